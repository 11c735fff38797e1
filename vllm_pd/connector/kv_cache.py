"""From vLLM's KV cache tensors to regions and a fingerprint.

Shapes, as read in vLLM 0.32.0 and seen in a run: on CPU one tensor per layer,
``(num_blocks, num_kv_heads, block_size, 2 * head_size)``, a view of one
allocation for all layers, block-contiguous. vllm-ascend 0.23.0 gives a tuple of
K and V, each ``(num_blocks, block_size, num_kv_heads, head_size)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_pd.errors import ConfigError
from vllm_pd.protocol.messages import KVLayout
from vllm_pd.transport.base import KVRegion

if TYPE_CHECKING:
    import torch

_SAMPLE_LEN = 64 * 1024
_NUM_SAMPLES = 16


def to_regions(
    kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
) -> list[KVRegion]:
    """Describe the tensors of ``register_kv_caches`` as contiguous spans of blocks.

    Returns:
        One region per tensor, in the order of the layers; a layer of several
        tensors gives ``NAME.0``, ``NAME.1`` and so on.

    Raises:
        ConfigError: a tensor's blocks are not contiguous, or there is none.
    """
    regions: list[KVRegion] = []
    for layer_name, cache in kv_caches.items():
        tensors: list[torch.Tensor] = (
            list(cache) if isinstance(cache, (tuple, list)) else [cache]  # type: ignore[list-item]
        )
        for index, tensor in enumerate(tensors):
            name = layer_name if len(tensors) == 1 else f"{layer_name}.{index}"
            regions.append(_to_region(name, tensor))
    if not regions:
        raise ConfigError("vLLM registered no KV cache")
    return regions


def _to_region(name: str, tensor: torch.Tensor) -> KVRegion:
    if tensor.dim() < 2 or not tensor.is_contiguous():
        raise ConfigError(
            f"KV cache of {name}: shape {tuple(tensor.shape)}, strides {tensor.stride()} is not "
            "one contiguous run per block",
            hint="hybrid and compressed KV caches are not supported",
        )
    # data_ptr, never the storage's base: in 0.32 all layers share one storage.
    return KVRegion(
        name=name,
        addr=tensor.data_ptr(),
        num_blocks=tensor.shape[0],
        block_len=tensor.stride(0) * tensor.element_size(),
        device=tensor.device.type,
    )


def to_layout(regions: Sequence[KVRegion]) -> KVLayout:
    """Return the geometry that peers are told.

    Raises:
        ConfigError: the regions differ in their number of blocks.
    """
    counts = {region.num_blocks for region in regions}
    if len(counts) != 1:
        raise ConfigError(f"KV caches with different numbers of blocks: {sorted(counts)}")
    return KVLayout(
        region_names=tuple(region.name for region in regions),
        block_lens=tuple(region.block_len for region in regions),
        num_blocks=counts.pop(),
    )


def model_digest(model: str, revision: str | None) -> str:
    """Identify a checkpoint independently of where it lies.

    For a folder: names, sizes and samples of its weight files, so that two fine-tunes
    of one architecture differ. Otherwise: name and revision.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    weights = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", ".bin"})
    digest = hashlib.blake2b(digest_size=16)
    for path in weights or [folder / "config.json"]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for i in range(_NUM_SAMPLES):
                file.seek(max(size - _SAMPLE_LEN, 0) * i // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_LEN))
    return digest.hexdigest()
