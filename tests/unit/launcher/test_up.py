"""``vllm-pd up``, ``status`` and ``down`` as a user runs them; only ``vllm serve`` is none."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ports import free_ports
from tests.unit.launcher import stand_in_vllm
from tests.unit.launcher.bench import wait_until
from tests.unit.router.certificates import Authority, Pair
from vllm_pd.launcher.run_dir import RunDir
from vllm_pd.launcher.stop import stop_by_logs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

REPO = Path(__file__).resolve().parents[3]
NOT_RUNNING = 3


@dataclass(frozen=True)
class User:
    """Somebody with a run folder, a topology file and no real vLLM.

    Attributes:
        folder: has all of this.
        port: of the router.
        ports: of the prefill and of the decode instance.
    """

    folder: Path
    port: int
    ports: tuple[int, int]

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.folder / "run")

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vllm_pd.cli", *args, "--run-dir", str(self.run_dir.path)],
            env={**os.environ, "PYTHONPATH": f"{self.folder}:{REPO}"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def up(self, **router: object) -> subprocess.CompletedProcess[str]:
        topology = {
            "model": str(self.folder),
            "served_model_name": "m",
            "device": "cpu",
            "prefill": {"port": self.ports[0]},
            "decode": {"port": self.ports[1]},
            "router": {"port": self.port, "workers": 2, "health_interval_s": 0.1, **router},
            "kv_cache_space_gib": 1,
            "start_timeout_s": 200,
        }
        path = self.folder / "topology.yaml"
        path.write_text(yaml.safe_dump(topology))
        return self.run("up", "--config", str(path))

    def status(self) -> tuple[int, dict[str, Any]]:
        done = self.run("status", "--json")
        found: dict[str, Any] = json.loads(done.stdout)
        return done.returncode, found


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    (tmp_path / "config.json").write_text("{}")  # of the model
    package = tmp_path / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(Path(stand_in_vllm.__file__).read_text())
    router, prefill, decode = free_ports(3)
    user = User(tmp_path, router, (prefill, decode))
    yield user
    stop_by_logs(user.run_dir, timeout_s=0.0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def certificate(authority: Authority) -> Pair:
    return authority.issue("router")


def get(port: int, path: str, context: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """Ask over a new connection, which any worker may accept."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    if context is not None:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def num_workers(user: User) -> int:
    """Return how many worker processes of the router have come up."""
    return user.run_dir.log_path("router").read_text().count(" serves as process ")


def test_a_router_of_two_workers_with_tls_is_started_asked_and_stopped(
    user: User, authority: Authority, certificate: Pair
) -> None:
    started = user.up(**certificate.options)
    assert started.returncode == 0, started.stdout + started.stderr
    assert f"serving m at https://127.0.0.1:{user.port}" in started.stdout

    context = ssl.create_default_context(cafile=authority.cafile)
    wait_until(lambda: num_workers(user) == 2, "both workers serve")
    for path in ("/health", "/ready", "/v1/models"):
        assert get(user.port, path, context)[0] == 200
    ready = json.loads(get(user.port, "/ready", context)[1])
    assert [one["healthy"] for one in ready["instances"]] == [True, True]
    with pytest.raises((http.client.HTTPException, OSError)):  # no plain HTTP beside it
        get(user.port, "/health")

    code, status = user.status()
    assert (code, status["router_url"]) == (0, f"https://127.0.0.1:{user.port}")
    assert {one["name"]: one["state"] for one in status["processes"]} == {
        "prefill-0": "ready",
        "decode-0": "ready",
        "router": "ready",
    }

    stopped = user.run("down")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert user.status()[0] == NOT_RUNNING
    with pytest.raises(ConnectionRefusedError):
        get(user.port, "/health", context)
    assert "killed" not in user.run_dir.log_path("supervisor").read_text()


def test_a_certificate_that_is_not_of_its_key_ends_the_start_with_a_word_about_it(
    user: User, authority: Authority, certificate: Pair
) -> None:
    other = authority.issue("other")

    started = user.up(ssl_certfile=str(certificate.certfile), ssl_keyfile=str(other.keyfile))

    assert started.returncode == 1
    assert "router ended while starting" in started.stderr
    assert str(other.keyfile) in started.stdout + started.stderr
    assert user.status()[0] == NOT_RUNNING
