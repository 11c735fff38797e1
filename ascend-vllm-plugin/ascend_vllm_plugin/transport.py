"""KV blocks from NPU to NPU over HCCL.

Two TCP links per pair of workers at most, one for each direction, carry the frames of
``wire``; the blocks go over a communicator of the two. The consumer says Want when it
has a buffer; the producer gathers and sends through a buffer of its own and says Go;
then the consumer receives and scatters. A buffer of the receiving side is waited for
before one of the sending side, and a sending one is held only while both sides work:
so buffers are never waited for in a circle.

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
from ascend_vllm_plugin.engine import Engine, Job
from ascend_vllm_plugin.jobs import Tools
from ascend_vllm_plugin.moves import Mover
from ascend_vllm_plugin.opening import open_backend, open_npu
from ascend_vllm_plugin.pairs import Local, Pair, Pairs
from ascend_vllm_plugin.settings import Settings, settings_from
from ascend_vllm_plugin.transfers import Buffers, Transfer, view_of
from ascend_vllm_plugin.verdicts import Verdicts
from ascend_vllm_plugin.wire import (
    Abandoned,
    Address,
    AnyFrame,
    Begin,
    Coming,
    Go,
    Grant,
    Present,
    Received,
    Request,
    Retract,
    Retracted,
    Vouch,
    Want,
    decode,
    encode,
    parse_address,
    why_not,
)
from vllm_pd.errors import (
    DigestMismatchError,
    PeerLostError,
    RemoteProtocolError,
    TransferError,
    TransportUnavailableError,
)
from vllm_pd.transport import inet
from vllm_pd.transport.base import KVRegion, TransferOutcome, TransportOptions
from vllm_pd.transport.chunks import plan_chunks
from vllm_pd.transport.digests import digest_of
from vllm_pd.transport.host import HostTransport
from vllm_pd.transport.ledger import Posted
from vllm_pd.transport.links import Direction, Endpoint, LinkEvent, LinkPool
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

CHUNK_LEN = 16 * 1024 * 1024
"""Bytes of one Send, or of one block if it is longer; both sides must agree."""

NUM_BUFFERS = 4
"""Transfers that can move at the same time, for each direction."""

MAX_WANTED = 4096
_WARM_LEN = 512
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
        make_backend: Callable[[Settings, str], Backend] = open_backend,
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
        self._peers: dict[str, Address] = {}
        self._pairs_by_key: dict[_Key, Pair] = {}
        self._transfers: dict[_Key, deque[Transfer]] = {}
        self._wants: dict[str, dict[int, Want]] = {}
        self._outbox: deque[tuple[Pair, AnyFrame]] = deque()
        self._verdicts = Verdicts()
        self._refusal = ""
        self._said: set[str] = set()

    # Preparation

    def register_regions(self, regions: Sequence[KVRegion]) -> None:  # noqa: D102
        self._regions = tuple(regions)
        try:
            device = self._open_device(self._regions)
            backend = self._make_backend(self._settings, self._options.host)
            self._mover = Mover(self._regions, device, self._settings, self._options, CHUNK_LEN)
            buffers = [
                device.allocate_device(self._mover.buffer_len) for _ in range(2 * NUM_BUFFERS)
            ]
            warm = device.allocate_device(_WARM_LEN)
            after = device.mark()
        except (HcclError, RuntimeError) as exc:
            raise TransportUnavailableError(f"hccl: {_first_line(exc)}") from exc
        self._buffers = {
            Direction.SENDING: Buffers(buffers[:NUM_BUFFERS]),
            Direction.RECEIVING: Buffers(buffers[NUM_BUFFERS:]),
        }
        self._engine = Engine(device, self._wake.set)
        self._mode = backend.name
        self._pairs = Pairs(
            Local(self._worker, self._engine, Tools(backend, device, after, warm)),
            send=self._post_frame,
            on_up=self._use_pair,
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

    @property
    def mode(self) -> tuple[str, str]:  # noqa: D102
        return self._mode, self._refusal

    def local_endpoint(self) -> bytes:  # noqa: D102
        assert self._address is not None
        return self._links.endpoint(msgspec.json.encode(self._address).decode())

    def can_reach(self, endpoint: bytes) -> bool:  # noqa: D102
        assert self._address is not None
        theirs = parse_address(self._links.parse_endpoint(endpoint).address)
        reason = why_not(self._address, theirs)
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

    def pump(self) -> None:  # noqa: D102
        if self._engine is not None:
            self._engine.pump()

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

    def _post_frame(self, pair: Pair, frame: AnyFrame) -> None:
        """Send a frame soon; any thread may call this."""
        self._outbox.append((pair, frame))
        self._wake.set()

    # Links and pairs

    def _handle_link_up(self, peer_id: str) -> None:
        self._pair(peer_id, Direction.SENDING)

    def _pair(self, peer_id: str, direction: Direction) -> Pair:
        """Return the pair of a link; begin to set it up if it is new."""
        key = peer_id, direction
        if key not in self._pairs_by_key:
            self._transfers[key] = deque()
            address = self._peers[peer_id]
            self._pairs_by_key[key] = self._pairs.begin(peer_id, direction, address)
        return self._pairs_by_key[key]

    def _use_pair(self, pair: Pair) -> None:
        self._advance(pair)

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
            self._lose(pair.peer_id, pair.direction, reason)

    def _give_place_up(self, failed: Pair, reason: str) -> None:
        """Let no other worker of a host be tried that waits for its turn."""
        for pair in list(self._pairs_by_key.values()):
            is_there = pair.address.place == failed.address.place
            if is_there and pair is not failed and pair.channel is None:
                self._lose(pair.peer_id, pair.direction, reason)

    def _refuse(self, worker: str, reason: str) -> None:
        self._refusal = reason
        if worker not in self._said:
            self._said.add(worker)
            logger.warning("hccl is not used with worker %s: %s", worker, reason)

    def _forget(self, peer_id: str, direction: Direction) -> None:
        pair = self._pairs_by_key.pop((peer_id, direction), None)
        if direction is Direction.SENDING:
            self._wants.pop(peer_id, None)
        if pair is None:
            return
        if pair.job is not None and pair.meeting.is_settled:
            self._verdicts.add(pair.address)
        for transfer in self._transfers.pop((peer_id, direction)):
            self._drop(transfer)
        self._pairs.end(pair)

    def _drop(self, transfer: Transfer) -> None:
        """Stop a transfer that has failed; what the device does for it ends first."""
        assert self._engine is not None
        job = transfer.job
        if job is None:
            self._give_back(transfer)
        elif self._engine.withdraw(job):
            transfer.posted.is_busy = False
            if not job.must_run:
                transfer.job = None
                self._give_back(transfer)

    # Transfers

    def _start_sending(self, posted: Posted) -> None:
        self._enqueue(posted)

    def _start_receiving(self, posted: Posted) -> None:
        self._enqueue(posted)

    def _enqueue(self, posted: Posted) -> None:
        pair = self._pair(posted.peer_id, posted.direction)
        num_blocks = len(posted.block_ids)
        chunks = plan_chunks(self._regions, posted.heads, num_blocks, max_len=CHUNK_LEN)
        self._transfers[posted.peer_id, posted.direction].append(Transfer(posted, pair, chunks))
        self._advance(pair)

    def _advance(self, pair: Pair) -> None:
        """Begin what can begin: there is a communicator, and there is a buffer."""
        if pair.channel is None or pair.is_over:
            return
        for transfer in list(self._transfers[pair.peer_id, pair.direction]):
            if transfer.posted.error is not None:  # an earlier one has lost the peer
                return
            if pair.direction is Direction.RECEIVING:
                self._ask(transfer)
            else:
                self._answer(transfer)

    def _ask(self, transfer: Transfer) -> None:
        """Consumer: say that the transfer can come."""
        if transfer.is_asked or not self._take_buffer(transfer):
            return
        posted = transfer.posted
        transfer.is_asked = True
        want = Want(
            transfer_id=posted.transfer_id,
            num_blocks=len(posted.block_ids),
            num_bytes=posted.num_bytes,
        )
        self._send_frame(transfer.pair, want)

    def _answer(self, transfer: Transfer) -> None:
        """Producer: send what the consumer wants."""
        posted, pair = transfer.posted, transfer.pair
        wants = self._wants.get(posted.peer_id, {})
        if transfer.buffer is not None or transfer.is_moved or posted.transfer_id not in wants:
            return
        want = wants[posted.transfer_id]
        if (want.num_blocks, want.num_bytes) != (len(posted.block_ids), posted.num_bytes):
            self._lose(
                posted.peer_id,
                posted.direction,
                f"{want.num_blocks} blocks of {want.num_bytes} bytes in all wanted, "
                f"{len(posted.block_ids)} of {posted.num_bytes} posted",
            )
            return
        if not self._take_buffer(transfer):
            return
        del wants[posted.transfer_id]
        go = self._mover.vouch(transfer)
        job = self._mover.send_job(
            transfer,
            on_done=lambda error: self._end_job(transfer, error),
            on_issued=lambda: self._post_frame(pair, go),
        )
        self._put(transfer, job)

    def _receive(self, transfer: Transfer, go: Go) -> None:
        """Consumer: the sending is issued, so receive it whatever happens here."""
        if not transfer.is_asked or transfer.job is not None or transfer.is_moved:
            raise RemoteProtocolError(f"Go of transfer {go.transfer_id}")
        self._mover.take_go(transfer, go)
        job = self._mover.recv_job(transfer, on_done=lambda error: self._end_job(transfer, error))
        self._put(transfer, job)

    def _put(self, transfer: Transfer, job: Job) -> None:
        assert self._engine is not None
        transfer.job, transfer.posted.is_busy = job, True
        self._engine.put(job)

    def _end_job(self, transfer: Transfer, error: str | None) -> None:
        """Go on after the engine's thread has done something for a transfer."""
        posted = transfer.posted
        try:
            self._go_on(transfer, error)
        except Exception as exc:
            # As in HostTransport.poll: a bug, or memory that is not to be had, costs one peer.
            logger.exception("hccl: transfer %d of %s", posted.transfer_id, posted.peer_id)
            self._lose(posted.peer_id, posted.direction, f"internal error: {exc!r}")
            self._ledger.end(posted)

    def _go_on(self, transfer: Transfer, error: str | None) -> None:
        posted = transfer.posted
        transfer.job, posted.is_busy = None, False
        transfer.is_moved = True
        if error is not None and posted.error is None:
            self._lose(posted.peer_id, posted.direction, error)
        if posted.error is not None:
            self._give_back(transfer)
            self._ledger.end(posted)
            return
        if transfer.host is not None:
            self._hash(transfer)
        job = self._mover.sample_job(transfer, on_done=lambda error: self._end_job(transfer, error))
        if job is not None:
            self._put(transfer, job)
            return
        self._give_back(transfer)
        if posted.direction is Direction.RECEIVING:
            self._finish_receiving(transfer)
        elif transfer.is_received:
            self._end(transfer, None)

    def _hash(self, transfer: Transfer) -> None:
        """Hash the portion that has come to the host; a producer vouches for it."""
        posted = transfer.posted
        started = time.monotonic()
        host, transfer.host = transfer.host, None
        assert host is not None
        transfer.digests.append(digest_of([view_of(host)]))
        posted.verify_s += time.monotonic() - started
        if posted.direction is Direction.SENDING:
            vouch = Vouch(
                transfer_id=posted.transfer_id,
                portion=len(transfer.digests) - 1,
                digest=transfer.digests[-1],
            )
            self._send_frame(transfer.pair, vouch)

    def _take_vouch(self, transfer: Transfer, vouch: Vouch) -> None:
        """Consumer: keep a digest of the producer's."""
        if vouch.portion != len(transfer.vouched) or vouch.portion >= len(transfer.portions):
            raise RemoteProtocolError(f"digest of portion {vouch.portion}")
        transfer.vouched[vouch.portion] = vouch.digest
        self._finish_receiving(transfer)

    def _finish_receiving(self, transfer: Transfer) -> None:
        """Consumer: compare, once everything is here and vouched for."""
        posted = transfer.posted
        if not transfer.is_hashed or len(transfer.vouched) < len(transfer.portions):
            return
        error: TransferError | None = None
        name = f"transfer {posted.transfer_id}"
        if any(transfer.vouched[i] != digest for i, digest in enumerate(transfer.digests)):
            error = DigestMismatchError(f"{name}: the bytes received are not those sent")
        elif not transfer.is_covered:
            error = DigestMismatchError(
                f"{name}: the producer vouches for less than {posted.digests.value}"
            )
        if error is None:
            self._send_frame(transfer.pair, Received(transfer_id=posted.transfer_id))
        else:
            abandoned = Abandoned(transfer_id=posted.transfer_id, reason=str(error))
            self._send_frame(transfer.pair, abandoned)
        self._end(transfer, error)

    def _end(self, transfer: Transfer, error: TransferError | None) -> None:
        self._ledger.end(transfer.posted, error)
        queue = self._transfers.get((transfer.posted.peer_id, transfer.posted.direction))
        if queue is not None and transfer in queue:
            queue.remove(transfer)

    # Buffers

    def _take_buffer(self, transfer: Transfer) -> bool:
        if transfer.buffer is None:
            transfer.buffer = self._buffers[transfer.posted.direction].take()
        return transfer.buffer is not None

    def _give_back(self, transfer: Transfer) -> None:
        """Give a transfer's buffer to whoever waits for one."""
        if transfer.buffer is None:
            return
        direction = transfer.posted.direction
        self._buffers[direction].give(transfer.buffer)
        transfer.buffer = None
        for (_, its_direction), pair in list(self._pairs_by_key.items()):
            if its_direction is direction:
                self._advance(pair)

    # Frames

    def _send_frame(self, pair: Pair, frame: AnyFrame) -> None:
        self._links.send(pair.peer_id, pair.direction, encode(frame))

    def _handle_frame(self, event: LinkEvent, payload: bytes) -> None:
        frame = decode(payload)
        pair = self._pairs_by_key.get((event.peer_id, event.direction))
        if pair is None:
            raise RemoteProtocolError(f"{type(frame).__name__} on a link that is not set up")
        match frame, event.direction:
            case (
                Request() | Grant() | Present() | Retract() | Retracted() | Begin() | Coming(),
                _,
            ):
                self._pairs.handle(pair, frame)
            case Want(), Direction.SENDING:
                wants = self._wants.setdefault(event.peer_id, {})
                if len(wants) >= MAX_WANTED:
                    raise RemoteProtocolError(f"{MAX_WANTED} transfers wanted at once")
                wants[frame.transfer_id] = frame
                self._advance(pair)
            case Go(), Direction.RECEIVING:
                self._receive(self._transfer(event, frame.transfer_id), frame)
            case Vouch(), Direction.RECEIVING:
                self._take_vouch(self._transfer(event, frame.transfer_id), frame)
            case ((Received() | Abandoned()), Direction.SENDING):
                self._take_receipt(event, frame)
            case other, _:
                raise RemoteProtocolError(f"{type(other).__name__} on a {event.direction} link")

    def _transfer(self, event: LinkEvent, transfer_id: int) -> Transfer:
        for transfer in self._transfers[event.peer_id, event.direction]:
            if transfer.posted.transfer_id == transfer_id:
                return transfer
        raise RemoteProtocolError(f"unknown transfer {transfer_id}")

    def _take_receipt(self, event: LinkEvent, frame: Received | Abandoned) -> None:
        """Producer: the consumer has got everything, or gives up."""
        transfer = self._transfer(event, frame.transfer_id)
        if transfer.job is None and not transfer.is_moved:
            raise RemoteProtocolError(f"receipt of transfer {frame.transfer_id}")
        if isinstance(frame, Abandoned):
            self._drop(transfer)
            self._end(transfer, TransferError(f"given up: {frame.reason}"))
        elif transfer.job is None:
            self._end(transfer, None)
        else:
            transfer.is_received = True


def _connect(endpoint: Endpoint) -> socket.socket:
    address = parse_address(endpoint.address)
    try:
        return inet.connect(address.host, address.port)
    except ValueError as exc:
        raise OSError(f"{address.host!r} port {address.port} is no address: {exc}") from exc


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [""])[0] or type(exc).__name__
