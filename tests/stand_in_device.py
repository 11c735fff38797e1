"""A stand-in for an accelerator that enforces an accelerator's rules on CPU tensors.

- Work runs later, on another thread, in order, each stream by itself.
- Memory of the device is touched by work on a stream only: any operation outside
  that is more than a view raises, as does asking for an address.
- A copy between host and device must not block and needs pinned memory.
- A copy to the host takes effect at the next event behind it; until then the host
  finds poison. A copy from the host reads when it runs, not when it was submitted.
- Streams belong to threads that chose the device.

Errors of work come out of the next event behind it, as on a real device.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

POISON = 0xA5
TIMEOUT_S = 10.0


class RuleBrokenError(RuntimeError):
    """Something was done that a real device does not allow or would not notice."""


class _Current(threading.local):
    stream: StandInStream | None = None
    device: StandInDevice | None = None


_current = _Current()

# Operations that only make another view or answer from the host's knowledge.
_VIEWS = {"view", "narrow", "unsqueeze", "size", "dim", "numel", "stride", "element_size"}
_VIEWS |= {"storage_offset", "is_contiguous", "is_inference", "__get__", "__len__", "__hash__"}
_SYNCHRONISING = {"item", "tolist", "cpu", "numpy", "data_ptr", "untyped_storage", "__repr__"}


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


class _Memory(torch.Tensor):
    """What both kinds of memory have in common: every operation is checked."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        tensors = list(_tensors((*args, *kwargs.values())))
        on_device = [isinstance(tensor, DeviceTensor) for tensor in tensors]
        if any(on_device):
            if name in _SYNCHRONISING:
                raise RuleBrokenError(f"{name} of device memory")
            if name != "copy_" and not all(on_device):
                raise RuleBrokenError(f"{name} mixes host and device memory")
            is_view = name in _VIEWS or (name == "__getitem__" and len(tensors) == 1)
            if not is_view and _current.stream is None:
                raise RuleBrokenError(f"{name} of device memory outside a stream")
        if name == "copy_" and on_device[0] != on_device[1]:
            return _copy_across(*tensors, non_blocking=kwargs.get("non_blocking", False))
        run: Callable[..., Any] = super().__torch_function__
        return run(func, types, args, kwargs)


class DeviceTensor(_Memory):
    """Memory of the stand-in device."""


class PinnedTensor(_Memory):
    """Host memory that the device can reach."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the same memory that nobody checks."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents it thus
        return tensor.as_subclass(torch.Tensor)


def _copy_across(dst: torch.Tensor, src: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
    if not non_blocking:
        raise RuleBrokenError("a copy between host and device that blocks")
    if not (isinstance(dst, PinnedTensor) or isinstance(src, PinnedTensor)):
        raise RuleBrokenError("an asynchronous copy of memory that is not pinned")
    stream = _current.stream
    assert stream is not None
    if isinstance(src, PinnedTensor):
        stream.publish()
        plain(dst).copy_(plain(src))
    else:
        content = plain(src).clone()
        plain(dst).view(torch.uint8).fill_(POISON)
        stream.unpublished.append(lambda: plain(dst).copy_(content))
    return dst


class StandInEvent:
    """A point in a stream's work."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self.error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def end(self, error: Exception | None) -> None:
        self.error = error
        self._is_over.set()

    def synchronize(self) -> None:
        if not self._is_over.wait(TIMEOUT_S):
            raise RuleBrokenError("waited for an event that does not come")
        if self.error is not None:
            raise RuntimeError(str(self.error))


class StandInStream:
    """Runs what is submitted on a thread of its own, while its gate is open."""

    def __init__(self, device: StandInDevice, gate: threading.Event) -> None:
        self._device = device
        self._gate = gate
        self._ops: queue.SimpleQueue[tuple[int, Callable[[], object]] | None] = queue.SimpleQueue()
        self._num_aborts = 0
        self._error: Exception | None = None
        self.unpublished: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._run, name="stand-in-stream", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], object]) -> None:
        self._check()
        refusal = self._device.ask(self)
        if refusal is None or refusal.is_half_done:
            self._put(self._device.fault(self) or work)
        if refusal is not None:
            raise refusal.error

    def record(self) -> StandInEvent:
        self._check()
        event = StandInEvent()
        self._device.count(self, +1)
        self._put(lambda: self._end(event))
        return event

    def wait(self, mark: Sequence[StandInEvent]) -> None:
        self._check()
        for event in mark:
            self._put(functools.partial(self._device.block, event))

    def synchronize(self) -> None:
        self.record().synchronize()

    def publish(self) -> None:
        """Let copies to the host take effect."""
        for effect in self.unpublished:
            effect()
        self.unpublished.clear()

    def abort(self) -> None:
        """Drop what has not begun; events behind it never come."""
        self._num_aborts += 1

    def _put(self, op: Callable[[], object]) -> None:
        self._ops.put((self._num_aborts, op))

    def close(self) -> None:
        self._ops.put(None)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def _check(self) -> None:
        if _current.device is not self._device:
            raise RuleBrokenError("a stream used by a thread that did not choose the device")

    def _end(self, event: StandInEvent) -> None:
        self.publish()
        error, self._error = self._error, None
        self._device.count(self, -1)
        event.end(error)

    def _run(self) -> None:
        _current.stream = self
        while (entry := self._ops.get()) is not None:
            num_aborts, op = entry
            self._gate.wait()
            if num_aborts < self._num_aborts:
                continue
            try:
                op()
            except Exception as exc:  # noqa: BLE001 - any error of work is the event's
                self._error = exc


@dataclass(frozen=True)
class Refusal:
    """How a submission fails: before its work is taken, or in the middle of it."""

    error: Exception
    is_half_done: bool


class StandInDevice:
    """The device; ``hold`` and ``resume`` say when its side streams run.

    Attributes:
        compute: the stream that the model would run on; holding the device does
            not hold it, ``compute_gate`` does.
        host_lens: sizes of the pinned memory that was asked for.
        device_lens: sizes of the device memory that was asked for.
        max_in_flight: most events of one side stream that were recorded and not over.
    """

    def __init__(self) -> None:
        self._gate = threading.Event()
        self._gate.set()
        self.compute_gate = threading.Event()
        self.compute_gate.set()
        self._changed = threading.Condition()
        self._in_flight: dict[StandInStream, int] = {}
        self._refusals: list[Refusal] = []
        self._faults: list[Exception] = []
        self._is_busy = False
        self._num_asked = 0
        self._num_blocked = 0
        self._num_recorded = 0
        self.host_lens: list[int] = []
        self.device_lens: list[int] = []
        self.max_in_flight = 0
        self.compute = StandInStream(self, self.compute_gate)
        self._streams = [self.compute]

    # What DeviceInterface asks for.

    def bind_thread(self) -> None:
        _current.device = self

    def make_stream(self) -> StandInStream:
        if _current.device is not self:
            raise RuleBrokenError("a stream made by a thread that did not choose the device")
        stream = StandInStream(self, self._gate)
        self._streams.append(stream)
        return stream

    def mark(self) -> list[StandInEvent]:
        chosen, _current.device = _current.device, self
        try:
            return [self.compute.record()]
        finally:
            _current.device = chosen

    def allocate_host(self, num_bytes: int) -> PinnedTensor:
        self.host_lens.append(num_bytes)
        memory = torch.full((num_bytes,), POISON, dtype=torch.uint8)
        return memory.as_subclass(PinnedTensor)

    def allocate_device(self, num_bytes: int) -> DeviceTensor:
        self.device_lens.append(num_bytes)
        return self.place(torch.full((num_bytes,), POISON, dtype=torch.uint8))

    # What tests use.

    def place(self, tensor: torch.Tensor) -> DeviceTensor:
        """Return a tensor as if it were on the device."""
        return tensor.as_subclass(DeviceTensor)

    def run_compute(self, work: Callable[[], object]) -> None:
        """Submit work to the compute stream."""
        chosen, _current.device = _current.device, self
        self.compute.submit(work)
        _current.device = chosen

    def hold(self) -> None:
        """Let no operation of a side stream begin."""
        self._gate.clear()

    def resume(self) -> None:
        self._gate.set()

    def refuse(self, error: Exception, *, is_half_done: bool = False) -> None:
        """Let the next submission to a side stream raise."""
        self._refusals.append(Refusal(error, is_half_done))

    def break_next(self, error: Exception) -> None:
        """Let the next work of a side stream fail when it runs."""
        self._faults.append(error)

    def stay_busy(self) -> None:
        """Let submissions block until ``be_ready``, as a driver with full queues does."""
        with self._changed:
            self._is_busy = True

    def be_ready(self) -> None:
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()

    def wait_asked(self, count: int) -> None:
        """Wait until so many submissions to side streams were begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_asked >= count, TIMEOUT_S)

    def block(self, event: StandInEvent) -> None:
        """Wait for an event on behalf of a stream."""
        with self._changed:
            self._num_blocked += not event.is_over
            self._changed.notify_all()
        event.synchronize()

    def wait_blocked(self, count: int) -> None:
        """Wait until so many times in all a stream came to an event that was not over."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_blocked >= count, TIMEOUT_S)

    def wait_recorded(self, count: int) -> None:
        """Wait until side streams have recorded so many events in all."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_recorded >= count, TIMEOUT_S)

    @property
    def num_recorded(self) -> int:
        with self._changed:
            return self._num_recorded

    def ask(self, stream: StandInStream) -> Refusal | None:
        """Return how a submission fails, after waiting until one may be made."""
        if stream is self.compute:
            return None
        with self._changed:
            self._num_asked += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: not self._is_busy, TIMEOUT_S)
            return self._refusals.pop(0) if self._refusals else None

    def fault(self, stream: StandInStream) -> Callable[[], None] | None:
        """Return what runs in place of work that is to fail."""
        if stream is self.compute or not self._faults:
            return None
        error = self._faults.pop(0)

        def fail() -> None:
            raise error

        return fail

    def count(self, stream: StandInStream, change: int) -> None:
        """Take note of an event that was recorded (+1) or is over (-1)."""
        if stream is self.compute:
            return
        with self._changed:
            self._in_flight[stream] = self._in_flight.get(stream, 0) + change
            self._num_recorded += max(change, 0)
            self.max_in_flight = max(self.max_in_flight, self._in_flight[stream])
            self._changed.notify_all()

    def release_all(self) -> None:
        """Let everything run."""
        self.be_ready()
        self.resume()
        self.compute_gate.set()

    def close(self) -> None:
        """End all streams after what they have been given."""
        self.release_all()
        for stream in self._streams:
            stream.close()
