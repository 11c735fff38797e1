"""The ``process_group`` backend: torch_npu's ``ProcessGroupHCCL``, without a default group.

A store that the leader makes is the rendezvous, as vllm-ascend's netloader does it
(``netloader_pg.py:32-146``). Send and Recv of a group of two create its communicator at
their first use (``ProcessGroupHCCL.cpp:4537-4543`` in torch_npu 2.10), so that is done
here, where both sides wait for each other.

Facts to know: the group has a watchdog that ends the process when an operation fails,
unless HCCL_ASYNC_ERROR_HANDLING is 0; the execution timeout is HCCL_EXEC_TIMEOUT, and
the buffer P2P_HCCL_BUFFSIZE, of the process.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ascend_vllm_plugin.abi import ADVICE, describe
from ascend_vllm_plugin.backend import Backend, Communicator, EngineStream, HcclError
from ascend_vllm_plugin.settings import DEFAULT_EXEC_TIMEOUT, EXEC_TIMEOUT_VARIABLE
from vllm_pd.transport import inet
from vllm_pd.transport.lanes import one_line

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BUFFER_VARIABLE = "P2P_HCCL_BUFFSIZE"
_CONNECT_TIMEOUT_S = 120.0  # HCCL_CONNECT_TIMEOUT's default


class _Root(msgspec.Struct, frozen=True):
    """Where the follower finds the leader's store."""

    host: str
    port: int
    name: str


class ProcessGroupBackend(Backend):
    """See the module.

    Args:
        host: address at which followers find this worker's store.
        buffer_mb: size of each of a communicator's two buffers, in MB.

    Raises:
        HcclError: torch_npu has no such process group.
    """

    name = "process_group"

    def __init__(self, *, host: str, buffer_mb: int) -> None:
        try:
            from torch_npu._C._distributed_c10d import ProcessGroupHCCL
        except ImportError as exc:
            raise HcclError(f"torch_npu has no ProcessGroupHCCL: {one_line(exc)}") from exc
        self._group: Any = ProcessGroupHCCL
        self._host = host
        # torch_npu reads it when it makes a communicator; what the user has set stays.
        self._buffer_mb = os.environ.setdefault(BUFFER_VARIABLE, str(buffer_mb))
        self._exec_timeout_s = os.environ.get(EXEC_TIMEOUT_VARIABLE) or DEFAULT_EXEC_TIMEOUT
        self._store: Any = None
        if os.environ.get("HCCL_ASYNC_ERROR_HANDLING", "1") != "0":
            logger.warning(
                "hccl: a peer that is lost in the middle of a transfer ends this process: "
                "HCCL_ASYNC_ERROR_HANDLING=0 prevents that"
            )

    @property
    def settings(self) -> str:  # noqa: D102
        return f"buffer {self._buffer_mb} MB, {EXEC_TIMEOUT_VARIABLE} {self._exec_timeout_s}"

    def make_root(self) -> bytes:  # noqa: D102
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        try:
            if self._store is None:
                # A socket of ours: by itself the store would listen on all addresses.
                listener = inet.listen(self._host)
                self._store = TCPStore(
                    self._host,
                    listener.getsockname()[1],
                    is_master=True,
                    wait_for_workers=False,
                    timeout=datetime.timedelta(seconds=_CONNECT_TIMEOUT_S),
                    master_listen_fd=listener.detach(),
                )
            root = _Root(self._host, self._store.port, secrets.token_hex(8))
        except RuntimeError as exc:
            raise HcclError(f"store of the process group: {one_line(exc)}") from exc
        return msgspec.msgpack.encode(root)

    def connect(self, root: bytes, *, is_leader: bool) -> Communicator:  # noqa: D102
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        timeout = datetime.timedelta(seconds=_CONNECT_TIMEOUT_S)
        try:
            where = msgspec.msgpack.decode(root, type=_Root)
            if is_leader:
                store = self._store
            else:
                store = TCPStore(where.host, where.port, is_master=False, timeout=timeout)
            prefixed = PrefixStore(where.name, store)
            rank = 0 if is_leader else 1
            # The store of a follower lives as long as the group.
            return _Group(self._group(prefixed, rank, 2, timeout), prefixed, peer=1 - rank)
        except (RuntimeError, msgspec.DecodeError) as exc:
            raise HcclError(explain(exc)) from exc


def explain(exc: Exception) -> str:
    """Return what torch_npu says, in one line; an error of HCCL by its name, with advice."""
    found = re.search(r"HCCL function error: (\w+).*?error code is (\d+)", str(exc), re.DOTALL)
    if found is None:
        return f"process group: {one_line(exc)}"
    code = int(found[2])
    advice = f" (hint: {ADVICE[code]})" if code in ADVICE else ""
    return f"process group: {found[1]}: {describe(code)}{advice}"


class _Group(Communicator):
    """A process group of two."""

    def __init__(self, group: Any, store: Any, *, peer: int) -> None:
        self._group = group
        self._store = store
        self._peer = peer

    def send(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        # wait() lets the stream wait, not the host.
        stream.submit(lambda: self._checked(lambda: self._group.send([tensor], self._peer, 0)))

    def recv(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        stream.submit(lambda: self._checked(lambda: self._group.recv([tensor], self._peer, 0)))

    @staticmethod
    def _checked(start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as exc:
            raise HcclError(explain(exc)) from exc

    def check(self) -> None:
        pass  # errors come out of the stream

    def destroy(self) -> None:
        try:
            self._group.shutdown()
        except RuntimeError as exc:
            logger.warning("hccl: %s", explain(exc))
        # Its threads end with it, and must not outlive the interpreter.
        self._group = self._store = None
