"""What a single CUDA GPU tells about moving KV cache, without vLLM.

    bash benchmarks/gpu/run.sh [--quick] [--json FILE] [--markdown FILE]

For the layouts of CUDA and of Ascend, whole blocks and half of the heads of each, as two
decode ranks for one prefill rank need:

  device copy        the limit of any kernel: a plain copy within the GPU
  gather, scatter    the kernels that collect blocks into a buffer, and the way back
  pinned copies      the limit of staging: one large copy to and from pinned host memory
  staged out         gather and copy to pinned memory, pipelined in chunks of 4 MiB
  tcp                all of it, between two KV caches of this GPU over loopback, verified

The shm transport maps host memory, so it cannot reach the KV cache of a GPU: that is
checked and said. Everything is one process on one GPU; nothing here says how two hosts or
an NPU do. Skips with one line where there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # this is a program, not an installed package

from rich.console import Console  # noqa: E402

from benchmarks.gpu import measures  # noqa: E402
from benchmarks.options import Parser, positive  # noqa: E402
from benchmarks.reporting import (  # noqa: E402
    Report,
    Row,
    check_writable,
    describe_environment,
    write,
)
from benchmarks.transfer.pair import BenchError  # noqa: E402
from vllm_pd.errors import PDError  # noqa: E402
from vllm_pd.transport.base import Heads, KVRegion  # noqa: E402
from vllm_pd.transport.device import TorchDevice  # noqa: E402

HALF: Heads = (0, measures.NUM_HEADS // 2)
CUDA = "cuda"


def reason_to_skip() -> str | None:
    """Return why nothing can be measured here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is found"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status, 0 also if there is no GPU."""
    argv = sys.argv[1:] if argv is None else argv
    args = _make_parser().parse_args(argv)
    if (reason := reason_to_skip()) is not None:
        sys.stdout.write(f"skipped: {reason}; this needs one CUDA GPU\n")
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        for path in filter(None, (args.json, args.markdown)):
            check_writable(path)
        rounds = 3 if args.quick else 20
        rows, notes = _measure(args.mib << 20, rounds, args.seed, console)
        environment = describe_environment("none") | _describe_gpu()
        environment["command"] = shlex.join(["bash", "benchmarks/gpu/run.sh", *argv])
        report = Report("gpu staging", environment, rows, notes)
        console.print(report.markdown())
        if args.json is not None:
            report.write_json(args.json)
        if args.markdown is not None:
            write(args.markdown, report.markdown())
    except (BenchError, PDError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def _measure(
    num_bytes: int, rounds: int, seed: int, console: Console
) -> tuple[list[Row], list[str]]:
    import torch

    rows = _pinned_copies(num_bytes, rounds)
    notes: list[str] = []
    for layout in measures.LAYOUTS:
        console.print(f"measuring {layout.name}")
        source, target = (measures.make_regions(layout, num_bytes, CUDA) for _ in range(2))
        block_ids = _shuffled(source[0].num_blocks, seed), _shuffled(source[0].num_blocks, seed + 1)
        kernels = measures.Kernels(torch.cuda.synchronize)
        limit = kernels.copy(source, rounds)
        rows.append(Row({"layout": layout.name}, "device copy", limit, "GB/s"))
        for name, heads in (("all", None), ("half", HALF)):
            labels = {"layout": layout.name, "heads": name}
            figures = {
                "gather": kernels.gather(source, block_ids[0], heads, rounds),
                "scatter": kernels.scatter(target, block_ids[1], heads, rounds),
                "staged out": measures.stage_out(
                    source, TorchDevice(CUDA), block_ids[0], heads, rounds
                ),
                "tcp": measures.move_by(
                    lambda: measures.transport_of("tcp"), (source, target), block_ids, heads, rounds
                ),
            }
            if not measures.is_moved((source, target), block_ids, heads):
                raise BenchError(f"{layout.name}, {name} heads: what arrived is not what was sent")
            rows += [Row(labels, figure, value, "GB/s") for figure, value in figures.items()]
            rows += [
                Row(labels, f"{figure} to device copy", figures[figure] / limit, "x")
                for figure in ("gather", "scatter")
            ]
        notes += _try_shm(layout, (source, target), block_ids)
        del source, target
    return rows, list(dict.fromkeys(notes))


def _pinned_copies(num_bytes: int, rounds: int) -> list[Row]:
    import torch

    device = TorchDevice(CUDA)
    length = min(num_bytes, 256 << 20)
    kernels = measures.Kernels(torch.cuda.synchronize)
    out, back = kernels.host_copy(
        device.allocate_host(length), device.allocate_device(length), rounds
    )
    return [
        Row({}, "pinned copy to the host", out, "GB/s"),
        Row({}, "pinned copy to the device", back, "GB/s"),
    ]


def _try_shm(
    layout: measures.Layout,
    regions: tuple[list[KVRegion], list[KVRegion]],
    block_ids: tuple[list[int], list[int]],
) -> list[str]:
    """Return why shm does not move this; it is not measured if one day it does."""
    try:
        measures.move_by(lambda: measures.transport_of("shm"), regions, block_ids, None, 1)
    except BenchError as exc:
        return [f"shm is not measured: {exc}"]
    return [f"shm moved {layout.name}, which this program does not expect"]


def _shuffled(count: int, seed: int) -> list[int]:
    ids = list(range(count))
    random.Random(seed).shuffle(ids)
    return ids


def _describe_gpu() -> dict[str, str]:
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{found.name}, {found.total_memory / 2**30:.0f} GiB",
        "cuda": str(torch.version.cuda),
    }


def _make_parser() -> Parser:
    parser = Parser(
        prog="run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="3 rounds instead of 20")
    add("--mib", type=positive, default=1024, metavar="N", help="MiB of each KV cache [1024]")
    add("--seed", type=int, default=1, metavar="N", help="of the order of blocks [1]")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write it as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
