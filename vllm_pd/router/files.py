"""Small files that the router reads: when they have changed, and secrets in them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vllm_pd.errors import ConfigError

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """Return what changes when a file is written or replaced; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_secret(path: Path) -> str:
    """Return the text of a file that nobody else should read.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read()
            mode = os.fstat(file.fileno()).st_mode
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    if mode & 0o077:
        logger.warning("%s is open to other users (chmod 600 closes it)", path)
    return text


def read_credential(path: Path) -> str:
    """Return the key that is the only content of a file.

    Raises:
        ConfigError: it cannot be read, or is not a key that a header can carry.
    """
    key = read_secret(path).strip()
    if not is_credential(key):
        raise ConfigError(f"{path}: expected one line of printable ASCII without spaces")
    return key


def is_credential(text: str) -> bool:
    """Return whether a header can carry this as a key."""
    return text.isascii() and text.isprintable() and bool(text) and " " not in text
