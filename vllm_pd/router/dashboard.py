"""``/dashboard``: a page that shows what the router does now, and the state behind it.

The page is one file without anything from elsewhere. It asks for ``/dashboard/state``
again and again and shows it. Whoever may see ``/metrics`` may see both: they show nothing
of requests but counts and durations, and they change nothing.
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
from vllm_pd.router.activity import SLICE_S, WINDOW_S, Slice, Tally, Timed
from vllm_pd.router.admission import Stage
from vllm_pd.router.headers import PATH_DECODE_ONLY, PATH_DISAGGREGATED
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.spread import Spread

_NUM_RATE_SLICES = 12  # a minute
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sources:
    """What the dashboard shows.

    Attributes:
        pool: the instances.
        metrics: with what happened in the last minutes.
        stages: the router's queues.
    """

    pool: InstancePool
    metrics: Metrics
    stages: Mapping[Role, Stage]


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
        body = msgspec.json.encode(state_of(self._sources_of(request), time.monotonic()))
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


def state_of(sources: Sources, now: float) -> dict[str, Any]:
    """Return what the page shows, as plain data; ``now`` is a monotonic time."""
    pool, metrics = sources.pool, sources.metrics
    slices = metrics.activity.recent()
    return {
        "version": __version__,
        "age_s": round(metrics.activity.age_s, 1),
        "window_s": WINDOW_S,
        "slice_s": SLICE_S,
        "ready": policy.has_pair(pool.snapshot(Role.PREFILL), pool.snapshot(Role.DECODE)),
        "requests": _requests(metrics, slices),
        "stages": [_timed(what, slices) for what in Timed],
        "queues": {role.value: _queue(stage) for role, stage in sources.stages.items()},
        "instances": [_instance(one, pool, now) for one in pool],
    }


def _requests(metrics: Metrics, slices: Sequence[Slice]) -> dict[str, Any]:
    counts: Counter[tuple[Tally, str]] = Counter()
    for one in slices:
        counts.update(one.counts)
    latest = sum(one.total(Tally.CODE) for one in slices[-_NUM_RATE_SLICES:])
    return {
        "in_flight": metrics.num_in_flight,
        "per_s": latest / metrics.activity.span_s(_NUM_RATE_SLICES),
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


def _queue(stage: Stage) -> dict[str, int]:
    return {"waiting": stage.num_waiting, "in_use": stage.in_use, "capacity": stage.capacity}


def _instance(instance: Instance, pool: InstancePool, now: float) -> dict[str, Any]:
    outstanding, scrape = instance.ledger.outstanding, instance.ledger.scrape
    failed_at = instance.failed_at
    return {
        "url": instance.base_url,
        "role": instance.role.value,
        "state": instance.state.value,
        "breaker": instance.breaker.state.value,
        "accepting": pool.is_accepting(instance),
        "in_flight": instance.in_flight,
        "prefill_tokens": outstanding.prefill_tokens,
        "kv_tokens": outstanding.kv_tokens,
        "load": None if scrape is None else msgspec.to_builtins(scrape.load),
        "model": instance.model_name,
        "fingerprint": instance.fingerprint,
        "num_failed": instance.num_failed,
        "last_failure": instance.last_failure,
        "failed_ago_s": None if failed_at is None else round(now - failed_at, 1),
    }
