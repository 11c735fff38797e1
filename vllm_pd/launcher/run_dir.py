"""Where a deployment keeps its files, and who may use them."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vllm_pd.errors import ConfigError, LaunchError

SUPERVISOR = "supervisor"


class RunDir:
    """The folder of one deployment; at most one is up in it at a time.

    ::

        state.json      what runs (only while something runs)
        lock            held by ``up``, then by the supervisor
        cluster.key     secret shared by the instances
        logs/NAME.log   one for each process, and supervisor.log
        demo-model/     the default model
    """

    def __init__(self, path: Path) -> None:
        try:
            self.path = path.expanduser().resolve()  # as the kernel names open files
        except (OSError, RuntimeError) as exc:
            raise ConfigError(f"run folder {path}: {exc}") from exc
        self.state_path = self.path / "state.json"
        self.lock_path = self.path / "lock"
        self.key_path = self.path / "cluster.key"
        self.logs_path = self.path / "logs"
        self.demo_model_path = self.path / "demo-model"

    def log_path(self, name: str) -> Path:
        """Return the log file of one process."""
        return self.logs_path / f"{name}.log"

    def make(self) -> None:
        """Make the folder, readable by its owner alone.

        Raises:
            ConfigError: it cannot be made or written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.logs_path.mkdir(exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"cannot make run folder {self.path}: {exc.strerror}") from exc
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ConfigError(f"run folder {self.path} is not writable")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the lock; a supervisor that inherits the descriptor holds it on.

        Yields:
            The descriptor to pass on.

        Raises:
            LaunchError: somebody else holds it.
        """
        try:
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"cannot open {self.lock_path}: {exc.strerror}") from exc
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise LaunchError(
                    f"already up in {self.path}", hint=f"{self.command('down')} stops it"
                ) from exc
            except OSError as exc:
                raise ConfigError(f"cannot lock {self.lock_path}: {exc.strerror}") from exc
            yield descriptor
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Return whether something is up here, or on its way up."""
        if not self.lock_path.exists():
            return False
        try:
            with self.locked():
                return False
        except LaunchError:
            return True

    def command(self, name: str) -> str:
        """Return the command line of another ``vllm-pd`` command for this folder."""
        script = "vllm-pd" if shutil.which("vllm-pd") else _script_path()
        if self.path == default_run_dir(os.environ).resolve():
            return f"{script} {name}"
        return f"{script} {name} --run-dir {shlex.quote(str(self.path))}"


def _script_path() -> str:
    """Return where the ``vllm-pd`` of this environment is, seen from the working directory."""
    script = Path(sys.executable).parent / "vllm-pd"
    try:
        return shlex.quote(str(script.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(script))


def default_run_dir(environ: Mapping[str, str]) -> Path:
    """Return the folder used when none is named."""
    base = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "vllm-pd"
