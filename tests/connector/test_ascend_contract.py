"""What vllm-ascend 0.23.0 does with a connector, against vLLM's own classes.

Each test names what it stands on: ``VA`` is vllm-ascend v0.23.0, under ``vllm_ascend/``; ``V23``
is vLLM 0.23.0, under ``vllm/``. Read, not run: vllm-ascend needs CANN. Runs in whichever
vLLM is importable; ``test_oldest_vllm`` runs it in 0.23.0.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.connector.driving import KEEP, PROMPT
from vllm_pd.connector.compat import in_rank_order, plain_mapping
from vllm_pd.connector.worker import PDConnectorWorker

if TYPE_CHECKING:
    from tests.connector.harness import Engine
    from tests.connector.workers import Instance

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]


class Log:
    """Which methods of a class were called, on which threads, and by which object of it."""

    def __init__(self, kind: type[Any], monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.calls: list[str] = []
        self.answers: list[Any] = []
        self.threads: set[int] = set()
        self.owner: Any = None
        for name in names:
            monkeypatch.setattr(kind, name, self._record(name, getattr(kind, name)))

    def _record(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            self.threads.add(threading.get_ident())
            self.owner = args[0]
            self.answers.append(hook(*args, **kwargs))
            return self.answers[-1]

        return recorded


@pytest.fixture
def instance(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Instance]:
    from tests.connector.workers import Instance

    made = Instance(make_engine(), monkeypatch, fill=0)
    yield made
    made.close()


def test_metadata_is_bound_before_loads_start_and_results_are_asked_for_after(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V23 ``v1/worker/kv_connector_model_runner_mixin.py:78-112``; VA uses that mixin."""
    names = ("bind_connector_metadata", "start_load_kv", "get_finished", "clear_connector_metadata")
    log = Log(type(instance.connector), monkeypatch, *names)
    instance.engine.add(PROMPT, dict(KEEP))
    instance.step()
    order = [name for name in log.calls if name != "start_load_kv"]
    assert order == ["bind_connector_metadata", "get_finished", "clear_connector_metadata"]
    assert log.calls.index("start_load_kv") > 0


def test_transports_are_pumped_by_the_thread_that_computes_when_a_step_begins(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HCCL 9.1 ``api_comm_impl.md``: one thread issues; VA's model runner is that thread."""
    pumped = Log(PDConnectorWorker, monkeypatch, "pump", "start", "get_finished")
    instance.engine.add(PROMPT, dict(KEEP))
    instance.step()
    assert pumped.calls[:3] == ["start", "pump", "get_finished"]
    assert pumped.threads == {threading.get_ident()}


def test_transports_are_pumped_again_before_results_are_reported(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V23 ``mixin.py:78-112``: after the forward pass, so what ended meanwhile is not late."""
    pumped = Log(PDConnectorWorker, monkeypatch, "pump", "get_finished")
    instance.engine.add(PROMPT, dict(KEEP))
    instance.step()
    assert pumped.calls == ["pump", "get_finished", "pump"]
    assert pumped.threads == {threading.get_ident()}


def test_empty_steps_pump_too(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """V23 ``mixin.py:42-44``: no ``wait_for_save`` then; a kept prefill keeps the engine going."""
    instance.engine.add(PROMPT, dict(KEEP))
    instance.step()
    pumped = Log(PDConnectorWorker, monkeypatch, "pump")
    assert instance.step().num_scheduled == {}
    assert pumped.calls == ["pump", "pump"]
    assert instance.engine.num_requests == 1


@pytest.mark.parametrize(
    ("layer_name", "layer"),
    [
        ("model.layers.0.self_attn.attn", (torch.zeros(2), torch.zeros(2))),  # GQA
        ("model.layers.0.self_attn.attn", [torch.zeros(2), torch.zeros(1)]),  # MLA
        ("", []),  # GDN
    ],
)
def test_layers_are_saved_in_whatever_form_they_come(
    instance: Instance, layer_name: str, layer: Any
) -> None:
    """VA ``attention/utils.py:428-456``, ``attention/mla_v1.py:1806``, ``ops/gdn.py:137``."""
    connector: Any = instance.connector
    connector.save_kv_layer(layer_name, layer, None)
    connector.wait_for_layer_load(layer_name)
    connector.wait_for_save()


def test_workers_are_in_the_order_of_ranks_whatever_the_keys_are() -> None:
    """VA ``worker/worker.py:870-889``: (pp, pcp, tp) with context parallelism, else (pp, tp)."""
    assert in_rank_order({(0, 0, 1): "b", (0, 0, 0): "a"}) == ["a", "b"]
    assert in_rank_order({(0, 1): "b", (0, 0): "a"}) == ["a", "b"]


def test_engine_id_that_the_platform_has_changed_is_the_one_that_peers_are_told(
    make_engine: Callable[..., Engine],
) -> None:
    """VA ``platform.py:485-487`` appends ``-<uuid>``, so no id can be configured."""
    engine = make_engine(engine_id="decode-0f8fad5b-d9cb-469f-a165-70867728950e")
    request_id = engine.add(PROMPT, dict(KEEP))
    params = engine.step().finished[request_id]
    assert params is not None
    assert params["remote_engine_id"] == "decode-0f8fad5b-d9cb-469f-a165-70867728950e"


def test_kept_prefill_is_reported_as_sent_once(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V23 ``v1/core/sched/scheduler.py:2238``: a second report asserts inside the engine."""
    request_id = instance.engine.add(PROMPT, dict(KEEP))
    params = instance.step().finished[request_id]
    assert params is not None
    log = Log(PDConnectorWorker, monkeypatch, "get_finished")
    instance.step()
    log.owner.start([], [], [params["transfer_id"]])
    deadline = time.monotonic() + 20.0
    while instance.engine.num_requests:
        instance.step()
        assert time.monotonic() < deadline
    instance.step()
    assert [ids for ids, _ in log.answers if ids] == [{request_id}]


def test_additional_config_that_is_no_mapping_is_no_obstacle() -> None:
    """V23 ``config/vllm.py``: a dict, or an object with a hash."""
    assert plain_mapping(SimpleNamespace(enable_kv_nz=True)) == {}
    assert plain_mapping({"enable_kv_nz": True}) == {"enable_kv_nz": True}
