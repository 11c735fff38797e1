"""What needs no vLLM of the code for vLLM's versions; the rest is in tests/connector."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_pd.connector.compat import in_rank_order


@pytest.mark.parametrize(
    "metadata",
    [
        {1: "second", 0: "first"},
        {(0, 1): "second", (0, 0): "first"},
        {(0, 0, 1): "second", (0, 0, 0): "first"},
    ],
    ids=["by tp", "by pp and tp", "by pp, pcp and tp"],
)
def test_workers_come_in_rank_order_however_vllm_names_them(metadata: dict[Any, str]) -> None:
    assert in_rank_order(metadata) == ["first", "second"]


def test_tenth_worker_comes_after_the_ninth() -> None:
    assert in_rank_order({(0, rank): rank for rank in (10, 9)}) == [9, 10]
