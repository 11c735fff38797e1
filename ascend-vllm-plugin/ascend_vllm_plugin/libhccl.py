"""The ``ctypes`` backend: libhccl itself, with communicators of our own.

Each has its own buffers and its own execution timeout, and no watchdog that ends the
process when a peer is lost, as that of torch_npu's process groups does.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ascend_vllm_plugin.abi import (
    ADVICE,
    INT8,
    ROOT_INFO_LEN,
    CommConfig,
    Result,
    describe,
    expansion_mode_of,
    make_config,
)
from ascend_vllm_plugin.backend import Backend, Communicator, EngineStream, HcclError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LIBRARY_VARIABLE = "HCCL_SO_PATH"
"""Where vllm-ascend, too, looks for the library (``utils.py:471-489``)."""

_POINTER, _U32, _U64, _INT = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
_MOVE = (_POINTER, _U64, _INT, _U32, _POINTER, _POINTER)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "HcclGetRootInfo": (_POINTER,),
    "HcclCommInitRootInfoConfig": (_U32, _POINTER, _U32, _POINTER, _POINTER),
    "HcclSend": _MOVE,
    "HcclRecv": _MOVE,
    "HcclCommDestroy": (_POINTER,),
    "HcclGetCommAsyncError": (_POINTER, _POINTER),
    "HcclGetErrorString": (_INT,),
}
_RESULTS: dict[str, Any] = {"HcclGetErrorString": ctypes.c_char_p}
"""Of functions that return something else than ``HcclResult``."""


class HcclLibrary:
    """The functions of libhccl that are used, with errors as exceptions.

    Args:
        path: the library.

    Raises:
        HcclError: it cannot be loaded, or is too old.
    """

    def __init__(self, path: str) -> None:
        try:
            self._lib: Any = ctypes.CDLL(path)
        except OSError as exc:
            raise HcclError(
                f"cannot load {path} ({exc}): source the set_env.sh of CANN's toolkit, or set "
                f"{LIBRARY_VARIABLE}"
            ) from exc
        if missing := [name for name in _PROTOTYPES if not hasattr(self._lib, name)]:
            raise HcclError(
                f"{path} has no {', '.join(missing)}: CANN is too old, use the image, CANN 9.1"
            )
        for name, arguments in _PROTOTYPES.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = arguments, _RESULTS.get(name, _INT)

    @property
    def capability(self) -> int:
        """How many fields of a communicator's configuration the library reads."""
        if not hasattr(self._lib, "HcclGetCommConfigCapability"):
            return 0
        function = self._lib.HcclGetCommConfigCapability
        function.restype = _U32
        return int(function())

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            HcclError: it did not succeed.
        """
        if code := getattr(self._lib, name)(*arguments):
            raise HcclError(self.explain(name, code))

    def explain(self, name: str, code: int) -> str:
        """Say what went wrong and what to do."""
        text = (self._lib.HcclGetErrorString(code) or b"").decode(errors="replace")
        advice = f" (hint: {ADVICE[code]})" if code in ADVICE else ""
        return f"{name}: {describe(code, text)}{advice}"


def library_path(environ: Mapping[str, str]) -> str:
    """Return where libhccl is."""
    return environ.get(LIBRARY_VARIABLE) or "libhccl.so"


class CtypesBackend(Backend):
    """See the module.

    Args:
        buffer_mb: size of each of a communicator's two buffers, in MB.
        exec_timeout_s: longest wait of an operation for its other half.
        soc: name of the chip.

    Raises:
        HcclError: libhccl cannot be used.
    """

    name = "ctypes"

    def __init__(self, *, buffer_mb: int, exec_timeout_s: int, soc: str) -> None:
        self._library = HcclLibrary(library_path(os.environ))
        self._config = make_config(
            buffer_mb=buffer_mb,
            exec_timeout_s=exec_timeout_s,
            capability=self._library.capability,
            expansion_mode=expansion_mode_of(soc),
        )
        if self._config.exec_timeout_s != exec_timeout_s:
            logger.warning(
                "hccl: this CANN has no execution timeout per communicator; set HCCL_EXEC_TIMEOUT, "
                "or a lost peer is noticed after 1836 s only"
            )

    @property
    def settings(self) -> str:  # noqa: D102
        config = self._config
        return f"buffer {config.buffer_mb} MB, execution timeout {config.exec_timeout_s} s"

    def make_root(self) -> bytes:  # noqa: D102
        root = ctypes.create_string_buffer(ROOT_INFO_LEN)
        self._library.call("HcclGetRootInfo", root)
        return root.raw

    def connect(self, root: bytes, *, is_leader: bool) -> Communicator:  # noqa: D102
        if len(root) != ROOT_INFO_LEN:
            raise HcclError(f"root information of {len(root)} bytes instead of {ROOT_INFO_LEN}")
        handle = ctypes.c_void_p()
        info = ctypes.create_string_buffer(root, ROOT_INFO_LEN)
        config = CommConfig.from_buffer_copy(self._config)
        rank = 0 if is_leader else 1
        self._library.call(
            "HcclCommInitRootInfoConfig",
            2,
            info,
            rank,
            ctypes.byref(config),
            ctypes.byref(handle),
        )
        return _Communicator(self._library, handle, peer=1 - rank)


class _Communicator(Communicator):
    """A communicator of libhccl with one peer."""

    def __init__(self, library: HcclLibrary, handle: ctypes.c_void_p, *, peer: int) -> None:
        self._library = library
        self._handle = handle
        self._peer = peer

    def send(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        self._move("HcclSend", tensor, stream)

    def recv(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        self._move("HcclRecv", tensor, stream)

    def _move(self, name: str, tensor: torch.Tensor, stream: EngineStream) -> None:
        handle = stream.handle  # first: what fills the buffer must have been issued
        self._library.call(
            name, tensor.data_ptr(), tensor.nbytes, INT8, self._peer, self._handle, handle
        )

    def check(self) -> None:
        code = ctypes.c_int(Result.SUCCESS)
        self._library.call("HcclGetCommAsyncError", self._handle, ctypes.byref(code))
        if code.value:
            raise HcclError(self._library.explain("communicator", code.value))

    def destroy(self) -> None:
        try:
            self._library.call("HcclCommDestroy", self._handle)
        except HcclError as exc:  # it is busy: its memory is lost until the process ends
            logger.warning("hccl: %s", exc)
