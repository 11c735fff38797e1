"""From vLLM's KV cache tensors to regions and a fingerprint.

Shapes, as read in vLLM 0.32.0 and seen in a run: on CPU one tensor per layer,
``(num_blocks, num_kv_heads, block_size, 2 * head_size)``, a view of one
allocation for all layers, block-contiguous. vllm-ascend 0.23.0 gives a tuple of
K and V, each ``(num_blocks, block_size, num_kv_heads, head_size)``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vllm_pd.errors import ConfigError
from vllm_pd.protocol.messages import KVLayout
from vllm_pd.transport.base import KVRegion

if TYPE_CHECKING:
    import torch

_SAMPLE_LEN = 4096
_NUM_SAMPLES = 1024
_MAX_HEADER_LEN = 100 * 1024 * 1024
_VOLATILE_KEYS = {"_name_or_path", "name_or_path", "transformers_version"}


def to_regions(
    kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    *,
    num_heads: int,
    block_size: int,
) -> list[KVRegion]:
    """Describe the tensors of ``register_kv_caches`` as contiguous spans of blocks.

    Args:
        kv_caches: tensors, or tuples of them, by layer.
        num_heads: KV heads on this rank.
        block_size: tokens per block.

    Returns:
        One region per tensor, in the order of the layers; a layer of several
        tensors gives ``NAME.0``, ``NAME.1`` and so on.

    Raises:
        ConfigError: a tensor's blocks are not contiguous, its heads cannot be told
            apart, or there is none.
    """
    regions: list[KVRegion] = []
    for layer_name, cache in kv_caches.items():
        tensors: list[torch.Tensor] = (
            list(cache) if isinstance(cache, (tuple, list)) else [cache]  # type: ignore[list-item]
        )
        for index, tensor in enumerate(tensors):
            name = layer_name if len(tensors) == 1 else f"{layer_name}.{index}"
            num_rows = _num_rows(
                name, tuple(tensor.shape), num_heads, block_size, is_alone=len(tensors) == 1
            )
            regions.append(_to_region(name, tensor, num_heads, num_rows))
    if not regions:
        raise ConfigError("vLLM registered no KV cache")
    return regions


def _to_region(name: str, tensor: torch.Tensor, num_heads: int, num_rows: int) -> KVRegion:
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
        num_rows=num_rows,
        num_heads=num_heads,
        tensor=None if tensor.device.type == "cpu" else tensor,
    )


def _num_rows(
    name: str, shape: tuple[int, ...], num_heads: int, block_size: int, *, is_alone: bool
) -> int:
    """Return the rows per block: 1 where heads come first, else one per token.

    Where there are as many heads as tokens, the shape does not tell: vLLM's single
    tensors have the heads first, vllm-ascend's pairs the tokens.

    Raises:
        ConfigError: neither is the case.
    """
    if num_heads == 1:
        return 1  # a block is the head, whatever is in it
    fits = [
        rows
        for rows, wanted in ((1, (num_heads, block_size)), (block_size, (block_size, num_heads)))
        if len(shape) == 4 and shape[1:3] == wanted
    ]
    if not fits:
        raise ConfigError(
            f"KV cache of {name}: cannot tell {num_heads} heads and {block_size} tokens per "
            f"block in shape {shape}"
        )
    return fits[0] if is_alone else fits[-1]


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
        num_rows=tuple(region.num_rows for region in regions),
        head_lens=tuple(region.head_len for region in regions),
        num_heads=regions[0].num_heads,
        num_blocks=counts.pop(),
    )


def model_digest(model: str, revision: str | None, config: Mapping[str, Any]) -> str:
    """Identify what computes the KV cache, independently of where it lies.

    Args:
        model: checkpoint folder, or name on a hub.
        revision: of the name.
        config: the model's configuration as it is used, after overrides.

    Returns:
        A digest of the configuration and of the weights: for a folder, names,
        shapes and samples of every tensor, so that two fine-tunes of one
        architecture differ; otherwise name and revision.
    """
    digest = hashlib.blake2b(digest_size=16)
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    folder = Path(model)
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in {".safetensors", ".bin"}:
                digest.update(path.name.encode())
                _digest_weights(path, digest)
    else:
        digest.update(f"{model}@{revision or 'main'}".encode())
    return digest.hexdigest()


def _digest_weights(path: Path, digest: hashlib.blake2b) -> None:
    """Sample a weight file: every tensor where its header says where they are."""
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for offset in _tensor_offsets(file, size, digest) or _even_offsets(size):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_LEN))


def _tensor_offsets(file: BinaryIO, size: int, digest: hashlib.blake2b) -> list[int]:
    """Return where to sample a safetensors file: the middle of each tensor; [] for others.

    Format: 8 bytes with the length of a JSON header, the header, the tensors.
    """
    header_len = int.from_bytes(file.read(8), "little")
    if not 2 <= header_len <= min(size - 8, _MAX_HEADER_LEN):
        return []
    data = file.read(header_len)
    try:
        header = json.loads(data)
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    digest.update(data)
    return [8 + header_len + (first + last) // 2 for first, last in spans]


def _even_offsets(size: int) -> list[int]:
    return [max(size - _SAMPLE_LEN, 0) * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)]
