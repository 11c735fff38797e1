"""Two processes with a ProcessGroupHCCL each, as ``test_process_group`` starts them.

    python -m tests.fake_cann.in_torch_npu.ranks SCENARIO RANK

Rank 0 says the port of its store, rank 1 hears it; the last line of each is its result.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch_npu import npu
from torch_npu._C._distributed_c10d import ProcessGroupHCCL

from tests.fake_cann.ranks import hear, say

NUM_BYTES = 3 << 20


def make_group(rank: int) -> Any:
    """Return a group of both processes, without a default group."""
    timeout = timedelta(seconds=20)
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timeout, wait_for_workers=False)
        say(str(store.port))
    else:
        store = TCPStore("127.0.0.1", int(hear()), 2, is_master=False, timeout=timeout)
    return ProcessGroupHCCL(PrefixStore("kv", store), rank, 2)


def content() -> torch.Tensor:
    """Return what rank 0 sends."""
    return torch.arange(NUM_BYTES).to(torch.uint8)


def send_and_receive(rank: int) -> dict[str, Any]:
    """Rank 0 sends on a side stream, rank 1 receives on one."""
    group, side = make_group(rank), npu.Stream()
    with npu.stream(side):
        if rank == 0:
            group.send([content().to("npu:0")], 1, 0).wait()
            side.synchronize()
            return {"default group": dist.is_initialized()}
        target = torch.zeros(NUM_BYTES, dtype=torch.uint8, device="npu:0")
        group.recv([target], 0, 0).wait()
    side.synchronize()
    return {"default group": dist.is_initialized(), "equal": torch.equal(target.cpu(), content())}


if __name__ == "__main__":
    npu.set_device(0)
    say(json.dumps(globals()[sys.argv[1]](int(sys.argv[2]))))
