from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from vllm_pd.config import Role, RoleLabel
from vllm_pd.router.admin import Admin, AdminKey
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.loads import Load
from vllm_pd.router.workers import changes

AUTHORIZED = {"Authorization": "Bearer secret"}
INSTANCES = "/admin/instances"

Client = TestClient[web.Request, web.Application]


async def is_there(_base_url: str) -> bool:
    return True


@pytest.fixture
async def pool() -> AsyncIterator[InstancePool]:
    pool = InstancePool(
        ("http://p1:8100",), ("http://d1:8200",), probe=is_there, health_interval_s=3600.0
    )
    await pool.start()
    yield pool
    await pool.stop()


@pytest.fixture
async def client(pool: InstancePool) -> AsyncIterator[Client]:
    async def make(_request: web.Request, change: changes.Change) -> None:
        changes.make(change, pool)

    app = web.Application()
    app.add_routes(Admin(AdminKey("secret"), lambda _request: pool, make).routes())
    async with TestClient(TestServer(app)) as client:
        yield client


async def ask(
    client: Client, method: str, path: str, *, headers: dict[str, str] = AUTHORIZED, **body: Any
) -> tuple[int, Any]:
    async with client.request(method, path, headers=headers, **body) as response:
        return response.status, await response.json() if response.status != 204 else None


def the(pool: InstancePool, name: str) -> Instance:
    instance = pool.get(name)
    assert instance is not None
    return instance


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer Secret"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer secret x"},
        {"Authorization": "secret"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", INSTANCES),
        ("POST", INSTANCES),
        ("PATCH", f"{INSTANCES}/d1:8200"),
        ("DELETE", f"{INSTANCES}/d1:8200"),
        ("POST", f"{INSTANCES}/d1:8200/drain"),
    ],
)
async def test_nothing_is_done_without_the_key(
    client: Client, pool: InstancePool, headers: dict[str, str], method: str, path: str
) -> None:
    status, answer = await ask(client, method, path, headers=headers)

    assert (status, answer) == (401, {"error": "Unauthorized"})
    assert pool.has_healthy(Role.DECODE)


async def test_all_that_is_known_is_listed(client: Client, pool: InstancePool) -> None:
    instance = the(pool, "p1:8100")
    instance.control, instance.engine_id, instance.fingerprint = ("::1", 5600), "e1", "f1"
    instance.ledger.note_scrape(Load(1, 2, 0.5), num_own_before=0)

    status, answer = await ask(client, "GET", INSTANCES)

    assert status == 200
    assert answer["instances"][0] == {
        "id": "p1:8100",
        "url": "http://p1:8100",
        "role": "prefill",
        "state": "healthy",
        "breaker": "closed",
        "in_flight": 0,
        "control": "[::1]:5600",
        "engine_id": "e1",
        "fingerprint": "f1",
        "load": {"num_running": 1, "num_waiting": 2, "kv_usage": 0.5},
    }
    assert answer["instances"][1]["load"] is None


async def test_an_instance_is_registered(client: Client, pool: InstancePool) -> None:
    body = {"url": "http://D2:8200/", "role": "decode", "control": "127.0.0.1:5600"}
    status, answer = await ask(client, "POST", INSTANCES, json=body)

    assert status == 201
    assert (answer["id"], answer["state"]) == ("d2:8200", "starting")
    assert the(pool, "d2:8200").control == ("127.0.0.1", 5600)


async def test_an_instance_that_names_no_role_does_both(client: Client, pool: InstancePool) -> None:
    await ask(client, "POST", INSTANCES, json={"url": "http://x"})

    assert the(pool, "x:80").role is RoleLabel.BOTH


async def test_registering_again_is_harmless_and_ends_a_drain(
    client: Client, pool: InstancePool
) -> None:
    with pool.in_use(the(pool, "d1:8200")):
        await ask(client, "POST", f"{INSTANCES}/d1:8200/drain")
        body = {"url": "http://d1:8200", "role": "decode"}
        status, answer = await ask(client, "POST", INSTANCES, json=body)

    assert (status, answer["state"]) == (200, "healthy")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no JSON object"),
        (b"[]", "no JSON object"),
        (b'{"url": "http://x"', "no JSON object"),
        (b'{"url": "\xff"}', "no JSON object"),
        (b"{}", "url"),
        (b'{"url": 3}', "url"),
        (b'{"url": "http://x", "role": "master"}', "role"),
        (b'{"url": "http://x", "weight": 3}', "weight"),
        (b'{"url": "x:8100"}', "does not start with http"),
        (b'{"url": "http://a:b@x"}', "user"),
        (b'{"url": "http://x", "control": "x"}', "control address"),
    ],
)
async def test_what_is_no_instance_is_refused_with_the_reason(
    client: Client, pool: InstancePool, body: bytes, reason: str
) -> None:
    status, answer = await ask(client, "POST", INSTANCES, data=body)

    assert status == 400
    assert reason in answer["error"]["message"]
    assert len(list(pool)) == 2


async def test_a_role_is_changed(client: Client, pool: InstancePool) -> None:
    status, answer = await ask(client, "PATCH", f"{INSTANCES}/d1:8200", json={"role": "both"})

    assert (status, answer["role"]) == (200, "both")
    assert [view.base_url for view in pool.snapshot(Role.PREFILL)] == [
        "http://p1:8100",
        "http://d1:8200",
    ]


@pytest.mark.parametrize("body", [{}, {"role": "master"}, {"role": "both", "url": "http://x"}])
async def test_a_bad_role_changes_nothing(
    client: Client, pool: InstancePool, body: dict[str, str]
) -> None:
    status, _ = await ask(client, "PATCH", f"{INSTANCES}/d1:8200", json=body)

    assert status == 400
    assert the(pool, "d1:8200").role is RoleLabel.DECODE


async def test_a_drained_instance_goes_when_its_requests_are_over(
    client: Client, pool: InstancePool
) -> None:
    with pool.in_use(the(pool, "d1:8200")):
        status, answer = await ask(client, "POST", f"{INSTANCES}/d1:8200/drain")
        assert (status, answer["state"], answer["in_flight"]) == (202, "draining", 1)

    while len((await ask(client, "GET", INSTANCES))[1]["instances"]) == 2:
        pass  # bounded by the test's timeout


async def test_a_removed_instance_is_gone_at_once(client: Client, pool: InstancePool) -> None:
    with pool.in_use(the(pool, "d1:8200")):
        assert await ask(client, "DELETE", f"{INSTANCES}/d1:8200") == (204, None)

        assert pool.get("d1:8200") is None


@pytest.mark.parametrize(
    ("method", "path"), [("PATCH", "/x:1"), ("DELETE", "/x:1"), ("POST", "/x:1/drain")]
)
async def test_an_unknown_instance_is_a_404_that_names_it(
    client: Client, method: str, path: str
) -> None:
    body = {"json": {"role": "both"}} if method == "PATCH" else {}
    status, answer = await ask(client, method, INSTANCES + path, **body)

    assert status == 404
    assert "x:1" in answer["error"]["message"]


async def test_an_instance_with_an_ipv6_address_and_a_path_can_be_named(
    client: Client,
) -> None:
    _, answer = await ask(client, "POST", INSTANCES, json={"url": "http://[::1]:8100/a/b"})
    status, _ = await ask(client, "DELETE", f"{INSTANCES}/{answer['id']}")

    assert status == 204


def test_the_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("secret\n")

    assert AdminKey.read(path).opens(AUTHORIZED)
