"""HCCL's C interface, as far as it is used: types, constants and what its errors mean.

Read in the headers ``hccl.h`` and ``hccl_types.h`` that torch_npu 2.11 and 2.13 ship.
"""

from __future__ import annotations

import ctypes
import enum

ROOT_INFO_LEN = 4108
"""Bytes of ``HcclRootInfo``."""

INT8 = 0
"""``HCCL_DATA_TYPE_INT8``: bytes; what Send and Recv take on A2 and A3, whatever the dtype."""

MIN_BUFFER_MB = 20
MAX_BUFFER_MB = 64
"""Send copies through the communicator's buffer, piece by piece: more is only memory."""

_MAGIC = 0xF0F0F0F0
_NOT_SET = 0xFFFFFFFF
_EXEC_TIMEOUT_NOT_SET = -1
_CAN_SET_EXEC_TIMEOUT = 8
"""``HCCL_COMM_CONFIG_EXEC_TIMEOUT`` of ``HcclCommConfigCapability``, in ``hccl_types.h``."""


class Result(enum.IntEnum):
    """``HcclResult``."""

    SUCCESS = 0
    PARA = 1
    PTR = 2
    MEMORY = 3
    INTERNAL = 4
    NOT_SUPPORT = 5
    NOT_FOUND = 6
    UNAVAIL = 7
    SYSCALL = 8
    TIMEOUT = 9
    TCP_CONNECT = 11
    ROCE_CONNECT = 12
    TCP_TRANSFER = 13
    ROCE_TRANSFER = 14
    RUNTIME = 15
    DRV = 16
    NETWORK = 19
    AGAIN = 20
    REMOTE = 21
    SUSPENDING = 22
    OOM = 24


ADVICE: dict[int, str] = {
    Result.PARA: "both sides must have the same HCCL buffer size and execution timeout",
    Result.MEMORY: "lower --gpu-memory-utilization: a communicator takes twice its buffer",
    Result.NOT_SUPPORT: "this device or CANN does not support it; use transport tcp",
    Result.UNAVAIL: "HCCL_HOST_SOCKET_PORT_RANGE may be exhausted or shared with another "
    "instance: give each its own range",
    Result.TIMEOUT: "the peer did not come: compare HCCL_IF_IP, HCCL_SOCKET_IFNAME and "
    "/etc/hccn.conf on both sides",
    Result.TCP_CONNECT: "host addresses do not route: set HCCL_IF_IP on both sides, and run "
    "containers with --net=host",
    Result.ROCE_CONNECT: "NPU addresses do not route: hccn_tool -i N -ping -g address IP, and "
    "the same TLS setting of the NPUs on both sides",
    Result.DRV: "npu-smi info shows whether the device is healthy, and who uses it",
    Result.NETWORK: "hccn_tool -i N -link -g shows whether the NPU's link is up",
    Result.REMOTE: "an RDMA write failed at the peer: it died, or the network lost packets",
    Result.OOM: "lower --gpu-memory-utilization: a communicator takes twice its buffer",
}
"""What to do about an error, by its number."""


class CommConfig(ctypes.Structure):
    """``HcclCommConfig`` up to version 8, which has the execution timeout.

    The library copies as much as ``size`` says and reads the fields that ``version``
    has, so an older one takes the first 32 bytes with version 1.
    """

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64),
        ("buffer_mb", ctypes.c_uint32),
        ("deterministic", ctypes.c_uint32),
        ("name", ctypes.c_char * 128),
        ("udi", ctypes.c_char * 128),
        ("expansion_mode", ctypes.c_uint32),
        ("traffic_class", ctypes.c_uint32),
        ("service_level", ctypes.c_uint32),
        ("world_rank_id", ctypes.c_uint32),
        ("job_id", ctypes.c_uint64),
        ("acl_graph_zero_copy", ctypes.c_uint8),
        ("exec_timeout_s", ctypes.c_int32),
        ("algo", ctypes.c_char * 1600),
        ("retry_enable", ctypes.c_char * 50),
        ("retry_params", ctypes.c_char * 128),
    )


FULL_LEN = ctypes.sizeof(CommConfig)
MINIMAL_LEN = 32
FULL_VERSION = 8
MINIMAL_VERSION = 1


def expansion_mode_of(soc: str) -> int:
    """Return where a chip's Send and Recv are unfolded, as ``hcclOpExpansionMode`` has it.

    1 is the host, 2 the AI CPU, 3 AIV: a comment in ``hccl_types.h`` of torch_npu 2.13.

    Without it HCCL_OP_EXPANSION_MODE holds, which users set to AIV for the model. That is
    nothing to Send and Recv, which go by the host on A2 and by the AI CPU on A3 then, but
    not all communicators of a device may be AIV (HCCL 9.1, ``HCCL_OP_EXPANSION_MODE.md``).

    Args:
        soc: name of the chip, e.g. ``Ascend910B3`` (A2) or ``Ascend910_9392`` (A3).
    """
    if soc.startswith("Ascend910B"):
        return 1  # host
    return 2 if soc.startswith("Ascend910_93") else 0  # AI CPU; HCCL's default


def make_config(
    *, buffer_mb: int, exec_timeout_s: int, capability: int, expansion_mode: int = 0
) -> CommConfig:
    """Return a communicator's configuration; both sides must pass an equal one.

    Args:
        buffer_mb: size of each of its two buffers, in MB.
        exec_timeout_s: longest wait of an operation for its other half, in whole seconds;
            without the capability HCCL_EXEC_TIMEOUT holds, 1836 s unless it is set.
        capability: what ``HcclGetCommConfigCapability`` answered; 0 if there is no such
            function.
        expansion_mode: see ``expansion_mode_of``; needs the capability, too.
    """
    config = CommConfig(
        magic=_MAGIC,
        buffer_mb=buffer_mb,
        deterministic=_NOT_SET,
        traffic_class=_NOT_SET,
        service_level=_NOT_SET,
        exec_timeout_s=_EXEC_TIMEOUT_NOT_SET,
    )
    if capability > _CAN_SET_EXEC_TIMEOUT:
        config.size, config.version = FULL_LEN, FULL_VERSION
        config.exec_timeout_s = exec_timeout_s
        config.expansion_mode = expansion_mode
    else:
        config.size, config.version = MINIMAL_LEN, MINIMAL_VERSION
    return config


def describe(code: int, text: str = "") -> str:
    """Name an error, in one line.

    Args:
        code: ``HcclResult``.
        text: of ``HcclGetErrorString``.
    """
    name = Result(code).name if code in set(Result) else "UNKNOWN"
    said = f": {' '.join(text.split())}" if text else ""
    return f"HCCL error {code} ({name}){said}"
