"""The access log: what its lines say, and that they get into the file."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from yarl import URL

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import (
    KV_PARAMS,
    Client,
    FakeInstance,
    Streams,
    answers,
    drops,
    hangs,
)
from vllm_pd.errors import ConfigError
from vllm_pd.router.access_log import MAX_LINE_LEN, MAX_PENDING, AccessLog

COMPLETIONS = "/v1/completions"
BODY = {"model": "m", "prompt": "hi", "max_tokens": 8}
FIELDS = {
    *("time", "request_id", "trace_id", "client", "api_key", "method", "path", "model"),
    *("status", "outcome", "error", "pd_path", "prefill", "decode", "retries"),
    *("prompt_tokens", "cached_tokens", "completion_tokens"),
    *("queue_s", "prefill_s", "first_bytes_s", "total_s", "request_len", "response_len"),
}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text_of(path).splitlines()]


def text_of(path: Path) -> str:
    return path.read_text()


async def only_line(router: Client, path: Path) -> dict[str, Any]:
    await router.close()  # which writes what is left
    (line,) = lines_of(path)
    return line


async def test_a_served_request_is_one_line_with_everything(
    start_router: StartRouter, start_instance: StartInstance, log_file: Path
) -> None:
    prefill = await start_instance(
        answers(200, {"kv_transfer_params": KV_PARAMS, "usage": USAGE | {"prompt_tokens": 7}})
    )
    answer = {"choices": [{"text": 'the word "usage": {"prompt_tokens": 99}'}], "usage": USAGE}
    decode = await start_instance(answers(200, answer))
    router = await start_router([prefill], [decode], access_log=str(log_file))
    async with router.post(COMPLETIONS, json=BODY, headers={"X-Request-Id": "r1"}) as response:
        sent = await response.read()
    line = await only_line(router, log_file)
    assert line.keys() == FIELDS
    expected = {
        "request_id": "r1",
        "trace_id": None,
        "client": "127.0.0.1",
        "api_key": None,
        "method": "POST",
        "path": COMPLETIONS,
        "model": "m",
        "status": 200,
        "outcome": "ok",
        "error": None,
        "pd_path": "disaggregated",
        "prefill": prefill.url,
        "decode": decode.url,
        "retries": 0,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "request_len": len(json.dumps(BODY)),
        "response_len": len(sent),
    }
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["queue_s"] <= line["total_s"]
    assert 0 < line["prefill_s"] < line["first_bytes_s"] < line["total_s"]


async def test_a_stream_is_a_line_with_the_usage_of_its_end(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    log_file: Path,
) -> None:
    usage = b"data: %b\n\n" % json.dumps({"choices": [], "usage": USAGE}).encode()
    decode = await start_instance(Streams([b"data: {}\n\n"] * 20 + [usage, b"data: [DONE]\n\n"]))
    router = await start_router([prefill], [decode], access_log=str(log_file))
    async with router.post(COMPLETIONS, json=BODY | {"stream": True}) as response:
        sent = await response.read()
    line = await only_line(router, log_file)
    counts = [line[f"{name}_tokens"] for name in ("prompt", "cached", "completion")]
    assert counts == [7, 4, 3]
    assert line["response_len"] == len(sent)


async def test_a_retried_request_says_how_often_and_who_served_it(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    decode: FakeInstance,
    log_file: Path,
) -> None:
    dead = await start_instance(drops)
    router = await start_router([dead, prefill], [decode], access_log=str(log_file))
    async with router.post(COMPLETIONS, json=BODY) as response:
        assert response.status == 200
    line = await only_line(router, log_file)
    assert (line["retries"], line["prefill"], line["error"]) == (1, prefill.url, None)


async def test_a_broken_stream_has_the_status_that_it_should_have_had(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    log_file: Path,
) -> None:
    decode = await start_instance(Streams([b"data: {}\n\n"], die=True))
    router = await start_router([prefill], [decode], access_log=str(log_file))
    async with router.post(COMPLETIONS, json=BODY | {"stream": True}) as response:
        await response.read()
    line = await only_line(router, log_file)
    assert (line["status"], line["outcome"]) == (502, "error")
    assert line["error"].startswith("the stream broke: ")


async def test_a_client_that_leaves_is_a_line(
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    log_file: Path,
) -> None:
    decode = await start_instance(hangs)
    router = await start_router([prefill], [decode], access_log=str(log_file))
    request = asyncio.ensure_future(router.post(COMPLETIONS, json=BODY))
    await decode.started.wait()
    request.cancel()
    await decode.cancelled.wait()
    line = await only_line(router, log_file)
    assert (line["status"], line["outcome"], line["decode"]) == (499, "client_left", decode.url)


async def test_what_no_instance_has_seen_is_a_line_too(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, log_file: Path
) -> None:
    router = await start_router([prefill], [decode], access_log=str(log_file))
    async with router.get("/nowhere?secret=1"):
        pass
    line = await only_line(router, log_file)
    assert line.keys() == FIELDS
    assert (line["path"], line["status"], line["error"]) == ("/nowhere", 404, "Not Found")


async def test_the_api_key_is_named_and_never_written(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    tmp_path: Path,
    log_file: Path,
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: ann, key: k-ann}\n")
    keys.chmod(0o600)
    router = await start_router(
        [prefill], [decode], api_keys_file=str(keys), access_log=str(log_file)
    )
    for key in ("k-ann", "k-wrong"):
        headers = {"Authorization": f"Bearer {key}"}
        async with router.post(COMPLETIONS, json=BODY, headers=headers):
            pass
    await router.close()
    right, wrong = lines_of(log_file)
    assert (right["api_key"], right["status"]) == ("ann", 200)
    assert (wrong["api_key"], wrong["status"], wrong["outcome"]) == (None, 401, "error")
    assert "k-" not in text_of(log_file)


async def test_nothing_that_a_client_sends_can_begin_a_line_or_act_on_a_terminal(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, log_file: Path
) -> None:
    router = await start_router([prefill], [decode], access_log=str(log_file))
    evil = '\n{"status": 200}\r\u2028\u009b31m\u202e"'
    async with router.get(URL(f"/{quote(evil)}", encoded=True)):
        pass
    halved = evil + "\ud800"
    for model in (evil, halved):
        async with router.post(COMPLETIONS, json=BODY | {"model": model}):
            pass
    await router.close()
    text = text_of(log_file)
    assert all(" " <= character < "\x7f" for line in text.split("\n") for character in line)
    unknown, served, odd = lines_of(log_file)
    assert unknown["path"] == f"/{evil}"
    assert (served["model"], odd["model"]) == (evil, halved)
    for line in (unknown, served, odd):
        assert datetime.fromisoformat(line["time"]).tzname() == "UTC"


async def test_a_long_path_is_cut(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, log_file: Path
) -> None:
    router = await start_router([prefill], [decode], access_log=str(log_file))
    async with router.get("/" + "x" * 5000):
        pass
    assert len((await only_line(router, log_file))["path"]) == 1024


def lose_none(num: int) -> None:
    pytest.fail(f"{num} lines lost")


async def test_a_file_that_is_moved_away_is_made_anew(log_file: Path) -> None:
    rotated = log_file.with_suffix(".1")
    async with AccessLog(str(log_file), lost=lose_none) as log:
        log.add(b"one\n")
        while not text_of(log_file):  # noqa: ASYNC110 - a thread writes it; bounded by the timeout
            await asyncio.sleep(0)
        os.rename(log_file, rotated)
        log.add(b"two\n")
    assert (text_of(rotated), text_of(log_file)) == ("one\n", "two\n")


async def test_a_file_is_added_to(log_file: Path) -> None:
    for line in (b"old\n", b"new\n"):
        async with AccessLog(str(log_file), lost=lose_none) as log:
            log.add(line)
    assert text_of(log_file) == "old\nnew\n"


async def test_a_dash_is_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    async with AccessLog("-", lost=lose_none) as log:
        log.add(b"one\n")
    assert capfd.readouterr().out == "one\n"


async def test_lines_that_cannot_be_written_in_time_are_counted_and_nothing_waits(
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "stuck"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # that reads nothing yet
    lost: list[int] = []
    line = b"x" * 127 + b"\n"  # all of them: 2 MiB, more than a pipe holds
    async with AccessLog(str(fifo), lost=lost.append) as log:
        for _ in range(MAX_PENDING):
            log.add(line)
        assert lost == []
        log.add(b"one too many\n")
        assert lost == [1]
        os.close(reader)  # the writer fails, and what waited is lost
    assert sum(lost) == MAX_PENDING + 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
async def test_a_full_disk_is_told_of_once_and_every_line_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, lost = asyncio.get_running_loop(), asyncio.Queue[int]()

    def lose(num: int) -> None:
        loop.call_soon_threadsafe(lost.put_nowait, num)

    async with AccessLog("/dev/full", lost=lose) as log:
        for _ in range(2):
            log.add(b"line\n")
            assert await lost.get() == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("lines of the access log /dev/full are lost: ")


async def test_a_folder_that_is_not_there_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the access log"):
        AccessLog(str(tmp_path / "nowhere" / "access.log"), lost=lose_none)


async def test_lost_lines_are_in_the_metrics(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode], access_log="/dev/full")
    text = ""
    # Its own lines are lost, too; bounded by the test's timeout.
    while not re.search(r"^vllm_pd:router_access_log_lost_total [1-9]", text, re.MULTILINE):
        async with router.get("/metrics") as response:
            text = await response.text()


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Return what makes files end at a length, as a full disk does; undone at the end."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    on_limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, on_limit)


async def test_a_line_that_does_not_fit_on_the_disk_is_not_begun(
    log_file: Path, file_limit: Callable[[int], None]
) -> None:
    lost: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(num_lines: int) -> None:
        loop.call_soon_threadsafe(lost.put_nowait, num_lines)

    async with AccessLog(str(log_file), lost=tell) as log:
        file_limit(6)
        for line in (b"1\n", b"22\n", b"333\n", b"4\n"):
            log.add(line)
        assert await lost.get() == 2
        file_limit(resource.RLIM_INFINITY)
        for line in (b"5\n", b"6\n"):
            log.add(line)
    assert text_of(log_file) == "1\n22\n5\n6\n"
    assert lost.empty()


_WRITER = """
import asyncio, sys
from vllm_pd.router.access_log import AccessLog

async def write():
    log = AccessLog("-", lost=print, close_timeout_s={patience_s!r})
    async with log:
        for _ in range(1000):
            log.add({line!r})
        print("ready", file=sys.stderr, flush=True)

asyncio.run(write())
"""


async def start_writer(
    line: bytes, stdout: int, *, patience_s: float = 60.0
) -> asyncio.subprocess.Process:
    """Start a process that writes a line a thousand times, as soon as it can."""
    script = _WRITER.format(line=line + b"\n", patience_s=patience_s)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script), stdout=stdout, stderr=asyncio.subprocess.PIPE
    )


async def is_ready(writer: asyncio.subprocess.Process) -> bool:
    assert writer.stderr is not None
    return await writer.stderr.readline() == b"ready\n"


async def test_lines_of_several_processes_do_not_mix_in_a_pipe() -> None:
    expected = [letter * 999 for letter in (b"a", b"b")]
    reading, writing = os.pipe()
    writers = [await start_writer(line, writing) for line in expected]
    os.close(writing)
    for writer in writers:  # so that both have something to write when the first can
        assert await is_ready(writer)
    with os.fdopen(reading, "rb") as pipe:
        lines = (await asyncio.to_thread(pipe.read)).splitlines()
    assert [await writer.wait() for writer in writers] == [0, 0]
    assert sorted(lines) == [line for line in expected for _ in range(1000)]


async def test_lines_of_several_processes_do_not_mix_in_a_file(tmp_path: Path) -> None:
    expected = [letter * 999 for letter in (b"a", b"b")]
    path = tmp_path / "stdout"
    with path.open("wb") as file:
        writers = [await start_writer(line, file.fileno()) for line in expected]
    assert [await is_ready(writer) for writer in writers] == [True, True]
    assert [await writer.wait() for writer in writers] == [0, 0]
    lines = path.read_bytes().splitlines()
    assert sorted(lines) == [line for line in expected for _ in range(1000)]


async def test_a_process_that_gives_up_on_a_full_pipe_leaves_no_half_line() -> None:
    reading, writing = os.pipe()
    capacity = fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)
    filled = os.write(writing, b"-" * (capacity - 3000))  # there is room for nine lines and a half
    writer = await start_writer(b"a" * 300, writing, patience_s=0.2)
    assert await is_ready(writer)
    assert await writer.wait() == 0
    text = os.read(reading, capacity)[filled:]
    after = await start_writer(b"b" * 300, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text += await asyncio.to_thread(pipe.read)
    assert await after.wait() == 0
    lines = text.splitlines()
    assert set(lines) <= {b"a" * 300, b"b" * 300}
    assert lines.count(b"b" * 300) == 1000


async def test_a_line_that_no_pipe_takes_in_one_piece_is_lost_and_counted(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    lost: list[int] = []
    async with AccessLog(str(fifo), lost=lost.append) as log:
        for line in (b"one\n", b"x" * MAX_LINE_LEN + b"\n", b"two\n"):
            log.add(line)
    assert os.read(reader, 2 * MAX_LINE_LEN) == b"one\ntwo\n"
    assert lost == [1]
    os.close(reader)


async def test_a_line_fits_into_a_pipe_whatever_the_client_sends(
    start_router: StartRouter, start_instance: StartInstance, log_file: Path
) -> None:
    dead = await start_instance(drops)
    router = await start_router([dead], [dead], access_log=str(log_file))
    name = "\U0001f600" * 600  # twelve bytes each, in an address and in the log
    async with router.post(COMPLETIONS, json=BODY | {"model": name}):
        pass
    async with router.get("/" + name):
        pass
    await router.close()
    served, unknown = text_of(log_file).splitlines(keepends=True)
    assert max(len(served), len(unknown)) <= MAX_LINE_LEN
    assert json.loads(unknown)["path"] == f"/{name[:63]}"


async def test_prefill_counts_the_prompt_of_a_stream_without_usage(
    start_router: StartRouter, start_instance: StartInstance, log_file: Path
) -> None:
    prefill = await start_instance(answers(200, {"kv_transfer_params": KV_PARAMS, "usage": USAGE}))
    decode = await start_instance(Streams([b"data: {}\n\n", b"data: [DONE]\n\n"]))
    router = await start_router([prefill], [decode], access_log=str(log_file))
    async with router.post(COMPLETIONS, json=BODY | {"stream": True}) as response:
        await response.read()
    line = await only_line(router, log_file)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, None)
