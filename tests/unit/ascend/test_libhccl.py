"""The library that is missing, or too old: one line each. The rest needs its double."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from ascend_vllm_plugin.backend import HcclError
from ascend_vllm_plugin.libhccl import CtypesBackend, library_path
from ascend_vllm_plugin.transport import HcclTransport

from vllm_pd.errors import TransportUnavailableError
from vllm_pd.transport.base import KVRegion, TransportOptions


def make() -> CtypesBackend:
    return CtypesBackend(buffer_mb=32, exec_timeout_s=30, soc="Ascend910B3")


def test_library_that_is_missing_is_one_line_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HCCL_SO_PATH", "/nowhere/libhccl.so")
    with pytest.raises(HcclError, match=r"cannot load /nowhere/libhccl.so.*set_env.sh"):
        make()


FUNCTIONS = (
    *("HcclGetRootInfo", "HcclCommInitRootInfoConfig", "HcclSend", "HcclRecv"),
    *("HcclCommDestroy", "HcclGetCommAsyncError", "HcclGetErrorString"),
)


@pytest.mark.parametrize("missing", FUNCTIONS)
def test_library_that_lacks_a_function_is_too_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path / "libhccl.so"
    code = "".join(f"int {name}(void) {{ return 0; }}\n" for name in FUNCTIONS if name != missing)
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=code, text=True, check=True)
    monkeypatch.setenv("HCCL_SO_PATH", str(path))
    with pytest.raises(HcclError, match=rf"has no {missing}: CANN is too old.*9\.1"):
        make()


def test_library_is_looked_for_where_vllm_ascend_does() -> None:
    assert library_path({"HCCL_SO_PATH": "/opt/libhccl.so"}) == "/opt/libhccl.so"
    assert library_path({}) == "libhccl.so"


def test_memory_of_the_host_is_not_for_hccl() -> None:
    transport = HcclTransport(TransportOptions())
    with pytest.raises(TransportUnavailableError, match="reaches NPU memory, not cpu memory"):
        transport.register_regions([KVRegion("layer.0", 8, 1, 8)])
    transport.close()


def test_encryption_is_not_for_hccl() -> None:
    options = TransportOptions(certificate=b"certificate", private_key=b"key")
    with pytest.raises(TransportUnavailableError, match="HCCL cannot encrypt"):
        HcclTransport(options)
