"""What a decode instance tells of a request's way to its first token. Pure.

The ``PDConnector`` of a decode instance answers a timeline if the params of the
request ask for it. vLLM hands it on in whole answers only: the ``kv_transfer_params`` of
completions and chats are no part of their streams (vLLM 0.32, ``entrypoints/openai``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_pd.protocol.params import TIMELINE, is_of_pd_connector
from vllm_pd.router import usage


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where the time of one request went on its decode instance, in seconds.

    Attributes:
        handover_s: from the engine's order to fetch the KV cache to its result.
        queue_s: in the engine's queue, until it had blocks; None: it does not tell.
    """

    handover_s: float
    queue_s: float | None


def asking(params: Mapping[str, Any] | None, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the params of a decode leg, with the question for the timeline if it helps.

    Args:
        params: those of the prefill instance.
        body: of the client.
    """
    if params is None or body.get("stream") or not is_of_pd_connector(params):
        return params
    return {**params, TIMELINE: True}


def timeline_of(answer: bytes) -> Timeline | None:
    """Read the timeline from a whole answer; None if it has none, or of a failed fetch."""
    if b'"timeline"' not in answer:
        return None
    found = (usage.kv_params_in(answer) or {}).get(TIMELINE)
    if not isinstance(found, dict) or found.get("outcome") != "ok":
        return None
    handover_s = _seconds(found.get("total_s"))
    if handover_s is None:
        return None
    return Timeline(handover_s, _seconds(found.get("engine_queue_s")))


def _seconds(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < math.inf else None
