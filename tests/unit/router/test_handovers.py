from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from vllm_pd.router.handovers import HandoverWatch, new_handovers, parse_handovers
from vllm_pd.router.spread import bucket_of

URL = "http://127.0.0.1:8200"
BOUNDS = (0.01, 0.1, 1.0)


def page(*seconds: float, name: str = "vllm_pd:kv_fetch_seconds", model: str = "m") -> str:
    """Return the metrics of an instance that has fetched so often."""
    registry = CollectorRegistry()
    labels = ["engine", "model_name"]
    histogram = Histogram(name, "Of a test.", labels, registry=registry, buckets=BOUNDS)
    for index, one in enumerate(seconds):
        histogram.labels(str(index % 2), model).observe(one)  # two engines
    return generate_latest(registry).decode()


@pytest.mark.parametrize("name", ["vllm_pd:kv_fetch_seconds", "vllm:nixl_xfer_time_seconds"])
def test_hand_overs_are_counted_by_bound_over_all_engines(name: str) -> None:
    found = parse_handovers(page(0.005, 0.05, 0.05, 5.0, name=name))
    assert found == {0.01: 1, 0.1: 3, 1.0: 3, math.inf: 4}


@pytest.mark.parametrize("model", ['a"b', "a}b", 'le="0.1"', "a\nb", "a, b"])
def test_whatever_a_model_is_called_they_are_read(model: str) -> None:
    assert parse_handovers(page(0.05, model=model)) == {0.01: 0, 0.1: 1, 1.0: 1, math.inf: 1}


@pytest.mark.parametrize(
    "line",
    ['{le="x"} 1', '{le="0.1"} x', '{le="0.1"} 1e999', "{} 1", '{le="0.1"', ""],
)
def test_a_line_without_sense_is_passed_over(line: str) -> None:
    text = (
        f'\nvllm_pd:kv_fetch_seconds_bucket{line}\nvllm_pd:kv_fetch_seconds_bucket{{le="1.0"}} 2\n'
    )
    assert parse_handovers(text).get(1.0) == 2


@given(st.text(alphabet='\nvllm_pd:kv_fetch_seconds_bucket{le="0.1,"} 123e+-'))
def test_no_text_breaks_the_parser(text: str) -> None:
    parse_handovers("\nvllm_pd:kv_fetch_seconds_bucket" + text)


@given(
    st.lists(st.floats(0.001, 9.0), max_size=20),
    st.lists(st.floats(0.001, 9.0), max_size=20),
)
def test_new_ones_are_as_many_as_came_and_in_their_buckets(
    before: list[float], after: list[float]
) -> None:
    found = new_handovers(parse_handovers(page(*before)), parse_handovers(page(*before, *after)))

    def counts(seconds: list[float]) -> list[int]:
        return [sum(one <= bound for one in seconds) for bound in BOUNDS[:-1]]

    assert len(found) == len(after)
    assert counts(found) == counts(after)


def test_after_a_restart_nothing_is_new() -> None:
    last, now = parse_handovers(page(0.05, 0.05)), parse_handovers(page(0.05))
    assert new_handovers(last, now) == []


class Noted:
    def __init__(self) -> None:
        self.buckets: list[int] = []

    def __call__(self, buckets: list[int], _total_s: float) -> None:
        self.buckets += buckets


class Pages:
    """What an instance answers, one scrape after the other."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = list(texts)

    async def __call__(self, _base_url: str) -> str | None:
        return self.texts.pop(0)


async def test_what_is_new_is_noted_and_the_page_passed_on() -> None:
    noted, pages = Noted(), (page(0.05), page(0.05, 0.05))
    watch = HandoverWatch(Pages(*pages), noted)
    assert [await watch.scrape(URL), await watch.scrape(URL)] == list(pages)
    assert noted.buckets == [bucket_of(0.055)]  # the middle of its bucket


async def test_a_scrape_that_fails_changes_nothing() -> None:
    noted = Noted()
    watch = HandoverWatch(Pages(page(0.05), None, page(0.05, 0.05)), noted)
    assert [await watch.scrape(URL) is None for _ in range(3)] == [False, True, False]
    assert len(noted.buckets) == 1


async def test_of_an_instance_that_restarted_nothing_is_known() -> None:
    noted = Noted()
    watch = HandoverWatch(Pages(page(0.05), page(0.05, 0.05)), noted)
    await watch.scrape(URL)
    watch.forget(URL)
    await watch.scrape(URL)
    assert noted.buckets == []
