"""Tests in the real torch_npu, on the double of CANN.

They run in an environment of their own, from ``tests/npu/test_in_torch_npu.py``; without
torch_npu there is nothing to collect here.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch_npu") else ["test_*.py"]
