"""Runs ``vllm bench serve`` and writes down what that keeps to itself.

    python -m benchmarks.serving.recorder PLAN PROGRESS_FD

Upstream's result has the moment in which a request was sent, not the one in which it was
to be sent, so a client that is late hides the wait that it causes. The times are drawn
in ``get_request`` of ``vllm/benchmarks/serve.py``. That generator is run twice from the
same random state: once on a clock that stands still, which shows what it would wait for
each request, and then as it is.

Upstream also takes a stream that broke off for a success; here it is a failure, if an
error event says so or if it is shorter than what --ignore-eos makes sure of.

PLAN is a list of runs as JSON, made one after the other in this process, because
importing vLLM takes longer than many a run: ``args`` of ``vllm bench serve``; ``schedule``,
a file for the times; ``partial``, a file for the requests so far if the run is
interrupted. A run without these two warms up, with its prompts turned round if ``is_turned``,
so that no prompt that is measured is in a cache by then. PROGRESS_FD gets a dot for each request
that is over, and a line feed for each run; the next one begins after a line on stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from vllm.benchmarks import serve
from vllm.benchmarks.lib import endpoint_request_func
from vllm.benchmarks.lib.endpoint_request_func import (
    ASYNC_REQUEST_FUNCS,
    OPENAI_COMPATIBLE_BACKENDS,
    StreamedResponseHandler,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

_UNFINISHED = "interrupted"
"""Error of requests that were under way then; ``load.UNFINISHED``, which imports less."""


class CheckedStream(StreamedResponseHandler):
    """Fails a request whose stream brings an error.

    Upstream skips an event without ``choices``, and takes every request for a success of
    which it saw one token. What is raised here it notes as the request's error.
    """

    def add_chunk(self, chunk_bytes: bytes) -> list[str]:
        """Return the complete events.

        Raises:
            RuntimeError: one of them is an error.
        """
        messages: list[str] = super().add_chunk(chunk_bytes)
        for message in messages:
            if (error := error_in(message)) is not None:
                raise RuntimeError(f"the stream ended with an error: {error}")
        return messages


def error_in(message: str) -> str | None:
    """Return what a server-sent event says of an error, in one line; None: it is none."""
    if '"error"' not in message:  # nearly always: do not parse twice what is measured
        return None
    for line in message.splitlines():
        if not line.startswith("data:"):
            continue
        try:
            data = json.loads(line.removeprefix("data:"))
        except json.JSONDecodeError:
            continue
        if isinstance(data, dict) and (error := data.get("error")):
            text = error.get("message") if isinstance(error, dict) else error
            return " ".join(str(text or error).split())
    return None


def check_length(asked: Any, output: Any) -> None:
    """Fail a request that ended before the length that it could not end before.

    Without a usage event, which a stream that is cut off has not, its chunks count.

    Args:
        asked: upstream's ``RequestFuncInput``.
        output: upstream's ``RequestFuncOutput``, which is changed.
    """
    if not (asked.ignore_eos and output.success):
        return
    num_tokens = output.output_tokens or 1 + len(output.itl)
    if num_tokens < asked.output_len:
        output.success = False
        output.error = f"ended after {num_tokens} of {asked.output_len} tokens"


class Recorder:
    """What is known of a run while it lasts.

    Args:
        progress_fd: gets a byte for each request and run that is over.
    """

    def __init__(self, progress_fd: int) -> None:
        self._progress_fd = progress_fd
        self._schedule: Path | None = None
        self._is_turned = False
        self._is_running = False
        self._sent: list[dict[str, Any]] = []

    def begin(self, schedule: Path | None, *, is_turned: bool) -> None:
        """Forget the last run.

        Args:
            schedule: gets the times of the next one.
            is_turned: whether its prompts are to be turned round.
        """
        self._schedule, self._is_turned = schedule, is_turned
        self._is_running, self._sent = False, []

    def end(self) -> None:
        """Tell that a run is over, and wait until that was noted."""
        self._tell(b"\n")
        sys.stdin.readline()

    def install(self) -> None:
        """Put this between upstream's parts."""
        _put(serve, "get_request", self._recorded(serve.get_request))
        _put(endpoint_request_func, "StreamedResponseHandler", CheckedStream)
        for name, function in list(ASYNC_REQUEST_FUNCS.items()):
            has_length = name in OPENAI_COMPATIBLE_BACKENDS
            ASYNC_REQUEST_FUNCS[name] = self._noted(function, has_length=has_length)

    def partial(self) -> dict[str, Any]:
        """Return the requests so far, as upstream's result has them."""
        rows = [(sent["input"], sent["output"], sent["start"]) for sent in self._sent]
        return {
            "start_times": [out.start_time if out else start for _, out, start in rows],
            "queue_times": [out.client_queue_time if out else 0.0 for _, out, _ in rows],
            "ttfts": [out.ttft if out else 0.0 for _, out, _ in rows],
            "itls": [out.itl if out else [] for _, out, _ in rows],
            "input_lens": [out.prompt_len if out else asked.prompt_len for asked, out, _ in rows],
            "output_lens": [(out.output_tokens or 0) if out else 0 for _, out, _ in rows],
            "errors": [out.error if out else _UNFINISHED for _, out, _ in rows],
        }

    def _recorded(self, get_request: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
        async def recorded(input_requests: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            requests = list(input_requests)
            if self._is_turned:
                requests = [replace(one, prompt=turned(one.prompt)) for one in requests]
            offsets_s = await plan(get_request, requests, *args, **kwargs)
            started = time.perf_counter()
            if self._schedule is not None:
                times = {"started": started, "offsets_s": offsets_s}
                self._schedule.write_text(json.dumps(times))
            self._is_running = True
            async for released in get_request(requests, *args, **kwargs):
                yield released

        return recorded

    def _noted(self, function: Callable[..., Any], *, has_length: bool) -> Callable[..., Any]:
        async def noted(request_func_input: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._is_running:  # upstream's own test or warm-up
                return await function(request_func_input, *args, **kwargs)
            sent = {"input": request_func_input, "output": None, "start": time.perf_counter()}
            self._sent.append(sent)
            output = await function(request_func_input, *args, **kwargs)
            if has_length:
                check_length(request_func_input, output)
            sent["output"] = output
            self._tell(b".")
            return output

        return noted

    def _tell(self, news: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(self._progress_fd, news)


def turned(prompt: Any) -> Any:
    """Return a prompt of the same length that begins otherwise: the same backwards.

    Args:
        prompt: a text, token ids, or what upstream has else, of which it is left as it is.
    """
    if isinstance(prompt, str):
        return " ".join(reversed(prompt.split(" ")))
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return prompt[::-1]
    return prompt


async def plan(
    get_request: Callable[..., AsyncIterator[Any]], *args: Any, **kwargs: Any
) -> list[float]:
    """Return for how long ``get_request`` would wait for each request, from its start on."""
    state = np.random.get_state()
    wait_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal wait_s
        wait_s = seconds

    offsets_s = []
    standing = SimpleNamespace(time=lambda: 0.0, perf_counter=lambda: 0.0)
    with _replaced(serve, time=standing, asyncio=SimpleNamespace(sleep=sleep)):
        async for _ in get_request(*args, **kwargs):
            offsets_s.append(wait_s)
            wait_s = 0.0
    np.random.set_state(state)
    return offsets_s


@contextlib.contextmanager
def _replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        _put(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            _put(module, name, value)


def _put(module: ModuleType, name: str, value: Any) -> None:
    setattr(module, name, value)


def main(argv: list[str]) -> int:
    """Make the runs; return the exit status."""
    # Ctrl-C may be ignored here, as for what a script starts in the background. SIGTERM comes
    # where a whole session is ended, and from the kernel when the parent dies.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    plan_file, progress_fd = argv
    recorder = Recorder(int(progress_fd))
    recorder.install()
    parser = FlexibleArgumentParser(prog="vllm bench serve")  # type: ignore[no-untyped-call]
    serve.add_cli_args(parser)
    for run in json.loads(Path(plan_file).read_text()):
        schedule = Path(run["schedule"]) if run["schedule"] else None
        recorder.begin(schedule, is_turned=run["is_turned"])
        try:
            serve.main(parser.parse_args(run["args"]))
        except KeyboardInterrupt:
            if run["partial"]:
                Path(run["partial"]).write_text(json.dumps(recorder.partial()))
            return 130
        recorder.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
