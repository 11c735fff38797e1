"""What can be set for HCCL, by environment variables: they concern one host's hardware."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ascend_vllm_plugin.abi import MAX_BUFFER_MB, MIN_BUFFER_MB
from vllm_pd.errors import ConfigError

BACKEND_VARIABLE = "VLLM_PD_HCCL_BACKEND"
BUFFER_VARIABLE = "VLLM_PD_HCCL_BUFFER_MB"
EXEC_TIMEOUT_VARIABLE = "HCCL_EXEC_TIMEOUT"
DEFAULT_EXEC_TIMEOUT = "1836"  # HCCL_EXEC_TIMEOUT.md of HCCL 9.1
BACKENDS = ("ctypes", "process_group")
DEFAULT_BUFFER_MB = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """Of all communicators of a worker.

    Attributes:
        backend: ``ctypes`` or ``process_group``.
        buffer_mb: size of each of a communicator's two buffers, in MB.
        exec_timeout_s: longest wait of an operation for its other half, in seconds.
    """

    backend: str
    buffer_mb: int
    exec_timeout_s: int


def settings_from(environ: Mapping[str, str], transfer_timeout_s: float) -> Settings:
    """Read the settings.

    Args:
        environ: the environment.
        transfer_timeout_s: the connector's; HCCL takes whole seconds.

    Raises:
        ConfigError: a value is none, or ``process_group`` would wait longer than that.
    """
    backend = environ.get(BACKEND_VARIABLE) or BACKENDS[0]
    if backend not in BACKENDS:
        raise ConfigError(
            f"{BACKEND_VARIABLE}={backend} is no backend", hint=f"use one of {', '.join(BACKENDS)}"
        )
    text = environ.get(BUFFER_VARIABLE) or str(DEFAULT_BUFFER_MB)
    if not (text.isdecimal() and MIN_BUFFER_MB <= int(text) <= MAX_BUFFER_MB):
        raise ConfigError(
            f"{BUFFER_VARIABLE}={text} is not between {MIN_BUFFER_MB} and {MAX_BUFFER_MB}"
        )
    exec_timeout_s = max(1, math.ceil(transfer_timeout_s))
    if backend == "process_group":
        _check_exec_timeout(environ, exec_timeout_s)
    return Settings(backend, int(text), exec_timeout_s)


def _check_exec_timeout(environ: Mapping[str, str], limit_s: int) -> None:
    """Refuse operations of process groups that would outlive the transfers they are for."""
    text = environ.get(EXEC_TIMEOUT_VARIABLE) or DEFAULT_EXEC_TIMEOUT
    if not (text.isdecimal() and 1 <= int(text) <= limit_s):  # 0: no end at all
        raise ConfigError(
            f"{EXEC_TIMEOUT_VARIABLE} is {text}, and with {BACKEND_VARIABLE}=process_group a lost "
            f"peer holds requests and their blocks that long, not transfer_timeout_s ({limit_s} s)",
            hint=f"set {EXEC_TIMEOUT_VARIABLE}={limit_s} on both sides, raise transfer_timeout_s, "
            f"or use {BACKEND_VARIABLE}=ctypes",
        )
