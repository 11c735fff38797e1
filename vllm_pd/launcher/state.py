"""The state file: what runs, so that another command can find and stop it."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

import msgspec

from vllm_pd.errors import LaunchError
from vllm_pd.launcher.process import ProcessIdentity

STATE_VERSION = 2


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the deployment.

    Attributes:
        name: as in the plan.
        role: as in the plan.
        url: address that it serves.
        log_path: its output; a process is known to be ours by it, too.
        devices: for people.
        status: ``starting``, ``ready``, ``restarting``, ``failed`` or ``stopping``.
        identity: the process itself; None: not started, or gone.
        num_restarts: restarts since ``up``.
        last_exit: how it ended the last time, for people.
    """

    name: str
    role: str
    url: str
    log_path: str
    devices: str = ""
    status: str = "starting"
    identity: ProcessIdentity | None = None
    num_restarts: int = 0
    last_exit: str | None = None


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The whole deployment.

    Attributes:
        phase: ``starting``, ``up`` or ``stopping``.
        stop_timeout_s: longest wait for a process to stop by itself.
    """

    version: int = STATE_VERSION
    phase: str = "starting"
    model: str
    served_model_name: str
    device: str
    router_url: str
    stop_timeout_s: float
    supervisor: ProcessIdentity
    processes: tuple[ProcessRecord, ...] = ()


def load_state(path: Path) -> State | None:
    """Read the state file; None: nothing is recorded.

    Raises:
        LaunchError: the file cannot be read, or is not what ``save_state`` writes.
    """
    folder = shlex.quote(str(path.parent))
    hint = f"vllm-pd down --force --run-dir {folder} stops what it can prove to be its own"
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise LaunchError(f"cannot read state file {path}: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise LaunchError(f"state file {path} is corrupt: {exc}", hint=hint) from exc
    if state.version != STATE_VERSION:
        raise LaunchError(
            f"state file {path} was written by another version ({state.version})", hint=hint
        )
    return state


def save_state(path: Path, state: State) -> None:
    """Replace the state file; a reader sees the old or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".state-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(state)))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
