"""The file of instances, which may change while the router runs.

It looks like this::

    instances:
      - url: http://10.0.0.1:8100
        role: prefill
        control: 10.0.0.1:5600
      - url: http://10.0.0.2:8200
        role: decode

An instance that is new in the file is added, a changed one is changed, and one that
is in it no more is drained. What the file does not name is left alone, and so is what
``/admin`` has changed since, until its entry in the file changes.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from vllm_pd.config import InstanceSpec, from_mapping, load_mapping
from vllm_pd.errors import ConfigError
from vllm_pd.router.addresses import base_url, control_address, instance_id
from vllm_pd.router.files import stamp_of
from vllm_pd.router.instances import InstancePool

logger = logging.getLogger(__name__)


class _Content(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    instances: tuple[InstanceSpec, ...]


class InstancesFile:
    """Keeps a pool as a file says.

    Raises:
        ConfigError: the file cannot be read, or is wrong.
    """

    def __init__(self, path: Path, pool: InstancePool) -> None:
        self._path = path
        self._pool = pool
        self._applied: dict[str, InstanceSpec] = {}
        self._stamp = stamp_of(path)
        self._apply(_read(path))

    def reload_if_changed(self) -> None:
        """Read the file again if it is not the one of before.

        If it cannot be used, that is logged once and the instances stay as they are.
        """
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._apply(_read(self._path))
        except ConfigError as exc:
            logger.error("the instances stay as they are: %s", exc)  # noqa: TRY400 - one line

    async def watch(self, interval_s: float) -> None:
        """Follow changes of the file until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            self.reload_if_changed()

    def _apply(self, wanted: dict[str, InstanceSpec]) -> None:
        for name in self._applied:
            if name in wanted:
                continue
            if (instance := self._pool.get(name)) is not None:
                self._pool.drain(instance)
        for name, spec in wanted.items():
            if self._applied.get(name) != spec:
                self._pool.add(spec)
        self._applied = wanted


def _read(path: Path) -> dict[str, InstanceSpec]:
    """Return all entries by instance id, so that nothing is applied of a file that is wrong.

    Raises:
        ConfigError: the file cannot be read, or is wrong.
    """
    content = from_mapping(_Content, load_mapping(path), source=str(path))
    specs: dict[str, InstanceSpec] = {}
    for spec in content.instances:
        try:
            name = instance_id(base_url(spec.url))
            if spec.control is not None:
                control_address(spec.control)
        except ConfigError as exc:
            raise ConfigError(f"{path}: {exc}") from exc
        if name in specs:
            raise ConfigError(f"{path}: instance {name} is there twice")
        specs[name] = spec
    return specs
