"""The benchmark's plan, arithmetic and rows, and one tiny run with real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kv_transfer
from benchmarks.transfer import peers
from benchmarks.transfer.arena import Arena
from benchmarks.transfer.child import PRODUCER
from benchmarks.transfer.pair import BenchError, Command, Pair
from benchmarks.transfer.plan import Plan, make_plan
from benchmarks.transfer.report import format_len, make_rows, parse_len
from benchmarks.transfer.sessions import Effort, measure_sessions, percentile
from benchmarks.transfer.throughput import Samples, make_command, rounds_order

KIB = 1024
PROGRAM = Path(kv_transfer.__file__)
ROW_KEYS = ["transport", "block_len", "gb_per_s", "ratio_to_memmove", "ratio_to_peer", "peer"]
SMALL = Plan(block_len=8 * KIB, num_regions=3, num_blocks=5, seed=1)
TINY_RUN = ["--block-len", "16384", "--mib", "4", "--rounds", "2", "--no-peers"]


def sample(transport: str, *seconds: float, block_len: int = 64 * KIB) -> Samples:
    return Samples(transport, block_len, 10**9, seconds)


def test_plan_moves_at_least_what_was_asked_for() -> None:
    plan = make_plan(1 << 20, num_bytes=256 << 20, seed=1)
    assert 256 << 20 <= plan.num_bytes < (256 << 20) + plan.num_regions * plan.block_len


def test_plan_of_less_than_a_block_moves_one_block_per_region() -> None:
    assert make_plan(1 << 20, num_bytes=1, seed=1).num_blocks == 1


def test_plan_reads_and_writes_every_block_once() -> None:
    src, dst = SMALL.offsets()
    every_block = list(range(0, SMALL.num_bytes, SMALL.block_len))
    assert sorted(src) == every_block
    assert sorted(dst) == every_block


def test_plan_order_is_random_and_the_same_for_a_seed() -> None:
    plan = Plan(4 * KIB, 1, 100, seed=1)
    src, dst = plan.block_ids()
    assert plan.block_ids() == (src, dst)
    assert len({tuple(src), tuple(dst), tuple(range(100))}) == 3
    assert Plan(4 * KIB, 1, 100, seed=2).block_ids() != (src, dst)


def test_plan_keeps_regions_apart() -> None:
    src, _ = SMALL.offsets()
    regions = [offset // SMALL.region_len for offset in src]
    assert regions == sorted(regions)


def copy_plan(plan: Plan, source: Arena, destination: Arena) -> None:
    with source.view() as src_view, destination.view() as dst_view:
        for src, dst in zip(*plan.offsets(), strict=True):
            dst_view[dst : dst + plan.block_len] = src_view[src : src + plan.block_len]


@pytest.mark.parametrize("block_len", [8 * KIB, 2048 * KIB], ids=["short", "long"])
def test_complete_copy_has_no_wrong_block(block_len: int) -> None:
    plan = Plan(block_len, 2, 2, seed=1)
    source, destination = Arena(plan.num_bytes), Arena(plan.num_bytes)
    source.fill()
    copy_plan(plan, source, destination)
    assert destination.find_wrong_block(plan) is None


@pytest.mark.parametrize("offset", [0, 777, SMALL.block_len - 1])
def test_one_wrong_byte_is_found(offset: int) -> None:
    source, destination = Arena(SMALL.num_bytes), Arena(SMALL.num_bytes)
    source.fill()
    copy_plan(SMALL, source, destination)
    with destination.view() as view:
        view[SMALL.offsets()[1][4] + offset] ^= 1
    assert destination.find_wrong_block(SMALL) == 4


def test_nothing_copied_is_found() -> None:
    assert Arena(SMALL.num_bytes).find_wrong_block(SMALL) == 0


def test_swapped_blocks_are_found() -> None:
    source, destination = Arena(SMALL.num_bytes), Arena(SMALL.num_bytes)
    source.fill()
    copy_plan(SMALL, source, destination)
    first, second = SMALL.offsets()[1][1:3]
    with destination.view() as view:
        saved = bytes(view[first : first + SMALL.block_len])
        view[first : first + SMALL.block_len] = view[second : second + SMALL.block_len]
        view[second : second + SMALL.block_len] = saved
    assert destination.find_wrong_block(SMALL) == 1


def test_row_has_exactly_the_promised_keys() -> None:
    assert [list(row) for row in make_rows([sample("memmove", 0.1)])] == [ROW_KEYS]


def test_ratios_are_of_medians() -> None:
    samples = [
        sample("memmove", 0.1, 0.1, 9.0),
        sample("shm", 0.125, 0.01, 3.0),
        sample("nixl", 0.25, 0.25, 0.25),
    ]
    row = make_rows(samples)[1]
    assert (row["gb_per_s"], row["ratio_to_memmove"]) == (8.0, 0.8)
    assert (row["ratio_to_peer"], row["peer"]) == (2.0, "nixl")


def test_transport_with_two_peers_has_two_rows() -> None:
    samples = [sample("tcp", 0.5), sample("socket", 0.25), sample("ucx-tcp", 2.0)]
    rows = [row for row in make_rows(samples) if row["transport"] == "tcp"]
    assert [(row["peer"], row["ratio_to_peer"]) for row in rows] == [
        ("socket", 0.5),
        ("ucx-tcp", 4.0),
    ]


def test_variant_of_a_transport_is_compared_with_the_same_peers() -> None:
    rows = make_rows([sample("shm+always", 0.5), sample("nixl", 1.0)])
    assert (rows[0]["peer"], rows[0]["ratio_to_peer"]) == ("nixl", 2.0)


def test_ratios_are_none_without_what_to_compare_with() -> None:
    (row,) = make_rows([sample("shm", 0.5)])
    assert (row["ratio_to_memmove"], row["ratio_to_peer"], row["peer"]) == (None, None, None)


def test_block_lengths_are_compared_separately() -> None:
    samples = [
        sample("memmove", 0.1),
        sample("shm", 0.1),
        sample("memmove", 0.1, block_len=KIB),
        sample("shm", 0.2, block_len=KIB),
    ]
    ratios = {row["block_len"]: row["ratio_to_memmove"] for row in make_rows(samples)}
    assert ratios == {64 * KIB: 1.0, KIB: 0.5}


def test_rounds_alternate_in_changing_order() -> None:
    order = rounds_order(["memmove", "shm", "tcp"], 20, seed=1)
    assert {tuple(sorted(names)) for names in order} == {("memmove", "shm", "tcp")}
    assert len({tuple(names) for names in order}) > 1


def test_slow_peer_is_measured_in_the_first_round_and_less_often() -> None:
    order = rounds_order(["memmove", "ucx-tcp"], 6, seed=1)
    assert ["ucx-tcp" in names for names in order] == [True, False, False, True, False, False]


def test_percentile_is_one_of_the_values() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 99), percentile(values, 50), percentile([7.0], 99)) == (99, 50, 7)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("65536", 65536), ("64KiB", 65536), ("1MiB", 1 << 20)]
)
def test_lengths_are_parsed(text: str, num_bytes: int) -> None:
    assert parse_len(text) == num_bytes


@pytest.mark.parametrize(("num_bytes", "text"), [(65536, "64 KiB"), (1 << 20, "1 MiB"), (7, "7 B")])
def test_lengths_are_shown(num_bytes: int, text: str) -> None:
    assert format_len(num_bytes) == text


def test_peer_without_its_environment_is_left_out() -> None:
    assert make_command("nixl", "python", None) is None
    assert make_command("socket", "python", None) is not None


def test_ucx_over_tcp_is_told_so() -> None:
    command = make_command("ucx-tcp", "python", "other-python")
    assert command is not None
    assert (command.python, command.env["UCX_TLS"]) == ("other-python", "tcp")


def test_incomplete_environment_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert peers.find_environment(peers.Packages(folder=tmp_path)) is None


def test_peers_are_pinned() -> None:
    assert "nixl 1.5.0" in peers.describe_packages()


@pytest.mark.parametrize(
    "argv",
    [
        ["--block-len", "1000"],
        ["--block-len", "many"],
        ["--rounds", "0"],
        ["--mib", "-1"],
        ["--cores", "0,100000"],
        ["--transport", "pigeon"],
        ["--json", "no/such/folder/rows.json"],
        ["--no-such-option"],
    ],
)
def test_bad_input_costs_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kv_transfer.main(argv)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_child_that_cannot_work_says_why_in_one_line() -> None:
    # An interpreter without this repository on its path ends at once.
    command = Command("socket", sys.executable, {"PYTHONPATH": ""})
    with pytest.raises(BenchError, match=r"No module named") as raised:
        Pair(command, usable_cores())
    assert "\n" not in str(raised.value)


def test_missing_interpreter_is_reported() -> None:
    with pytest.raises(BenchError, match="No such file"):
        Pair(Command("socket", "/no/such/python", {}), usable_cores())


def test_error_in_a_child_reaches_the_parent() -> None:
    command = Command("worker", sys.executable, {}, roles=(PRODUCER,))
    with Pair(command, usable_cores()) as pair, pytest.raises(BenchError, match="KeyError: 'x'"):
        pair.producer.call("stop", engine_id="x")


def usable_cores() -> tuple[int, int]:
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


@pytest.mark.slow
def test_tiny_run_measures_all_but_the_foreign_peers(tmp_path: Path) -> None:
    rows_file, extra_file = tmp_path / "rows.json", tmp_path / "extra.json"
    argv = [*TINY_RUN, "--no-sessions", "--json", str(rows_file), "--json-extra", str(extra_file)]
    assert kv_transfer.main(argv) == 0
    rows = json.loads(rows_file.read_text())
    assert all(list(row) == ROW_KEYS for row in rows)
    assert {(row["transport"], row["peer"]) for row in rows} == {
        ("memmove", None),
        ("shm", None),
        ("tcp", "socket"),
        ("socket", None),
    }
    assert all(row["gb_per_s"] > 0 and row["block_len"] == 16384 for row in rows)
    extra = json.loads(extra_file.read_text())
    assert [len(found["seconds"]) for found in extra["rounds"]] == [2, 2, 2, 2]
    assert "--no-peers" in extra["environment"]["command"]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_sessions_are_measured(transport: str) -> None:
    effort = Effort(num_handshakes=1, num_fetches=3, idle_s=0.05)
    figures = measure_sessions(transport, sys.executable, usable_cores(), effort, seed=1)
    assert (figures.transport, figures.num_handshakes, figures.num_fetches) == (transport, 1, 3)
    assert 0 < figures.fetch_ms <= figures.fetch_p99_ms
    assert 0 < figures.handshake_ms <= figures.handshake_max_ms


def start_endless_run() -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run that would take hours; return it and its children's pidfds."""
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), *TINY_RUN, "--rounds", "10000000", "--no-sessions"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children_file = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    pids: list[str] = []
    while len(pids) < 3:  # the first pair, and then some
        assert program.poll() is None
        pids = children_file.read_text().split()
    return program, [os.pidfd_open(int(pid)) for pid in pids]


def end(program: subprocess.Popen[str]) -> str:
    """Wait for a program's end, and see to it; return what it wrote to stderr."""
    try:
        return program.communicate(timeout=30)[1]
    finally:
        program.kill()
        program.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_children_do_not_outlive_the_program(number: signal.Signals) -> None:
    program, pidfds = start_endless_run()
    program.send_signal(number)
    end(program)
    for pidfd in pidfds:
        ready, _, _ = select.select([pidfd], [], [], 30)
        os.close(pidfd)
        assert ready


@pytest.mark.slow
def test_interruption_costs_one_line() -> None:
    program, pidfds = start_endless_run()
    program.send_signal(signal.SIGINT)
    errors = end(program)
    for pidfd in pidfds:
        os.close(pidfd)
    assert (program.returncode, errors) == (130, "interrupted\n")
