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

In a router of several processes each reads the file, and the first that sees a change
has all of them make it, so that they do so in the same order as changes by ``/admin``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from vllm_pd.config import InstanceSpec, from_mapping, load_mapping
from vllm_pd.errors import ConfigError
from vllm_pd.router.addresses import base_url, control_address, instance_id
from vllm_pd.router.files import stamp_of
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.workers import changes
from vllm_pd.router.workers.changes import Add, Change, Drain

logger = logging.getLogger(__name__)


class _Content(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    instances: tuple[InstanceSpec, ...]


class InstancesFile:
    """Keeps a pool as a file says.

    Args:
        path: of the file.
        pool: what the file says now is done there at once.
        tell: has all processes of the router do what the file says later, each by
            ``make``; None: there is one process.

    Raises:
        ConfigError: the file cannot be read, or is wrong.
    """

    def __init__(
        self,
        path: Path,
        pool: InstancePool,
        *,
        tell: Callable[[tuple[Change, ...]], None] | None = None,
    ) -> None:
        self._path = path
        self._pool = pool
        self._tell = tell or self.make
        self._applied: dict[str, InstanceSpec] = {}
        self._stamp = stamp_of(path)
        self.make(self._changes(_read(path)))

    @property
    def names(self) -> tuple[str, ...]:
        """Ids of the instances that the file names, as far as that was done."""
        return tuple(self._applied)

    def reload_if_changed(self) -> None:
        """Read the file again if it is not the one of before.

        If it cannot be used, that is logged once and the instances stay as they are.
        """
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            if wanted := self._changes(_read(self._path)):
                self._tell(wanted)
        except ConfigError as exc:
            logger.error("the instances stay as they are: %s", exc)  # noqa: TRY400 - one line

    async def watch(self, interval_s: float) -> None:
        """Follow changes of the file until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            self.reload_if_changed()

    def make(self, wanted: Iterable[Change]) -> None:
        """Make changes that a process of the router, maybe this one, has seen in the file."""
        for change in wanted:
            changes.make(change, self._pool)
            if isinstance(change, Add):
                self._applied[change.name] = change.spec
            else:
                self._applied.pop(change.name, None)

    def _changes(self, wanted: dict[str, InstanceSpec]) -> tuple[Change, ...]:
        gone = (Drain(name) for name in self._applied if name not in wanted)
        new = (Add(spec) for name, spec in wanted.items() if self._applied.get(name) != spec)
        return (*gone, *new)


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
