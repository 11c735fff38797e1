"""Log files of the processes: keep, read, follow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TAIL_LEN = 1 << 20


def start_new_log(path: Path) -> None:
    """Make an empty log; the previous one is kept beside it as ``NAME.log.old``."""
    if path.exists():
        path.replace(path.with_name(path.name + ".old"))
    path.touch(mode=0o600)


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log, of its last MiB at most; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_LEN))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines[-count:] if count > 0 else []


class LogFollower:
    """Finds what is added to logs after it was made."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._offsets = {path: _size(path) for path in paths}
        self._rests = dict.fromkeys(self._offsets, b"")

    def new_lines(self) -> list[tuple[str, str]]:
        """Return ``(name, line)`` of the lines completed since the last call."""
        return [(path.stem, line) for path in self._offsets for line in self._read(path)]

    def _read(self, path: Path) -> list[str]:
        size = _size(path)
        if size < self._offsets[path]:  # a new log was started
            self._offsets[path], self._rests[path] = 0, b""
        if size <= self._offsets[path]:
            return []
        with path.open("rb") as file:
            file.seek(self._offsets[path])
            added = file.read()
        self._offsets[path] += len(added)
        *lines, self._rests[path] = (self._rests[path] + added).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
