"""Checks of a device's KV cache by its plugin, through the group ``vllm_pd.kv_geometry``.

The entry point is named after the device type of the tensors, e.g. ``npu``. Without a
plugin a cache must only be what ``kv_cache`` can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_pd.connector.kv_cache import KVCaches

GROUP = "vllm_pd.kv_geometry"


def check_kv_caches(
    kv_caches: KVCaches, block_size: int, additional_config: Mapping[str, Any]
) -> None:
    """Let the plugin of the KV cache's device refuse what cannot be exchanged.

    Args:
        kv_caches: tensors, or tuples of them, by layer.
        block_size: tokens per block.
        additional_config: vLLM's, for the platform.

    Raises:
        ConfigError: it is refused.
    """
    first = next(iter(kv_caches.values()), None)
    tensor = first[0] if isinstance(first, (tuple, list)) and first else first
    kind = getattr(getattr(tensor, "device", None), "type", "cpu")
    for entry in entry_points(group=GROUP, name=kind):
        entry.load()(kv_caches, block_size=block_size, additional_config=additional_config)
