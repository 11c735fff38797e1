"""What must be installed beside this plugin, checked when a transport is made.

The plugin declares none of it as a requirement: the Ascend image has its own builds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib import metadata

from ascend_vllm_plugin import __version__
from vllm_pd.errors import TransportUnavailableError

logger = logging.getLogger(__name__)

_OLDEST_TORCH_NPU = (2, 10)  # of the vllm-ascend 0.23.0 image
_OLDEST_VLLM, _NEWEST_VLLM = (0, 23), (0, 32)
_LOOKED_UP = ("vllm-pd", "torch", "torch-npu", "vllm", "vllm-ascend")


def check_versions() -> None:
    """Look at what is installed; what is merely untested is logged.

    Raises:
        TransportUnavailableError: something is missing or does not fit.
    """
    installed = {name: _version_of(name) for name in _LOOKED_UP}
    if found := problems(installed):
        raise TransportUnavailableError("; ".join(found))
    for doubt in doubts(installed):
        logger.warning("%s", doubt)


def problems(installed: Mapping[str, str | None]) -> list[str]:
    """Return why this plugin cannot work with these versions; None: not installed. Pure."""
    found = []
    ours, core = __version__, installed["vllm-pd"]
    if core is None or _minor(core) != _minor(ours):
        found.append(
            f"ascend-vllm-plugin {ours} needs vllm-pd {ours}, {_found(core)}: install both from "
            "one checkout"
        )
    torch, torch_npu = installed["torch"], installed["torch-npu"]
    if torch is None or torch_npu is None:
        name = "torch" if torch is None else "torch-npu"
        found.append(f"{name} is not installed: use the vllm-ascend image, or its requirements")
    elif _minor(torch_npu) < _OLDEST_TORCH_NPU:
        found.append(f"torch-npu {torch_npu} is older than 2.10, of vllm-ascend 0.23.0: update it")
    elif _minor(torch) != _minor(torch_npu):
        found.append(
            f"torch {torch} and torch-npu {torch_npu} do not belong together: install the "
            f"torch-npu {torch.rpartition('.')[0]} that is made for it"
        )
    return found


def doubts(installed: Mapping[str, str | None]) -> list[str]:
    """Return what was not tested. Pure."""
    found = []
    vllm, vllm_ascend = installed["vllm"], installed["vllm-ascend"]
    if vllm is not None and not _OLDEST_VLLM <= _minor(vllm) <= _NEWEST_VLLM:
        found.append(f"vLLM {vllm} is not among the versions that are tested, 0.23 to 0.32")
    if vllm_ascend is not None and vllm is not None and _minor(vllm_ascend) != _minor(vllm):
        found.append(f"vllm-ascend {vllm_ascend} is made for another vLLM than {vllm}")
    return found


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _found(version: str | None) -> str:
    return "not installed" if version is None else f"found {version}"


def _minor(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
