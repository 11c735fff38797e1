"""``X-Request-Id``: on both legs, and on every answer whatever becomes of the request."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import (
    Client,
    FakeInstance,
    Streams,
    answers,
    drops,
    prefills,
)

COMPLETIONS = "/v1/completions"
BODY = {"model": "m", "prompt": "hi", "max_tokens": 8}
NAMED = {"X-Request-Id": "mine-1"}


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "admin.key"
    path.write_text("secret\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def api_keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.yaml"
    path.write_text("- {name: ann, key: k-ann, requests_per_minute: 1}\n")
    path.chmod(0o600)
    return str(path)


async def test_the_clients_id_is_on_both_legs_and_on_the_answer(
    router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    async with router.post(COMPLETIONS, json=BODY, headers=NAMED) as response:
        assert response.headers.getall("X-Request-Id") == ["mine-1"]
    legs = [one.received[0].headers.getall("X-Request-Id") for one in (prefill, decode)]
    assert legs == [["mine-1"], ["mine-1"]]


@pytest.mark.parametrize("given", ["", "x" * 129, "\u00e9", "a\tb"])
async def test_an_id_that_cannot_be_used_is_replaced(
    router: Client, decode: FakeInstance, given: str
) -> None:
    async with router.post(COMPLETIONS, json=BODY, headers={"X-Request-Id": given}) as response:
        made = response.headers["X-Request-Id"]
    assert str(UUID(made)) == made
    assert decode.received[0].headers["X-Request-Id"] == made


async def test_a_missing_id_is_made_anew_for_each_request(router: Client) -> None:
    made = set()
    for _ in range(2):
        async with router.post(COMPLETIONS, json=BODY) as response:
            made.add(response.headers["X-Request-Id"])
    assert len(made) == 2


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
async def test_answers_to_get_have_it(router: Client, path: str) -> None:
    async with router.get(path, headers=NAMED) as response:
        assert response.status == 200
        assert response.headers["X-Request-Id"] == "mine-1"


async def test_a_stream_has_it(
    start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decode = await start_instance(Streams([b"data: {}\n\n", b"data: [DONE]\n\n"]))
    router = await start_router([prefill], [decode])
    async with router.post(COMPLETIONS, json=BODY | {"stream": True}, headers=NAMED) as response:
        await response.read()
        assert response.headers["X-Request-Id"] == "mine-1"


async def test_answers_to_unknown_endpoints_and_methods_have_it(router: Client) -> None:
    async with router.get("/nowhere", headers=NAMED) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (404, "mine-1")
    async with router.get(COMPLETIONS, headers=NAMED) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (405, "mine-1")


async def test_a_refusal_before_any_handler_has_it(router: Client) -> None:
    headers = NAMED | {"Expect": "miracles"}
    async with router.post(COMPLETIONS, json=BODY, headers=headers) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (417, "mine-1")


async def test_refusals_for_want_of_a_key_have_it(
    start_router: StartRouter,
    prefill: FakeInstance,
    decode: FakeInstance,
    api_keys_file: str,
    key_file: str,
) -> None:
    router = await start_router(
        [prefill], [decode], api_keys_file=api_keys_file, admin_key_file=key_file
    )
    async with router.post(COMPLETIONS, json=BODY, headers=NAMED) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (401, "mine-1")
    async with router.get("/admin/instances", headers=NAMED) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (401, "mine-1")


async def test_refusals_for_want_of_room_have_it(
    start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance, api_keys_file: str
) -> None:
    router = await start_router([prefill], [decode], api_keys_file=api_keys_file, max_body_len=100)
    headers = NAMED | {"Authorization": "Bearer k-ann"}
    async with router.post(COMPLETIONS, data=b"x" * 101, headers=headers) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (413, "mine-1")
    async with router.post(COMPLETIONS, json=BODY, headers=headers) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (429, "mine-1")


async def test_a_refusal_of_an_instance_has_it_once(
    start_router: StartRouter, start_instance: StartInstance
) -> None:
    refuses = answers(404, {"error": {}}, **{"X-Request-Id": "theirs"})
    one, other = await start_instance(refuses), await start_instance(refuses)
    router = await start_router([one], [other])
    async with router.post(COMPLETIONS, json=BODY, headers=NAMED) as response:
        assert response.status == 404
        assert response.headers.getall("X-Request-Id") == ["mine-1"]


async def test_an_answer_for_a_lost_instance_has_it(
    start_router: StartRouter, start_instance: StartInstance
) -> None:
    router = await start_router([await start_instance(prefills)], [await start_instance(drops)])
    async with router.post(COMPLETIONS, json=BODY, headers=NAMED) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (502, "mine-1")
