"""What the scheduler's tests have in common; needs no vLLM."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.connector.harness import Engine, Step

BLOCK_SIZE = 32
PROMPT = list(range(100))  # three blocks and a bit
NUM_BLOCKS = 4
KEEP: dict[str, Any] = {"do_remote_decode": True}


def prefill(producer: Engine, prompt: list[int] = PROMPT) -> dict[str, Any]:
    """Compute a prompt on the producer; return what its response tells the router."""
    request_id = producer.add(prompt, dict(KEEP))
    params = run_to_end(producer, request_id)[-1].finished[request_id]
    assert params is not None
    return params


def run_to_end(engine: Engine, *request_ids: str) -> list[Step]:
    """Step until all requests are answered; the workers report nothing."""
    waiting, steps = set(request_ids), []
    while waiting:
        steps.append(engine.step())
        waiting -= steps[-1].finished.keys()
        assert len(steps) < 1000, f"{waiting} never ended"
    return steps


def serve(engine: Engine, num_steps: int = 1000) -> list[Step]:
    """Step until no request is left; every load succeeds and every grant is fetched at once.

    Args:
        engine: what to step.
        num_steps: give up then, which is no error.
    """
    steps: list[Step] = []
    loaded: list[str] = []
    fetched: list[str] = []
    while engine.num_requests and len(steps) < num_steps:
        steps.append(engine.step(received=loaded, sent=fetched))
        loaded = [load.request_id for load in steps[-1].metadata.loads]
        fetched = [grant.request_id for grant in steps[-1].metadata.grants]
    return steps


def wait_for_release(engine: Engine) -> list[str]:
    """Step until a peer's release has come in over the control channel."""
    deadline = time.monotonic() + 10.0
    while not (releases := engine.step().metadata.releases):
        assert time.monotonic() < deadline, "no release came"
        time.sleep(0.001)
    return releases
