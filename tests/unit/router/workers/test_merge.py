from __future__ import annotations

import re

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_pd.router.workers.merge import Page, merge, page_of, render, what_stays


def registry(count: int, *labels: str, up: int = 1) -> CollectorRegistry:
    made = CollectorRegistry()
    counter = Counter("requests", "Requests.", ["code"], registry=made)
    for label in labels:
        counter.labels(label).inc(count)
    Gauge("open", "Open requests.", registry=made).set(count)
    Gauge("up", "Whether it is up.", registry=made).set(up)
    Histogram("seconds", "Time.", buckets=(0.1, 1.0), registry=made).observe(count / 4)
    return made


def values(page: Page) -> dict[str, float]:
    text = re.sub(r"^(#.*|\S+_created\S*.*)\n", "", render(page).decode(), flags=re.MULTILINE)
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines()}


def test_one_page_is_what_prometheus_client_would_write() -> None:
    made = registry(3, "200", "503")
    assert render(page_of(made)) == generate_latest(made)


def test_samples_with_the_same_labels_are_added_up() -> None:
    pages = [page_of(registry(1, "200", up=1)), page_of(registry(5, "200", "503", up=0))]
    assert values(merge(pages, least_of=["up"])) == {
        'requests_total{code="200"}': 6,
        'requests_total{code="503"}': 5,
        "open": 6,
        "up": 0,
        'seconds_bucket{le="0.1"}': 0,
        'seconds_bucket{le="1.0"}': 1,
        'seconds_bucket{le="+Inf"}': 2,
        "seconds_count": 2,
        "seconds_sum": 1.5,
    }


def test_a_sum_was_made_when_the_first_part_was() -> None:
    first = page_of(registry(1, "200"))
    both = render(merge([page_of(registry(1, "200")), first])).decode()
    (created,) = [
        one.value for family in first for one in family.samples if "requests_created" in one.name
    ]
    shown = re.search(r"^requests_created\{.*\} (.*)$", both, re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == created


def test_of_a_worker_that_is_gone_only_what_it_counted_stays() -> None:
    names = [family.name for family in what_stays(page_of(registry(1, "200")))]
    assert names == ["requests", "seconds"]
