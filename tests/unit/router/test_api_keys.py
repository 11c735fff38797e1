from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from multidict import CIMultiDict

from vllm_pd.config import RouterConfig
from vllm_pd.errors import ConfigError, OverloadedError
from vllm_pd.router import api_keys
from vllm_pd.router.api_keys import Access, ApiKeys, Client, Limits, unauthorized_response

TWO_CLIENTS = """
- name: alice
  key: sk-alice
- name: batch
  key: sk-batch
  max_concurrent: 2
  requests_per_minute: 60
  min_priority: 10
"""

Write = Callable[[str], Path]


class Clock:
    """Time as the test wants it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of 0600 that is newer than the one before it."""
    path = tmp_path / "secrets"
    times = iter(range(1, 100))

    def write(text: str) -> Path:
        path.write_text(text)
        path.chmod(0o600)
        at = next(times)
        os.utime(path, (at, at))
        return path

    return write


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def name_of(client: Client | None) -> str | None:
    return client.name if client else None


# --- Whose key is it? -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("authorization", "name"),
    [
        ("Bearer sk-alice", "alice"),
        ("bearer sk-batch", "batch"),
        ("Bearer sk-alic", None),
        ("Bearer sk-alice2", None),
        ("Bearer  sk-alice", None),
        ("Basic sk-alice", None),
        ("sk-alice", None),
        ("Bearer", None),
        ("", None),
        ("Bearer \udcff\udcfe", None),
    ],
)
def test_a_client_is_known_by_its_bearer_key(
    write: Write, authorization: str, name: str | None
) -> None:
    keys = ApiKeys(write(TWO_CLIENTS))

    assert name_of(keys.client_of({"Authorization": authorization})) == name


def test_a_request_without_key_is_nobodys(write: Write) -> None:
    assert ApiKeys(write(TWO_CLIENTS)).client_of({}) is None


def test_nobody_is_answered_like_vllm_does() -> None:
    response = unauthorized_response()

    assert (response.status, response.body) == (401, b'{"error":"Unauthorized"}')
    assert response.content_type == "application/json"


# --- The file -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list of entries"),
        ("[]", "list of entries"),
        ("sk-secret", "list of entries"),
        ("- sk-secret", "entry 1: expected a mapping"),
        ("- {name: a, key: sk-secret}\n- {name: b}", "entry 2: .*`key`"),
        ("- {name: a, key: 5}", "entry 1: "),
        ("- {name: '', key: sk-secret}", "name is empty"),
        ("- {name: a, key: ''}", "printable"),
        ("- {name: a, key: 'sk-secret with spaces'}", "printable"),
        ("- {name: a, key: sk-secret, limit: 5}", "limit"),
        ("- {name: a, key: sk-secret, max_concurrent: 0}", "max_concurrent"),
        ("- {name: a, key: sk-secret, requests_per_minute: -1}", "requests_per_minute"),
        ("- {name: a, key: sk-secret}\n- {name: a, key: k}", "same name"),
        ("- {name: a, key: sk-secret}\n- {name: b, key: sk-secret}", "same key"),
        ("- {name: a, key: 'sk-secret", "not YAML at line 1"),
        ("- {name: a, key: !sk-secret x}", "not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it_and_no_key(
    write: Write, text: str, message: str
) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value).replace(str(path), "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        ApiKeys(tmp_path / "nowhere")


def test_a_file_that_others_can_read_is_warned_about(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(TWO_CLIENTS)
    path.chmod(0o640)

    ApiKeys(path)

    assert "chmod 600" in caplog.text


def test_a_file_of_its_owner_is_read_in_silence(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    ApiKeys(write(TWO_CLIENTS))

    assert caplog.text == ""


def test_a_changed_file_changes_who_is_known(write: Write) -> None:
    keys = ApiKeys(write(TWO_CLIENTS))
    write("- {name: bob, key: sk-bob}")

    keys.reload_if_changed()

    assert name_of(keys.client_of(bearer("sk-bob"))) == "bob"
    assert keys.client_of(bearer("sk-alice")) is None


def test_a_client_with_a_new_key_keeps_its_open_requests_and_gets_the_new_limits(
    write: Write,
) -> None:
    keys = ApiKeys(write("- {name: a, key: old, max_concurrent: 5}"))
    client = keys.client_of(bearer("old"))
    assert client is not None
    with client.request():
        write("- {name: a, key: new, max_concurrent: 1}")
        keys.reload_if_changed()
        same = keys.client_of(bearer("new"))
        assert same is client
        with pytest.raises(OverloadedError), same.request():
            pass


def test_a_file_that_cannot_be_used_leaves_the_keys_and_is_told_once(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(write(TWO_CLIENTS))
    write("- {name: alice}")

    keys.reload_if_changed()
    keys.reload_if_changed()

    assert name_of(keys.client_of(bearer("sk-alice"))) == "alice"
    assert len(caplog.records) == 1
    assert "`key`" in caplog.text


def test_a_file_that_is_gone_for_a_moment_is_read_when_it_is_back(write: Write) -> None:
    path = write(TWO_CLIENTS)
    keys = ApiKeys(path)
    path.unlink()
    keys.reload_if_changed()
    assert name_of(keys.client_of(bearer("sk-alice"))) == "alice"

    write("- {name: bob, key: sk-bob}")
    keys.reload_if_changed()

    assert name_of(keys.client_of(bearer("sk-bob"))) == "bob"


def test_an_unchanged_file_is_not_read_again(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys = ApiKeys(write(TWO_CLIENTS))

    keys.reload_if_changed()

    assert caplog.text == ""


# --- Limits ---------------------------------------------------------------------------


def test_a_client_without_limits_is_served_as_often_as_it_asks(clock: Clock) -> None:
    client = Client("a", Limits(), clock=clock)
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(client.request())
        assert client.in_use == 1000
    assert client.in_use == 0


def test_a_client_with_as_many_open_requests_as_it_may_have_is_refused(clock: Clock) -> None:
    client = Client("a", Limits(max_concurrent=2), clock=clock)
    with client.request():
        clock.now += 20.0
    with client.request(), client.request():
        with pytest.raises(OverloadedError, match="2 requests open") as caught, client.request():
            pass
        assert client.in_use == 2
    assert caught.value.retry_after_s == 10  # two that take 20 s each


def test_a_request_that_fails_does_not_count_for_ever(clock: Clock) -> None:
    client = Client("a", Limits(max_concurrent=1), clock=clock)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), client.request():
            raise ZeroDivisionError


def send(client: Client, count: int) -> None:
    for _ in range(count):
        with client.request():
            pass


def test_a_minutes_requests_may_come_at_once_but_no_more(clock: Clock) -> None:
    client = Client("a", Limits(requests_per_minute=6), clock=clock)
    send(client, 6)

    with pytest.raises(OverloadedError, match="6 requests per minute") as caught:
        send(client, 1)
    assert caught.value.retry_after_s == 10


def test_after_retry_after_there_is_place_for_one_request(clock: Clock) -> None:
    client = Client("a", Limits(requests_per_minute=6), clock=clock)
    send(client, 6)
    clock.now += 10.0
    send(client, 1)

    with pytest.raises(OverloadedError):
        send(client, 1)


def test_a_long_silence_saves_up_one_minutes_requests(clock: Clock) -> None:
    client = Client("a", Limits(requests_per_minute=6), clock=clock)
    send(client, 6)
    clock.now += 3600.0
    send(client, 6)

    with pytest.raises(OverloadedError):
        send(client, 1)


def test_a_request_refused_for_its_concurrency_costs_nothing(clock: Clock) -> None:
    client = Client("a", Limits(max_concurrent=1, requests_per_minute=2), clock=clock)
    with client.request(), pytest.raises(OverloadedError, match="open"):
        send(client, 1)

    send(client, 1)


def test_a_client_gets_no_priority_above_its_limit() -> None:
    client = Client("a", Limits(min_priority=10))

    assert [client.priority(asked) for asked in (-5, 10, 11)] == [10, 10, 11]


# --- Access ---------------------------------------------------------------------------


def leg_headers(access: Access) -> CIMultiDict[str]:
    headers = CIMultiDict({"Authorization": "Bearer sk-alice", "X-Request-Id": "id"})
    headers.add("authorization", "Bearer another")
    access.authorize(headers)
    return headers


def test_without_keys_everybody_is_one_client_with_any_priority() -> None:
    client = Access.from_config(RouterConfig()).client_of({})

    assert client is not None
    assert (client.name, client.priority(-(2**63))) == ("", -(2**63))


def test_without_keys_the_instances_see_what_the_client_sent() -> None:
    headers = leg_headers(Access.from_config(RouterConfig()))

    assert headers.getall("Authorization") == ["Bearer sk-alice", "Bearer another"]


def test_a_key_of_the_router_never_reaches_an_instance(write: Write) -> None:
    config = RouterConfig(api_keys_file=str(write(TWO_CLIENTS)))
    access = Access.from_config(config)

    assert name_of(access.client_of(bearer("sk-alice"))) == "alice"
    assert leg_headers(access) == CIMultiDict({"X-Request-Id": "id"})


def test_the_instances_see_the_upstream_key_alone(write: Write) -> None:
    config = RouterConfig(upstream_key_file=str(write("sk-upstream\n")))

    headers = leg_headers(Access.from_config(config))

    assert headers.getall("Authorization") == ["Bearer sk-upstream"]


@pytest.mark.parametrize("text", ["", "\n", "two lines\n", "a\nb\n", "schlüssel"])
def test_an_upstream_key_file_that_holds_no_key_is_refused(write: Write, text: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match="one line") as caught:
        Access.from_config(RouterConfig(upstream_key_file=str(path)))
    assert str(path) in str(caught.value)


async def test_a_watched_file_is_read_when_it_changes(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "RELOAD_INTERVAL_S", 0.0)
    access = Access(ApiKeys(write(TWO_CLIENTS)))
    watcher = asyncio.create_task(access.watch())
    write("- {name: bob, key: sk-bob}")

    for _ in range(3):  # steps of the watcher
        await asyncio.sleep(0)

    assert name_of(access.client_of(bearer("sk-bob"))) == "bob"
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)


async def test_nothing_is_watched_without_a_file() -> None:
    await Access().watch()
