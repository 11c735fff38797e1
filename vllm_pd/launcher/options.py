"""From the options of ``vllm-pd up`` and a topology file to one topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vllm_pd.config import Role, Topology, load_topology
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.split import parse_shape, with_shape

T = TypeVar("T")

_replace = msgspec.structs.replace


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What the user said on the command line or by environment variables; None: nothing."""

    config: Path | None = None
    model: str | None = None
    served_model_name: str | None = None
    device: str | None = None
    prefill: str | None = None
    decode: str | None = None
    port: int | None = None
    prefill_port: int | None = None
    decode_port: int | None = None
    transport: str | None = None
    max_model_len: int | None = None
    args: tuple[str, ...] = ()


def topology_from(options: UpOptions) -> Topology:
    """Read the topology file, if any, and let the options override it.

    Raises:
        ConfigError: the file or an option is wrong.
    """
    topology = load_topology(options.config) if options.config else Topology()
    changes: dict[str, Any] = {
        key: value
        for key in ("model", "served_model_name", "device")
        if (value := getattr(options, key)) is not None
    }
    changes |= _group_changes(topology, options)
    if options.port is not None:
        changes["router"] = _checked(lambda: _replace(topology.router, port=options.port))
    if options.transport is not None:
        changes["connector"] = _checked(
            lambda: _replace(topology.connector, transport=options.transport)
        )
    if options.args and not options.args[0].startswith("-"):
        raise ConfigError(
            f"unexpected argument {options.args[0]!r}",
            hint="the model is --model; options for vLLM come after --",
        )
    args = list(topology.args)
    if options.max_model_len is not None:
        args += ["--max-model-len", str(options.max_model_len)]
    changes["args"] = (*args, *options.args)
    return _checked(lambda: _replace(topology, **changes))


def _group_changes(topology: Topology, options: UpOptions) -> dict[str, Any]:
    """Return the changed groups and ports of both roles."""
    changes: dict[str, Any] = {}
    for role in Role:
        group = getattr(topology, role.value)
        if (text := getattr(options, role.value)) is not None:
            group = with_shape(group, parse_shape(text, role=role))
        if (port := getattr(options, f"{role.value}_port")) is not None:
            changes[f"{role.value}_port"] = port
            group = _replace(group, port=None) if group else None
        changes[role.value] = group
    return changes


def _checked(make: Callable[[], T]) -> T:
    """Make a struct, and blame the user's options for what its checks refuse."""
    try:
        return make()
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
