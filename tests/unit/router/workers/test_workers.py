"""Several real router processes on one port, in front of instances that do as told."""

from __future__ import annotations

import json
import os
import signal
import ssl
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.unit.router.certificates import Authority
from tests.unit.router.conftest import StartInstance
from tests.unit.router.fakes import FakeInstance, Streams, completes, drops, hangs
from tests.unit.router.test_stored import Store
from tests.unit.router.workers.deployment import Connection, Router, launch, running, until

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
BODY = {"model": "m", "prompt": "hi", "max_tokens": 8}
EVENT = b'data: {"choices": [{"text": "x"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ADMIN = "admin-key"


@pytest.fixture
def admin(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "admin.key"
    path.write_text(ADMIN)
    path.chmod(0o600)
    return {"admin_key_file": str(path)}


async def in_flight(connection: Connection) -> dict[str, int]:
    """Return the open requests by instance, as a worker lists them."""
    _, raw = await connection.ask("GET", "/admin/instances", key=ADMIN)
    return {one["url"]: one["in_flight"] for one in json.loads(raw)["instances"]}


async def metric(connection: Connection, line: str) -> float:
    """Return the sum of a metric's samples, as a worker shows it."""
    _, raw = await connection.ask("GET", "/metrics")
    found = [text for text in raw.decode().splitlines() if text.startswith(line)]
    return sum(float(text.split()[-1]) for text in found)


async def served(connection: Connection, *instances: FakeInstance) -> FakeInstance:
    """Send a request that is not answered, and return the instance that got it."""
    before = [len(one.received) for one in instances]
    connection.send("POST", COMPLETIONS, BODY)

    def is_there() -> bool:
        return [len(one.received) for one in instances] != before

    await until(is_there)
    counts = zip(instances, before, strict=True)
    return next(one for one, count in counts if len(one.received) > count)


async def has_open(connection: Connection, instance: FakeInstance, count: int) -> bool:
    return (await in_flight(connection))[instance.url] == count


async def is_gone(connection: Connection, instance: FakeInstance) -> bool:
    return instance.url not in await in_flight(connection)


async def is_served(connection: Connection) -> bool:
    return (await connection.ask("POST", COMPLETIONS, BODY))[0] == 200


async def is_unready(connection: Connection) -> bool:
    return (await connection.ask("GET", "/ready"))[0] == 503


async def are_in_flight(connection: Connection, count: int) -> bool:
    return await metric(connection, "vllm_pd:router_requests_in_flight") == count


async def is_refused(router: Router) -> bool:
    try:
        (await router.connect()).close()
    except ConnectionError:
        return True
    return False


async def both(router: Router) -> tuple[Connection, Connection]:
    first, second = router.workers()
    return await router.connect_to(first), await router.connect_to(second)


async def test_a_worker_sends_requests_where_the_others_have_fewest(
    prefill: FakeInstance,
    start_instance: StartInstance,
    admin: dict[str, Any],
    tmp_path: Path,
) -> None:
    decodes = [await start_instance(hangs) for _ in range(2)]
    async with running(tmp_path, [prefill], decodes, **admin) as router:
        first, second = router.workers()
        for _ in range(5):
            one = await served(await router.connect_to(first), *decodes)
            other = await served(await router.connect_to(second), *decodes)
            assert one is not other
        for connection in await both(router):
            assert await in_flight(connection) == {prefill.url: 0} | {
                decode.url: 5 for decode in decodes
            }


async def test_every_worker_shows_the_metrics_of_all(
    prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    async with running(tmp_path, [prefill], [decode]) as router:
        one, other = await both(router)
        for connection in (one, one, one, other):
            assert (await connection.ask("POST", COMPLETIONS, BODY))[0] == 200
        for connection in (one, other):
            assert await metric(connection, "vllm_pd:router_requests_total{") == 4
            assert await metric(connection, "vllm_pd:router_request_seconds_count{") == 4
            assert await metric(connection, "vllm_pd:router_instance_up{") == 2


async def dashboard(connection: Connection) -> Any:
    """Return what the dashboard shows if a worker is asked."""
    status, raw = await connection.ask("GET", "/dashboard/state")
    assert status == 200
    return json.loads(raw)


async def has_queue(connection: Connection) -> bool:
    """Return whether a request waits for a decode slot anywhere."""
    return bool((await dashboard(connection))["queues"]["decode"]["waiting"])


async def test_the_dashboard_of_every_worker_shows_what_all_have_done_and_do(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    decode = await start_instance(completes)
    async with running(tmp_path, [prefill], [decode], decode_max_concurrent=2) as router:
        one, other = await both(router)
        for connection in (one, one, other):
            assert (await connection.ask("POST", COMPLETIONS, BODY))[0] == 200
        decode.behave = hangs
        for connection in (one, other):
            await served(connection, decode)
        waiting = await router.connect_to(router.workers()[1])
        waiting.send("POST", COMPLETIONS, BODY)
        asking = [await router.connect_to(worker) for worker in router.workers()]
        await until(partial(has_queue, asking[0]))
        for connection in asking:
            shown = await dashboard(connection)
            assert shown["processes"] == {"num": 2, "silent": 0}
            requests = shown["requests"]
            assert (requests["code"], requests["in_flight"]) == ({"200": 3}, 3)
            assert sum(requests["series"]) == 3
            assert shown["queues"]["decode"] == {"waiting": 1, "in_use": 2, "capacity": 2}
            (whole,) = [stage for stage in shown["stages"] if stage["name"] == "request"]
            assert whole["num"] == 3
            in_flight = {each["url"]: each["in_flight"] for each in shown["instances"]}
            assert in_flight == {prefill.url: 0, decode.url: 2}


async def test_the_dashboard_tells_of_failures_that_another_worker_has_seen(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    decode = await start_instance(drops)
    options = {"breaker_failures": 1, "breaker_backoff_s": 3600.0}
    async with running(tmp_path, [prefill], [decode], **options) as router:
        one, other = await both(router)
        assert (await one.ask("POST", COMPLETIONS, BODY))[0] >= 500
        for connection in (one, other):
            shown = await dashboard(connection)
            (seen,) = [each for each in shown["instances"] if each["url"] == decode.url]
            assert (seen["num_failed"], seen["breaker"], seen["accepting"]) == (1, "open", False)
            assert shown["requests"]["num_errors"] == 1


async def test_the_dashboard_says_which_part_of_the_router_is_missing(
    prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    async with running(tmp_path, [prefill], [decode]) as router:
        hung, _ = router.workers()
        _, asking = await both(router)
        os.kill(hung, signal.SIGSTOP)
        assert (await dashboard(asking))["processes"] == {"num": 2, "silent": 1}
        os.kill(hung, signal.SIGKILL)


async def test_instances_that_come_and_go_by_any_worker_are_forgotten_by_all(
    prefill: FakeInstance, decode: FakeInstance, admin: dict[str, Any], tmp_path: Path
) -> None:
    async with running(tmp_path, [prefill], [decode], **admin) as router:
        one, other = await both(router)
        for number in range(1, 21):
            host = f"127.0.0.1:{number}"  # nobody listens there
            spec = {"url": f"http://{host}", "role": "decode"}
            assert (await one.ask("POST", "/admin/instances", spec, key=ADMIN))[0] == 201
            path = f"/admin/instances/{host}"
            assert (await other.ask("DELETE", path, key=ADMIN))[0] < 300
        os.kill(router.workers()[0], signal.SIGKILL)
        await until(lambda: router.num_served() == 3)
        replacement = await router.connect_to(router.workers()[1])
        for connection in (other, replacement):
            assert (await states(connection)).keys() == {prefill.url, decode.url}


async def test_a_drain_that_was_answered_holds_in_all_workers(
    prefill: FakeInstance,
    start_instance: StartInstance,
    admin: dict[str, Any],
    tmp_path: Path,
) -> None:
    stream = Streams([EVENT], [DONE], wait=True)
    drained, kept = await start_instance(stream), await start_instance(completes)
    async with running(tmp_path, [prefill], [drained, kept], **admin) as router:
        one, other = await both(router)
        while await served(other, drained, kept) is not drained:
            await other.answer()
        name = drained.url.removeprefix("http://")

        status, _ = await one.ask("POST", f"/admin/instances/{name}/drain", key=ADMIN)
        assert status == 202
        more = await router.connect_to(router.workers()[1])
        for _ in range(4):
            assert await served(more, drained, kept) is kept
            await more.answer()
        # It has a request of the other worker, and is not gone before that is over.
        assert (await in_flight(one))[drained.url] == 1
        stream.go_on.set()
        assert (await other.answer())[1] == EVENT + DONE
        for connection in (one, more):
            await until(partial(is_gone, connection, drained))


async def test_an_instance_that_is_registered_with_one_worker_is_used_by_all(
    prefill: FakeInstance,
    decode: FakeInstance,
    admin: dict[str, Any],
    tmp_path: Path,
) -> None:
    async with running(tmp_path, [prefill], [], **admin) as router:
        one, other = await both(router)
        assert (await other.ask("POST", COMPLETIONS, BODY))[0] == 503
        spec = {"url": decode.url, "role": "decode"}
        assert (await one.ask("POST", "/admin/instances", spec, key=ADMIN))[0] == 201
        for connection in (one, other):
            await until(partial(is_served, connection))  # it has been probed there
        wrong = {"url": decode.url, "control": "nonsense"}
        assert (await one.ask("POST", "/admin/instances", wrong, key=ADMIN))[0] == 400
        assert (await other.ask("GET", "/health"))[0] == 200


async def test_when_a_worker_is_killed_the_others_go_on_and_it_is_replaced(
    prefill: FakeInstance,
    start_instance: StartInstance,
    admin: dict[str, Any],
    tmp_path: Path,
) -> None:
    stream = Streams([EVENT], [EVENT, DONE], wait=True)
    decode = await start_instance(completes)
    async with running(tmp_path, [prefill], [decode], **admin) as router:
        victim, survivor = router.workers()
        lost, kept = await router.connect_to(victim), await router.connect_to(survivor)
        asking = await router.connect_to(survivor)
        assert (await lost.ask("GET", "/v1/models"))[0] == 200
        decode.behave = stream
        await served(lost, decode)
        await served(kept, decode)
        name = prefill.url.removeprefix("http://")
        change = {"role": "both"}
        await asking.ask("PATCH", f"/admin/instances/{name}", change, key=ADMIN)
        assert (await in_flight(asking))[decode.url] == 2
        assert await metric(asking, "vllm_pd:router_requests_total{") == 1

        os.kill(victim, signal.SIGKILL)

        await until(partial(has_open, asking, decode, 1))
        await until(lambda: router.num_served() == 3)
        assert await metric(asking, "vllm_pd:router_requests_total{") == 1  # of the dead one
        old, new = router.workers()
        assert (old, new != victim) == (survivor, True)
        replacement = await router.connect_to(new)
        _, raw = await replacement.ask("GET", "/admin/instances", key=ADMIN)
        roles = {one["url"]: one["role"] for one in json.loads(raw)["instances"]}
        assert roles[prefill.url] == "both"
        stream.go_on.set()
        assert (await kept.answer())[1] == EVENT + EVENT + DONE
        assert "was killed by SIGKILL" in router.log.read_text()


async def test_a_worker_that_hangs_is_replaced(
    prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    async with running(tmp_path, [prefill], [decode]) as router:
        hung, other = router.workers()
        os.kill(hung, signal.SIGSTOP)
        await until(lambda: router.num_served() == 3)
        assert hung not in router.workers()
        assert router.workers()[0] == other
        assert "router worker 0 has hung for 10 s" in router.log.read_text()


async def states(connection: Connection) -> dict[str, str]:
    """Return the states of the instances, as a worker lists them."""
    _, raw = await connection.ask("GET", "/admin/instances", key=ADMIN)
    return {one["url"]: one["state"] for one in json.loads(raw)["instances"]}


async def is_in_state(connection: Connection, instance: FakeInstance, state: str | None) -> bool:
    return (await states(connection)).get(instance.url) == state


async def agree(one: Connection, other: Connection) -> bool:
    return await states(one) == await states(other)


async def test_a_replaced_worker_does_not_drain_what_the_file_has_listed_again(
    prefill: FakeInstance,
    decode: FakeInstance,
    admin: dict[str, Any],
    tmp_path: Path,
) -> None:
    file = tmp_path / "instances.json"
    both_listed = [{"url": prefill.url, "role": "prefill"}, {"url": decode.url, "role": "decode"}]

    def write(listed: list[dict[str, str]]) -> None:
        new = tmp_path / "new"
        new.write_text(json.dumps({"instances": listed}))
        new.rename(file)

    write(both_listed)
    async with running(tmp_path, [], [], instances_file=str(file), **admin) as router:
        one, other = await both(router)
        name = decode.url.removeprefix("http://")
        assert (await one.ask("POST", f"/admin/instances/{name}/drain", key=ADMIN))[0] == 202
        for listed, state in (([], None), (both_listed, "healthy")):
            write(listed)
            for connection in (one, other):  # only the file ends the use of this one
                await until(partial(is_in_state, connection, prefill, state))
        os.kill(router.workers()[0], signal.SIGKILL)
        await until(lambda: router.num_served() == 3)
        replacement = await router.connect_to(router.workers()[1])
        await until(partial(agree, replacement, other))  # when it has been probed there
        await until(partial(is_served, replacement))


async def test_an_instance_on_which_a_request_failed_is_doubted_by_all(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    decode = await start_instance(drops)
    options = {"breaker_failures": 1, "breaker_backoff_s": 3600.0}
    async with running(tmp_path, [prefill], [decode], **options) as router:
        one, other = await both(router)
        assert (await one.ask("POST", COMPLETIONS, BODY))[0] >= 500
        await until(partial(is_unready, other))
        decode.received.clear()
        assert (await other.ask("POST", COMPLETIONS, BODY))[0] == 503
        assert decode.received == []


async def test_a_slot_that_one_worker_gives_back_goes_to_who_waits_in_another(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    stream = Streams([EVENT], [DONE], wait=True)
    decode = await start_instance(stream)
    async with running(tmp_path, [prefill], [decode], decode_max_concurrent=1) as router:
        one, other = await both(router)
        await served(one, decode)
        other.send("POST", COMPLETIONS, BODY)
        asking = await router.connect()
        await until(partial(are_in_flight, asking, 2))
        assert len(decode.received) == 1
        stream.go_on.set()
        assert (await one.answer())[0] == (await other.answer())[0] == 200


async def test_the_limit_of_an_api_key_holds_for_all_workers_together(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: ann, key: k-ann, max_concurrent: 1}\n")
    keys.chmod(0o600)
    decode = await start_instance(hangs)
    async with running(tmp_path, [prefill], [decode], api_keys_file=str(keys)) as router:
        one, other = await both(router)
        one.send("POST", COMPLETIONS, BODY, key="k-ann")
        await decode.started.wait()
        assert (await other.ask("POST", COMPLETIONS, BODY, key="k-ann"))[0] == 429


async def test_a_prompt_goes_where_another_worker_has_sent_it(
    start_instance: StartInstance, prefill: FakeInstance, tmp_path: Path
) -> None:
    decodes = [await start_instance(completes) for _ in range(2)]
    body = BODY | {"prompt": "long " * 1000}
    async with running(tmp_path, [prefill], decodes) as router:
        one, other = await both(router)
        for _ in range(6):
            for connection in (one, other):
                assert (await connection.ask("POST", COMPLETIONS, body))[0] == 200
    assert sorted(len(decode.received) for decode in decodes) == [0, 12]


async def test_sigterm_lets_all_workers_finish_what_is_open(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    stream = Streams([EVENT], [DONE], wait=True)
    decode = await start_instance(stream)
    async with running(tmp_path, [prefill], [decode]) as router:
        workers = router.workers()
        connections = await both(router)
        for connection in connections:
            await served(connection, decode)
        router.process.send_signal(signal.SIGTERM)
        for pid in workers:  # the group of a terminal or a supervisor gets it, too
            os.kill(pid, signal.SIGTERM)
        await until(partial(is_refused, router))
        stream.go_on.set()
        for connection in connections:
            assert (await connection.answer())[1] == EVENT + DONE
        assert await router.process.wait() == 0
        assert not [pid for pid in workers if _lives(pid)]


async def test_a_second_signal_ends_all_workers_at_once(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    decode = await start_instance(hangs)
    async with running(tmp_path, [prefill], [decode]) as router:
        workers = router.workers()
        await served(await router.connect(), decode)
        router.process.send_signal(signal.SIGTERM)
        await until(lambda: len(router.workers()) == 1)  # the other one was idle
        router.process.send_signal(signal.SIGTERM)
        await decode.cancelled.wait()
        assert await router.process.wait() == 0
        assert not [pid for pid in workers if _lives(pid)]


async def test_workers_without_a_parent_end(
    prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    async with running(tmp_path, [prefill], [decode]) as router:
        workers = router.workers()
        router.process.kill()
        await until(lambda: not any(map(_lives, workers)))
    assert router.log.read_text().count("parent process is gone") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssl_certfile": "/nowhere", "ssl_keyfile": "/nowhere"}, "cannot read ssl_certfile"),
        ({"upstream_ca_file": "/nowhere"}, "cannot read upstream_ca_file"),
    ],
)
async def test_a_router_whose_workers_cannot_start_says_why_and_ends(
    decode: FakeInstance, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    router = await launch(tmp_path, [decode], [decode], **options)
    assert await router.process.wait() == 1
    (line,) = router.log.read_text().splitlines()
    assert message in line


async def test_while_a_worker_cannot_be_replaced_the_others_get_all_connections(
    prefill: FakeInstance, decode: FakeInstance, admin: dict[str, Any], tmp_path: Path
) -> None:
    async with running(tmp_path, [prefill], [decode], **admin) as router:
        victim, survivor = router.workers()
        key = admin["admin_key_file"]
        move(key, f"{key}.away")
        os.kill(victim, signal.SIGKILL)
        await until(lambda: "the next one starts in 0.5 s" in router.log.read_text())
        assert f"cannot read {key}" in router.log.read_text()

        for _ in range(20):
            assert (await (await router.connect()).ask("GET", "/health"))[0] == 200
        move(f"{key}.away", key)
        await until(lambda: router.num_served() == 3)
        assert router.workers()[0] == survivor


async def test_all_workers_serve_tls(
    prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    tls = ssl.create_default_context(cafile=str(authority.cafile))
    options = authority.issue("router").options
    async with running(tmp_path, [prefill], [decode], **options) as router:
        url = f"https://127.0.0.1:{router.port}/health"
        for _ in range(8):
            async with aiohttp.ClientSession() as session, session.get(url, ssl=tls) as response:
                assert response.status == 200


async def test_a_port_that_another_router_has_is_not_shared_with_it(
    prefill: FakeInstance, decode: FakeInstance, tmp_path: Path
) -> None:
    async with running(tmp_path, [prefill], [decode]) as router:
        (tmp_path / "second").mkdir()
        second = await launch(tmp_path / "second", [prefill], [decode], port=router.port)
        assert await second.process.wait() == 1
        assert f"port {router.port} on 127.0.0.1 is already in use" in second.log.read_text()


def move(source: str, target: str) -> None:
    Path(source).rename(target)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def test_every_worker_finds_a_response_that_an_instance_has_stored(
    start_instance: StartInstance, tmp_path: Path
) -> None:
    prefill, other = await start_instance(Store()), await start_instance(Store())
    owner = await start_instance(Store("resp_1"))
    async with running(tmp_path, [prefill], [other, owner]) as router:
        for connection in await both(router):
            assert (await connection.ask("GET", "/v1/responses/resp_1"))[0] == 200
            assert (await connection.ask("GET", "/v1/responses/resp_2"))[0] == 404


async def test_workers_share_the_memory_for_bodies(
    prefill: FakeInstance, start_instance: StartInstance, tmp_path: Path
) -> None:
    decode = await start_instance(hangs)
    limits = {"max_body_len": 60, "max_held_len": 60}
    async with running(tmp_path, [prefill], [decode], **limits) as router:
        one, other = await both(router)
        one.send("POST", COMPLETIONS, BODY)
        await decode.started.wait()

        status, raw = await other.ask("POST", COMPLETIONS, BODY)

        assert (status, json.loads(raw)["error"]["code"]) == (429, 429)
        one.close()  # its client leaves
        await decode.cancelled.wait()
        other.send("POST", COMPLETIONS, BODY)
        await until(lambda: len(decode.received) == 2)
