"""Opens the NPU and HCCL; everything that needs torch_npu or CANN begins here."""

from __future__ import annotations

from collections.abc import Sequence

from ascend_vllm_plugin.backend import Backend
from ascend_vllm_plugin.device import NpuDevice
from ascend_vllm_plugin.libhccl import CtypesBackend
from ascend_vllm_plugin.process_group import ProcessGroupBackend
from ascend_vllm_plugin.settings import Settings
from ascend_vllm_plugin.versions import check_versions
from vllm_pd.errors import TransportUnavailableError
from vllm_pd.transport.base import KVRegion


def open_npu(regions: Sequence[KVRegion]) -> NpuDevice:
    """Return the NPU that a KV cache is on.

    Raises:
        TransportUnavailableError: it is in other memory, or what is installed does not fit.
        RuntimeError: torch_npu cannot use the NPU.
    """
    kinds = {region.device for region in regions}
    if kinds != {"npu"}:
        raise TransportUnavailableError(
            f"the hccl transport reaches NPU memory, not {', '.join(sorted(kinds))} memory"
        )
    check_versions()
    indices = {region.tensor.device.index or 0 for region in regions}
    if len(indices) != 1:
        raise TransportUnavailableError(f"KV cache on several NPUs: {sorted(indices)}")
    return NpuDevice(indices.pop())


def open_backend(settings: Settings, host: str, soc: str) -> Backend:
    """Load the backend that is asked for.

    Args:
        settings: which, and how.
        host: address at which peers reach this worker.
        soc: name of the chip.

    Raises:
        HcclError: it cannot be used.
    """
    if settings.backend == ProcessGroupBackend.name:
        return ProcessGroupBackend(host=host, buffer_mb=settings.buffer_mb)
    return CtypesBackend(
        buffer_mb=settings.buffer_mb, exec_timeout_s=settings.exec_timeout_s, soc=soc
    )
