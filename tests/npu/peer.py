"""An engine with one worker in a process of its own, for tests that kill it.

    python -m tests.npu.peer ENGINE_ID DEVICE TRANSFER_TIMEOUT_S

A line of standard input is a command; every answer is a line in JSON.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_pd.session.fetches import FetchRequest

REQUEST = "decode-t"


class Peer:
    """The process, seen from the test; use as a context manager."""

    def __init__(self, engine_id: str, device: int, *, transfer_timeout_s: float = 30.0) -> None:
        self.engine_id = engine_id
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.npu.peer"),
                *(engine_id, str(device), str(transfer_timeout_s)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port: int = self._hear()

    def ask(self, *command: object) -> Any:
        """Send a command and return the answer."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        return self._hear()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _hear(self) -> Any:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        while not (line := stdout.readline()).startswith(">"):
            assert line, "the peer has ended"
        return json.loads(line[1:])


def request_of(
    peer: Peer, transfer_id: str, *, block_ids: tuple[int, ...] = (6, 5)
) -> FetchRequest:
    """Return what a consumer here asks for, of that engine."""
    from vllm_pd.session.fetches import FetchRequest

    request_id = f"decode-{transfer_id}"
    return FetchRequest(
        request_id, transfer_id, peer.engine_id, "127.0.0.1", peer.port, 0, block_ids
    )


def main(engine_id: str, device: str, transfer_timeout_s: str) -> None:
    """Run the engine until standard input ends."""
    import msgspec

    from tests.npu.engines import CONFIG, GQA, NpuEngine
    from vllm_pd.session.fetches import FetchRequest
    from vllm_pd.session.producer import Grant

    config = msgspec.structs.replace(CONFIG, transfer_timeout_s=float(transfer_timeout_s))
    engine = NpuEngine(engine_id, (int(device),), GQA, first=5 * 10**6, config=config)
    worker = engine.workers[0]
    say(engine.endpoint.port)
    for line in sys.stdin:
        match json.loads(line):
            case ["grant", str(transfer_id), list(blocks)]:
                worker.start([], [Grant(transfer_id, "prefill-t", tuple(blocks))], [])
                say("granted")
            case ["fetch", str(remote), int(port), str(transfer_id), list(blocks)]:
                request = FetchRequest(
                    REQUEST, transfer_id, remote, "127.0.0.1", port, 0, tuple(blocks)
                )
                worker.start([request], [], [])
                say("asked")
            case ["finished"]:
                sending, recving = engine.finished(0)
                say([sorted(sending), sorted(recving), sorted(worker.take_invalid_block_ids())])
            case ["hold"]:
                engine.is_held.set()
                say("held")
            case ["set", str(name), str(value)]:
                ctypes.CDLL("libascendcl.so").fakeSet(name.encode(), value.encode())
                say("set")
            case other:
                raise ValueError(other)


def say(answer: object) -> None:
    """Answer; the mark tells answers from what libraries print."""
    sys.stdout.write(f">{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
