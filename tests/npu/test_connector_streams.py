"""Streams of communicators, from torch_npu's own pool."""

from __future__ import annotations

from ascend_vllm_plugin.device import POOL_LEN, NpuDevice
from ascend_vllm_plugin.transport import MAX_PAIRS

from tests.npu.groups import NPU


def test_streams_in_use_are_not_handed_out_again() -> None:
    device = NpuDevice(0)
    old = [device.make_stream() for _ in range(MAX_PAIRS)]
    numbers = {stream.number for stream in old}
    for _ in range(100):  # peers come and go
        stream = device.make_stream()
        numbers.add(stream.number)
        device.take_back(stream)
    assert len(numbers) == MAX_PAIRS + 1


def test_pool_of_torch_npu_is_as_long_as_was_read() -> None:
    drawn = [NPU.Stream(device=1) for _ in range(2 * POOL_LEN)]
    assert len({stream.stream_id for stream in drawn}) == POOL_LEN
