"""The connector's metrics on vLLM's own path, from a worker's step to ``/metrics``."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.connector.test_timeline import fetched
from vllm_pd.demo.model import Geometry, write_untrained_model
from vllm_pd.session.stats import FetchTimeline, Outcome, SessionStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_pd.connector.stats import PDConnectorStats

# Importing vLLM warns about its own dependencies.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FETCH = fetched(
    num_bytes=2_000_000,
    num_bytes_saved=1000,
    timeline=FetchTimeline(0.02, 0.001, 0.004, 0.001, 0.03),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_pd.connector import register

    register()
    folder = tmp_path_factory.mktemp("model") / "untrained"
    write_untrained_model(folder, Geometry(num_layers=1), seed=0)
    transfer = KVTransferConfig(kv_connector="PDConnector", kv_role="kv_both")
    args = EngineArgs(
        model=str(folder), served_model_name="m", enforce_eager=True, kv_transfer_config=transfer
    )
    return args.create_engine_config()


@pytest.fixture
def api_server(config: VllmConfig) -> Iterator[ApiServer]:
    from vllm.v1.metrics import prometheus

    yield ApiServer(config)
    unregister: Any = prometheus.unregister_vllm_metrics
    unregister()


class ApiServer:
    """vLLM's own loggers, fed as its output loop feeds them."""

    def __init__(self, config: VllmConfig, num_engines: int = 1) -> None:
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        self._logger = PrometheusStatLogger(config, list(range(num_engines)))

    def record(self, stats: PDConnectorStats, engine_idx: int = 0) -> None:
        from vllm.v1.metrics.stats import SchedulerStats

        payload = through_msgpack(SchedulerStats(kv_connector_stats=stats.data))
        self._logger.record(payload, None, engine_idx=engine_idx)

    def value(self, name: str, /, **labels: str) -> float | None:
        """Return a sample of ``/metrics``; None if there is no such series."""
        from prometheus_client import REGISTRY

        known = {"model_name": "m", "engine": "0"}
        return REGISTRY.get_sample_value(f"vllm_pd:kv_{name}", {**known, **labels})


def through_msgpack(scheduler_stats: Any) -> Any:
    """Carry a step's stats from EngineCore to the API server as vLLM does."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    sent = EngineCoreOutputs(scheduler_stats=scheduler_stats)
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    return received.scheduler_stats


def worker_stats(rank: int = 0, mode: str = "memfd", **counts: Any) -> PDConnectorStats:
    from vllm_pd.connector.stats import PDConnectorStats

    return PDConnectorStats.of_worker(rank, SessionStats(**counts), {"shm": (mode, "")})


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        *(("fetches_total", {"outcome": outcome.value}) for outcome in Outcome),
        ("fetched_bytes_total", {"transport": "shm"}),
        ("fetched_bytes_total", {"transport": "tcp"}),
        ("sent_bytes_total", {}),
        ("saved_bytes_total", {}),
        ("leases_granted_total", {}),
        *(("leases_ended_total", {"reason": r}) for r in ("fetched", "released", "expired")),
        *(("handshake_failures_total", {"reason": r}) for r in ("incompatible", "refused")),
        *(("dropped_frames_total", {"reason": r}) for r in ("malformed", "wrong_key")),
        ("leases", {}),
        ("blocks_held", {}),
        ("fetch_seconds_count", {}),
        ("handshake_seconds_count", {}),
        ("transfer_seconds_count", {}),
        ("verify_seconds_count", {}),
        ("fetch_bandwidth_bytes_per_second_count", {}),
        ("fetch_bytes_count", {}),
    ],
)
def test_series_are_there_before_anything_happens(
    api_server: ApiServer, name: str, labels: dict[str, str]
) -> None:
    assert api_server.value(name, **labels) == 0


def test_fetch_is_counted_and_timed(api_server: ApiServer) -> None:
    api_server.record(worker_stats(fetches=[FETCH]))
    assert api_server.value("fetches_total", outcome="ok") == 1
    assert api_server.value("fetched_bytes_total", transport="shm") == 2_000_000
    assert api_server.value("saved_bytes_total") == 1000
    assert api_server.value("fetch_seconds_sum") == 0.03
    assert api_server.value("handshake_seconds_sum") == 0.02
    assert api_server.value("transfer_seconds_sum") == 0.004
    assert api_server.value("verify_seconds_sum") == 0.001
    assert api_server.value("fetch_bandwidth_bytes_per_second_sum") == 5e8
    assert api_server.value("fetch_bytes_sum") == 2_000_000


def test_bytes_of_prompts_that_needed_no_fetch_are_saved_too(api_server: ApiServer) -> None:
    from vllm_pd.connector.stats import PDConnectorStats

    api_server.record(worker_stats(fetches=[FETCH]))
    api_server.record(PDConnectorStats.of_worker(0, SessionStats(), {}, num_bytes_saved=500))
    assert api_server.value("saved_bytes_total") == 1500


def test_failed_fetch_is_counted_but_not_timed(api_server: ApiServer) -> None:
    api_server.record(worker_stats(fetches=[fetched(outcome=Outcome.CORRUPT)]))
    assert api_server.value("fetches_total", outcome="corrupt") == 1
    assert api_server.value("fetch_seconds_count") == 0


def test_producer_counts_leases_and_bytes(api_server: ApiServer) -> None:
    api_server.record(worker_stats(num_leases_granted=2, num_leases=2, num_blocks_held=9))
    assert api_server.value("leases") == 2
    assert api_server.value("blocks_held") == 9
    ended = Counter(fetched=1, expired=1)
    api_server.record(worker_stats(num_leases_ended=ended, num_bytes_sent=77))
    assert api_server.value("leases_granted_total") == 2
    assert api_server.value("leases_ended_total", reason="fetched") == 1
    assert api_server.value("leases_ended_total", reason="expired") == 1
    assert api_server.value("sent_bytes_total") == 77
    assert api_server.value("leases") == 0
    assert api_server.value("blocks_held") == 0


def test_reason_that_nobody_knew_before_is_counted_too(api_server: ApiServer) -> None:
    api_server.record(worker_stats(num_handshake_failures=Counter(moon=3)))
    assert api_server.value("handshake_failures_total", reason="moon") == 3


def test_engines_of_one_server_have_their_own_series(config: VllmConfig) -> None:
    api_server = ApiServer(config, num_engines=2)
    api_server.record(worker_stats(fetches=[FETCH]), engine_idx=1)
    assert api_server.value("fetches_total", engine="0", outcome="ok") == 0
    assert api_server.value("fetches_total", engine="1", outcome="ok") == 1


def test_state_is_summed_over_the_ranks(api_server: ApiServer) -> None:
    api_server.record(
        merged(worker_stats(0, num_blocks_held=4), worker_stats(1, num_blocks_held=4))
    )
    assert api_server.value("blocks_held") == 8


def test_transport_that_changes_its_mode_shows_the_new_one_alone(api_server: ApiServer) -> None:
    api_server.record(worker_stats(mode="memfd"))
    assert api_server.value("transport_info", transport="shm", mode="memfd", reason="") == 1
    api_server.record(worker_stats(mode="process_vm"))
    assert api_server.value("transport_info", transport="shm", mode="memfd", reason="") == 0
    assert api_server.value("transport_info", transport="shm", mode="process_vm", reason="") == 1


def test_second_engine_of_a_process_starts_its_metrics_anew(config: VllmConfig) -> None:
    ApiServer(config).record(worker_stats(fetches=[FETCH]))
    assert ApiServer(config).value("fetches_total", outcome="ok") == 0


@pytest.mark.parametrize("data", [{"fetches": "x"}, {"workers": {"0": 5}}])
def test_data_that_cannot_be_read_does_not_end_the_output_loop(
    api_server: ApiServer, data: dict[str, Any]
) -> None:
    from vllm_pd.connector.stats import PDConnectorStats

    api_server.record(PDConnectorStats(data))
    assert api_server.value("fetches_total", outcome="ok") == 0


def merged(*of_ranks: PDConnectorStats | None) -> PDConnectorStats:
    """Merge what the ranks report in one step, with vLLM's own code."""
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    from vllm_pd.connector.stats import PDConnectorStats

    outputs: list[ModelRunnerOutput | None] = []
    for stats in of_ranks:
        news = KVConnectorOutput(kv_connector_stats=stats)
        # A copy, as of another process: without news it is vLLM's one and only empty output.
        outputs.append(copy.copy(ModelRunnerOutput.with_kv_conn_output_only(news)))
    output = KVOutputAggregator(len(outputs)).aggregate(outputs)
    assert output is not None
    assert output.kv_connector_output is not None
    found = output.kv_connector_output.kv_connector_stats
    assert isinstance(found, PDConnectorStats)
    return found


def test_drops_of_the_instance_endpoint_are_counted_and_leave_the_gauges_alone(
    api_server: ApiServer,
) -> None:
    from vllm_pd.connector.stats import PDConnectorStats

    api_server.record(worker_stats(num_leases=2))
    api_server.record(PDConnectorStats.of_instance({"wrong_key": 3}))
    assert api_server.value("dropped_frames_total", reason="wrong_key") == 3
    assert api_server.value("leases") == 2


def test_step_in_which_one_rank_has_news_reports_that_rank() -> None:
    assert merged(None, worker_stats(1, fetches=[FETCH]), None).fetches == [FETCH]


def test_all_ranks_of_a_request_are_in_the_merged_stats() -> None:
    both = merged(worker_stats(0, fetches=[FETCH]), worker_stats(1, fetches=[FETCH]))
    assert both.fetches == [FETCH, FETCH]


def log_of(config: VllmConfig, *steps: PDConnectorStats) -> list[str]:
    """Return the lines that vLLM logs after some steps."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

    lines: list[str] = []
    log: Any = KVConnectorLogging(config.kv_transfer_config)
    for stats in steps:
        log.observe(stats.data)
    log.log(lambda text, *values: lines.append(text % values))
    return lines


def test_log_line_covers_all_steps_of_an_interval(config: VllmConfig) -> None:
    first = worker_stats(fetches=[FETCH])
    (line,) = log_of(config, first, worker_stats(fetches=[FETCH]))
    assert "Fetches=2, Failed fetches=0, MB fetched=4.0" in line
    assert first.fetches == [FETCH], "what other loggers read too was changed"


def test_interval_without_events_logs_no_line(config: VllmConfig) -> None:
    assert log_of(config, worker_stats()) == []
