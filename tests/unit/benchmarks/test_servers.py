"""Servers that a benchmark runs end with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.service.servers import free_ports, running

STUBBORN = """
import http.server, os, signal, sys

# Told to stop, it goes on, and the user loses patience.
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


@pytest.mark.slow
def test_server_is_killed_although_the_wait_for_its_end_is_interrupted(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", STUBBORN, str(port)]
    url = f"http://127.0.0.1:{port}/"
    with pytest.raises(KeyboardInterrupt), running(tmp_path / "log", command, url, {}) as pid:
        pass
    assert not Path(f"/proc/{pid}").exists()
