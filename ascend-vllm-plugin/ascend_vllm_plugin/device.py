"""The NPU through torch_npu: streams and events that the engine's thread can use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from vllm_pd.transport.device import Mark, TorchDevice

POOL_LEN = 32
"""Streams that torch_npu has for a device and hands out; seen with torch_npu 2.13."""

MAX_STREAMS = 24
"""Of them, those that a worker's communicators may have. An assumption: no more than eight are
the model's, drawn before; a pool that goes round hands those out again."""


class _Numbered(Protocol):
    @property
    def number(self) -> int:
        """Equal for equal streams of one device."""


_Stream = TypeVar("_Stream", bound=_Numbered)


class StreamPool(Generic[_Stream]):
    """Streams that communicators use one after the other. For the engine's thread.

    torch_npu hands out its streams in turn for ever, also those that the model computes
    on. What is aborted must not be one of these: so a stream that ended well is used
    again, and one that did not is never given back.

    Args:
        draw: asks torch_npu for one.
    """

    def __init__(self, draw: Callable[[], _Stream]) -> None:
        self._draw = draw
        self._drawn: set[int] = set()  # for good
        self._free: list[_Stream] = []

    @property
    def has_more(self) -> bool:
        """Whether ``take`` has one; any thread may ask."""
        return bool(self._free) or len(self._drawn) < MAX_STREAMS

    def take(self) -> _Stream:
        """Return a stream that nobody else has from here.

        Raises:
            RuntimeError: there is none any more.
        """
        if self._free:
            return self._free.pop()
        if self.has_more:
            for _ in range(POOL_LEN):
                stream = self._draw()
                if stream.number not in self._drawn:
                    self._drawn.add(stream.number)
                    return stream
        raise RuntimeError(f"{len(self._drawn)} streams are in use or did not end well")

    def put(self, stream: _Stream) -> None:
        """Take back a stream that has nothing to do and has not failed."""
        self._free.append(stream)


class NpuDevice(TorchDevice):
    """One NPU.

    Args:
        index: logical index, after ASCEND_RT_VISIBLE_DEVICES.

    Raises:
        RuntimeError: torch_npu cannot use it.
    """

    def __init__(self, index: int) -> None:
        import torch
        import torch_npu  # noqa: F401 - makes torch know the NPU

        super().__init__("npu", index)
        self._npu: Any = torch.get_device_module("npu")
        self._streams = StreamPool(self._draw_stream)
        self.index = index

    @property
    def soc(self) -> str:
        """Name of the chip, e.g. ``Ascend910B3``."""
        return str(self._npu.get_device_name(self.index))

    @property
    def host_index(self) -> str:
        """Its number in this container, whatever it is called in this process."""
        return host_index_of(self.index, os.environ.get("ASCEND_RT_VISIBLE_DEVICES"))

    def make_stream(self) -> NpuStream:  # type: ignore[override]
        """See ``EngineDevice``."""
        return self._streams.take()

    def take_back(self, stream: NpuStream) -> None:
        """See ``EngineDevice``."""
        self._streams.put(stream)

    @property
    def has_streams(self) -> bool:
        """See ``EngineDevice``."""
        return self._streams.has_more

    def _draw_stream(self) -> NpuStream:
        return NpuStream(self._npu, self._npu.Stream(device=self.index))


def host_index_of(index: int, visible: str | None) -> str:
    """Return the number in its container of a process's NPU.

    Args:
        index: its number in the process.
        visible: ASCEND_RT_VISIBLE_DEVICES; None: not set.
    """
    names = [name.strip() for name in visible.split(",")] if visible else []
    return names[index] if index < len(names) else str(index)


def container_id() -> str:
    """Return what tells this process's container from others of its host.

    NPUs are numbered anew in every container that is given some of them. The number of
    the mount namespace is of the kernel, so it is unique on the host; namespaces(7).
    """
    return str(os.stat("/proc/self/ns/mnt").st_ino)


class NpuStream:
    """A stream beside those that the model computes on; see ``EngineStream``."""

    def __init__(self, npu: Any, stream: Any) -> None:
        self._npu = npu
        self._stream = stream

    @property
    def number(self) -> int:
        """Equal for equal streams of one device."""
        return int(self._stream.stream_id)

    def submit(self, work: Callable[[], object]) -> None:
        """See ``EngineStream``."""
        with self._npu.stream(self._stream):
            work()

    def record(self) -> NpuEvent:
        """See ``EngineStream``."""
        event = self._npu.Event()
        event.record(self._stream)
        return NpuEvent(event)

    def wait(self, mark: Mark) -> None:
        """See ``EngineStream``."""
        for event in mark:
            self._stream.wait_event(event)

    def abort(self) -> None:
        """See ``EngineStream``.

        ``aclrtStreamAbort`` drops what has not begun and stops what has (``acl/acl_rt.h`` among
        the headers of torch-npu 2.13: "abort unexecuted tasks and pause executing tasks on the
        stream"). That CANN 9.1 has it, and does so, is an assumption.
        """
        acl = ctypes.CDLL("libascendcl.so")
        if not hasattr(acl, "aclrtStreamAbort"):
            raise RuntimeError("this CANN has no aclrtStreamAbort")
        if code := acl.aclrtStreamAbort(ctypes.c_void_p(self.handle)):
            raise RuntimeError(f"aclrtStreamAbort failed with error {code}")

    @property
    def handle(self) -> int:
        """See ``EngineStream``.

        Reading it waits until torch_npu's queue is empty (``npu/Stream.cpp:91-96`` and
        ``core/npu/NPUStream.cpp:417-445`` in torch_npu 2.10), so that no other thread
        issues anything to the device meanwhile.
        """
        return int(self._stream.npu_stream)


class NpuEvent:
    """See ``EngineEvent``."""

    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def is_over(self) -> bool:
        """See ``EngineEvent``."""
        return bool(self._event.query())

    def synchronize(self) -> None:
        """See ``EngineEvent``."""
        self._event.synchronize()
