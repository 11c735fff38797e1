"""What torch is asked for, the rules of the stand-in for it, and a real device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.stand_in_device import POISON, RuleBrokenError, StandInDevice, StandInStream, plain
from vllm_pd.transport.base import KVRegion
from vllm_pd.transport.chunks import plan_chunks
from vllm_pd.transport.device import TorchDevice
from vllm_pd.transport.staging import StageKind, Stager

TIMEOUT_S = 30.0


class FakeStream:
    def __init__(self, device: int) -> None:
        self.device = device
        self.calls: list[object] = []

    def record_event(self, event: object = "event") -> object:
        self.calls.append(("record", event))
        return event

    def wait_event(self, event: object) -> None:
        self.calls.append(("wait", event))


class FakeModule:
    """The names that ``torch.cuda`` and ``torch.npu`` have in common, as far as needed."""

    Stream = FakeStream

    def __init__(self) -> None:
        self.default, self.current = FakeStream(3), FakeStream(3)
        self.entered: list[object] = []
        self.chosen: list[int] = []

    def current_device(self) -> int:
        return 3

    def current_stream(self, index: int) -> FakeStream:
        assert index == 3
        return self.current

    def default_stream(self, index: int) -> FakeStream:
        assert index == 3
        return self.default

    def set_device(self, index: int) -> None:
        self.chosen.append(index)

    def device(self, index: int) -> Any:
        return self._entering(index)

    def stream(self, stream: FakeStream) -> Any:
        return self._entering(stream)

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            self.blocking = blocking

        def synchronize(self) -> None:
            assert self.blocking

    def _entering(self, entry: object) -> Any:
        module = self

        class Context:
            def __enter__(self) -> None:
                module.entered.append(entry)

            def __exit__(self, *_: object) -> None:
                module.entered.remove(entry)

        return Context()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    module = FakeModule()
    monkeypatch.setattr(torch, "get_device_module", {"npu": module}.__getitem__)
    return module


def test_torch_runs_work_on_the_stream_and_orders_it_behind_marks(module: FakeModule) -> None:
    device = TorchDevice("npu")
    device.bind_thread()
    stream = device.make_stream()
    entered: list[list[object]] = []
    stream.wait(device.mark())
    stream.submit(lambda: entered.append(list(module.entered)))
    event = stream.record()
    event.synchronize()
    stream.synchronize()
    (side,) = entered[0]
    assert isinstance(side, FakeStream)
    assert side.calls[:3] == [("wait", "event"), ("wait", "event"), ("record", event)]
    assert module.chosen == [3]
    assert module.entered == []


def test_torch_marks_every_stream_once_that_may_compute(module: FakeModule) -> None:
    device = TorchDevice("npu", 3)
    home = module.current
    assert len(device.mark()) == 2
    module.current = FakeStream(3)
    assert len(device.mark()) == 3
    module.current = module.default
    assert len(device.mark()) == 2
    assert [len(stream.calls) for stream in (module.default, home)] == [3, 3]


@pytest.fixture
def device() -> Iterator[StandInDevice]:
    device = StandInDevice()
    yield device
    device.close()


@pytest.fixture
def stream(device: StandInDevice) -> StandInStream:
    device.bind_thread()
    return device.make_stream()


def ones(device: StandInDevice) -> torch.Tensor:
    return device.place(torch.ones(4, dtype=torch.uint8))


def test_stand_in_lets_nobody_touch_device_memory_outside_a_stream(device: StandInDevice) -> None:
    memory = ones(device)
    assert memory[1:].view(3, 1).shape == (3, 1)
    for touch in (
        lambda: memory + 1,
        lambda: memory.zero_(),
        lambda: memory[torch.tensor([1])],
        lambda: memory.clone(),
        lambda: memory.numpy(),
        lambda: memory.data_ptr(),
        lambda: bool(memory[0]),
    ):
        with pytest.raises(RuleBrokenError):
            touch()


def test_stand_in_shows_poison_until_the_event(
    device: StandInDevice, stream: StandInStream
) -> None:
    host, memory = device.allocate_host(4), ones(device)
    copied = threading.Event()
    stream.submit(lambda: host.copy_(memory, non_blocking=True))
    stream.submit(copied.set)
    assert copied.wait(TIMEOUT_S)
    assert host.tolist() == [POISON] * 4
    stream.record().synchronize()
    assert host.tolist() == [1] * 4


def test_stand_in_reads_host_memory_when_the_copy_runs(
    device: StandInDevice, stream: StandInStream
) -> None:
    host, memory = device.allocate_host(4), ones(device)
    host.fill_(2)
    device.hold()
    stream.submit(lambda: memory.copy_(host, non_blocking=True))
    host.fill_(3)  # too early
    device.resume()
    stream.record().synchronize()
    assert plain(memory).tolist() == [3] * 4


@pytest.mark.parametrize(
    ("is_pinned", "non_blocking"), [(False, True), (True, False)], ids=["pageable", "blocking"]
)
def test_stand_in_copies_only_pinned_memory_without_blocking(
    device: StandInDevice, stream: StandInStream, *, is_pinned: bool, non_blocking: bool
) -> None:
    memory = ones(device)
    host = device.allocate_host(4) if is_pinned else torch.zeros(4, dtype=torch.uint8)
    stream.submit(lambda: memory.copy_(host, non_blocking=non_blocking))
    with pytest.raises(RuntimeError, match=r"pinned|blocks"):
        stream.record().synchronize()


def test_stand_in_orders_streams_by_marks_only(
    device: StandInDevice, stream: StandInStream
) -> None:
    order: list[str] = []
    device.compute_gate.clear()
    device.run_compute(lambda: order.append("compute"))
    mark = device.mark()
    stream.submit(lambda: order.append("before"))
    stream.wait(mark)
    stream.submit(lambda: order.append("after"))
    event = stream.record()
    assert not event.is_over
    device.compute_gate.set()
    event.synchronize()
    assert order.index("compute") < order.index("after")


def test_stand_in_serves_only_threads_that_chose_it(device: StandInDevice) -> None:
    with pytest.raises(RuleBrokenError, match="choose"):
        device.make_stream()


def real_region(name: str, tensor: torch.Tensor) -> KVRegion:
    length = tensor.stride(0) * tensor.element_size()
    return KVRegion(name, 0, tensor.shape[0], length, tensor.device.type, 16, 8, tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("heads", [None, (2, 4), (1, 3)], ids=str)
def test_blocks_travel_between_two_caches_of_a_real_device(heads: tuple[int, int] | None) -> None:
    shape = (64, 16, 8, 128)
    sources = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    targets = [torch.zeros_like(source) for source in sources]
    awake = threading.Event()
    stagers = [
        Stager(
            [real_region(str(i), tensor) for i, tensor in enumerate(tensors)],
            TorchDevice("cuda"),
            buffer_len=1 << 20,
            num_buffers=4,
            wake=awake.set,
        )
        for tensors in (sources, targets)
    ]
    sender, receiver = stagers
    src_ids, dst_ids = torch.randperm(64).tolist(), torch.randperm(64).tolist()
    regions = [real_region(str(i), tensor) for i, tensor in enumerate(sources)]
    chunks = plan_chunks(regions, heads, len(src_ids), max_len=1 << 20)
    for number, chunk in enumerate(chunks):
        sender.gather(number, chunk, src_ids, heads)
    receiver.fence(StageKind.SCATTER)
    waiting, num_received = [], 0
    while num_received < len(chunks):
        assert awake.wait(TIMEOUT_S)
        awake.clear()
        waiting += sender.take_done()
        while waiting and (buffer := receiver.acquire()):
            staged = waiting.pop(0)
            assert staged.error is None
            assert staged.buffer is not None
            assert isinstance(staged.key, int)
            chunk = chunks[staged.key]
            buffer.view[: chunk.num_bytes] = staged.buffer.view[: chunk.num_bytes]
            sender.release(staged.buffer)
            receiver.scatter(staged.key, chunk, dst_ids, heads, buffer)
        done = receiver.take_done()
        assert {staged.error for staged in done} <= {None}
        num_received += len(done)
    first, count = heads or (0, 8)
    for source, target in zip(sources, targets, strict=True):
        expected = torch.zeros_like(source)
        expected[dst_ids, :, first : first + count] = source[src_ids, :, first : first + count]
        assert target.equal(expected)
    for stager in stagers:
        stager.close()
