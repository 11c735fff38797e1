"""The cluster key: one CURVE key pair that all instances of a deployment share.

Whoever can read the file may fetch KV cache, so only its owner may.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from vllm_pd.errors import ConfigError


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public: str
    secret: str


@dataclass(frozen=True, slots=True, repr=False)
class ClusterKey:
    """A CURVE key pair, Z85-encoded."""

    public: bytes
    secret: bytes


def write_cluster_key(path: Path) -> None:
    """Make a new cluster key, readable by its owner only.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    data = msgspec.json.encode(_KeyFile(public.decode(), secret.decode()))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data + b"\n")
    except FileExistsError:
        raise ConfigError(
            f"{path} exists", hint="a new key locks out running instances; delete it first"
        ) from None
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def load_cluster_key(path: Path) -> ClusterKey:
    """Read a cluster key.

    Raises:
        ConfigError: it cannot be read, is damaged, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"cannot read the cluster key {path}: {exc.strerror}", hint="make one: vllm-pd keygen"
        ) from exc
    if mode & 0o077:
        raise ConfigError(
            f"the cluster key {path} is open to other users", hint=f"chmod 600 {path}"
        )
    try:
        keys = msgspec.json.decode(data, type=_KeyFile)
        derived = zmq.curve_public(keys.secret.encode())
    except (msgspec.DecodeError, zmq.ZMQError, ValueError) as exc:
        raise ConfigError(f"{path} is not a cluster key: {exc}") from exc
    if derived != keys.public.encode():
        raise ConfigError(f"{path} is not a cluster key: public and secret do not match")
    return ClusterKey(derived, keys.secret.encode())
