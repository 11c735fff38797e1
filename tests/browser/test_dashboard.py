"""The dashboard in a real browser, before a router with fake instances."""

from __future__ import annotations

import asyncio

import pytest

from tests.browser.chromium import Page
from tests.unit.router.conftest import StartInstance, StartRouter
from tests.unit.router.fakes import Client, FakeInstance, completes, prefills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BODY = {"model": "m", "prompt": "hi"}
HOSTILE = "<img src=x onerror=window.broken=1></td><script>window.broken=1</script>"
LOAD = """# made for a test
vllm:num_requests_running{{engine="0",model_name="{model}"}} 3.0
vllm:num_requests_waiting{{engine="0",model_name="{model}"}} 2.0
vllm:kv_cache_usage_perc{{engine="0",model_name="{model}"}} 0.42
"""
NONE = "\N{EN DASH}"
IS_SHOWN = "!document.getElementById('main').hidden"


def row(instance: FakeInstance) -> str:
    return f'#instances tr[data-url="{instance.url}"]'


def shows(selector: str, text: str) -> str:
    return f"(document.querySelector('{selector}')?.innerText ?? '').includes('{text}')"


async def open_dashboard(page: Page, router: Client) -> None:
    await page.resize(1400)
    await page.open(str(router.make_url("/dashboard")))
    await page.wait_until(IS_SHOWN)


@pytest.fixture
async def prefill(start_instance: StartInstance) -> FakeInstance:
    return await start_instance(prefills)


@pytest.fixture
async def decode(start_instance: StartInstance) -> FakeInstance:
    instance = await start_instance(completes)
    instance.metrics = LOAD.format(model="some/model")
    return instance


@pytest.fixture
async def router(start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance) -> Client:
    return await start_router([prefill], [decode], health_interval_s=0.1)


async def test_instances_are_shown_with_role_state_and_load(
    page: Page, router: Client, prefill: FakeInstance, decode: FakeInstance
) -> None:
    await open_dashboard(page, router)
    await page.wait_until(shows(row(decode), "42 %"))
    shown = await page.text(row(decode))
    for text in (decode.url, "decode", "up", "3 / 2"):
        assert text in shown
    assert "some/model" in await page.text("#summary")
    assert "prefill" in await page.text(row(prefill))
    assert "ready" in await page.text("#ready")
    assert "2 of 2 up" in await page.text("#summary")
    assert page.problems == []


async def test_an_instance_that_dies_is_shown_as_down(
    page: Page, router: Client, decode: FakeInstance
) -> None:
    await open_dashboard(page, router)
    its_row = row(decode)
    await page.wait_until(shows(its_row, "up"))
    await decode.stop()
    await page.wait_until(shows(its_row, "down"))
    await page.wait_until(shows("#ready", "not ready"))
    assert "1 of 2 up" in await page.text("#summary")


async def test_numbers_move_with_the_requests(page: Page, router: Client) -> None:
    await open_dashboard(page, router)
    assert "No answer yet" in await page.text("#codes")
    for _ in range(3):
        async with router.post("/v1/completions", json=BODY) as response:
            assert response.status == 200
    await page.wait_until("document.querySelector('#codes tbody td').innerText === '3'")
    assert "200 OK" in await page.text("#codes tbody th")
    assert await page.text('[data-stage="prefill"] td') != NONE
    assert await page.text('[data-stage="kv_handover"] td') == NONE
    assert "100.0 %" in await page.text("#tiles")


async def test_a_broken_request_is_shown_at_its_instance(
    page: Page, router: Client, decode: FakeInstance
) -> None:
    await open_dashboard(page, router)
    await decode.stop()
    async with router.post("/v1/completions", json=BODY) as response:
        assert response.status in (502, 503)  # before or after a probe found out
    await page.wait_until(shows("#codes", str(response.status)))


async def test_what_instances_call_themselves_stays_text(
    page: Page, start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    decode.metrics = LOAD.format(model=HOSTILE)
    router = await start_router([prefill], [decode], health_interval_s=0.1)
    await open_dashboard(page, router)
    await page.wait_until(shows(row(decode), "42 %"))
    assert HOSTILE in await page.text("#summary")
    prefill.metrics = LOAD.format(model="another")  # names stand in the rows where they differ
    await page.wait_until(shows(row(prefill), "another"))
    assert HOSTILE in await page.text(row(decode))
    assert await page.evaluate("window.broken === undefined && !document.querySelector('img')")
    assert page.problems == []


async def test_the_policy_of_the_page_lets_no_other_script_run(page: Page, router: Client) -> None:
    await open_dashboard(page, router)
    await page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        "{textContent: 'window.broken = 1'}))"
    )
    assert await page.evaluate("window.broken === undefined")
    assert "Content Security Policy" in page.problems[0]


async def test_the_page_says_when_the_router_is_away(page: Page, router: Client) -> None:
    await open_dashboard(page, router)
    await router.server.close()
    await page.wait_until(shows("#away", "does not answer"))
    assert "away" in await page.text("#ready")


async def test_the_page_says_when_a_part_of_the_router_is_missing(
    page: Page, start_router: StartRouter, prefill: FakeInstance, decode: FakeInstance
) -> None:
    router = await start_router([prefill], [decode], workers=2)  # of which there is one
    await open_dashboard(page, router)
    assert "No answer from 1 of 2 router processes" in await page.text("#silent")
    assert "2 router processes together" in await page.text("footer")


async def test_of_many_instances_those_out_of_use_and_the_fullest_are_shown_first(
    page: Page, start_router: StartRouter, start_instance: StartInstance, prefill: FakeInstance
) -> None:
    decodes = await asyncio.gather(*(start_instance(completes) for _ in range(19)))
    decodes[7].healthy = False
    decodes[3].metrics = LOAD.format(model="m")
    router = await start_router([prefill], decodes, health_interval_s=0.1)
    await open_dashboard(page, router)
    await page.wait_until(shows(row(decodes[3]), "42 %"))
    urls = "[...document.querySelectorAll('#instances tbody tr')].map((row) => row.dataset.url)"
    shown = await page.evaluate(urls)
    assert (shown[:2], len(shown)) == ([decodes[7].url, decodes[3].url], 16)
    await page.evaluate("document.getElementById('more').click()")
    assert len(await page.evaluate(urls)) == 20


@pytest.mark.parametrize("width", [390, 1400])
async def test_nothing_is_wider_than_the_window(
    page: Page,
    start_router: StartRouter,
    start_instance: StartInstance,
    prefill: FakeInstance,
    decode: FakeInstance,
    width: int,
) -> None:
    decodes = await asyncio.gather(*(start_instance(completes) for _ in range(9)))
    router = await start_router([prefill], [decode, *decodes])
    await open_dashboard(page, router)
    await page.resize(width)
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    assert await page.evaluate("document.querySelectorAll('.fleet li').length") == 11
