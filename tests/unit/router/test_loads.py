from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from vllm_pd.router.loads import Ledger, Load, Scrape, Work, model_name_of, parse_load

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 70.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 1234.0
"""


def page(*, running: str = "1.0", waiting: str = "0.0", kv_usage: str = "0.5") -> str:
    return (
        f"vllm:num_requests_running {running}\n"
        f"vllm:num_requests_waiting {waiting}\n"
        f"vllm:kv_cache_usage_perc {kv_usage}\n"
    )


def page_of_model(name: str) -> str:
    registry = CollectorRegistry()
    running = Gauge("vllm:num_requests_running", "", ["engine", "model_name"], registry=registry)
    running.labels("0", name).set(1)
    return generate_latest(registry).decode()


@pytest.mark.parametrize("name", ["some/model", 'a"b', "a\\nb", "a\nb", 'x",model_name="y', "模型"])
def test_the_model_is_read_whatever_it_is_called(name: str) -> None:
    assert model_name_of(page_of_model(name)) == name


@pytest.mark.parametrize("text", ["", page(), '\nvllm:num_requests_running{engine="0"} 1\n'])
def test_a_page_that_names_no_model_names_none(text: str) -> None:
    assert model_name_of(text) == ""


def test_the_load_is_read_from_a_page_of_vllm() -> None:
    assert parse_load(PAGE) == Load(num_running=3, num_waiting=2, kv_usage=0.25)


def test_the_engines_of_an_instance_are_taken_together_and_the_fullest_counts() -> None:
    second = PAGE.replace('engine="0"', 'engine="1"').replace("0.25", "0.75")

    assert parse_load(PAGE + second) == Load(num_running=6, num_waiting=4, kv_usage=0.75)


def test_names_without_labels_and_a_last_line_without_an_end_are_read() -> None:
    assert parse_load(page().rstrip("\n")) == Load(1, 0, 0.5)


def test_a_timestamp_after_the_value_is_not_the_value() -> None:
    assert parse_load(page(running="4 1395066363000")) == Load(4, 0, 0.5)


@given(st.text())
def test_whatever_a_model_is_called_the_load_is_read(name: str) -> None:
    registry = CollectorRegistry()
    for metric in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        gauge = Gauge(f"vllm:{metric}", "Help.", ["model_name"], registry=registry)
        gauge.labels(name).set(1)

    assert parse_load(generate_latest(registry).decode("utf-8", "replace")) == Load(1, 1, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>not found</html>",
        PAGE.replace("vllm:num_requests_running{", "vllm:other{"),
        PAGE.replace("vllm:num_requests_waiting{", "vllm:other{"),
        PAGE.replace("vllm:kv_cache_usage_perc{", "vllm:other{"),
        PAGE[: PAGE.index(" 0.25")],
        page(running="NaN"),
        page(running="+Inf"),
        page(waiting="-1"),
        page(kv_usage="many"),
        page(kv_usage=""),
        page(running="1e308") + page(running="1e308"),
    ],
)
def test_a_page_with_a_missing_or_senseless_value_gives_no_load(text: str) -> None:
    assert parse_load(text) is None


@given(st.text(alphabet='vllm:num_requests_running{}", 0.\n'))
def test_no_text_breaks_the_parser(text: str) -> None:
    parse_load(PAGE + text)


def test_what_the_scrape_shows_of_this_router_is_not_foreign() -> None:
    assert Scrape(Load(3, 2, 0.0), num_own=4).num_foreign == 1


def test_requests_that_are_still_on_their_way_do_not_make_foreign_ones_negative() -> None:
    assert Scrape(Load(1, 0, 0.0), num_own=4).num_foreign == 0


def test_work_is_outstanding_as_long_as_it_is_open() -> None:
    ledger = Ledger()

    with ledger.open(Work(1, 2, 3)), ledger.open(Work(10, 20, 30)):
        assert ledger.outstanding == Work(11, 22, 33)
    assert ledger.outstanding == Work()


def test_work_that_fails_is_over() -> None:
    ledger = Ledger()

    with pytest.raises(ConnectionResetError), ledger.open(Work(1, 2, 3)):
        raise ConnectionResetError

    assert ledger.outstanding == Work()


def test_what_is_sent_after_the_scrape_makes_nothing_foreign() -> None:
    ledger = Ledger()
    with ledger.open(Work(num_sequences=2)):
        ledger.note_scrape(Load(5, 0, 0.0), num_own_before=2)

        with ledger.open(Work(num_sequences=9)):
            assert ledger.scrape is not None
            assert ledger.scrape.num_foreign == 3


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_what_began_or_ended_during_the_scrape_is_not_taken_for_foreign(
    before: int, after: int
) -> None:
    ledger = Ledger()

    with ledger.open(Work(num_sequences=after)):
        ledger.note_scrape(Load(3, 0, 0.0), num_own_before=before)

    assert ledger.scrape is not None
    assert ledger.scrape.num_foreign == 0


def test_a_failed_scrape_drops_the_one_before() -> None:
    ledger = Ledger()
    ledger.note_scrape(Load(5, 0, 0.0), num_own_before=0)

    ledger.note_scrape(None, num_own_before=0)

    assert ledger.scrape is None
