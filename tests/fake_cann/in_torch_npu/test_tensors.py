"""Tensors of the real torch_npu on the double: what moves KV blocks gives the right values."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch_npu import npu

NPU = "npu:0"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.int64]
# [blocks, tokens, heads, head size] as in vllm-ascend: GQA, and both parts of MLA's pair.
SHAPES = [(6, 4, 2, 8), (6, 4, 1, 16), (6, 4, 1, 2)]


@pytest.fixture(autouse=True)
def device() -> None:
    npu.set_device(0)


def cache(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a cache on the host whose values all differ, as far as the type allows."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def is_equal(on_device: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare bytes."""
    return torch.equal(on_device.cpu().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_between_host_and_device_keep_every_byte(dtype: torch.dtype) -> None:
    host = cache((6, 4, 2, 8), dtype)
    assert is_equal(host.to(NPU), host)


def test_copies_inside_the_device_keep_every_byte() -> None:
    host = cache((6, 4, 2, 8))
    device = host.to(NPU)
    target = torch.empty_like(device)
    target.copy_(device)
    assert is_equal(target, host)


@pytest.mark.parametrize("shape", SHAPES)
def test_index_select_gathers_blocks(shape: tuple[int, ...]) -> None:
    host, blocks = cache(shape), torch.tensor([4, 0, 5])
    assert is_equal(host.to(NPU).index_select(0, blocks.to(NPU)), host.index_select(0, blocks))


def test_index_select_writes_into_a_buffer() -> None:
    host, blocks = cache((6, 4, 2, 8)), torch.tensor([4, 0, 5], dtype=torch.int32)
    buffer = torch.zeros(3, 4, 2, 8, dtype=host.dtype, device=NPU)
    torch.index_select(host.to(NPU), 0, blocks.to(NPU), out=buffer)
    assert is_equal(buffer, host.index_select(0, blocks))


@pytest.mark.parametrize("shape", SHAPES)
def test_index_copy_scatters_blocks(shape: tuple[int, ...]) -> None:
    host, blocks = torch.zeros(shape, dtype=torch.bfloat16), torch.tensor([4, 0, 5])
    source, target = cache((3, *shape[1:])), host.to(NPU)
    target.index_copy_(0, blocks.to(NPU), source.to(NPU))
    assert is_equal(target, host.index_copy(0, blocks, source))


def test_index_copy_scatters_into_some_heads() -> None:
    host, blocks = torch.zeros(6, 4, 4, 8, dtype=torch.bfloat16), torch.tensor([4, 0])
    source, target = cache((2, 4, 2, 8)), host.to(NPU)
    target[:, :, 2:].index_copy_(0, blocks.to(NPU), source.to(NPU))
    host[:, :, 2:].index_copy_(0, blocks, source)
    assert is_equal(target, host)


def test_strided_views_become_contiguous() -> None:
    host = cache((6, 4, 4, 8))
    assert is_equal(host.to(NPU)[:, :, 1:3].contiguous(), host[:, :, 1:3])
    assert is_equal(host.to(NPU).transpose(1, 2).contiguous(), host.transpose(1, 2))


def test_strided_views_take_copies() -> None:
    host, part = torch.zeros(6, 4, 4, 8, dtype=torch.bfloat16), cache((6, 4, 2, 8))
    target = host.to(NPU)
    target[:, :, 1:3].copy_(part.to(NPU))
    host[:, :, 1:3].copy_(part)
    assert is_equal(target, host)


def test_tensors_are_made_with_a_value() -> None:
    assert is_equal(torch.zeros(3, 5, device=NPU), torch.zeros(3, 5))
    assert is_equal(torch.ones(3, 5, device=NPU), torch.ones(3, 5))
    assert is_equal(
        torch.full((3, 5), 2.5, dtype=torch.bfloat16, device=NPU),
        torch.full((3, 5), 2.5, dtype=torch.bfloat16),
    )


def test_tensors_are_put_together() -> None:
    host = cache((6, 4, 2, 8))
    device = host.to(NPU)
    assert is_equal(torch.cat([device, device[:2]]), torch.cat([host, host[:2]]))
    assert is_equal(torch.stack([device, device], dim=1), torch.stack([host, host], dim=1))


def test_types_are_converted() -> None:
    host = torch.tensor([0.0, 1.0, -2.5, 3.14159265, 65504.0])
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        assert is_equal(host.to(NPU).to(dtype), host.to(dtype))


def test_pinned_memory_takes_asynchronous_copies() -> None:
    host = cache((6, 4, 2, 8))
    pinned = torch.empty_like(host, pin_memory=True)
    assert pinned.is_pinned()
    pinned.copy_(host.to(NPU), non_blocking=True)
    npu.synchronize()
    assert torch.equal(pinned, host)


def after(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code behind a tensor on the device, in a process that it may ruin."""
    setup = "import torch\ntorch.npu.set_device(0)\nx = torch.zeros(4, 8, device='npu:0')\n"
    return subprocess.run(
        [sys.executable, "-c", setup + code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_operator_that_is_not_provided_ends_the_process_by_its_name() -> None:
    done = after("print((x + x).cpu())")
    assert done.returncode != 0
    assert "the operator Add is not provided by the double" in done.stderr
    assert "tensor" not in done.stdout


def test_an_index_out_of_range_is_an_error_of_the_device() -> None:
    code = "x.index_select(0, torch.tensor([9]).to('npu:0'))\ntorch.npu.synchronize()"
    done = after(code)
    assert done.returncode != 0
    assert "507015" in done.stderr


def test_device_memory_runs_out() -> None:
    done = after("torch.empty(65 << 30, dtype=torch.int8, device='npu:0')")
    assert "torch.OutOfMemoryError" in done.stderr


def test_expandable_segments_hold_tensors() -> None:
    """The image's documents ask for this setting."""
    code = "print(torch.cat([x, x]).cpu().sum(), torch.npu.memory_allocated() > 0)"
    done = after(code, PYTORCH_NPU_ALLOC_CONF="expandable_segments:True")
    assert "tensor(0.) True" in done.stdout, done.stderr
