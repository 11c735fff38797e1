"""Shared memory against peers that lie, die or are elsewhere."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from tests.transport_conformance import (
    NUM_BLOCKS,
    SESSION,
    SHAPES,
    Arena,
    Worker,
    drive,
    introduce,
    make_worker,
    outcomes_of,
)
from tests.unit.transport.liars import (
    LyingProducer,
    connect_as_consumer,
    framed,
    poll_until_outcome,
)
from vllm_pd.config import Digests
from vllm_pd.errors import DigestMismatchError, PeerLostError
from vllm_pd.transport import memory
from vllm_pd.transport.base import KVRegion, TransportOptions
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.shm_frames import (
    Abandoned,
    AnyFrame,
    Confirmed,
    Copied,
    Memory,
    Ready,
    RegionInfo,
    Vouched,
)

REPOSITORY = Path(__file__).parents[3]


def num_mappings(*, writable: bool) -> int:
    """Return how often memory of a KV cache is mapped in this process."""
    mode = "rw-s" if writable else "r--s"
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:vllm-pd-kv" in line and line.split()[1] == mode for line in lines)


@pytest.fixture
def make() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(name: str, options: TransportOptions | None = None) -> Worker:
        workers.append(make_worker(name, ShmTransport(options or TransportOptions())))
        return workers[-1]

    yield make
    for worker in workers:
        worker.transport.close()


def test_memory_that_may_not_be_locked_is_shared_all_the_same(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(memory, "lock_pages", refuse)
    with caplog.at_level(logging.INFO):
        worker = make("decode")
    assert worker.transport.mode == ("memfd", "")
    assert "locked into memory: Operation not permitted" in caplog.text


@pytest.fixture
def consumer(make: Callable[..., Worker]) -> Worker:
    return make("decode")


# Losing a peer while it is read


class Gate:
    """Holds the copier thread after its copy; see ``TransportOptions.on_received``."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.may_pass = threading.Event()

    def __call__(self, _: memoryview) -> None:
        self.is_reached.set()
        assert self.may_pass.wait(60)


def test_lost_transfer_ends_when_its_copy_does_and_only_then_the_pages_are_unmapped(
    make: Callable[..., Worker],
) -> None:
    gate = Gate()
    producer, consumer = make("p0"), make("decode", TransportOptions(on_received=gate))
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0, 1])
    consumer.transport.recv_blocks(SESSION, 1, [2, 3])
    drive(producer, consumer, until=gate.is_reached.is_set)
    num_before = num_mappings(writable=False)
    assert num_before == 1

    consumer.transport.remove_peer(SESSION)
    assert consumer.transport.poll() == []
    assert num_mappings(writable=False) == num_before

    gate.may_pass.set()
    outcome = poll_until_outcome(consumer)
    assert isinstance(outcome.error, PeerLostError)
    assert num_mappings(writable=False) == 0
    assert isinstance(poll_until_outcome(producer).error, PeerLostError)


def test_close_waits_for_copies(make: Callable[..., Worker]) -> None:
    gate = Gate()
    producer, consumer = make("p0"), make("decode", TransportOptions(on_received=gate))
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0, 1])
    consumer.transport.recv_blocks(SESSION, 1, [2, 3])
    drive(producer, consumer, until=gate.is_reached.is_set)
    closing = threading.Thread(target=consumer.transport.close)
    closing.start()
    gate.may_pass.set()
    closing.join(60)
    (outcome,) = consumer.transport.poll()
    assert isinstance(outcome.error, PeerLostError)
    assert num_mappings(writable=False) == 0


def test_every_transfer_ends_once_though_its_digests_are_being_computed(
    make: Callable[..., Worker],
) -> None:
    producer, consumer = make("p0"), make("decode")
    introduce(producer, consumer)
    ended: dict[str, list[int]] = {producer.name: [], consumer.name: []}

    def is_over(worker: Worker) -> bool:
        ended[worker.name] += [outcome.transfer_id for outcome in worker.transport.poll()]
        return len(ended[worker.name]) >= 20

    for transfer_id in range(20):
        producer.transport.send_blocks(SESSION, transfer_id, [0, 1], digests=Digests.ALWAYS)
        consumer.transport.recv_blocks(SESSION, transfer_id, [2, 3])
        is_over(producer)
        is_over(consumer)
    for worker in (producer, consumer):
        worker.transport.remove_peer(SESSION)
        drive(until=partial(is_over, worker))
        is_over(worker)
    assert ended == {producer.name: list(range(20)), consumer.name: list(range(20))}


def test_nothing_of_a_peer_is_left_when_it_is_gone(make: Callable[..., Worker]) -> None:
    producer, consumer = make("p0"), make("decode")
    num_fds = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        introduce(producer, consumer)
        producer.transport.send_blocks(SESSION, number, [0])
        consumer.transport.recv_blocks(SESSION, number, [1])
        outcomes_of(producer, consumer)
        consumer.transport.remove_peer(SESSION)
        producer.transport.remove_peer(SESSION)
    assert len(os.listdir("/proc/self/fd")) == num_fds
    assert num_mappings(writable=False) == 0


# Where the KV cache lies


def scattered(name: str, count: int) -> Worker:
    """Make a worker whose regions lie apart, a page and a bit each."""
    step = 3 * memory.PAGE_LEN
    arena = Arena(count * step)
    regions = [KVRegion(f"layer.{i}", arena.addr + i * step, 2, 4096) for i in range(count)]
    worker = Worker(name, ShmTransport(TransportOptions()), arena, regions)
    for region in range(count):
        for block_id in range(2):
            worker.fill(region, block_id, value=100 * region + block_id + len(name))
    worker.transport.register_regions(regions)
    return worker


@pytest.mark.parametrize(
    ("count", "mode"), [(100, "memfd"), (253, "memfd"), (254, "process_vm_readv")]
)
def test_every_region_may_be_an_allocation_of_its_own(count: int, mode: str) -> None:
    producer, consumer = scattered("p0", count), scattered("decode", count)
    assert producer.transport.mode[0] == mode
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [1, 0], digests=Digests.ALWAYS)
    consumer.transport.recv_blocks(SESSION, 1, [0, 1])
    seen = outcomes_of(producer, consumer)
    assert [outcomes[0].error for outcomes in seen.values()] == [None, None]
    for region in range(count):
        assert consumer.block(region, 0) == producer.block(region, 1)
        assert consumer.block(region, 1) == producer.block(region, 0)
    producer.transport.close()
    consumer.transport.close()


# Producers that lie


def announced(worker: Worker, **changes: object) -> Memory:
    """Return what a producer with the worker's memory would announce, but for some changes."""
    regions = tuple(
        RegionInfo(r.addr, r.num_blocks, r.block_len, r.num_rows, r.num_heads)
        for r in worker.regions
    )
    return msgspec.structs.replace(Memory(spans=(), regions=regions), **changes)


READY = Ready(transfer_id=1, block_ids=(0,), heads=None, inline=(), vouched=(), is_complete=False)


def changed(index: int = 0, **changes: int) -> Callable[[Worker], AnyFrame]:
    def make(worker: Worker) -> AnyFrame:
        regions = list(announced(worker).regions)
        regions[index] = msgspec.structs.replace(regions[index], **changes)
        return announced(worker, regions=tuple(regions))

    return make


LAYOUTS: dict[str, Callable[[Worker], AnyFrame]] = {
    "fewer regions": lambda w: announced(w, regions=announced(w).regions[:1]),
    "more regions": lambda w: announced(w, regions=announced(w).regions * 2),
    "no regions": lambda w: announced(w, regions=()),
    "other rows": changed(num_rows=2),
    "other blocks": changed(1, block_len=1001),
    "no heads": changed(num_heads=0, block_len=0),
    "no blocks": changed(num_blocks=0),
    "memory that is not there": changed(addr=8),
    "spans without descriptors": lambda w: announced(w, spans=((4096, 4096),)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_peer_that_claims_another_layout_is_lost_and_others_are_not(
    make: Callable[..., Worker], consumer: Worker, layout: Callable[[Worker], AnyFrame]
) -> None:
    before = consumer.content()
    with LyingProducer(consumer, socket.AF_UNIX, "liar") as liar:
        consumer.transport.recv_blocks("liar", 1, [1])
        liar.accept()
        liar.send(layout(consumer))
        outcome = poll_until_outcome(consumer)
    assert isinstance(outcome.error, PeerLostError)
    assert consumer.content() == before
    producer = make("p0")
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [3])
    consumer.transport.recv_blocks(SESSION, 1, [4])
    assert outcomes_of(consumer, producer)[consumer.name][0].error is None


ANNOUNCEMENTS: dict[str, list[AnyFrame]] = {
    "blocks beyond": [msgspec.structs.replace(READY, block_ids=(NUM_BLOCKS,))],
    "blocks before": [msgspec.structs.replace(READY, block_ids=(-1,))],
    "more blocks": [msgspec.structs.replace(READY, block_ids=(0, 1))],
    "heads beyond": [msgspec.structs.replace(READY, heads=(1, 1))],
    "no heads": [msgspec.structs.replace(READY, heads=(0, 0))],
    "digest of nothing": [msgspec.structs.replace(READY, vouched=((9, 0, 1),))],
    "confirmed before": [Confirmed(transfer_id=1)],
    "confirmed another": [READY, Confirmed(transfer_id=2)],
    "copied": [Copied(transfer_id=1)],
    "abandoned": [Abandoned(transfer_id=1, reason="why not")],
}


@pytest.mark.parametrize("frames", ANNOUNCEMENTS.values(), ids=ANNOUNCEMENTS)
def test_announcement_that_does_not_fit_loses_the_peer(
    consumer: Worker, frames: list[AnyFrame]
) -> None:
    before = consumer.content()
    with LyingProducer(consumer, socket.AF_UNIX) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        liar.accept()
        liar.send(announced(consumer))
        for frame in frames:
            liar.send(frame)
        outcome = poll_until_outcome(consumer)
    assert isinstance(outcome.error, PeerLostError)
    if READY not in frames:
        assert consumer.content() == before


@pytest.mark.parametrize(
    "frames", [[READY], [Confirmed(transfer_id=1)], ["nonsense"], [{"type": "unknown"}], [b"\xc1"]]
)
def test_peer_that_does_not_begin_with_its_memory_is_lost(
    consumer: Worker, frames: list[object]
) -> None:
    with LyingProducer(consumer, socket.AF_UNIX) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        liar.accept()
        for frame in frames:
            liar.send(frame)
        assert isinstance(poll_until_outcome(consumer).error, PeerLostError)


def test_memory_is_announced_once(consumer: Worker) -> None:
    with LyingProducer(consumer, socket.AF_UNIX) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        liar.accept()
        liar.send(announced(consumer))
        liar.send(announced(consumer))
        assert "twice" in str(poll_until_outcome(consumer).error)


def test_transfer_is_announced_once(consumer: Worker) -> None:
    with LyingProducer(consumer, socket.AF_UNIX) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        liar.accept()
        liar.send(announced(consumer))
        for _ in range(2):
            liar.send(msgspec.structs.replace(READY, vouched=((0, 0, 1),)))
        assert "twice" in str(poll_until_outcome(consumer).error)


def test_digests_that_were_not_announced_are_a_mismatch(make: Callable[..., Worker]) -> None:
    gate = Gate()
    consumer = make("decode", TransportOptions(on_received=gate))
    with LyingProducer(consumer, socket.AF_UNIX) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        liar.accept()
        liar.send(announced(consumer))
        liar.send(READY)
        drive(consumer, until=gate.is_reached.is_set)
        liar.send(Vouched(transfer_id=1, digests=(b"x" * 16,)))
        drive(consumer, until=lambda: True)
        gate.may_pass.set()
        assert isinstance(poll_until_outcome(consumer).error, DigestMismatchError)


def file_of(content: bytes, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize("is_sealed", [True, False])
def test_file_that_could_shrink_is_never_mapped(consumer: Worker, is_sealed: bool) -> None:
    """Whoever reads a mapping of a file that shrinks is killed; the kernel's copy only fails."""
    region = consumer.regions[0]
    addr, num_bytes = memory.page_interior(region.addr, region.num_blocks * region.block_len)
    content = bytes(memory.view(addr, num_bytes))
    fd = file_of(content, fcntl.F_SEAL_SHRINK if is_sealed else 0)
    with LyingProducer(consumer, socket.AF_UNIX) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        liar.accept()
        liar.send(announced(consumer, spans=((addr, num_bytes),)), fds=[fd])
        # The second region is not in the file: the peer must have sent it along.
        liar.send(msgspec.structs.replace(READY, block_ids=(3,)))
        if is_sealed:
            outcome = poll_until_outcome(consumer)
            assert "bytes of a block are readable" in str(outcome.error)
        else:
            os.ftruncate(fd, 0)
            liar_sees = liar.socks[0]
            liar_sees.recv(1 << 16)  # the greeting
            drive(consumer, until=lambda: consumer.block(0, 1) == consumer.block(0, 3))
            assert num_mappings(writable=False) == 0
    os.close(fd)


def test_descriptor_that_is_no_memory_is_closed(consumer: Worker) -> None:
    num_fds = len(os.listdir("/proc/self/fd"))
    with LyingProducer(consumer, socket.AF_UNIX) as liar:
        consumer.transport.recv_blocks(SESSION, 1, [1])
        liar.accept()
        reader, writer = os.pipe()
        message = announced(consumer, spans=((4096, 4096),), regions=())
        liar.send(message, fds=[reader])
        assert isinstance(poll_until_outcome(consumer).error, PeerLostError)
        os.close(reader)
        os.close(writer)
    assert len(os.listdir("/proc/self/fd")) == num_fds


# Consumers that lie


@pytest.mark.parametrize(
    "frame",
    [
        Copied(transfer_id=7),
        Abandoned(transfer_id=7, reason="?"),
        Confirmed(transfer_id=1),
        READY,
        Vouched(transfer_id=1, digests=()),
        "nonsense",
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_consumer_that_says_what_it_must_not_is_lost(
    make: Callable[..., Worker], consumer: Worker, frame: object
) -> None:
    producer = make("p0")
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0])
    with connect_as_consumer(producer) as sock:
        drive(producer, until=lambda: True)
        sock.sendall(framed(frame))
        assert isinstance(poll_until_outcome(producer).error, PeerLostError)


def test_consumer_that_gives_up_fails_its_transfer_only(
    make: Callable[..., Worker], consumer: Worker
) -> None:
    producer = make("p0")
    introduce(producer, consumer)
    producer.transport.send_blocks(SESSION, 1, [0])
    producer.transport.send_blocks(SESSION, 2, [1])
    with connect_as_consumer(producer) as sock:
        sock.sendall(framed(Abandoned(transfer_id=1, reason="tired")))
        outcome = poll_until_outcome(producer)
        assert "tired" in str(outcome.error)
        assert not isinstance(outcome.error, PeerLostError)
        sock.sendall(framed(Copied(transfer_id=2)))
        assert poll_until_outcome(producer).error is None


# Another process


@pytest.mark.parametrize(
    ("limit", "mode"),
    [("none", "memfd"), ("file size", "process_vm_readv")],
    ids=["as is", "refused"],
)
def test_blocks_of_another_process_arrive(consumer: Worker, limit: str, mode: str) -> None:
    """With a limit on the length of files, the kernel really refuses the memory file."""
    script = [sys.executable, "-m", "tests.unit.transport.producer_process", limit]
    with subprocess.Popen(
        script, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        found, reason, endpoint = child.stdout.readline().rstrip("\n").split("\t")
        assert found == mode, reason
        assert ("cannot remap the KV cache" in reason) == (mode != "memfd")
        assert consumer.transport.can_reach(bytes.fromhex(endpoint))
        consumer.transport.add_peer(SESSION, bytes.fromhex(endpoint))
        child.stdin.write(f"{consumer.transport.local_endpoint().hex()}\n")
        child.stdin.flush()
        consumer.transport.recv_blocks(SESSION, 1, [0, 5, 2])
        (outcome,) = outcomes_of(consumer)[consumer.name]
        assert child.stdout.readline() == "None\n"
        child.stdin.close()
        assert child.wait(60) == 0
    assert outcome.error is None
    twin = make_worker("child", ShmTransport(TransportOptions()))  # the same content
    for region in range(len(SHAPES)):
        for src, dst in ((6, 0), (1, 5), (7, 2)):
            assert consumer.block(region, dst) == twin.block(region, src)
    twin.transport.close()
