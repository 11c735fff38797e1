"""KV blocks from NPU to NPU over HCCL.

Two TCP links per pair of workers at most, one for each direction, carry the frames of
``wire``; the blocks go over a communicator of the two. This module knows links and
pairs; what happens to a transfer is in ``traffic``.

Everything that touches the device is a job for the engine's thread, see ``engine``.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ascend_vllm_plugin.backend import Backend, EngineDevice, HcclError
from ascend_vllm_plugin.device import container_id
from ascend_vllm_plugin.engine import OVERDUE_S, Engine
from ascend_vllm_plugin.jobs import Tools
from ascend_vllm_plugin.moves import Mover
from ascend_vllm_plugin.opening import open_backend, open_npu
from ascend_vllm_plugin.pairs import Local, Pair, Pairs
from ascend_vllm_plugin.settings import Settings, settings_from
from ascend_vllm_plugin.traffic import Outside, Traffic
from ascend_vllm_plugin.transfers import Buffers
from ascend_vllm_plugin.verdicts import Verdicts
from ascend_vllm_plugin.wire import (
    Abandoned,
    Address,
    AnyFrame,
    Declined,
    Go,
    Received,
    Vouch,
    Want,
    decode,
    encode,
    parse_address,
    why_not,
)
from vllm_pd.errors import PeerLostError, RemoteProtocolError, TransportUnavailableError
from vllm_pd.transport import inet
from vllm_pd.transport.base import KVRegion, TransferOutcome, TransportOptions
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction, Endpoint, LinkEvent, LinkPool
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

CHUNK_LEN = 16 * 1024 * 1024
"""Bytes of one Send, or of one block if it is longer; both sides must agree."""

NUM_BUFFERS = 4
"""Transfers that can move at the same time, for each direction."""

MAX_PAIRS = 16
"""Communicators of a worker at the same time: each takes twice its buffer of device memory."""

_WARM_LEN = 512
_NUM_SAID = 1024  # workers of whom it is known that it was said; a restarted one is another
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_Key = tuple[str, Direction]


class HcclTransport(HostTransport):
    """See the module and ``Transport``.

    Args:
        options: see there.
        open_device: finds the NPU that holds a KV cache.
        make_backend: loads HCCL.
    """

    name = "hccl"
    needs_pump = True

    def __init__(
        self,
        options: TransportOptions,
        *,
        open_device: Callable[[Sequence[KVRegion]], EngineDevice] = open_npu,
        make_backend: Callable[[Settings, str, str], Backend] = open_backend,
    ) -> None:
        if options.certificate is not None:
            raise TransportUnavailableError(
                "tls is on, and HCCL cannot encrypt: use transport tcp, or leave tls out"
            )
        self._settings = settings_from(os.environ, options.transfer_timeout_s)
        listener = inet.listen(options.host)
        super().__init__(LinkPool(self.name, listener, _connect, check_peer=inet.send_at_once))
        host, port = listener.getsockname()[:2]
        self._listens_at: tuple[str, int] = host, port
        self._options = options
        self._open_device = open_device
        self._make_backend = make_backend
        self._wake = Wakeup()
        self._links.watch(self._wake.fileno())
        self._worker = secrets.token_hex(8)
        self._address: Address | None = None
        self._engine: Engine | None = None
        self._device: EngineDevice | None = None
        self._peers: dict[str, Address] = {}
        self._pairs_by_key: dict[_Key, Pair] = {}
        self._outbox: deque[tuple[Pair, AnyFrame]] = deque()
        self._verdicts = Verdicts()
        self._refusal = ""
        self._said: dict[str, None] = {}  # workers, those of long ago first

    # Preparation

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        self._regions = tuple(regions)
        try:
            device = self._open_device(self._regions)
            backend = self._make_backend(self._settings, self._options.host, device.soc)
            self._mover = Mover(self._regions, device, self._settings, self._options, CHUNK_LEN)
            buffers = [
                device.allocate_device(self._mover.buffer_len) for _ in range(2 * NUM_BUFFERS)
            ]
            warm = device.allocate_device(_WARM_LEN)
            after = device.mark()
        except (HcclError, RuntimeError) as exc:
            raise TransportUnavailableError(f"hccl: {_first_line(exc)}") from exc
        limit_s = self._settings.exec_timeout_s
        engine = Engine(device, self._wake.set, limit_s=limit_s + OVERDUE_S)
        self._mode = backend.name
        self._traffic = Traffic(
            self._mover,
            engine,
            {
                Direction.SENDING: Buffers(buffers[:NUM_BUFFERS]),
                Direction.RECEIVING: Buffers(buffers[NUM_BUFFERS:]),
            },
            self._ledger,
            Outside(self._send_frame, self._post_frame, self._lose_pair, self._leave_pair),
        )
        self._pairs = Pairs(
            Local(self._worker, engine, Tools(backend, device, after, warm), limit_s),
            send=self._post_frame,
            on_up=self._traffic.advance,
            on_failed=self._give_pair_up,
        )
        self._address = Address(
            worker=self._worker,
            host=self._listens_at[0],
            port=self._listens_at[1],
            boot_id=_BOOT_ID.read_text().strip(),
            container=container_id(),
            device=device.host_index,
            soc=device.soc,
            backend=backend.name,
            settings=backend.settings,
            chunk_len=CHUNK_LEN,
        )
        self._device = device
        self._engine = engine  # last: from here on pump works

    @property
    def mode(self) -> tuple[str, str]:  # noqa: D102
        return self._mode, self._refusal

    def local_endpoint(self) -> bytes:  # noqa: D102
        assert self._address is not None
        return self._links.endpoint(msgspec.json.encode(self._address).decode())

    def can_reach(self, endpoint: bytes) -> bool:  # noqa: D102
        assert self._address is not None
        theirs = parse_address(self._links.parse_endpoint(endpoint).address)
        reason = why_not(self._address, theirs) or self._why_no_more()
        if not reason and self._verdicts.forbids(theirs):
            return False  # said when it happened
        if reason:
            self._refuse(theirs.worker, reason)
        return not reason

    def add_peer(self, peer_id: str, endpoint: bytes) -> None:  # noqa: D102
        theirs = parse_address(self._links.parse_endpoint(endpoint).address)
        super().add_peer(peer_id, endpoint)
        self._peers[peer_id] = theirs

    def remove_peer(self, peer_id: str) -> None:  # noqa: D102
        super().remove_peer(peer_id)
        self._peers.pop(peer_id, None)

    # Progress

    def poll(self) -> list[TransferOutcome]:  # noqa: D102
        outcomes = super().poll()
        self._wake.clear()
        self._advance_all()
        return outcomes + self._ledger.drain()

    def pump(self) -> bool:  # noqa: D102
        if self._engine is None:
            return False
        if time.monotonic() >= self._pairs.deadline:
            self._wake.set()
        return self._engine.pump()

    def close(self) -> None:  # noqa: D102
        super().close()
        if self._engine is None:
            self._wake.close()
            return
        self._pairs.close()
        for peer_id, direction in list(self._pairs_by_key):
            self._forget(peer_id, direction)
        self._engine.close()
        self._engine.take_done()
        self._ledger.fail_all(PeerLostError("the transport was closed"))
        self._wake.close()

    def _advance_all(self) -> None:
        """Send what the engine's thread has to say, and go on with what it has done."""
        while self._outbox:
            pair, frame = self._outbox.popleft()
            if not pair.is_over:
                self._links.send(pair.peer_id, pair.direction, encode(frame))
        if self._engine is not None:
            self._engine.take_done()
            self._pairs.expire(time.monotonic())

    def _send_frame(self, pair: Pair, frame: AnyFrame) -> None:
        self._links.send(pair.peer_id, pair.direction, encode(frame))

    def _post_frame(self, pair: Pair, frame: AnyFrame) -> None:
        """Send a frame soon; any thread may call this."""
        self._outbox.append((pair, frame))
        self._wake.set()

    # Links and pairs

    def _handle_link_up(self, peer_id: str) -> None:
        # A new link may be seen before the end of the old one, whose pair makes room for it.
        is_new = (peer_id, Direction.SENDING) not in self._pairs_by_key
        if is_new and (reason := self._why_no_more()):
            declined = encode(Declined(reason=reason))
            self._links.send(peer_id, Direction.SENDING, declined)
        else:
            self._begin_pair(peer_id, Direction.SENDING)

    def _begin_pair(self, peer_id: str, direction: Direction) -> Pair:
        self._forget(peer_id, direction)  # a new link may be seen before the end of the old one
        pair = self._pairs.begin(peer_id, direction, self._peers[peer_id])
        self._pairs_by_key[peer_id, direction] = pair
        self._traffic.open(pair)
        return pair

    def _why_no_more(self) -> str:
        """Say why this worker cannot have another pair; ``""`` if it can."""
        if self._traffic.is_exhausted:
            return "operations that never ended hold all buffers of a worker: restart that instance"
        if len(self._pairs_by_key) >= MAX_PAIRS:
            return f"a worker has {MAX_PAIRS} communicators already, which is all it may have"
        if self._device is not None and not self._device.has_streams:
            return "too many streams of a worker have failed: restart that instance"
        return ""

    def _give_pair_up(self, pair: Pair, reason: str, has_begun: bool) -> None:  # noqa: FBT001
        """Take note that HCCL cannot link two workers; what follows goes another way."""
        if has_begun:
            is_gone = pair.is_over
            reason = f"cannot be linked: {reason}"
            if self._verdicts.add(pair.address, blocked_s=pair.blocked_s, is_gone=is_gone):
                reason += f"; it took {pair.blocked_s:.0f} s, so its host is left alone for hours"
                self._give_place_up(pair, reason)
            self._refuse(pair.worker, reason)
        if not pair.is_over:
            self._lose_pair(pair, reason)

    def _lose_pair(self, pair: Pair, reason: str) -> None:
        self._lose(pair.peer_id, pair.direction, reason)

    def _leave_pair(self, pair: Pair, reason: str) -> None:
        """Take note that an operation with a peer never ended."""
        self._verdicts.add(pair.address)
        self._refuse(pair.worker, reason)

    def _give_place_up(self, failed: Pair, reason: str) -> None:
        """Let no other worker of a host be tried that waits for its turn."""
        for pair in list(self._pairs_by_key.values()):
            is_there = pair.address.place == failed.address.place
            if is_there and pair is not failed and pair.channel is None:
                self._lose_pair(pair, reason)

    def _refuse(self, worker: str, reason: str) -> None:
        self._refusal = reason
        if worker not in self._said:
            self._said[worker] = None
            if len(self._said) > _NUM_SAID:
                del self._said[next(iter(self._said))]
            logger.warning("hccl is not used with worker %s: %s", worker, reason)

    def _forget(self, peer_id: str, direction: Direction) -> None:
        pair = self._pairs_by_key.pop((peer_id, direction), None)
        if pair is None:
            return
        if pair.job is not None and pair.meeting.is_settled:
            self._verdicts.add(pair.address)
        self._traffic.close(pair)
        self._pairs.end(pair)

    # Transfers and frames

    def _start_sending(self, posted: Posted) -> None:
        pair = self._pairs_by_key.get((posted.peer_id, Direction.SENDING))
        if pair is not None:  # else the peer was declined, and goes
            self._traffic.post(posted, pair)

    def _start_receiving(self, posted: Posted) -> None:
        key = posted.peer_id, Direction.RECEIVING
        if key not in self._pairs_by_key:
            if reason := self._why_no_more():
                self._decline(posted.peer_id, reason)
                raise RemoteProtocolError(reason)
            self._begin_pair(*key)
        self._traffic.post(posted, self._pairs_by_key[key])

    def _decline(self, peer_id: str, reason: str) -> None:
        """Consumer: leave a worker to other transports, as one side has too many already."""
        peer = self._peers[peer_id]
        self._verdicts.add(peer)
        self._refuse(peer.worker, reason)

    def _handle_frame(self, event: LinkEvent, payload: bytes) -> None:
        frame = decode(payload)
        pair = self._pairs_by_key.get((event.peer_id, event.direction))
        if pair is None:
            raise RemoteProtocolError(f"{type(frame).__name__} on a link that is not set up")
        match frame:
            case Declined() if event.direction is Direction.RECEIVING:
                self._decline(event.peer_id, frame.reason)
                self._lose_pair(pair, frame.reason)
            case Declined():
                raise RemoteProtocolError("Declined from a consumer")
            case Want() | Go() | Vouch() | Received() | Abandoned():
                self._traffic.handle(pair, frame)
            case _:
                self._pairs.handle(pair, frame)


def _connect(endpoint: Endpoint) -> socket.socket:
    address = parse_address(endpoint.address)
    try:
        return inet.connect(address.host, address.port)
    except ValueError as exc:
        raise OSError(f"{address.host!r} port {address.port} is no address: {exc}") from exc


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [""])[0] or type(exc).__name__
