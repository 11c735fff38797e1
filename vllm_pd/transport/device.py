"""What staging needs of an accelerator: streams, events and two kinds of memory.

``TorchDevice`` gets all of it from torch, for CUDA and NPU alike: a device type's
module (``torch.cuda``, ``torch.npu``) has the same names. torch is imported when a
device is made, so that transports of host memory never load it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

Mark: TypeAlias = Sequence[Any]
"""Events on the streams that compute; only the device that made them reads them."""


class Event(Protocol):
    """A point in a stream's work; recorded already."""

    def synchronize(self) -> None:
        """Sleep, without using the CPU, until all work before this point is done.

        Raises:
            RuntimeError: the device failed.
        """


class Stream(Protocol):
    """Work of the device that runs in order, beside that of other streams."""

    def submit(self, work: Callable[[], object]) -> None:
        """Call ``work``, whose tensor operations run on this stream, sooner or later.

        It must hold on to the tensors it uses until an event recorded afterwards
        is over, and copy between host and device only with ``non_blocking=True``
        and pinned memory.

        Raises:
            Exception: what ``work`` raised; part of it may be under way.
        """

    def record(self) -> Event:
        """Return an event behind all that was submitted so far."""

    def wait(self, mark: Mark) -> None:
        """Let what is submitted from now on run after ``mark``; does not block."""

    def synchronize(self) -> None:
        """Sleep until all submitted work is done."""


class DeviceInterface(Protocol):
    """One accelerator. Made on the thread that computes, or before it computes.

    Torch allocates on the device in that thread's order, so ``allocate_device``
    belongs there, too; a stream that uses the memory must wait for a later mark.
    """

    def bind_thread(self) -> None:
        """Make this the calling thread's device, before it makes or uses streams."""

    def make_stream(self) -> Stream:
        """Return a new stream."""

    def mark(self) -> Mark:
        """Return where the streams that compute are now. Any thread may ask."""

    def allocate_host(self, num_bytes: int) -> torch.Tensor:
        """Return pinned host memory: contiguous bytes that the device can copy."""

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        """Return device memory: contiguous bytes."""


class TorchDevice:
    """An accelerator that torch has a module for.

    Args:
        device_type: ``cuda`` or ``npu``.
        index: which one; None for the calling thread's.
    """

    def __init__(self, device_type: str, index: int | None = None) -> None:
        import torch

        self._module: Any = torch.get_device_module(device_type)
        self._index = self._module.current_device() if index is None else index
        self._name = f"{device_type}:{self._index}"
        # vLLM computes on CUDA on a stream of its own that is current on its thread
        # only; this is the chance to learn of it.
        self._home = self._module.current_stream(self._index)

    def bind_thread(self) -> None:
        """See ``DeviceInterface``."""
        self._module.set_device(self._index)

    def make_stream(self) -> TorchStream:
        """See ``DeviceInterface``."""
        return TorchStream(self._module, self._module.Stream(device=self._index))

    def mark(self) -> Mark:
        """See ``DeviceInterface``.

        torch cannot name all streams. The ones known: the default stream, the
        stream of the thread that made this object, and the calling thread's.
        """
        streams: list[Any] = []
        with self._module.device(self._index):
            for stream in (
                self._module.default_stream(self._index),
                self._home,
                self._module.current_stream(self._index),
            ):
                if stream not in streams:
                    streams.append(stream)
            return [stream.record_event() for stream in streams]

    def allocate_host(self, num_bytes: int) -> torch.Tensor:
        """See ``DeviceInterface``."""
        import torch

        with self._module.device(self._index):  # or it would belong to the first device
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def allocate_device(self, num_bytes: int) -> torch.Tensor:
        """See ``DeviceInterface``."""
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8, device=self._name)


class TorchStream:
    """A stream of a ``TorchDevice``."""

    def __init__(self, module: Any, stream: Any) -> None:
        self._module = module
        self._stream = stream

    def submit(self, work: Callable[[], object]) -> None:
        """See ``Stream``."""
        with self._module.stream(self._stream):
            work()

    def record(self) -> Event:
        """See ``Stream``."""
        # Without blocking=True, synchronize() of CUDA turns a core into a heater.
        event: Event = self._module.Event(blocking=True)
        self._stream.record_event(event)
        return event

    def wait(self, mark: Mark) -> None:
        """See ``Stream``."""
        for event in mark:
            self._stream.wait_event(event)

    def synchronize(self) -> None:
        """See ``Stream``."""
        # Through an event, as the stream's own synchronize() would spin.
        self.record().synchronize()
