"""The code for vLLM's versions, in whichever vLLM is importable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vllm_pd.connector.compat import cpu_packing, engine_index

if TYPE_CHECKING:
    from tests.connector.harness import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # importing vLLM warns about its own dependencies
]


def test_packing_names_the_instruction_set_and_the_release(consumer: Engine) -> None:
    import vllm

    instruction_set, _, release = cpu_packing(consumer.config).split(":")
    assert instruction_set in {"amx", "neon", "rvv", "vec", "vec16", "vsx", "vxe"}
    assert release == f"vllm-{'.'.join(vllm.__version__.split('.')[:2])}"


def test_data_parallel_engines_of_a_dense_model_differ(consumer: Engine) -> None:
    parallel = consumer.config.parallel_config
    parallel.data_parallel_index = 3  # as EngineCore does for the fourth engine
    parallel.data_parallel_rank = 0
    assert engine_index(parallel) == 3
