"""NIXL with its UCX backend: a READ of the same blocks, host memory to host memory.

Runs in the peers' environment. Registration, descriptor lists, the transfer's handle
and the connection are made beforehand; posting and waiting are measured. UCX is
configured by the environment that the parent sets, if at all.

NIXL is measured at its best. Its progress thread spins; on the consumer, which is
pinned and polls anyway, both would fight over one core, and NIXL was seen at half the
speed. Over TCP, on the contrary, it is faster with the thread on both sides.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from typing import Any

from benchmarks.transfer.arena import Arena
from benchmarks.transfer.mover import GO, Mover
from benchmarks.transfer.plan import Plan
from benchmarks.transfer.wire import Wire

_BACKEND = "UCX"
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


class _NixlMover(Mover):
    def __init__(self, link: Wire, name: str, agent_name: str, *, has_thread: bool) -> None:
        super().__init__(link, name)
        # By name, as it is not installed where the types are checked.
        api = importlib.import_module("nixl._api")
        config = api.nixl_agent_config(backends=[_BACKEND], enable_prog_thread=has_thread)
        self._agent: Any = api.nixl_agent(agent_name, config)
        if _BACKEND not in self._agent.backends:
            raise RuntimeError("this NIXL has no UCX backend")

    def _take_memory(self, arena: Arena) -> None:
        self._agent.register_memory([(arena.addr, arena.num_bytes, 0, "")], mem_type="DRAM")


class NixlProducer(_NixlMover):
    """Only lends its memory: the consumer reads, NIXL's own thread does what is to do."""

    def __init__(self, link: Wire, name: str) -> None:
        # Let UCX read this process's memory where only parents may (Yama).
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        super().__init__(link, name, "producer", has_thread=True)

    def run(self) -> float:  # noqa: D102
        started = time.perf_counter()
        self._link.receive()
        return time.perf_counter() - started

    def _take_memory(self, arena: Arena) -> None:
        arena.fill()
        super()._take_memory(arena)
        self._link.send({"metadata": self._agent.get_agent_metadata().hex(), "addr": arena.addr})

    def _set_up(self, plan: Plan, arena: Arena) -> None:
        pass  # the consumer names the blocks


class NixlConsumer(_NixlMover):
    """Reads."""

    def __init__(self, link: Wire, name: str) -> None:
        super().__init__(link, name, "consumer", has_thread=name != "nixl")
        self._remote, self._remote_addr = "", 0
        self._lists: list[Any] = []
        self._transfer: Any = None

    def run(self) -> float:  # noqa: D102
        agent, transfer = self._agent, self._transfer
        started = time.perf_counter()
        state = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        seconds = time.perf_counter() - started
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        self._link.send(GO)
        return seconds

    def _take_memory(self, arena: Arena) -> None:
        super()._take_memory(arena)
        theirs = self._link.receive()
        self._remote = self._agent.add_remote_agent(bytes.fromhex(theirs["metadata"]))
        self._remote_addr = theirs["addr"]

    def _set_up(self, plan: Plan, arena: Arena) -> None:
        src, dst = plan.offsets()
        indices = list(range(len(src)))
        self._lists = [
            self._agent.prep_xfer_dlist(
                agent, [(base + offset, plan.block_len, 0) for offset in offsets], "DRAM"
            )
            for agent, base, offsets in (
                ("NIXL_INIT_AGENT", arena.addr, dst),
                (self._remote, self._remote_addr, src),
            )
        ]
        ours, remote = self._lists
        self._transfer = self._agent.make_prepped_xfer("READ", ours, indices, remote, indices)

    def _release(self) -> None:
        if self._transfer is not None:
            self._agent.release_xfer_handle(self._transfer)
            for prepared in self._lists:
                self._agent.release_dlist_handle(prepared)
            self._transfer, self._lists = None, []
