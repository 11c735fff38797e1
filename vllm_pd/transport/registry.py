"""Transports by name, through the entry-point group ``vllm_pd.transports``.

A plugin adds a transport by declaring an entry point; nothing here changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.metadata import entry_points

from vllm_pd.errors import ConfigError, TransportUnavailableError
from vllm_pd.transport.base import KVRegion, Transport, TransportOptions
from vllm_pd.transport.fault_spec import VARIABLE, FaultSpec, faults_from
from vllm_pd.transport.faults import FaultyTransport, faulty_options

logger = logging.getLogger(__name__)

GROUP = "vllm_pd.transports"
AUTO_ORDER = ("hccl", "shm", "tcp")
"""Preference of ``auto``, best first; names that are not installed are passed over."""


def known_names() -> list[str]:
    """Return the names of the installed transports."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def create(name: str, options: TransportOptions, faults: FaultSpec | None = None) -> Transport:
    """Load and make one transport, with faults if there are to be any.

    Raises:
        ConfigError: there is no transport of that name.
        TransportUnavailableError: it cannot be used here.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if not found:
        raise ConfigError(f"unknown transport {name!r}", hint=f"known: {', '.join(known_names())}")
    try:
        kind = found[0].load()
    except ImportError as exc:
        raise TransportUnavailableError(f"transport {name}: {exc}") from exc
    if faults is None:
        transport: Transport = kind(options)
        return transport
    if name in faults.refuse:
        raise TransportUnavailableError(f"transport {name} is refused by {VARIABLE}")
    return FaultyTransport(kind(faulty_options(options, faults, name)), faults)


def open_transports(
    names: Sequence[str] | None, regions: Sequence[KVRegion], options: TransportOptions
) -> tuple[dict[str, Transport], dict[str, str]]:
    """Make transports and register the KV cache with them.

    Faults are injected if the environment asks for them.

    Args:
        names: the transports to offer, best first; all must work. None: all of
            ``AUTO_ORDER`` that are installed and work.
        regions: the KV cache.
        options: for every transport.

    Returns:
        Transports by name, best first, and why others are not among them.

    Raises:
        ConfigError: a named transport is unknown, or the faults are.
        TransportUnavailableError: a named transport does not work, or none does.
    """
    faults = faults_from(os.environ, known_names())
    if faults is not None:
        logger.warning("faults are injected into all transfers, by %s=%s", VARIABLE, faults)
    wanted = names if names is not None else [n for n in AUTO_ORDER if n in known_names()]
    transports: dict[str, Transport] = {}
    problems: dict[str, str] = {}
    for name in wanted:
        try:
            transport = create(name, options, faults)
            try:
                transport.register_regions(regions)
            except BaseException:
                transport.close()
                raise
        except TransportUnavailableError as exc:
            if names is not None:
                for opened in transports.values():
                    opened.close()
                raise
            logger.warning("transport %s is not used: %s", name, exc)
            problems[name] = str(exc)
        else:
            transports[name] = transport
    if not transports:
        raise TransportUnavailableError(
            "no transport can reach the KV cache "
            f"({'; '.join(f'{n}: {p}' for n, p in problems.items()) or 'none installed'})"
        )
    return transports, problems
