"""What can be set for HCCL, by environment variables: they concern one host's hardware."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ascend_vllm_plugin.abi import MAX_BUFFER_MB, MIN_BUFFER_MB
from vllm_pd.errors import ConfigError

BACKEND_VARIABLE = "VLLM_PD_HCCL_BACKEND"
BUFFER_VARIABLE = "VLLM_PD_HCCL_BUFFER_MB"
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
        ConfigError: a value is none.
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
    return Settings(backend, int(text), max(1, math.ceil(transfer_timeout_s)))
