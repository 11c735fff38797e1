"""The NPU through torch_npu: streams and events that the engine's thread can use."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from typing import Any

from vllm_pd.transport.device import Mark, TorchDevice

_POOL_LEN = 32


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
        self._streams: weakref.WeakSet[NpuStream] = weakref.WeakSet()
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
        """Return a stream that no other user of this method has, while there are some.

        torch_npu has a pool of 32 for each device, and hands them out in turn for ever.
        """
        used = {stream.number for stream in self._streams}
        stream = self._draw_stream()
        for _ in range(_POOL_LEN - 1):
            if stream.number not in used:
                break
            stream = self._draw_stream()
        self._streams.add(stream)
        return stream

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

        ``aclrtStreamAbort`` drops what has not begun and stops what has (``acl_rt.h`` of
        torch-npu 2.13: "abort unexecuted tasks and pause executing tasks on the stream").
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
