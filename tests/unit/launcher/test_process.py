from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vllm_pd.launcher.process import (
    ProcessIdentity,
    end_group,
    group_members,
    identify,
    is_alive,
    send_signal,
    uptime_s,
    wait_gone,
    writers_to,
)

SLEEPER = [sys.executable, "-S", "-c", "import signal; signal.pause()"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "x.log"


@pytest.fixture
def process(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        popen = subprocess.Popen(SLEEPER, stdout=file, stderr=file, start_new_session=True)
    yield popen
    popen.kill()
    popen.wait()


def later_process_with_the_same_number(identity: ProcessIdentity) -> ProcessIdentity:
    return msgspec.structs.replace(identity, start_ticks=identity.start_ticks - 1)


def test_a_running_process_is_alive(process: subprocess.Popen[bytes]) -> None:
    assert is_alive(identify(process.pid))


def test_a_zombie_is_not_alive(process: subprocess.Popen[bytes]) -> None:
    identity = identify(process.pid)
    process.kill()
    assert wait_gone(identity, 10.0)
    assert process.returncode is None  # not reaped yet


def test_another_start_time_is_another_process(process: subprocess.Popen[bytes]) -> None:
    assert not is_alive(later_process_with_the_same_number(identify(process.pid)))


def test_another_boot_is_another_process(process: subprocess.Popen[bytes]) -> None:
    identity = msgspec.structs.replace(identify(process.pid), boot_id="earlier")
    assert not is_alive(identity)
    assert not send_signal(identity, signal.SIGKILL)


def test_a_process_that_reuses_the_number_is_not_signalled(
    process: subprocess.Popen[bytes],
) -> None:
    identity = later_process_with_the_same_number(identify(process.pid))
    assert not send_signal(identity, signal.SIGKILL)
    assert process.poll() is None


def test_a_process_that_is_gone_is_not_signalled(process: subprocess.Popen[bytes]) -> None:
    identity = identify(process.pid)
    process.kill()
    process.wait()
    assert not send_signal(identity, signal.SIGTERM)


def test_identify_refuses_a_number_without_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):
        identify(process.pid)


def test_waiting_ends_at_the_deadline(process: subprocess.Popen[bytes]) -> None:
    assert not wait_gone(identify(process.pid), 0.0)


def test_a_group_that_reuses_the_number_is_left_alone(
    process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    identity = later_process_with_the_same_number(identify(process.pid))
    assert group_members(identity, tmp_path / "x.log") == []
    assert end_group(identity, tmp_path / "x.log", grace_s=0.0)
    assert process.poll() is None


def test_a_group_may_end_by_itself(process: subprocess.Popen[bytes], log: Path) -> None:
    assert end_group(identify(process.pid), log, grace_s=10.0)
    assert process.wait() == -signal.SIGTERM


def test_a_group_that_does_not_end_is_killed(log: Path) -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code],
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
        )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        assert end_group(identify(process.pid), log, grace_s=0.0)
    assert process.returncode == -signal.SIGKILL


def test_a_process_is_known_by_its_log(process: subprocess.Popen[bytes], log: Path) -> None:
    assert [writer.pid for writer in writers_to(log)] == [process.pid]


def test_a_process_is_known_by_a_log_that_was_deleted(
    process: subprocess.Popen[bytes], log: Path
) -> None:
    log.unlink()
    assert [writer.pid for writer in writers_to(log)] == [process.pid]


def test_a_reader_of_the_log_is_not_taken_for_its_process(log: Path) -> None:
    log.touch()
    with log.open("rb") as file, subprocess.Popen(SLEEPER, stdin=file) as reader:
        try:
            assert writers_to(log) == []
        finally:
            reader.kill()


def test_uptime_counts_from_the_start() -> None:
    assert uptime_s(identify(os.getpid())) >= 0
