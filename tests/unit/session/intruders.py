"""Peers that say what they like, on real sockets."""

from __future__ import annotations

import contextlib
import itertools
import random
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import zmq

from tests.unit.session.test_manager import LAYOUT, ONE_HEAD, Engine, fetch_request
from vllm_pd.config import Digests
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.protocol.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Describe,
    Drain,
    FetchBlocks,
    FetchFailed,
    FetchFailure,
    FetchReady,
    GetOutstanding,
    GetStats,
    Goodbye,
    Hello,
    InstanceInfo,
    Refused,
    Release,
    Renew,
    Stats,
    WorkerAddress,
    decode,
    encode,
)
from vllm_pd.session.keys import load_cluster_key
from vllm_pd.session.producer import Grant
from vllm_pd.session.stats import SessionStats
from vllm_pd.transport.links import Endpoint

TIMEOUT_S = 20.0
ENGINE_ID = "intruder"
_numbers = itertools.count()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.002)


def check_service(producer: Engine, consumer: Engine) -> None:
    """A normal fetch works: its bytes are right, and its blocks are freed once."""
    transfer_id = f"check-{next(_numbers)}"
    producer.manager.grant(Grant(transfer_id, f"prefill-{transfer_id}", (6, 2, 3)))
    consumer.manager.fetch(fetch_request(producer, transfer_id, block_offset=1))
    assert consumer.wait_fetched().error is None
    for region in range(2):
        assert consumer.worker.block(region, 1) == producer.worker.block(region, 2)
        assert consumer.worker.block(region, 5) == producer.worker.block(region, 3)
    assert producer.wait(lambda r: bool(r.freed)).freed == [f"prefill-{transfer_id}"]


class Counts:
    """Adds up what a worker counts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.num_granted = 0
        self.last = SessionStats()

    def update(self) -> Self:
        if stats := self._engine.manager.take_stats():
            self.dropped += stats.num_dropped_frames
            self.refused += stats.num_handshake_failures
            self.ended += stats.num_leases_ended
            self.outcomes += Counter(fetch.outcome.value for fetch in stats.fetches)
            self.num_granted += stats.num_leases_granted
            self.last = stats
        return self

    def check_accounts(self) -> None:
        """Every lease has ended once, and no block is held."""
        wait_until(lambda: self.update().num_granted == self.ended.total(), "all leases ended")
        assert (self.last.num_leases, self.last.num_blocks_held) == (0, 0)


class Intruder:
    """Speaks to a control endpoint.

    Args:
        port: of the endpoint.
        key_file: the cluster key it uses; None: plaintext.
    """

    def __init__(self, port: int, *, key_file: Path | None = None) -> None:
        self._context = zmq.Context()
        self._sock: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._sock.linger = 0
        self._sock.sndtimeo = self._sock.rcvtimeo = int(TIMEOUT_S * 1000)
        self.session_id = b"\x01" + secrets.token_bytes(15)
        self._sock.routing_id = self.session_id
        if key_file is not None:
            key = load_cluster_key(key_file)
            self._sock.curve_serverkey = key.public
            self._sock.curve_publickey, self._sock.curve_secretkey = key.public, key.secret
        self._sock.connect(f"tcp://127.0.0.1:{port}")

    def send(self, *frames: bytes) -> None:
        self._sock.send_multipart(frames)

    def say(self, message: AnyMessage) -> None:
        self.send(encode(message))

    def hear(self) -> AnyMessage:
        return decode(self._sock.recv())

    def greet(self, engine: Engine, **changes: Any) -> AnyMessage:
        """Say Hello as a worker of another engine would, and return the answer."""
        self.say(hello(engine, **changes))
        return self.hear()

    def close(self) -> None:
        self._sock.close()
        self._context.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hello(engine: Engine, **changes: Any) -> Hello:
    """Return a greeting that ``engine`` could send, under another name."""
    transport = engine.worker.transport
    greeting = Hello(
        protocol_version=PROTOCOL_VERSION,
        engine_id=ENGINE_ID,
        tp_rank=0,
        tp_size=1,
        fingerprint=ONE_HEAD,
        layout=LAYOUT,
        endpoints={transport.name: transport.local_endpoint()},
    )
    return msgspec.structs.replace(greeting, **changes)


def fetch_blocks(engine: Engine, transfer_id: str = "t1", **changes: Any) -> FetchBlocks:
    fetch = FetchBlocks(
        fetch_id=1,
        transfer_id=transfer_id,
        transport=engine.worker.transport.name,
        block_offset=0,
        num_blocks=2,
        first_head=0,
        num_heads=1,
        num_readers=1,
        digests=Digests.ALWAYS,
        timeout_s=5.0,
    )
    return msgspec.structs.replace(fetch, **changes)


def endpoint_counters(engine: Engine) -> dict[str, float]:
    """Return what the instance endpoint counts."""
    with Intruder(engine.endpoint.port) as asker:
        asker.say(GetStats())
        answer = asker.hear()
        assert isinstance(answer, Stats)
        return answer.counters


def some_of_all_messages(engine: Engine) -> list[AnyMessage]:
    """Return messages of every type, most of them wrong where they are sent to."""
    info = InstanceInfo(
        protocol_version=PROTOCOL_VERSION,
        engine_id=ENGINE_ID,
        tp_size=1,
        workers=(WorkerAddress(tp_rank=0, host="127.0.0.1", port=1),),
        fingerprint=ONE_HEAD,
        num_leases=0,
        lease_s=1.0,
    )
    return [
        Describe(),
        info,
        Release(transfer_id="nothing"),
        Renew(transfer_ids=("t1", "nothing")),
        Drain(on=False),
        GetOutstanding(),
        GetStats(),
        Stats(counters={"a": 1.0}),
        hello(engine),
        Refused(reason="no"),
        fetch_blocks(engine),
        fetch_blocks(engine, "nothing", fetch_id=2),
        FetchReady(fetch_id=1),
        FetchFailed(fetch_id=1, failure=FetchFailure.TRANSPORT, detail=""),
        Goodbye(),
    ]


def noise(rng: random.Random, valid: list[bytes], count: int) -> Iterator[bytes]:
    """Yield frames: random bytes, valid ones, and valid ones with mistakes."""
    for _ in range(count):
        frame = bytearray(rng.choice(valid))
        match rng.randrange(6):
            case 0:
                frame = bytearray(rng.randbytes(rng.randrange(200)))
            case 1:
                frame = frame[: rng.randrange(len(frame))]
            case 2 | 3:
                for _ in range(rng.randrange(1, 4)):
                    frame[rng.randrange(len(frame))] = rng.randrange(256)
            case 4:
                place = rng.randrange(len(frame))
                frame[place:place] = rng.randbytes(rng.randrange(1, 9))
            case _:
                pass
        yield bytes(frame)


def is_message(frame: bytes) -> bool:
    try:
        decode(frame)
    except RemoteProtocolError:
        return False
    return True


# Data links


def endpoint_of(engine: Engine) -> Endpoint:
    return msgspec.msgpack.decode(engine.worker.transport.local_endpoint(), type=Endpoint)


def dial(endpoint: Endpoint) -> socket.socket:
    """Connect to the data port of a worker."""
    if endpoint.scheme == "shm":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT_S)
        sock.connect(f"\0{endpoint.address}")
        return sock
    host, port, _ = endpoint.address.split("|")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def framed(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


def greeting(endpoint: Endpoint, peer_id: str) -> bytes:
    fields = {"peer_id": peer_id, "token": endpoint.token, "stream": 0, "num_streams": 1}
    return framed(msgspec.msgpack.encode(fields))


DATA_FRAMES: list[dict[str, Any]] = [
    {"type": "copied", "transfer_id": 1},
    {"type": "abandoned", "transfer_id": 1, "reason": "no"},
    {"type": "confirmed", "transfer_id": 1},
    {"type": "received", "transfer_id": 1},
    {"type": "data", "transfer_id": 1, "chunk": 0, "num_bytes": 10, "digest": b""},
    {"type": "data", "transfer_id": 1, "chunk": -1, "num_bytes": 1 << 62, "digest": b"x"},
    {"type": "memory", "spans": [], "regions": []},
    {"type": "memory", "spans": [[4096, 1 << 40]], "regions": [[0, 1 << 50, 12288, 1, 1]]},
    {
        "type": "memory",
        "spans": [],
        "regions": [
            {"addr": 8, "num_blocks": 8, "block_len": 3 * 4096, "num_rows": 1, "num_heads": 1},
            {"addr": 8, "num_blocks": 8, "block_len": 1000, "num_rows": 1, "num_heads": 1},
        ],
    },
    {
        "type": "ready",
        "transfer_id": 1,
        "block_ids": [0, 1 << 40],
        "heads": None,
        "inline": [],
        "digests": [[-1, b""]],
        "is_complete": True,
    },
]
"""Frames of both transports, for links where most of them have no place."""


class FakeProducer:
    """An instance that answers a consumer with whatever a test wants.

    Args:
        victim: the consumer that will be told of it.
    """

    def __init__(self, victim: Engine) -> None:
        self._victim = victim
        self._context = zmq.Context()
        self._sock = self._bind()
        theirs = endpoint_of(victim)
        if theirs.scheme == "shm":
            name = f"intruder-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"\0{name}")
            self._listener.listen(64)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            name = f"127.0.0.1|{self._listener.getsockname()[1]}|plain"
        self._listener.settimeout(0.0)
        self._connections: list[socket.socket] = []
        self.endpoint = msgspec.msgpack.encode(msgspec.structs.replace(theirs, address=name))

    def _bind(self) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        sock.linger = 0
        self.port = sock.bind_to_random_port("tcp://127.0.0.1")
        return sock

    def info(self) -> InstanceInfo:
        """Return the description that leads a consumer here."""
        return InstanceInfo(
            protocol_version=PROTOCOL_VERSION,
            engine_id=ENGINE_ID,
            tp_size=1,
            workers=(WorkerAddress(tp_rank=0, host="127.0.0.1", port=self.port),),
            fingerprint=ONE_HEAD,
            num_leases=1,
            lease_s=1.0,
        )

    def hello(self) -> Hello:
        scheme = endpoint_of(self._victim).scheme
        return hello(self._victim, endpoints={scheme: self.endpoint})

    def answer(self, message: AnyMessage) -> AnyMessage | bytes | None:
        """Return what a producer would answer."""
        match message:
            case Describe():
                return self.info()
            case Hello():
                return self.hello()
            case FetchBlocks():
                return FetchReady(fetch_id=message.fetch_id)
            case _:
                return None

    def step(self, answer: Callable[[AnyMessage], AnyMessage | bytes | None], data: bytes) -> None:
        """Answer what is there, and send ``data`` over every data link that comes."""
        while self._sock.poll(1):
            identity, payload = self._sock.recv_multipart()
            reply = answer(decode(payload))
            if reply is not None:
                frame = reply if isinstance(reply, bytes) else encode(reply)
                self._sock.send_multipart([identity, frame])
        try:
            connection = self._listener.accept()[0]
        except BlockingIOError:
            return
        self._connections.append(connection)
        with contextlib.suppress(OSError):  # it only looked whether somebody is here
            connection.sendall(data)

    def leave(self) -> None:
        """Close all connections, and come back at another port."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._sock.close()
        self._sock = self._bind()

    def close(self) -> None:
        self.leave()
        self._listener.close()
        self._sock.close()
        self._context.destroy()
