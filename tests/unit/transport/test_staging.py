"""Staging on a stand-in device that enforces what a real one demands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.stand_in_device import TIMEOUT_S, StandInDevice, plain
from vllm_pd.errors import LocalProtocolError, TransferError, TransportUnavailableError
from vllm_pd.transport.base import Heads, KVRegion
from vllm_pd.transport.chunks import Chunk, Piece, plan_chunks
from vllm_pd.transport.staging import Staged, StageKind, Stager, StagingBuffer

NUM_BLOCKS = 11
NUM_HEADS = 4
BLOCK_SIZE = 3  # tokens
HEAD_SIZE = 8  # elements
BUFFER_LEN = 4096
BLOCK_IDS = (7, 2, 10, 0, 5, 3)
NOWHERE = 8  # what device memory must not be reached by: its host address

CPU_SHAPE = (NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
NPU_SHAPE = (NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE)
NUM_ROWS: dict[Sequence[int], int] = {CPU_SHAPE: 1, NPU_SHAPE: BLOCK_SIZE}
DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.uint8)
HEADS: tuple[Heads | None, ...] = (None, (0, NUM_HEADS), (0, 2), (2, 2), (1, 2), (3, 1), (1, 3))


def random_cache(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return content.view(dtype).view(shape)


def region_of(name: str, tensor: torch.Tensor, num_rows: int, num_heads: int) -> KVRegion:
    return KVRegion(
        name=name,
        addr=NOWHERE,
        num_blocks=tensor.shape[0],
        block_len=tensor.stride(0) * tensor.element_size(),
        device="stand-in",
        num_rows=num_rows,
        num_heads=num_heads,
        tensor=tensor,
    )


def payload(region: KVRegion, ids: Sequence[int], heads: Heads | None) -> bytes:
    """Return the bytes of some blocks as the payload order demands, computed naively."""
    first, count = heads or (0, region.num_heads)
    content = plain(region.tensor).view(torch.uint8).view(-1)
    blocks = content.view(region.num_blocks, region.num_rows, region.num_heads, -1)
    wanted = blocks[list(ids)][:, :, first : first + count]
    return wanted.contiguous().numpy().tobytes()


@dataclass
class Rig:
    """A stager over some regions, and who waits for it."""

    device: StandInDevice
    regions: Sequence[KVRegion]
    num_buffers: int = 4
    buffer_len: int = BUFFER_LEN
    awake: threading.Event = field(default_factory=threading.Event)
    num_wakes: int = 0
    done: list[Staged] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stager = Stager(
            self.regions,
            self.device,
            buffer_len=self.buffer_len,
            num_buffers=self.num_buffers,
            wake=self.wake,
        )

    def wake(self) -> None:
        self.num_wakes += 1
        self.awake.set()

    def next(self) -> Staged:
        """Return the next that is over."""
        while not self.done:
            self.awake.clear()
            self.done += self.stager.take_done()
            if not self.done:
                assert self.awake.wait(TIMEOUT_S)
        return self.done.pop(0)

    def gathered(self, key: Hashable, num_bytes: int) -> bytes:
        """Return the bytes of the next gather, which must be this one, and its buffer."""
        staged = self.next()
        assert (staged.key, staged.kind, staged.error) == (key, StageKind.GATHER, None)
        assert staged.buffer is not None
        content = bytes(staged.buffer.view[:num_bytes])
        self.stager.release(staged.buffer)
        return content

    def fill(self, content: bytes) -> StagingBuffer:
        buffer = self.acquire()
        buffer.view[: len(content)] = content
        return buffer

    def acquire(self) -> StagingBuffer:
        buffer = self.stager.acquire()
        assert buffer is not None
        return buffer


def chunk_of(region: KVRegion, num_blocks: int, first: int = 0, index: int = 0) -> Chunk:
    return Chunk((Piece(index, first, num_blocks),), num_blocks * region.block_len)


@pytest.fixture
def device() -> Iterator[StandInDevice]:
    device = StandInDevice()
    yield device
    device.close()


def make_regions(device: StandInDevice, shape: Sequence[int] = CPU_SHAPE) -> list[KVRegion]:
    return [
        region_of(
            f"layer.{i}",
            device.place(random_cache(shape, torch.bfloat16, seed=i)),
            NUM_ROWS[tuple(shape)],
            NUM_HEADS,
        )
        for i in range(2)
    ]


@pytest.fixture
def open_rig(device: StandInDevice) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def open_rig(regions: Sequence[KVRegion], **options: Any) -> Rig:
        rigs.append(Rig(device, regions, **options))
        return rigs[-1]

    yield open_rig
    device.release_all()
    for rig in rigs:
        rig.stager.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("stage-")]


@pytest.fixture
def rig(device: StandInDevice, open_rig: Callable[..., Rig]) -> Rig:
    return open_rig(make_regions(device))


# The bytes


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [CPU_SHAPE, NPU_SHAPE], ids=["cpu", "npu"])
def test_gathered_bytes_are_in_payload_order(
    device: StandInDevice,
    open_rig: Callable[..., Rig],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    heads: Heads | None,
) -> None:
    tensors = [device.place(random_cache(shape, dtype, seed)) for seed in range(2)]
    regions = [region_of(str(i), t, NUM_ROWS[shape], NUM_HEADS) for i, t in enumerate(tensors)]
    rig = open_rig(regions)
    chunks = plan_chunks(regions, heads, len(BLOCK_IDS), max_len=1000)
    for number, chunk in enumerate(chunks):
        rig.stager.gather(number, chunk, BLOCK_IDS, heads)
    content = b"".join(rig.gathered(n, chunk.num_bytes) for n, chunk in enumerate(chunks))
    assert content == b"".join(payload(region, BLOCK_IDS, heads) for region in regions)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [CPU_SHAPE, NPU_SHAPE], ids=["cpu", "npu"])
def test_scattered_bytes_change_their_heads_and_nothing_else(
    device: StandInDevice,
    open_rig: Callable[..., Rig],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    heads: Heads | None,
) -> None:
    num_rows = NUM_ROWS[shape]
    source = region_of("src", random_cache(shape, dtype, seed=8), num_rows, NUM_HEADS)
    cache = random_cache(shape, dtype, seed=9)
    target = region_of("dst", device.place(cache.clone()), num_rows, NUM_HEADS)
    expected = cache.clone().view(torch.uint8).view(NUM_BLOCKS, num_rows, NUM_HEADS, -1)
    first, count = heads or (0, NUM_HEADS)
    blocks = source.tensor.view(torch.uint8).view(NUM_BLOCKS, num_rows, NUM_HEADS, -1)
    for block_id in BLOCK_IDS:
        expected[block_id, :, first : first + count] = blocks[block_id, :, first : first + count]

    rig = open_rig([target])
    (chunk,) = plan_chunks([target], heads, len(BLOCK_IDS), max_len=BUFFER_LEN)
    buffer = rig.fill(payload(source, BLOCK_IDS, heads))
    rig.stager.scatter("in", chunk, BLOCK_IDS, heads, buffer)
    assert rig.next() == Staged("in", StageKind.SCATTER, None, None)
    assert plain(target.tensor).view(torch.uint8).flatten().equal(expected.flatten())


def test_a_chunk_may_hold_regions_of_different_geometry_and_odd_lengths(
    device: StandInDevice,
    open_rig: Callable[..., Rig],
) -> None:
    regions = [
        region_of("k", device.place(random_cache((5, 2, 4, 3), torch.uint8, 1)), 2, 4),
        region_of("v", device.place(random_cache((5, 4, 7), torch.uint8, 2)), 1, 4),
        region_of("scale", device.place(random_cache((5, 4, 8), torch.uint8, 3)), 1, 4),
    ]
    rig = open_rig(regions)
    for heads in HEADS:
        (chunk,) = plan_chunks(regions, heads, 3, max_len=BUFFER_LEN)
        rig.stager.gather("all", chunk, (4, 0, 2), heads)
        expected = b"".join(payload(region, (4, 0, 2), heads) for region in regions)
        assert rig.gathered("all", chunk.num_bytes) == expected


def test_a_tensor_may_start_anywhere_in_its_storage(
    device: StandInDevice, open_rig: Callable[..., Rig]
) -> None:
    storage = random_cache((2 + NUM_BLOCKS * 16,), torch.uint8, seed=4)
    tensor = device.place(storage[2:].view(NUM_BLOCKS, 1, 4, 4))
    rig = open_rig([region_of("layer", tensor, 1, 4)])
    (chunk,) = plan_chunks(rig.regions, (1, 2), 2, max_len=BUFFER_LEN)
    rig.stager.gather("out", chunk, (9, 1), (1, 2))
    assert rig.gathered("out", chunk.num_bytes) == payload(rig.regions[0], (9, 1), (1, 2))


def test_a_cache_made_in_inference_mode_is_written(
    device: StandInDevice, open_rig: Callable[..., Rig]
) -> None:
    with torch.inference_mode():
        tensor = device.place(torch.zeros(4, 2, 8, dtype=torch.uint8))
    assert tensor.is_inference()
    rig = open_rig([region_of("layer", tensor, 1, 2)])
    buffer = rig.fill(b"x" * 16)
    rig.stager.scatter("in", chunk_of(rig.regions[0], 1), (2,), None, buffer)
    assert rig.next().error is None
    assert payload(rig.regions[0], (2,), None) == b"x" * 16


def test_all_of_a_cache_comes_back_through_few_buffers(
    device: StandInDevice, open_rig: Callable[..., Rig]
) -> None:
    rig = open_rig(make_regions(device, NPU_SHAPE), buffer_len=200)
    order = list(range(NUM_BLOCKS))[::-1]
    chunks = plan_chunks(rig.regions, None, NUM_BLOCKS, max_len=200)
    assert len(chunks) > 5 * rig.num_buffers
    before = [payload(region, order, None) for region in rig.regions]
    for number, chunk in enumerate(chunks):
        rig.stager.gather(number, chunk, order, None)
    contents = [rig.gathered(n, chunk.num_bytes) for n, chunk in enumerate(chunks)]
    for region in rig.regions:
        plain(region.tensor).zero_()

    keys: list[Hashable] = []
    for number, (chunk, content) in enumerate(zip(chunks, contents, strict=True)):
        while (buffer := rig.stager.acquire()) is None:
            keys.append(rig.next().key)
        buffer.view[: len(content)] = content
        rig.stager.scatter(number, chunk, order, None, buffer)
    while len(keys) < len(chunks):
        keys.append(rig.next().key)
    assert keys == list(range(len(chunks)))
    assert [payload(region, order, None) for region in rig.regions] == before
    assert device.host_lens.count(200) == device.device_lens.count(200) == rig.num_buffers


# The pipeline


def test_the_next_gather_is_issued_while_the_previous_is_under_way(rig: Rig) -> None:
    rig.device.hold()
    for number in range(3):
        rig.stager.gather(number, chunk_of(rig.regions[0], 2, number), BLOCK_IDS, None)
    rig.device.wait_recorded(2)
    assert rig.device.max_in_flight == 2
    rig.device.resume()
    for number in range(3):
        content = rig.gathered(number, 2 * rig.regions[0].block_len)
        assert content == payload(rig.regions[0], BLOCK_IDS[number : number + 2], None)


def test_the_next_gather_is_issued_while_an_older_buffer_is_sent(rig: Rig) -> None:
    for number in range(3):
        rig.stager.gather(number, chunk_of(rig.regions[0], 2, number), BLOCK_IDS, None)
    first, second = rig.next(), rig.next()
    assert first.buffer is not None
    assert second.buffer is not None
    kept = bytes(second.buffer.view)
    rig.stager.release(first.buffer)
    rig.gathered(2, 0)
    assert bytes(second.buffer.view) == kept
    rig.stager.release(second.buffer)


def test_no_gather_is_issued_without_a_buffer(rig: Rig) -> None:
    for number in range(5):
        rig.stager.gather(number, chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    first, second = rig.next(), rig.next()
    assert rig.device.num_recorded == 2
    assert first.buffer is not None
    rig.stager.release(first.buffer)
    third = rig.next()
    assert rig.device.num_recorded == 3
    for staged in (second, third):
        assert staged.buffer is not None
        rig.stager.release(staged.buffer)
    rig.gathered(3, 0)
    rig.gathered(4, 0)


def test_a_gather_is_not_reported_before_its_event(rig: Rig) -> None:
    rig.device.hold()
    rig.stager.gather("out", chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    rig.device.wait_recorded(1)
    assert rig.stager.take_done() == []
    rig.device.resume()
    assert rig.gathered("out", 8) == payload(rig.regions[0], BLOCK_IDS, None)[:8]


def test_a_scatter_is_not_reported_and_its_buffer_not_free_before_its_event(rig: Rig) -> None:
    rig.device.hold()
    others = rig.acquire()
    buffer = rig.fill(b"y" * rig.regions[0].block_len)
    rig.stager.scatter("in", chunk_of(rig.regions[0], 1), (4,), None, buffer)
    rig.device.wait_recorded(1)
    assert rig.stager.acquire() is None
    assert rig.stager.take_done() == []
    rig.device.resume()
    assert rig.next().key == "in"
    assert rig.acquire() is buffer
    rig.stager.release(others)


def test_gathers_that_nobody_reads_leave_the_buffers_of_receiving_alone(rig: Rig) -> None:
    for number in range(8):
        rig.stager.gather(number, chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    rig.next()
    rig.next()
    for number in range(8):
        buffer = rig.fill(bytes([number]) * rig.regions[1].block_len)
        chunk = chunk_of(rig.regions[1], 1, first=number % 6, index=1)
        rig.stager.scatter(number, chunk, BLOCK_IDS, None, buffer)
        assert rig.next() == Staged(number, StageKind.SCATTER, None, None)


def test_somebody_who_found_no_buffer_is_woken_by_a_release(rig: Rig) -> None:
    first, second = rig.acquire(), rig.acquire()
    rig.stager.release(first)
    assert rig.num_wakes == 0
    first = rig.acquire()
    assert rig.stager.acquire() is None
    rig.stager.release(second)
    assert rig.num_wakes == 1
    assert rig.acquire() is second
    rig.stager.release(first)
    assert rig.num_wakes == 1


# The order against the compute stream


def test_a_scatter_runs_after_what_was_computed_before_the_fence(rig: Rig) -> None:
    region = rig.regions[0]
    rig.device.compute_gate.clear()
    rig.device.run_compute(lambda: region.tensor.fill_(1.0))
    rig.stager.fence(StageKind.SCATTER)
    rig.stager.scatter("in", chunk_of(region, 1), (4,), None, rig.fill(b"z" * region.block_len))
    rig.device.wait_blocked(1)
    assert rig.stager.take_done() == []
    rig.device.compute_gate.set()
    assert rig.next().key == "in"
    assert payload(region, (4,), None) == b"z" * region.block_len


def test_a_gather_does_not_wait_for_a_scatter_that_waits_for_computing(rig: Rig) -> None:
    region = rig.regions[0]
    rig.stager.gather("early", chunk_of(region, 1), (6,), None)
    rig.gathered("early", 0)
    rig.device.compute_gate.clear()
    rig.stager.fence(StageKind.SCATTER)
    rig.stager.scatter("in", chunk_of(region, 1), (4,), None, rig.acquire())
    rig.device.wait_blocked(1)
    rig.stager.gather("out", chunk_of(region, 1), (6,), None)
    assert rig.gathered("out", region.block_len) == payload(region, (6,), None)
    rig.device.compute_gate.set()
    assert rig.next().key == "in"


def test_buffers_are_not_written_before_work_that_torch_took_their_memory_from(
    device: StandInDevice,
    open_rig: Callable[..., Rig],
) -> None:
    device.compute_gate.clear()
    rig = open_rig(make_regions(device))
    rig.stager.gather("out", chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    device.wait_blocked(1)
    assert rig.stager.take_done() == []
    device.compute_gate.set()
    rig.gathered("out", 0)


# What goes wrong


def test_work_that_the_device_refuses_fails_alone(rig: Rig) -> None:
    rig.device.refuse(RuntimeError("out of memory\nTry this and that"))
    for number in range(2):
        rig.stager.gather(number, chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    assert rig.next() == Staged(0, StageKind.GATHER, None, "out of memory")
    assert rig.gathered(1, 8) == payload(rig.regions[0], BLOCK_IDS, None)[:8]


def test_work_that_fails_on_the_device_fails_its_chunk(rig: Rig) -> None:
    rig.device.break_next(RuntimeError("memory fault"))
    for number in range(2):
        rig.stager.gather(number, chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
        if number == 0:  # an error comes out of the first event behind it
            assert rig.next() == Staged(0, StageKind.GATHER, None, "memory fault")
    assert rig.gathered(1, 8) == payload(rig.regions[0], BLOCK_IDS, None)[:8]


def test_a_failed_scatter_gives_its_buffer_back(rig: Rig) -> None:
    for number in range(5):
        rig.device.refuse(RuntimeError("lost"))
        rig.stager.scatter(number, chunk_of(rig.regions[0], 1), (4,), None, rig.acquire())
        assert rig.next() == Staged(number, StageKind.SCATTER, None, "lost")


def test_half_a_scatter_is_not_reported_while_it_may_still_write(rig: Rig) -> None:
    region = rig.regions[0]
    rig.device.hold()
    rig.device.refuse(RuntimeError("half"), is_half_done=True)
    rig.stager.scatter("in", chunk_of(region, 1), (4,), None, rig.fill(b"h" * region.block_len))
    rig.device.wait_recorded(1)
    assert rig.stager.take_done() == []
    rig.device.resume()
    assert rig.next().error == "half"
    plain(region.tensor).zero_()  # what vLLM may do from now on
    rig.stager.gather("out", chunk_of(region, 1), (4,), None)
    assert rig.gathered("out", region.block_len) == bytes(region.block_len)


@pytest.mark.parametrize(
    ("pieces", "num_bytes", "heads", "error"),
    [
        ((Piece(0, 0, 1),), 7, None, "a chunk of more than 7 bytes"),
        ((Piece(0, 0, 1),), 800, None, "a chunk of 384 bytes, not 800"),
        ((Piece(0, 5, 2),), 768, None, "2 blocks from 5, of 6"),
        ((Piece(0, 0, 0),), 0, None, "0 blocks from 0, of 6"),
        ((Piece(0, 0, 6),) * 2, 4608, None, "4608 bytes for a buffer of 4096"),
        ((Piece(0, 0, 1),), 384, (3, 2), "2 heads from 3, of 4"),
    ],
)
def test_a_chunk_that_does_not_fit_fails_alone(
    rig: Rig, pieces: tuple[Piece, ...], num_bytes: int, heads: Heads | None, error: str
) -> None:
    rig.stager.gather("bad", Chunk(pieces, num_bytes), BLOCK_IDS, heads)
    rig.stager.gather("good", chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    assert rig.next() == Staged("bad", StageKind.GATHER, None, error)
    assert rig.gathered("good", 8) == payload(rig.regions[0], BLOCK_IDS, None)[:8]


@pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS])
def test_a_block_out_of_range_never_reaches_the_device(rig: Rig, block_id: int) -> None:
    chunk = chunk_of(rig.regions[0], 2)
    rig.stager.scatter("bad", chunk, (0, block_id), None, rig.acquire())
    assert rig.next().error == "block ids out of range 0 to 10"


def test_a_fence_that_the_device_refuses_is_a_transfer_error(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise RuntimeError("no event\nadvice")

    monkeypatch.setattr(rig.device, "mark", refuse)
    with pytest.raises(TransferError, match=r"^fence: no event$"):
        rig.stager.fence(StageKind.SCATTER)


def test_memory_that_cannot_be_had_makes_staging_unavailable(
    device: StandInDevice, open_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(num_bytes: int) -> Any:
        raise RuntimeError(f"cannot pin {num_bytes} bytes")

    monkeypatch.setattr(device, "allocate_host", refuse)
    with pytest.raises(TransportUnavailableError, match="cannot pin"):
        open_rig(make_regions(device))


def test_a_tensor_with_gaps_makes_staging_unavailable(
    device: StandInDevice, open_rig: Callable[..., Rig]
) -> None:
    tensor = device.place(random_cache((4, 8, 2, 4), torch.uint8, 0))[:, ::2]
    with pytest.raises(TransportUnavailableError, match="not contiguous"):
        open_rig([region_of("layer", tensor, 1, 1)])


def test_a_region_without_its_tensor_makes_staging_unavailable(
    open_rig: Callable[..., Rig],
) -> None:
    with pytest.raises(TransportUnavailableError, match="no tensor"):
        open_rig([KVRegion("layer", NOWHERE, 4, 16, "stand-in")])


def test_a_tensor_of_another_size_than_its_region_makes_staging_unavailable(
    device: StandInDevice,
    open_rig: Callable[..., Rig],
) -> None:
    tensor = device.place(torch.zeros(4, 16, dtype=torch.uint8))
    with pytest.raises(TransportUnavailableError, match="64 bytes is not 5 blocks of 16"):
        open_rig([KVRegion("layer", NOWHERE, 5, 16, "stand-in", tensor=tensor)])


def test_buffers_shorter_than_a_block_are_refused(
    device: StandInDevice, open_rig: Callable[..., Rig]
) -> None:
    with pytest.raises(TransportUnavailableError, match="shorter than a block of 384"):
        open_rig(make_regions(device), buffer_len=383)


@pytest.mark.parametrize("num_buffers", [0, 1, 5])
def test_buffers_that_cannot_be_halved_are_refused(
    device: StandInDevice, open_rig: Callable[..., Rig], num_buffers: int
) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be halved"):
        open_rig(make_regions(device), num_buffers=num_buffers)


def test_a_buffer_is_released_once(rig: Rig) -> None:
    buffer = rig.acquire()
    rig.stager.release(buffer)
    with pytest.raises(LocalProtocolError, match="does not hold"):
        rig.stager.release(buffer)


def test_a_buffer_is_scattered_once(rig: Rig) -> None:
    buffer = rig.acquire()
    rig.stager.scatter(0, chunk_of(rig.regions[0], 1), (4,), None, buffer)
    with pytest.raises(LocalProtocolError, match="does not hold"):
        rig.stager.scatter(1, chunk_of(rig.regions[0], 1), (4,), None, buffer)
    assert rig.next().key == 0


# Cancelling and closing


def test_cancelled_gathers_are_forgotten_and_those_under_way_reported(rig: Rig) -> None:
    rig.device.hold()
    for number in range(6):
        rig.stager.gather(
            ("a" if number % 2 else "b", number), chunk_of(rig.regions[0], 1), (4,), None
        )
    rig.device.wait_recorded(2)
    assert rig.stager.cancel(lambda key: key[0] == "a") == [("a", 3), ("a", 5)]  # type: ignore[index]
    rig.device.resume()
    for key in [("b", 0), ("a", 1), ("b", 2), ("b", 4)]:
        rig.gathered(key, 0)
    assert rig.device.num_recorded == 4


def test_a_cancelled_scatter_writes_nothing_and_gives_its_buffer_back(rig: Rig) -> None:
    region = rig.regions[0]
    before = payload(region, (4,), None)
    rig.device.stay_busy()
    rig.stager.scatter(0, chunk_of(region, 1), (3,), None, rig.acquire())
    rig.device.wait_asked(1)
    rig.stager.scatter(1, chunk_of(region, 1), (4,), None, rig.acquire())
    assert rig.stager.acquire() is None
    assert rig.stager.cancel(lambda key: key == 1) == [1]
    assert rig.num_wakes == 1
    rig.stager.release(rig.acquire())
    rig.device.be_ready()
    assert rig.next().key == 0
    assert payload(region, (4,), None) == before


def test_close_ends_what_is_under_way_and_forgets_the_rest(rig: Rig) -> None:
    rig.device.hold()
    for number in range(4):
        rig.stager.gather(number, chunk_of(rig.regions[0], 1, number), BLOCK_IDS, None)
    rig.device.wait_recorded(2)
    closing = threading.Thread(target=rig.stager.close)
    closing.start()
    rig.device.resume()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    done = rig.stager.take_done()
    assert [staged.key for staged in done] == [0, 1]
    for number, staged in enumerate(done):
        assert staged.buffer is not None
        expected = payload(rig.regions[0], BLOCK_IDS[number : number + 1], None)
        assert bytes(staged.buffer.view[: len(expected)]) == expected
        rig.stager.release(staged.buffer)


def test_a_closed_stager_takes_no_more_work(rig: Rig) -> None:
    buffer = rig.acquire()
    rig.stager.close()
    rig.stager.close()
    assert rig.stager.acquire() is None
    rig.stager.release(buffer)
    with pytest.raises(LocalProtocolError, match="closed"):
        rig.stager.gather("out", chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    with pytest.raises(LocalProtocolError, match="closed"):
        rig.stager.scatter("in", chunk_of(rig.regions[0], 1), BLOCK_IDS, None, buffer)
    assert rig.stager.take_done() == []


def test_bytes_can_be_sent_after_the_stager_is_gone(
    device: StandInDevice, open_rig: Callable[..., Rig]
) -> None:
    rig = open_rig(make_regions(device))
    rig.stager.gather("out", chunk_of(rig.regions[0], 1), BLOCK_IDS, None)
    staged = rig.next()
    assert staged.buffer is not None
    view = staged.buffer.view[:8]
    expected = payload(rig.regions[0], BLOCK_IDS, None)[:8]
    rig.stager.close()
    del rig, staged
    assert bytes(view) == expected
