"""What the control plane adds: handshakes, fetches of one block, idle threads, memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.transfer.pair import Command, Pair
from benchmarks.transfer.plan import NUM_REGIONS, Plan

BLOCK_LEN = 256 * 1024
"""Bytes of one block of 128 tokens in one of the regions."""

_TINY_BLOCK_LEN = 4096
_KV_BLOCKS = 32  # of BLOCK_LEN in every region: 96 MiB
_CONSUMER = "consumer"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure.

    Attributes:
        num_handshakes: fresh producers.
        num_fetches: of one block.
        idle_s: seconds during which idle threads are watched.
    """

    num_handshakes: int
    num_fetches: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class SessionFigures:
    """Of one transport. Milliseconds, percent of a core, bytes.

    Attributes:
        transport: the transport below the sessions.
        handshake_ms: fetch of one tiny block from a producer never met, median.
        handshake_max_ms: the slowest of them.
        num_handshakes: how many were measured.
        fetch_ms: fetch of one 128-token block, median.
        fetch_p99_ms: 99th percentile.
        num_fetches: how many were measured.
        poll_pause_ms: time from one look for results to the next, which is in
            ``fetch_ms`` about half on average.
        idle_percent: CPU use of all our threads of a worker; the greater of both sides.
        memory_len: memory per worker beside the KV cache, this project's modules
            included; the greater of both sides.
    """

    transport: str
    handshake_ms: float
    handshake_max_ms: float
    num_handshakes: int
    fetch_ms: float
    fetch_p99_ms: float
    num_fetches: int
    poll_pause_ms: float
    idle_percent: float
    memory_len: int


def measure_sessions(
    transport: str, python: str, cores: tuple[int, int], effort: Effort, seed: int
) -> SessionFigures:
    """Measure sessions over one transport, in two new processes.

    Raises:
        BenchError: something failed.
    """
    with Pair(Command("worker", python, {}), cores) as pair:
        big = Plan(BLOCK_LEN, NUM_REGIONS, _KV_BLOCKS, seed)
        producer = _start(pair, "producer", transport, big, side="producer")
        consumer = _start(pair, _CONSUMER, transport, big, side="consumer")
        fetches = _fetch_blocks(pair, producer["port"], effort.num_fetches, seed)
        memory_len = max(
            pair.producer.call("memory") - producer["before"],
            pair.consumer.call("memory") - consumer["before"],
        )
        idle_s = [sum(used.values()) for used in _idle(pair, effort.idle_s)]
        handshakes = _shake_hands(pair, transport, effort.num_handshakes, seed)
    times = [seconds for seconds, _ in fetches]
    return SessionFigures(
        transport=transport,
        handshake_ms=statistics.median(handshakes) * 1e3,
        handshake_max_ms=max(handshakes) * 1e3,
        num_handshakes=len(handshakes),
        fetch_ms=statistics.median(times) * 1e3,
        fetch_p99_ms=percentile(times, 99) * 1e3,
        num_fetches=len(times),
        poll_pause_ms=sum(times) / sum(looks for _, looks in fetches) * 1e3,
        idle_percent=max(idle_s) / effort.idle_s * 100,
        memory_len=memory_len,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that ``percent`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _start(pair: Pair, engine_id: str, transport: str, plan: Plan, *, side: str) -> dict[str, int]:
    child = pair.producer if side == "producer" else pair.consumer
    started: dict[str, int] = child.call(
        "start", engine_id=engine_id, transport=transport, plan=asdict(plan)
    )
    return started


def _fetch_blocks(pair: Pair, port: int, count: int, seed: int) -> list[tuple[float, int]]:
    """Fetch one block many times over one session; the first, with the handshake, is left out."""
    names = [f"{seed}-{i}" for i in range(count + 1)]
    pair.producer.call("grant", engine_id="producer", transfer_ids=names, block_ids=[3])
    measured: list[tuple[float, int]] = pair.consumer.call(
        "fetch",
        engine_id=_CONSUMER,
        remote=("producer", port),
        transfer_ids=names,
        block_ids=[5],
    )
    return measured[1:]


def _shake_hands(pair: Pair, transport: str, count: int, seed: int) -> list[float]:
    """Fetch a tiny block from one fresh producer after the other; return the seconds."""
    plan = Plan(_TINY_BLOCK_LEN, NUM_REGIONS, 4, seed)
    _start(pair, "tiny", transport, plan, side="consumer")
    times = []
    for i in range(count + 1):
        name = f"fresh-{i}"
        port = _start(pair, name, transport, plan, side="producer")["port"]
        pair.producer.call("grant", engine_id=name, transfer_ids=[name], block_ids=[1])
        fetched: list[tuple[float, int]] = pair.consumer.call(
            "fetch", engine_id="tiny", remote=(name, port), transfer_ids=[name], block_ids=[2]
        )
        times.append(fetched[0][0])
        pair.producer.call("stop", engine_id=name)
    return times[1:]  # the first runs code for the first time


def _idle(pair: Pair, seconds: float) -> list[Any]:
    """Watch both sides at once, connected to each other."""
    for child in pair.children:
        child.order("idle", seconds=seconds)
    return [child.result() for child in pair.children]
