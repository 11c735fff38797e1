"""``/dashboard``: a page that shows what the router does now, and the state behind it.

The page is one file without anything from elsewhere. It asks for ``/dashboard/state``
again and again and shows it. Whichever worker of the router is asked asks all of them.
Whoever may see ``/metrics`` may see both: they show nothing of requests but counts and
durations, and they change nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import msgspec
from aiohttp import web

from vllm_pd import __version__
from vllm_pd.config import Role
from vllm_pd.router import policy
from vllm_pd.router.activity import SLICE_S, WINDOW_S, Slice, Tally, Timed, span_s, window_of
from vllm_pd.router.admission import Stage
from vllm_pd.router.headers import PATH_DECODE_ONLY, PATH_DISAGGREGATED
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.reports import Queue, Report, finding_of, merged, report_of
from vllm_pd.router.spread import Spread
from vllm_pd.router.workers.shared import Shared

_NUM_RATE_SLICES = 12  # a minute
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sources:
    """What the dashboard shows.

    Attributes:
        pool: the instances.
        metrics: with what happened in the last minutes.
        stages: the router's queues.
        num_processes: that the router has.
        shared: asks all of them; None: there is one.
    """

    pool: InstancePool
    metrics: Metrics
    stages: Mapping[Role, Stage]
    num_processes: int = 1
    shared: Shared | None = None

    async def reports(self) -> Sequence[Report]:
        """Return what the processes say of themselves, as far as they answer."""
        if self.shared is not None:
            return await self.shared.reports()
        return [report_of(self.pool, self.metrics, self.stages)]


class Dashboard:
    """Handlers of ``/dashboard``.

    Args:
        sources_of: returns those of the app that a request came to.
    """

    def __init__(self, sources_of: Callable[[web.Request], Sources]) -> None:
        self._sources_of = sources_of

    def routes(self) -> list[web.RouteDef]:
        """Return what to add to the app."""
        return [
            web.get("/dashboard", self._page, allow_head=False),
            web.get("/dashboard/state", self._state, allow_head=False),
        ]

    async def _page(self, _request: web.Request) -> web.Response:
        page, policy_text = _load_page()
        headers = {
            "Content-Security-Policy": policy_text,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def _state(self, request: web.Request) -> web.Response:
        sources = self._sources_of(request)
        state = state_of(sources, await sources.reports(), time.monotonic())
        body = msgspec.json.encode(state)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=body, content_type="application/json", headers=headers)


@cache
def _load_page() -> tuple[str, str]:
    """Return the page and its policy: nothing runs or loads but what is written there."""
    page = resources.files("vllm_pd.router").joinpath("dashboard.html").read_text("utf-8")
    hashes: dict[str, str] = {}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind] = f"'sha256-{digest}'"
    directives = [
        "default-src 'none'",
        f"script-src {hashes['script']}",
        f"style-src {hashes['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, "; ".join(directives)


def state_of(sources: Sources, reports: Sequence[Report], now: float) -> dict[str, Any]:
    """Return what the page shows, as plain data.

    Args:
        sources: of the process that is asked.
        reports: of all processes that answer.
        now: a monotonic time.
    """
    pool, whole = sources.pool, merged(reports)
    slices = window_of(whole.slices, now)
    return {
        "version": __version__,
        "processes": {"num": sources.num_processes, "silent": sources.num_processes - len(reports)},
        "age_s": round(whole.age_s, 1),
        "window_s": WINDOW_S,
        "slice_s": SLICE_S,
        "ready": policy.has_pair(pool.snapshot(Role.PREFILL), pool.snapshot(Role.DECODE)),
        "requests": _requests(whole, slices, now),
        "stages": [_timed(what, slices) for what in Timed],
        "queues": {
            role.value: _queue(whole.queues[role], stage) for role, stage in sources.stages.items()
        },
        "instances": [_instance(one, pool, whole, now) for one in pool],
    }


def _requests(whole: Report, slices: Sequence[Slice], now: float) -> dict[str, Any]:
    counts: Counter[tuple[Tally, str]] = Counter()
    for one in slices:
        counts.update(one.counts)
    latest = sum(one.total(Tally.CODE) for one in slices[-_NUM_RATE_SLICES:])
    return {
        "in_flight": whole.in_flight,
        "per_s": latest / span_s(_NUM_RATE_SLICES, age_s=whole.age_s, now=now),
        "series": [one.total(Tally.CODE) for one in slices],
        "error_series": [_num_errors(one.counts) for one in slices],
        "disaggregated_series": [_share_disaggregated(one.counts) for one in slices],
        "num_errors": _num_errors(counts),
        **{tally.value: _labels(counts, tally) for tally in Tally},
    }


def _num_errors(counts: Mapping[tuple[Tally, str], int]) -> int:
    """Return how many answers said that the service failed; refusals are none."""
    return sum(
        num for (what, label), num in counts.items() if what is Tally.CODE and label >= "500"
    )


def _share_disaggregated(counts: Mapping[tuple[Tally, str], int]) -> float | None:
    disaggregated = counts.get((Tally.PATH, PATH_DISAGGREGATED), 0)
    num = disaggregated + counts.get((Tally.PATH, PATH_DECODE_ONLY), 0)
    return disaggregated / num if num else None


def _labels(counts: Counter[tuple[Tally, str]], tally: Tally) -> dict[str, int]:
    return {label: num for (what, label), num in counts.most_common() if what is tally}


def _timed(what: Timed, slices: Sequence[Slice]) -> dict[str, Any]:
    whole = Spread()
    series: list[float | None] = []
    for one in slices:
        spread = one.spreads.get(what)
        series.append(None if spread is None else spread.quantile(0.5))
        if spread is not None:
            whole.merge(spread)
    return {
        "name": what.value,
        "num": whole.num,
        "p50": whole.quantile(0.5),
        "p90": whole.quantile(0.9),
        "p99": whole.quantile(0.99),
        "series": series,
    }


def _queue(queue: Queue, stage: Stage) -> dict[str, int]:
    """Return a stage; every process has the capacity of all of them."""
    return {"waiting": queue.waiting, "in_use": queue.in_use, "capacity": stage.capacity}


def _instance(instance: Instance, pool: InstancePool, whole: Report, now: float) -> dict[str, Any]:
    outstanding, scrape = instance.ledger.outstanding, instance.ledger.scrape
    # None has found anything yet if it was registered a moment ago.
    finding = whole.findings.get(instance.base_url) or finding_of(instance, pool)
    failed_at = finding.failed_at
    return {
        "url": instance.base_url,
        "role": instance.role.value,
        "state": finding.state.value,
        "breaker": finding.breaker.value,
        "accepting": finding.accepting,
        "in_flight": instance.in_flight,
        "prefill_tokens": outstanding.prefill_tokens,
        "kv_tokens": outstanding.kv_tokens,
        "load": None if scrape is None else msgspec.to_builtins(scrape.load),
        "model": instance.model_name,
        "fingerprint": instance.fingerprint,
        "num_failed": finding.num_failed,
        "last_failure": finding.last_failure,
        "failed_ago_s": None if failed_at is None else round(now - failed_at, 1),
    }
