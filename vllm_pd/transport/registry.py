"""Transports by name, through the entry-point group ``vllm_pd.transports``.

A plugin adds a transport by declaring an entry point; nothing here changes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import entry_points

from vllm_pd.errors import ConfigError, TransportUnavailableError
from vllm_pd.transport.base import KVRegion, Transport, TransportOptions

logger = logging.getLogger(__name__)

GROUP = "vllm_pd.transports"
AUTO_ORDER = ("hccl", "shm", "tcp")
"""Preference of ``auto``, best first; names that are not installed are passed over."""


def known_names() -> list[str]:
    """Return the names of the installed transports."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def create(name: str, options: TransportOptions) -> Transport:
    """Load and make one transport.

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
    transport: Transport = kind(options)
    return transport


def open_transports(
    names: Sequence[str] | None, regions: Sequence[KVRegion], options: TransportOptions
) -> dict[str, Transport]:
    """Make transports and register the KV cache with them.

    Args:
        names: the transports to offer, best first; all must work. None: all of
            ``AUTO_ORDER`` that are installed and work.
        regions: the KV cache.
        options: for every transport.

    Returns:
        Transports by name, best first.

    Raises:
        ConfigError: a named transport is unknown.
        TransportUnavailableError: a named transport does not work, or none does.
    """
    wanted = names if names is not None else [n for n in AUTO_ORDER if n in known_names()]
    transports: dict[str, Transport] = {}
    problems: list[str] = []
    for name in wanted:
        try:
            transport = create(name, options)
            try:
                transport.register_regions(regions)
            except TransportUnavailableError:
                transport.close()
                raise
        except TransportUnavailableError as exc:
            if names is not None:
                for opened in transports.values():
                    opened.close()
                raise
            logger.warning("transport %s is not used: %s", name, exc)
            problems.append(f"{name}: {exc}")
        else:
            transports[name] = transport
    if not transports:
        raise TransportUnavailableError(
            f"no transport can reach the KV cache ({'; '.join(problems) or 'none installed'})"
        )
    return transports
