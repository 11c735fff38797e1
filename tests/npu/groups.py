"""What a model's ranks say to each other, over torch_npu's own process groups."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch_npu  # noqa: F401 - makes torch know the NPU
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch_npu._C._distributed_c10d import ProcessGroupHCCL

NPU: Any = torch.get_device_module("npu")
_TIMEOUT = timedelta(seconds=60)


class Group:
    """One rank of a model whose operations torch_npu issues behind its task queue."""

    def __init__(self, store: Store, rank: int, size: int, device: int) -> None:
        self._group: Any = ProcessGroupHCCL(PrefixStore("model", store), rank, size, _TIMEOUT)
        self._rank = rank
        self._tensor = torch.zeros(4096, dtype=torch.uint8, device=f"npu:{device}")

    def exchange(self) -> None:
        """Send to the next rank, or receive from the one before; returns at once."""
        if self._rank % 2 == 0:
            work = self._group.send([self._tensor], self._rank + 1, 0)
        else:
            work = self._group.recv([self._tensor], self._rank - 1, 0)
        work.wait()  # lets the stream wait, not the host

    def wait(self) -> None:
        """Wait until the device has done it, as a model does for its tokens."""
        NPU.current_stream().synchronize()

    def close(self) -> None:
        self._group.shutdown()


def make_groups(devices: Sequence[int]) -> list[Group | None]:
    """Return the ranks on these devices; None for one that is alone."""
    if len(devices) == 1:
        return [None]
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
    # Each rank has its own, as one that waits for a key lets nobody else use it.
    others = [
        TCPStore("127.0.0.1", first.port, is_master=False, timeout=_TIMEOUT) for _ in devices[1:]
    ]
    return [
        Group(store, rank, len(devices), device)
        for rank, (store, device) in enumerate(zip([first, *others], devices, strict=True))
    ]
