"""Options: what is accepted, what is refused, and how clearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_pd.config import ConnectorConfig, RouterConfig, Topology, from_mapping, load_topology
from vllm_pd.errors import ConfigError


def connector(**values: Any) -> ConnectorConfig:
    return from_mapping(ConnectorConfig, values, source="kv_connector_extra_config")


def test_defaults_stay_on_this_host() -> None:
    assert connector().is_loopback
    assert connector().transport_names is None


def test_unknown_key_is_refused_by_name_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config.*lease_seconds.*lease_s"):
        connector(lease_seconds=3)


@pytest.mark.parametrize(
    "values",
    [
        {"lease_s": 0},
        {"transfer_timeout_s": -1},
        {"lease_s": "soon"},
        {"min_load_tokens": 0},
        {"side_channel_port": 70000},
        {"side_channel_host": "0.0.0.0"},
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        connector(**values)


def test_transports_are_listed_best_first() -> None:
    assert connector(transport=" shm, tcp").transport_names == ("shm", "tcp")


def test_numbers_may_come_as_text_from_a_command_line() -> None:
    assert connector(lease_s="12.5").lease_s == 12.5


def test_router_refuses_what_is_no_address() -> None:
    with pytest.raises(ConfigError, match="localhost:8100"):
        from_mapping(RouterConfig, {"prefill_urls": ["localhost:8100"]}, source="router")


def test_topology_file(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text("model: org/model\ndecode: {count: 2, tp: 2}\nrouter: {port: 9000}\n")
    topology = load_topology(path)
    assert topology.decode is not None
    assert (topology.decode.count, topology.decode.tp, topology.router.port) == (2, 2, 9000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode: {count: 0}", "at least 1"),
        ("decode: {cuont: 2}", "cuont"),
        ("modelx: x", "modelx"),
        ("- a list", "mapping"),
        ("a: [1", "not YAML"),
        ("router: {port: x}", "port"),
    ],
)
def test_wrong_topology_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_topology(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_topology_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_topology(tmp_path / "nowhere.yaml")


def test_topology_has_defaults_for_everything() -> None:
    assert Topology().model is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("connector: {lease: 3}", "known keys: transport, .*lease_s"),
        ("router: {prot: 3}", "known keys: host, port"),
        ("prefill: {cuont: 3}", "known keys: count, tp"),
    ],
)
def test_unknown_nested_key_comes_with_the_keys_of_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_topology(path)


@pytest.mark.parametrize(
    "text",
    [
        "max_restarts: -1",
        "start_timeout_s: 0",
        "drain_timeout_s: .nan",
        "kv_cache_space_gib: -3",
        'host: ""',
        "prefill: {devices: [0, 0]}",
        "prefill: {devices: []}",
        "connector: {lease_s: .nan}",
        "router: {health_interval_s: 0}",
        "router: {port: 99999}",
        "router: {max_body_len: -5}",
        "router: {max_body_len: 10, max_held_len: 9}",
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_topology(path)
