from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from vllm_pd.config import RoleLabel
from vllm_pd.errors import ConfigError
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.instances_file import InstancesFile
from vllm_pd.router.workers.changes import Change, Drain

TWO = """
instances:
  - {url: "http://p1:8100", role: prefill, control: "127.0.0.1:5600"}
  - {url: "http://d1:8200", role: decode}
"""


async def is_there(_base_url: str) -> bool:
    return True


@pytest.fixture
def pool() -> InstancePool:
    return InstancePool((), (), probe=is_there, health_interval_s=3600.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "instances.yaml"
    path.write_text(TWO)
    return path


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)  # another inode, so it never looks unchanged


def the(pool: InstancePool, name: str) -> Instance:
    instance = pool.get(name)
    assert instance is not None
    return instance


def test_all_instances_of_the_file_are_there(path: Path, pool: InstancePool) -> None:
    InstancesFile(path, pool)

    assert the(pool, "p1:8100").role is RoleLabel.PREFILL
    assert the(pool, "p1:8100").control == ("127.0.0.1", 5600)
    assert the(pool, "d1:8200").role is RoleLabel.DECODE


def test_a_change_of_the_file_is_followed(path: Path, pool: InstancePool) -> None:
    file = InstancesFile(path, pool)
    replace(path, 'instances: [{url: "http://p1:8100"}, {url: "http://d2:8200", role: decode}]')
    file.reload_if_changed()

    assert the(pool, "p1:8100").role is RoleLabel.BOTH
    assert the(pool, "p1:8100").control is None
    assert the(pool, "d1:8200").draining
    assert not the(pool, "d2:8200").draining


def test_what_the_file_says_no_more_than_before_is_left_alone(
    path: Path, pool: InstancePool
) -> None:
    file = InstancesFile(path, pool)
    pool.drain(the(pool, "d1:8200"))
    pool.relabel(the(pool, "p1:8100"), RoleLabel.BOTH)
    replace(path, TWO + '  - {url: "http://d2:8200"}\n')
    file.reload_if_changed()

    assert the(pool, "d1:8200").draining
    assert the(pool, "p1:8100").role is RoleLabel.BOTH


def test_an_instance_that_comes_back_into_the_file_drains_no_more(
    path: Path, pool: InstancePool
) -> None:
    file = InstancesFile(path, pool)
    for text in ("instances: []", TWO):
        replace(path, text)
        file.reload_if_changed()

    assert not any(one.draining for one in pool)


BAD = [
    ("instances: [", "not YAML"),
    ("", "mapping"),
    ("instances: 3", "array"),
    ("members: []", "members"),
    ('instances: [{url: "http://p1", role: both, ports: 3}]', "ports"),
    ('instances: [{url: "http://p1", role: master}]', "role"),
    ('instances: [{url: "p1"}]', "does not start with http"),
    ('instances: [{url: "http://p1", control: "p1"}]', "control address"),
    ('instances: [{url: "http://p1"}, {url: "http://p1:80/"}]', "p1:80 is there twice"),
]


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_a_bad_file_is_refused_at_the_start(
    path: Path, pool: InstancePool, text: str, reason: str
) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        InstancesFile(path, pool)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", [text for text, _ in BAD])
def test_a_bad_file_later_changes_nothing_and_is_told_of_once(
    path: Path, pool: InstancePool, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    file = InstancesFile(path, pool)
    replace(path, text)
    with caplog.at_level(logging.ERROR):
        file.reload_if_changed()
        file.reload_if_changed()

    assert [one.draining for one in pool] == [False, False]
    assert caplog.text.count("stay as they are") == 1


def test_a_file_that_is_gone_changes_nothing(path: Path, pool: InstancePool) -> None:
    file = InstancesFile(path, pool)
    path.unlink()
    file.reload_if_changed()

    assert [one.draining for one in pool] == [False, False]


def test_what_all_processes_are_to_do_is_done_when_it_comes_back(
    path: Path, pool: InstancePool
) -> None:
    told: list[tuple[Change, ...]] = []
    file = InstancesFile(path, pool, tell=told.append)
    replace(path, "instances: []")
    file.reload_if_changed()
    assert not any(one.draining for one in pool)
    assert told == [(Drain("p1:8100"), Drain("d1:8200"))]
    file.make(told[0])
    assert all(one.draining for one in pool)
    assert file.names == ()


def test_a_change_that_another_process_has_seen_first_is_not_told_again(
    path: Path, pool: InstancePool
) -> None:
    told: list[tuple[Change, ...]] = []
    file = InstancesFile(path, pool, tell=told.append)
    replace(path, "instances: []")
    file.make([Drain("p1:8100"), Drain("d1:8200")])
    file.reload_if_changed()
    assert told == []


async def test_the_file_is_watched(path: Path, pool: InstancePool) -> None:
    file = InstancesFile(path, pool)
    watching = asyncio.create_task(file.watch(0.001))
    replace(path, TWO + '  - {url: "http://d2:8200"}\n')
    while pool.get("d2:8200") is None:  # noqa: ASYNC110  # bounded by the timeout
        await asyncio.sleep(0)
    watching.cancel()
