"""The GPU benchmark's measurements, on host memory and on the stand-in device."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import measures, staging
from benchmarks.transfer.pair import REPO, BenchError
from tests.stand_in_device import StandInDevice
from vllm_pd.transport.base import Heads, KVRegion, TransportOptions
from vllm_pd.transport.tcp import TcpTransport

LAYOUT = measures.Layout("small", 4)
NUM_BLOCKS = 6
SOURCE_IDS, TARGET_IDS = [3, 1, 0, 5], [0, 2, 4, 1]


def regions() -> list[KVRegion]:
    return measures.make_regions(LAYOUT, 2 * NUM_BLOCKS * LAYOUT.block_len, "cpu", num_regions=2)


@pytest.fixture
def device() -> Iterator[StandInDevice]:
    device = StandInDevice()
    yield device
    device.close()


def placed(on_host: list[KVRegion], device: StandInDevice) -> list[KVRegion]:
    return [
        dataclasses.replace(one, addr=8, device="stand-in", tensor=device.place(one.tensor))
        for one in on_host
    ]


def test_cache_has_the_blocks_of_its_layout() -> None:
    (first, _) = regions()
    assert (first.num_blocks, first.block_len) == (NUM_BLOCKS, LAYOUT.block_len)
    assert first.tensor.nbytes == NUM_BLOCKS * LAYOUT.block_len


def test_gather_and_scatter_have_a_rate() -> None:
    kernels = measures.Kernels(lambda: None)
    for heads in (None, staging.HALF):
        assert kernels.gather(regions(), SOURCE_IDS, heads, rounds=1) > 0
        assert kernels.scatter(regions(), TARGET_IDS, heads, rounds=1) > 0
    assert kernels.copy(regions(), rounds=1) > 0


def test_pinned_copies_have_a_rate_in_both_directions() -> None:
    kernels = measures.Kernels(lambda: None)
    assert all(rate > 0 for rate in kernels.host_copy(torch.zeros(9), torch.ones(9), rounds=1))


def test_staging_takes_every_chunk(device: StandInDevice) -> None:
    on_device = placed(regions(), device)
    assert measures.stage_out(on_device, device, SOURCE_IDS, None, rounds=2) > 0


@pytest.mark.parametrize("heads", [None, staging.HALF])
def test_transport_moves_what_is_checked_afterwards(
    device: StandInDevice, heads: Heads | None
) -> None:
    on_host = regions(), regions()
    on_device = placed(on_host[0], device), placed(on_host[1], device)
    block_ids = SOURCE_IDS, TARGET_IDS
    assert not measures.is_moved(on_host, block_ids, heads)
    rate = measures.move_by(
        lambda: TcpTransport(TransportOptions(), open_device=lambda _: device),
        on_device,
        block_ids,
        heads,
        rounds=1,
    )
    assert rate > 0
    assert measures.is_moved(on_host, block_ids, heads)


def test_transport_that_cannot_reach_the_memory_says_why(device: StandInDevice) -> None:
    on_device = placed(regions(), device), placed(regions(), device)
    with pytest.raises(BenchError, match="stand-in memory"):
        measures.move_by(
            lambda: measures.transport_of("shm"), on_device, (SOURCE_IDS, TARGET_IDS), None, 1
        )


@pytest.mark.skipif(staging.reason_to_skip() is None, reason="there is a GPU here")
def test_without_a_gpu_it_is_skipped_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert staging.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped: ")
    assert out.count("\n") == 1


def test_script_starts_the_program_from_any_folder(tmp_path: Path) -> None:
    command = ["bash", str(REPO / "benchmarks/gpu/run.sh"), "--help"]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "single CUDA GPU" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(staging.reason_to_skip() is not None, reason="there is no GPU here")
def test_gpu_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert staging.main(["--quick", "--mib", "64"]) == 0
    assert "| tcp |" in capsys.readouterr().out
