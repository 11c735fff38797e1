"""Ranges of ports that a deployment has promised to its instances, seen by all others.

HCCL binds its ports when it needs them, long after the launch. So a deployment claims
them for as long as it lives, by names of abstract Unix sockets: the kernel gives each to
one process, in the whole network namespace as it does with ports, and takes it back when
the last holder ends, however it ends; unix(7). A name stands for a block of ports, so
ranges that overlap without being equal are told apart, too.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vllm_pd.errors import ConfigError
from vllm_pd.launcher.npu_env import PORT_RANGE_VARIABLES
from vllm_pd.launcher.plan import DeploymentPlan

BLOCK_LEN = 64
"""Ports that one name stands for."""

_PREFIX = "vllm-pd/hccl-ports/"


def claimed_ports(proc_net: Path = Path("/proc/net")) -> frozenset[int]:
    """Return the ports that deployments of this host have claimed."""
    try:
        text = (proc_net / "unix").read_text(errors="replace")
    except OSError:
        return frozenset()
    blocks = re.findall(rf"@{_PREFIX}(\d+)$", text, flags=re.MULTILINE)
    return frozenset(port for block in blocks for port in range(int(block), int(block) + BLOCK_LEN))


@contextmanager
def claim_ports(plan: DeploymentPlan) -> Iterator[tuple[int, ...]]:
    """Claim the ranges of a plan; yield descriptors that hold them.

    A process that inherits the descriptors goes on holding them.

    Raises:
        ConfigError: another deployment has claimed some since the plan was made.
    """
    with ExitStack() as stack:
        fds = []
        for block in sorted(_blocks(_ranges_of(plan))):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            try:
                sock.bind(f"\0{_PREFIX}{block}")
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                raise ConfigError(
                    f"ports {block} to {block + BLOCK_LEN - 1} are another deployment's, for HCCL",
                    hint="start again, and ranges that are free are chosen; where the topology "
                    "file names ranges, name others",
                ) from exc
            fds.append(sock.fileno())
        yield tuple(fds)


def _ranges_of(plan: DeploymentPlan) -> Iterator[range]:
    for spec in plan.processes:
        for name in PORT_RANGE_VARIABLES:
            # HCCL takes lists of ranges and "auto", too; those are the user's own affair.
            if found := re.fullmatch(r"(\d+)-(\d+)", spec.env.get(name, "")):
                yield range(int(found[1]), int(found[2]) + 1)


def _blocks(ranges: Iterable[range]) -> set[int]:
    """Return the first ports of all blocks that ranges have a port of."""
    return {port - port % BLOCK_LEN for ports in ranges for port in ports}
