"""What the programs that start deployments have in common on the command line."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparing.deployments import Site, check_pool
from benchmarks.options import Parser, positive, read_number
from benchmarks.service.servers import ENGINE_ARGS, dtype_args
from benchmarks.transfer.pair import REPO, BenchError
from vllm_pd.demo.model import Geometry, write_untrained_model
from vllm_pd.launcher.devices import detect_device, find_pool

GEOMETRY = Geometry(hidden_size=512, num_layers=12, num_heads=8, num_kv_heads=8, head_size=64)
"""As in ``service_overhead.py``: 41 million parameters, heavy enough to have a prefill."""

_AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")

_OWN_ARGS = (*ENGINE_ARGS, "--no-enable-prefix-caching")


def make_parser(program: str, description: str) -> Parser:
    """Return a parser with what says where and how engines run."""
    parser = Parser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("args", nargs="*", metavar="-- ARG", help="for every vllm serve")
    add("--model", metavar="PATH", help="checkpoint folder or name [an untrained 41M model]")
    add("--device", choices=("npu", "cuda", "cpu"), help="[the first of these that is found]")
    add("--devices", metavar="I,J", help="devices or CPU cores, an even number [all of them]")
    add("--kv-gib", type=positive, default=1, metavar="N", help="CPU: KV cache of an instance [1]")
    return parser


def make_site(args: argparse.Namespace, folder: Path) -> Site:
    """Return where deployments run, by the options of ``make_parser``.

    The untrained model is written into ``folder`` if no model is named.

    Raises:
        BenchError: the devices cannot be halved, or are not there.
        ConfigError: the model cannot be written.
    """
    device = args.device or detect_device(os.environ)
    there = tuple(find_pool(device, os.environ))
    pool = tuple(args.devices.split(",")) if args.devices else there[: len(there) // 2 * 2]
    if missing := [name for name in pool if name not in there]:
        raise BenchError(f"there is no device {missing[0]}; there are {', '.join(there)}")
    check_pool(pool)
    model = args.model
    if model is None:
        path = folder / "model"
        write_untrained_model(path, GEOMETRY)
        model = str(path)
    # The user's come last, so that they win.
    own_args = _OWN_ARGS if args.model is None else ()
    engine_args = (*dtype_args(device, args.model), *own_args, *args.args)
    return Site(model, device, pool, engine_args, args.kv_gib, folder)


def describe_site(site: Site) -> dict[str, str]:
    """Return what a reader must know of it."""
    return {
        "model": f"untrained, {GEOMETRY.num_layers} layers, hidden {GEOMETRY.hidden_size}"
        if site.model == str(site.folder / "model")
        else site.model,
        "devices": f"{site.device} {', '.join(site.pool)}",
        "vllm serve": " ".join(site.args) or "no further options",
    }


def warnings_of(site: Site, autogroup: Path = _AUTOGROUP) -> list[str]:
    """Return what of this machine makes figures worth less.

    Args:
        site: where deployments run.
        autogroup: where the kernel tells whether it schedules Unix sessions as groups.
    """
    try:
        is_on = autogroup.read_text().strip() == "1"
    except OSError:
        is_on = False
    if site.device != "cpu" or not is_on:
        return []
    return [
        "The kernel schedules Unix sessions as groups here. What `vllm-pd up` starts and the load "
        "generator are in different ones, and on shared cores either may stand still for seconds: "
        "gaps of seconds are not those of the service. Without it: "
        "sysctl kernel.sched_autogroup_enabled=0"
    ]


def default_output(name: str) -> Path:
    """Return ``benchmarks/results/<date>-<machine>/<name>``."""
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return REPO / "benchmarks/results" / f"{day}-{platform.node() or 'machine'}" / name


def make_output(path: Path) -> None:
    """Make the folder of the results.

    Raises:
        BenchError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise BenchError(f"cannot make {path}: {exc.strerror}") from exc
    if not os.access(path, os.W_OK):
        raise BenchError(f"{path} cannot be written: no permission")


def share(text: str) -> float:
    """Read a share of the capacity, or ``inf``.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    value = read_number(text)
    if not (0 < value <= 2 or value == math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 to 2 times the capacity nor inf")
    return value


def seconds(text: str) -> float:
    """Read a positive number of seconds.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    value = read_number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def chosen(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the names that are wanted, in their own order."""
    return tuple(name for name in names if name in wanted)
