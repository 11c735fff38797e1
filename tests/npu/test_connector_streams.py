"""Streams of communicators, from torch_npu's own pool."""

from __future__ import annotations

from ascend_vllm_plugin.device import NpuDevice

NUM_STREAMS = 16  # of a worker with as many communicators as it may have


def test_streams_in_use_are_not_handed_out_again() -> None:
    device = NpuDevice(0)
    old = [device.make_stream() for _ in range(NUM_STREAMS)]
    for _ in range(40):  # peers come and go
        device.make_stream()
    young = [device.make_stream() for _ in range(NUM_STREAMS)]
    assert len({stream.number for stream in old + young}) == 2 * NUM_STREAMS
