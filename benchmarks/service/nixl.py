"""The peer: vLLM's NixlConnector between the same instances, behind this project's router."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.service.servers import Engine, Service, free_ports, routed, served
from benchmarks.transfer import peers

NAME = "nixl"

KV_TRANSFER = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "recompute",
}


def find_packages() -> Path:
    """Return the folder of the peer's packages, installed if they are missing.

    Raises:
        BenchError: they cannot be installed.
    """
    python = peers.find_environment() or peers.make_environment()
    (packages,) = (python.parents[1] / "lib").glob("python*/site-packages")
    return packages


def link_packages(packages: Path, folder: Path) -> None:
    """Make a folder with nothing but the peer, which can come before the engine's packages."""
    shutil.rmtree(folder, ignore_errors=True)  # of another run
    folder.mkdir()
    for package in packages.glob("nixl*"):
        (folder / package.name).symlink_to(package)


@contextlib.contextmanager
def deployed(engine: Engine, cores: tuple[int, int], packages: Path) -> Iterator[Service]:
    """Run one prefill and one decode instance, and the router.

    Raises:
        BenchError: one of them does not start.
    """
    folder = engine.folder / "packages"
    link_packages(packages, folder)
    args = ("--kv-transfer-config", json.dumps(KV_TRANSFER))
    with contextlib.ExitStack() as stack:
        instances = []
        for role, core, port in zip(("prefill", "decode"), cores, free_ports(2), strict=True):
            env = variables(folder, port)
            name = f"{NAME}-{role}"
            instances.append(stack.enter_context(served(engine, name, core, *args, env=env)))
        yield stack.enter_context(routed(engine, NAME, *instances))


def variables(packages: Path, port: int) -> dict[str, str]:
    """Return the environment of an instance.

    Args:
        packages: folder with the peer and nothing else.
        port: of its side channel.
    """
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH")))),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
        "NIXL_LOG_LEVEL": "WARN",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
