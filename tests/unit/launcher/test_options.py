from __future__ import annotations

from pathlib import Path

import pytest

from vllm_pd.config import InstanceGroup, Topology
from vllm_pd.errors import ConfigError
from vllm_pd.launcher.options import UpOptions, topology_from


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "topology.yaml"
    path.write_text(
        "model: org/file\n"
        "decode: {count: 2, tp: 1, port: 9200, args: [--seed, '1']}\n"
        "router: {port: 9000, prefill_timeout_s: 5}\n"
        "args: [--dtype, float32]\n"
    )
    return path


def test_no_options_mean_the_default_topology() -> None:
    assert topology_from(UpOptions()) == Topology()


def test_options_override_the_file(file: Path) -> None:
    topology = topology_from(
        UpOptions(config=file, model="org/option", decode="1x2", port=1, max_model_len=64)
    )
    assert topology.model == "org/option"
    assert topology.decode == InstanceGroup(count=1, tp=2, port=9200, args=("--seed", "1"))
    assert (topology.router.port, topology.router.prefill_timeout_s) == (1, 5.0)
    assert topology.args == ("--dtype", "float32", "--max-model-len", "64")


def test_what_no_option_names_stays_as_the_file_says(file: Path) -> None:
    topology = topology_from(UpOptions(config=file, device="cpu"))
    assert (topology.model, topology.router.port) == ("org/file", 9000)


def test_a_port_option_wins_over_the_groups_port(file: Path) -> None:
    topology = topology_from(UpOptions(config=file, decode_port=7000))
    assert topology.decode_port == 7000
    assert topology.decode is not None
    assert topology.decode.port is None


def test_a_port_option_leaves_the_shape_to_the_device() -> None:
    topology = topology_from(UpOptions(prefill_port=7000))
    assert (topology.prefill, topology.prefill_port) == (None, 7000)


def test_the_transport_option_reaches_the_connector() -> None:
    assert topology_from(UpOptions(transport="tcp")).connector.transport == "tcp"


def test_further_arguments_are_passed_to_vllm() -> None:
    assert topology_from(UpOptions(args=("--seed", "1"))).args == ("--seed", "1")


def test_an_argument_that_is_no_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unexpected argument './model'.*--model"):
        topology_from(UpOptions(args=("./model",)))


def test_a_malformed_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="decode '2' is not INSTANCESxTP"):
        topology_from(UpOptions(decode="2"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none.yaml"):
        topology_from(UpOptions(config=tmp_path / "none.yaml"))
