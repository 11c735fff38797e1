"""Tests that need torch_npu; ``test_in_torch_npu`` runs them, on the double of CANN."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = (
    [] if importlib.util.find_spec("torch_npu") else ["test_hccl_*.py", "test_connector_*.py"]
)
