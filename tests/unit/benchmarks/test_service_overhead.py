"""The service benchmark's prompts, arithmetic, parsing and report; no engine is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import service_overhead
from benchmarks.service import nixl, report, tied
from benchmarks.service.client import parse_stream
from benchmarks.service.figures import (
    Limit,
    Quartiles,
    Stages,
    Step,
    Ttft,
    Usage,
    kv_block_len,
    quartiles_ms,
)
from benchmarks.service.prompts import FIRST_ID, Prompts, rounds_of
from benchmarks.service.rounds import STAGES, Baseline, Measured
from benchmarks.service.servers import Engine, free_ports, topology
from benchmarks.service.usage import Idle, beside_kv, threads_used
from benchmarks.transfer.pair import BenchError
from vllm_pd.config import Topology, from_mapping

MB = 1_000_000
ROW_KEYS = ["service", "figure", "prompt_tokens", "value", "unit", "limit", "met"]


def exactly(median: float) -> Quartiles:
    return Quartiles(median, median, median, 1)


def ttft(through: float, alone: float, *, prompt_len: int, service: str = "vllm-pd") -> Ttft:
    return Ttft(service, prompt_len, exactly(through), exactly(alone), None)


def usage(kind: str = "worker", *, ours: float = 0.0, memory_len: int = 0) -> Usage:
    idle, plain = Idle(kind, ours, ours, 2), Idle(kind, 0.0, 0.0, 0)
    return Usage("vllm-pd", "decode", idle, plain, memory_len, 100 * MB)


def measured(service: str = "vllm-pd") -> Measured:
    stages = Stages(64, 3 << 20, "shm", dict.fromkeys(STAGES, 1.0), 40.0, 20.0)
    return Measured(
        ttft=[ttft(65.0, 40.0, prompt_len=64, service=service)],
        steps=[Step(service, "decode", exactly(13.0), exactly(12.5))],
        stages=[stages] if service == "vllm-pd" else [],
        usage=[usage(memory_len=120 * MB)],
        baseline=Baseline(exactly(12.5), {}, {}),
        handshake_ms=5.0 if service == "vllm-pd" else None,
        samples={"step": {"decode": [0.013]}},
    )


def test_prompts_have_the_length_asked_for_and_differ() -> None:
    prompts = Prompts(2048, seed=1)
    made = [tuple(prompts.fresh(64)) for _ in range(10)]
    assert {len(prompt) for prompt in made} == {64}
    assert len(set(made)) == 10


def test_prompts_have_no_special_tokens_and_none_beyond_the_vocabulary() -> None:
    assert set(Prompts(FIRST_ID + 2, seed=1).fresh(1000)) == {FIRST_ID, FIRST_ID + 1}


def test_prompts_are_the_same_for_a_seed() -> None:
    assert Prompts(2048, seed=1).fresh(9) == Prompts(2048, seed=1).fresh(9)
    assert Prompts(2048, seed=1).fresh(9) != Prompts(2048, seed=2).fresh(9)


def test_prompts_need_more_than_special_tokens() -> None:
    with pytest.raises(ValueError, match="too small"):
        Prompts(FIRST_ID, seed=1)


def test_every_round_asks_everybody_once_in_a_changing_order() -> None:
    rounds = list(rounds_of("abc", 30, seed=1))
    assert len(rounds) == 30
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 6


def test_quartiles_are_in_milliseconds() -> None:
    assert quartiles_ms([0.001, 0.002, 0.003, 0.004, 0.005]) == Quartiles(3.0, 2.0, 4.0, 5)


def test_quartiles_of_one_sample_are_that_sample() -> None:
    assert quartiles_ms([0.5]) == Quartiles(500.0, 500.0, 500.0, 1)


def test_hand_over_is_the_difference_of_the_medians() -> None:
    found = ttft(720.0, 700.0, prompt_len=1000)
    assert found.added_ms == pytest.approx(20.0)
    assert found.added_percent == pytest.approx(100 * 20 / 700)


@pytest.mark.parametrize(
    ("through", "alone", "prompt_len", "is_met"),
    [
        (64.9, 40.0, 64, True),
        (65.0, 40.0, 64, False),
        (1039.0, 1000.0, 1000, True),
        (1040.0, 1000.0, 3500, False),
        (9999.0, 1.0, 500, None),
    ],
)
def test_short_prompts_have_a_limit_in_ms_and_long_ones_in_percent(
    through: float, alone: float, prompt_len: int, is_met: bool | None
) -> None:
    assert ttft(through, alone, prompt_len=prompt_len).limit.is_met is is_met


def test_decode_step_is_compared_as_a_ratio() -> None:
    assert Step("vllm-pd", "decode", exactly(13.0), exactly(10.0)).limit == Limit(
        1.3, 1.1, "x plain"
    )


def test_idle_limit_is_for_our_threads() -> None:
    assert usage(ours=0.99).idle_limit.is_met is True
    assert usage(ours=1.0).idle_limit.is_met is False


def test_memory_limit_is_for_workers_and_for_what_is_added() -> None:
    assert usage(memory_len=149 * MB).memory_limit == Limit(49.0, 50.0, "MB")
    assert usage(memory_len=150 * MB).memory_limit.is_met is False
    assert usage("engine core", memory_len=900 * MB).memory_limit.is_met is None


def test_block_of_the_benchmark_model_is_256_kib_in_each_of_12_layers() -> None:
    config: dict[str, object] = {
        "num_hidden_layers": 12,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "dtype": "bfloat16",
    }
    assert kv_block_len(config, 128) == 12 * 256 * 1024
    assert kv_block_len({**config, "dtype": "float32"}, 128) == 2 * 12 * 256 * 1024


def event(value: dict[str, object]) -> bytes:
    return f"data: {json.dumps(value)}\n".encode()


def token(text: str = "x") -> bytes:
    return event({"choices": [{"text": text}], "usage": None})


def test_stream_has_first_and_last_token_and_their_number() -> None:
    found = parse_stream(
        [
            (0.5, token("")),  # a part of a character is a token, too
            (0.5, b"\n"),
            (0.6, token()),
            (0.9, token()),
            (0.95, event({"choices": [], "usage": {"completion_tokens": 5}})),
            (0.96, b"data: [DONE]\n"),
        ]
    )
    assert (found.first_s, found.last_s, found.num_tokens) == (0.5, 0.9, 5)
    assert found.step_s == pytest.approx(0.1)


def test_stream_that_ends_with_an_error_event_is_an_error() -> None:
    lines = [(0.5, token()), (0.6, event({"error": {"message": "the decode instance failed"}}))]
    with pytest.raises(BenchError, match="the decode instance failed"):
        parse_stream(lines)


@pytest.mark.parametrize(
    "lines", [[], [token()], [event({"choices": [], "usage": {"completion_tokens": 1}})]]
)
def test_stream_without_tokens_or_usage_is_an_error(lines: list[bytes]) -> None:
    with pytest.raises(BenchError, match="without"):
        parse_stream([(0.1, line) for line in lines])


HEAP = ["55d0-55d1 rw-p 00000000 00:00 0                          [heap]", "Rss:  3000 kB"]
KV_PRIVATE = ["7f00-7f99 rw-p 00000000 00:00 0 ", "Size:  5000 kB", "Rss:  5000 kB", "Pss: 9 kB"]
KV_MEMFD = ["7f00-7f99 rw-s 00000000 00:01 7   /memfd:vllm-pd-kv (deleted)", "Rss:  5000 kB"]
PEER_KV = ["8f00-8f99 r--s 00000000 00:01 8   /memfd:vllm-pd-kv (deleted)", "Rss:  700 kB"]


@pytest.mark.parametrize("kv", [KV_PRIVATE, KV_MEMFD, KV_MEMFD + PEER_KV])
def test_memory_beside_the_kv_cache_is_the_same_however_that_is_mapped(kv: list[str]) -> None:
    assert beside_kv([*kv, *HEAP], kv_len=5000 * 1024) == 3000 * 1024


def test_thread_that_is_new_counts_from_its_start() -> None:
    assert threads_used({"a/1": 2.0, "gone/3": 1.0}, {"a/1": 2.5, "b/2": 0.25}) == {
        "a/1": 0.5,
        "b/2": 0.25,
    }


def test_topology_is_one_that_the_launcher_takes() -> None:
    engine = Engine(Path("model"), 1, Path("."))
    values = topology(engine, (0, 1), {"transport": "tcp"}, [8000, 8100, 8200])
    found = from_mapping(Topology, values, source="test")
    assert found.prefill is not None
    assert found.decode is not None
    assert (found.prefill.devices, found.decode.devices) == ((0,), (1,))
    assert found.connector.transport == "tcp"


def test_free_ports_differ() -> None:
    assert len(set(free_ports(5))) == 5


def test_rows_have_exactly_the_documented_keys() -> None:
    rows = report.make_rows([("vllm-pd", measured())], ours="vllm-pd")
    assert all(list(row) == ROW_KEYS for row in rows)
    assert [row["figure"] for row in rows] == [
        "ttft_added",
        "decode_step_decode",
        "handshake",
        "idle_cpu_decode_worker",
        "memory_decode_worker",
    ]
    assert rows[0] == {
        "service": "vllm-pd",
        "figure": "ttft_added",
        "prompt_tokens": 64,
        "value": 25.0,
        "unit": "ms",
        "limit": 25.0,
        "met": False,
    }


def test_nothing_is_required_of_the_peer() -> None:
    rows = report.make_rows([("nixl", measured("nixl"))], ours="vllm-pd")
    assert {(row["limit"], row["met"]) for row in rows} == {(None, None)}


def test_tables_show_figures_and_limits_of_all_services() -> None:
    services = [("vllm-pd", measured()), ("nixl", measured("nixl"))]
    console = Console(width=200)
    with console.capture() as captured:
        for table in report.tables(services, ours="vllm-pd"):
            console.print(table)
    text = captured.get()
    assert "< 25 ms: MISSED" in text
    assert "< 1.1 x plain: met" in text
    assert "< 50 MB: met" in text
    assert text.count("nixl") == 3  # no limits, no stages


def test_extra_is_plain_data() -> None:
    data = json.loads(json.dumps(report.extra([("vllm-pd", measured())])))
    assert data["vllm-pd"]["samples"] == {"step": {"decode": [0.013]}}


def test_options_have_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_overhead, "find_pool", lambda *_: ("2", "3"))
    options = service_overhead.parse_options([])
    assert options.cores == (2, 3)
    assert sorted(options.effort.rounds) == [64, 1000, 3500]
    assert options.effort.num_steps >= 128
    assert not options.with_nixl


def test_options_name_prompt_lengths_and_connector() -> None:
    options = service_overhead.parse_options(
        [
            "--quick",
            "--prompt-len",
            "200",
            "--prompt-len",
            "64",
            "--connector",
            '{"transport":"tcp"}',
        ]
    )
    assert list(options.effort.rounds) == [64, 200]
    assert options.connector == {"transport": "tcp"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt-len", "0"], "not a positive number"),
        (["--prompt-len", "9000"], "more than"),
        (["--connector", "[1]"], "not a JSON object"),
        (["--connector", "{"], "not JSON"),
        (["--connector", '{"route": "tcp"}'], "unknown field `route`"),
        (["--gap", "nan"], "is not 0 to 60 seconds"),
        (["--gap", "-1"], "is not 0 to 60 seconds"),
        (["--cores", "0"], "not two of the cores"),
        (["--cores", "0,9999"], "not two of the cores"),
        (["--peer", "nobody"], "invalid choice"),
        (["--json", "/no/such/folder/file"], "not a file that can be written"),
    ],
)
def test_bad_options_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        service_overhead.parse_options(argv)
    assert exited.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_nothing_but_the_peer_comes_before_the_engines_packages(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    for name in ("nixl", "nixl_cu12", "nixl_cu12.libs", "numpy", "pip"):
        (packages / name).mkdir(parents=True)
    nixl.link_packages(packages, tmp_path / "peer")
    names = sorted(path.name for path in (tmp_path / "peer").iterdir())
    assert names == ["nixl", "nixl_cu12", "nixl_cu12.libs"]


def test_tied_program_is_not_started_by_an_orphan() -> None:
    program = [sys.executable, "-c", "print('started')"]
    command = [sys.executable, str(tied.__file__), "-1", *program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
