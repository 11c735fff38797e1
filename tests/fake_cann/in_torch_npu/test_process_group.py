"""ProcessGroupHCCL of the real torch_npu on the double, between two processes."""

from __future__ import annotations

import os

from tests.fake_cann.ranks import Child


def test_a_group_sends_bytes_without_a_default_group() -> None:
    ranks = [
        Child(
            *("-m", "tests.fake_cann.in_torch_npu.ranks", "send_and_receive", str(rank)),
            env={**os.environ, "ASCEND_RT_VISIBLE_DEVICES": str(rank)},
        )
        for rank in (0, 1)
    ]
    # torch_npu writes a warning to standard output first.
    port = next(line for line in iter(ranks[0].hear, "") if line.isdigit())
    ranks[1].tell(port)
    first, second = (rank.outcome() for rank in ranks)
    assert first.result == {"default group": False}, first.stderr
    assert second.result == {"default group": False, "equal": True}, second.stderr
