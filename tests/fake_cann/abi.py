"""The C ABI of AscendCL and HCCL as far as these tests call it, through ctypes.

Prototypes, layouts and numbers: section 2 of the project's notes on Ascend, after
``hccl.h`` and ``acl_rt.h`` in torch_npu 2.13.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from ctypes import CDLL, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

ROOT_INFO_LEN = 4108
INT8, FP16, UINT8 = 0, 3, 7
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
CONFIG_LEN = {1: 32, 8: 2104, 9: 2232, 10: 2240}
NOT_SET = 0xFFFFFFFF


HostFunction = ctypes.CFUNCTYPE(None, c_void_p)


class SendRecvItem(ctypes.Structure):
    """HcclSendRecvItem."""

    _fields_ = (
        ("type", c_int),
        ("buf", c_void_p),
        ("count", c_uint64),
        ("data_type", c_int),
        ("remote_rank", c_uint32),
    )


def comm_config(
    *,
    version: int = 8,
    size: int | None = None,
    magic: int = 0xF0F0F0F0,
    buffer_mb: int = NOT_SET,
    exec_timeout_s: int = -1,
) -> bytes:
    """Return the bytes of an HcclCommConfig; ``size`` defaults to that of its version."""
    config = bytearray(max(CONFIG_LEN.values()))
    size = CONFIG_LEN[version] if size is None else size
    struct.pack_into("<QIIQII", config, 0, size, magic, version, 0, buffer_mb, NOT_SET)
    struct.pack_into("<Iii", config, 288, NOT_SET, -1, -1)
    struct.pack_into("<i", config, 316, exec_timeout_s)
    return bytes(config)


class Libraries:
    """The two libraries of one process; attributes are the C functions."""

    def __init__(self, folder: Path) -> None:
        self.acl = CDLL(str(folder / "libascendcl.so"))
        self.hccl = CDLL(str(folder / "libhccl.so"))
        for name in ("HcclSend", "HcclRecv"):
            function = getattr(self.hccl, name)
            function.argtypes = [c_void_p, c_uint64, c_int, c_uint32, c_void_p, c_void_p]
        self.hccl.HcclBatchSendRecv.argtypes = [c_void_p, c_uint32, c_void_p, c_void_p]
        self.hccl.HcclBarrier.argtypes = [c_void_p, c_void_p]
        self.hccl.HcclCommDestroy.argtypes = [c_void_p]
        self.hccl.HcclGetCommAsyncError.argtypes = [c_void_p, c_void_p]
        self.hccl.HcclGetCommName.argtypes = [c_void_p, c_void_p]
        self.hccl.fakeHcclNumInSetup.argtypes = [c_void_p]
        self.hccl.HcclGetErrorString.restype = c_char_p
        self.hccl.fakeHcclNumChunks.restype = c_size_t
        self.acl.aclrtMalloc.argtypes = [c_void_p, c_size_t, c_int]
        self.acl.aclrtFree.argtypes = [c_void_p]
        self.acl.aclrtMemcpy.argtypes = [c_void_p, c_size_t, c_void_p, c_size_t, c_int]
        self.acl.aclrtMemcpyAsync.argtypes = [*self.acl.aclrtMemcpy.argtypes, c_void_p]
        self.acl.aclrtGetMemInfo.argtypes = [c_int, c_void_p, c_void_p]
        self.acl.aclGetRecentErrMsg.restype = c_char_p
        self.acl.aclrtGetSocName.restype = c_char_p
        one = ("DestroyStream", "SynchronizeStream", "DestroyEvent", "SynchronizeEvent")
        for name in one:
            getattr(self.acl, f"aclrt{name}").argtypes = [c_void_p]
        two = ("RecordEvent", "StreamWaitEvent", "QueryEventStatus", "StreamQuery")
        for name in two:
            getattr(self.acl, f"aclrt{name}").argtypes = [c_void_p, c_void_p]
        self.acl.aclrtLaunchHostFunc.argtypes = [c_void_p, HostFunction, c_void_p]
        self.acl.fakeSet.argtypes = [c_char_p, c_char_p]
        self.acl.aclrtSetStreamFailureMode.argtypes = [c_void_p, c_uint64]
        self.acl.aclmdlRICaptureBegin.argtypes = [c_void_p, c_int]
        self.acl.aclmdlRICaptureEnd.argtypes = [c_void_p, c_void_p]
        self.acl.aclmdlRIExecuteAsync.argtypes = [c_void_p, c_void_p]
        self.acl.aclmdlRIDestroy.argtypes = [c_void_p]

    def set_hook(self, name: str, text: str | None) -> None:
        """Change a hook of the double in this process."""
        self.acl.fakeSet(name.encode(), None if text is None else text.encode())

    def stream(self) -> c_void_p:
        """Return a new stream."""
        stream = c_void_p()
        check(self.acl.aclrtCreateStream(byref(stream)))
        return stream

    def event(self) -> c_void_p:
        """Return a new event."""
        event = c_void_p()
        check(self.acl.aclrtCreateEvent(byref(event)))
        return event

    def is_complete(self, event: c_void_p) -> bool:
        """Return whether the event's latest record is over."""
        status = c_int()
        check(self.acl.aclrtQueryEventStatus(event, byref(status)))
        return status.value == 1

    def device_memory(self, content: bytes) -> int:
        """Return the address of new device memory with this content."""
        address = c_void_p()
        check(self.acl.aclrtMalloc(byref(address), len(content), 0))
        num_bytes = len(content)
        check(self.acl.aclrtMemcpy(address, num_bytes, content, num_bytes, HOST_TO_DEVICE))
        assert address.value is not None
        return address.value

    def read(self, address: int, num_bytes: int) -> bytes:
        """Return what is in device memory now, whatever runs on streams."""
        content = ctypes.create_string_buffer(num_bytes)
        check(self.acl.aclrtMemcpy(content, num_bytes, address, num_bytes, DEVICE_TO_HOST))
        return content.raw

    def copy_async(self, target: int, source: int, num_bytes: int, stream: c_void_p) -> int:
        """Return the code of an asynchronous copy inside the device."""
        copy = self.acl.aclrtMemcpyAsync
        return int(copy(target, num_bytes, source, num_bytes, DEVICE_TO_DEVICE, stream))

    def free_memory(self) -> int:
        """Return how many bytes of device memory are left."""
        free, total = c_size_t(), c_size_t()
        check(self.acl.aclrtGetMemInfo(0, byref(free), byref(total)))
        return free.value

    def root_info(self) -> bytes:
        """Return the root info of a new communicator."""
        root_info = ctypes.create_string_buffer(ROOT_INFO_LEN)
        check(self.hccl.HcclGetRootInfo(root_info))
        return root_info.raw


class Gate:
    """Work that keeps its stream waiting until it is opened."""

    def __init__(self, libraries: Libraries, stream: c_void_p) -> None:
        self._opened = threading.Event()
        self._function = HostFunction(lambda _: self._opened.wait(30) and None)
        check(libraries.acl.aclrtLaunchHostFunc(stream, self._function, None))

    def open(self) -> None:
        """Let the stream go on."""
        self._opened.set()


def check(code: int) -> None:
    """Raise unless a call succeeded."""
    if code:
        raise CannError(code)


class CannError(Exception):
    """A call returned an error code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"error code {code}")
        self.code = code
