"""Environment of instances on NPUs, so that none takes another's addresses or ports. Pure.

Variables as in the documents of vllm-ascend 0.23.0 and HCCL 9.1; those that the user has
set are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_pd.errors import ConfigError

FIRST_PORT = 61000
"""Above the ports that Linux gives to clients (``net.ipv4.ip_local_port_range``)."""

RANGE_LEN = 64
"""Ports per instance and kind: HCCL's own default is 32 for all ranks of a host."""

_LAST_PORT = 65535

PORT_RANGE_VARIABLES = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")

DEFAULTS = {
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "TASK_QUEUE_ENABLE": "1",
    "HCCL_BUFFSIZE": "256",
}
"""For every instance, unless the user sets them."""


@dataclass(frozen=True, slots=True)
class Network:
    """Where other instances reach this host.

    Attributes:
        host_ip: address.
        interface: the network interface that has it; ``""`` if it is not known.
    """

    host_ip: str
    interface: str = ""


def exec_timeout_env(environ: Mapping[str, str], transfer_timeout_s: float) -> dict[str, str]:
    """Return what an instance needs whose KV cache goes over process groups.

    Their operations wait for a lost peer as long as HCCL lets all of the process wait,
    1836 s by default; communicators of ascend-vllm-plugin's own have their own timeout.

    Args:
        environ: of the instance.
        transfer_timeout_s: the connector's; HCCL takes whole seconds.
    """
    if environ.get("VLLM_PD_HCCL_BACKEND") != "process_group" or "HCCL_EXEC_TIMEOUT" in environ:
        return {}
    return {"HCCL_EXEC_TIMEOUT": str(max(1, math.ceil(transfer_timeout_s)))}


def unset_port_ranges(environ: Mapping[str, str]) -> list[str]:
    """Return which of HCCL's two ranges of ports the user leaves to the launcher."""
    return [name for name in PORT_RANGE_VARIABLES if name not in environ]


def port_ranges(num_ranges: int, taken: Collection[int]) -> list[range]:
    """Return ranges that share no port with each other or with what is taken.

    Raises:
        ConfigError: there are not so many.
    """
    free = _free_ranges(taken)
    ranges = [found for _, found in zip(range(num_ranges), free, strict=False)]
    if len(ranges) < num_ranges:
        raise ConfigError(
            f"{num_ranges} ranges of {RANGE_LEN} ports wanted for HCCL, {len(ranges)} are free "
            f"from {FIRST_PORT} to {_LAST_PORT}",
            hint="use fewer instances, or set HCCL_HOST_SOCKET_PORT_RANGE and "
            "HCCL_NPU_SOCKET_PORT_RANGE in env of the topology file",
        )
    return ranges


def _free_ranges(taken: Collection[int]) -> Iterator[range]:
    first = FIRST_PORT
    while first + RANGE_LEN - 1 <= _LAST_PORT:
        found = range(first, first + RANGE_LEN)
        if clash := [port for port in found if port in taken]:
            first = clash[-1] + 1
            continue
        yield found
        first = found.stop


def npu_envs(
    environs: Sequence[Mapping[str, str]], network: Network | None, taken: Collection[int]
) -> list[dict[str, str]]:
    """Return the variables of each instance.

    Args:
        environs: what the user sets for each, in the environment or in the topology file.
        network: how peers reach this host; None: HCCL finds out.
        taken: ports that are in use or promised to others.

    Raises:
        ConfigError: there are not enough ports.
    """
    common = dict(DEFAULTS)
    if network is not None:
        common["HCCL_IF_IP"] = network.host_ip
        if network.interface:
            for name in ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
                common[name] = network.interface
    ranges = iter(port_ranges(sum(len(unset_port_ranges(its)) for its in environs), taken))
    envs = []
    for environ in environs:
        env = {name: value for name, value in common.items() if name not in environ}
        for name in unset_port_ranges(environ):
            ports = next(ranges)
            env[name] = f"{ports.start}-{ports.stop - 1}"
        envs.append(env)
    return envs
