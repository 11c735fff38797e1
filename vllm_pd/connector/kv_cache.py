"""From vLLM's KV cache tensors to regions and a fingerprint.

Shapes, as read in vLLM 0.32.0 and seen in a run: one tensor per layer,
``(num_blocks, num_kv_heads, block_size, 2 * head_size)``, a view of one allocation
for all layers. On CPU the heads of a block come first in memory, too; elsewhere the
strides tell, and the tokens come first by default. vllm-ascend 0.23.0 gives a tuple
of K and V, each ``(num_blocks, block_size, num_kv_heads, head_size)``; multi-head
latent attention has one head, and a tensor may lack that dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from vllm_pd.errors import ConfigError
from vllm_pd.protocol.messages import KVLayout
from vllm_pd.transport.base import KVRegion

if TYPE_CHECKING:
    import torch

KVCaches: TypeAlias = "Mapping[str, torch.Tensor | Sequence[torch.Tensor]]"
"""What vLLM registers: tensors, or tuples of them, by layer."""

_SAMPLE_LEN = 4096
_NUM_SAMPLES = 1024
_MAX_HEADER_LEN = 100 * 1024 * 1024
_VOLATILE_KEYS = {"_name_or_path", "name_or_path", "transformers_version"}


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """How the blocks of one tensor lie in memory.

    Attributes:
        dims: the tensor's dimensions, from the outermost in memory to the innermost.
        order: their names: Blocks, Heads, tokens (N) and the Content of one head for
            one token.
        num_rows: rows per block.
    """

    dims: tuple[int, ...]
    order: str
    num_rows: int


def to_regions(kv_caches: KVCaches, *, num_heads: int, block_size: int) -> list[KVRegion]:
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
    regions = [
        _to_region(name, tensor, num_heads, arrangement)
        for name, tensor, arrangement in _arranged(kv_caches, num_heads, block_size)
    ]
    if not regions:
        raise ConfigError("vLLM registered no KV cache")
    return regions


def memory_order(kv_caches: KVCaches, *, num_heads: int, block_size: int) -> str:
    """Name the order in memory of what a block consists of, e.g. ``BNHC``.

    It depends on vLLM's attention backend and options, not on the number of heads of
    a rank, so peers can be told apart by it whatever their tensor-parallel sizes.

    Args:
        kv_caches: as for ``to_regions``.
        num_heads: KV heads on this rank.
        block_size: tokens per block.

    Raises:
        ConfigError: it cannot be told.
    """
    arranged = _arranged(kv_caches, num_heads, block_size)
    return "+".join(dict.fromkeys(arrangement.order for _, _, arrangement in arranged))


def _arranged(
    kv_caches: KVCaches, num_heads: int, block_size: int
) -> Iterator[tuple[str, torch.Tensor, _Arrangement]]:
    """Yield every region's name, tensor and arrangement."""
    for layer_name, cache in kv_caches.items():
        is_tuple = isinstance(cache, (tuple, list))
        tensors: list[torch.Tensor] = list(cache) if is_tuple else [cache]  # type: ignore[list-item]
        for index, tensor in enumerate(tensors):
            name = layer_name if len(tensors) == 1 else f"{layer_name}.{index}"
            arrangement = _arrange(name, tensor, num_heads, block_size, is_alone=not is_tuple)
            yield name, tensor, arrangement


def _to_region(
    name: str, tensor: torch.Tensor, num_heads: int, arrangement: _Arrangement
) -> KVRegion:
    ordered = tensor.permute(arrangement.dims)
    if not ordered.is_contiguous():
        raise ConfigError(
            f"KV cache of {name}: shape {tuple(tensor.shape)}, strides {tensor.stride()}: blocks "
            "are not contiguous, or do not follow each other without gaps",
            hint="unset VLLM_KV_CACHE_LAYOUT or set it to HND; padded and compressed KV caches "
            "are not supported",
        )
    # data_ptr, never the storage's base: in 0.32 all layers share one storage.
    return KVRegion(
        name=name,
        addr=tensor.data_ptr(),
        num_blocks=tensor.shape[0],
        block_len=ordered.stride(0) * tensor.element_size(),
        device=tensor.device.type,
        num_rows=arrangement.num_rows,
        num_heads=num_heads,
        tensor=None if tensor.device.type == "cpu" else ordered,
    )


def _arrange(
    name: str, tensor: torch.Tensor, num_heads: int, block_size: int, *, is_alone: bool
) -> _Arrangement:
    """Tell a tensor's dimensions apart, and their order in memory.

    The answer for one head must be the one for many, which the peer's ranks may have of
    the same cache. With one head either order is the same bytes, and torch does not
    care for the stride of a dimension of size 1. So the shape decides where the tokens
    come first in it; the stride decides where they do not, since vLLM sets that one on
    purpose.

    Where there are as many heads as tokens, the shape does not tell: vLLM's single
    tensors have the heads first, vllm-ascend's tuples the tokens.

    Raises:
        ConfigError: there are not as many heads and tokens as there should be.
    """
    shape = tuple(tensor.shape)
    if len(shape) == 5:
        raise ConfigError(
            f"KV cache of {name}: shape {shape}: keys and values are in one tensor of five "
            "dimensions, which is not supported",
            hint="on a GPU, use vLLM 0.32",
        )
    if len(shape) == 3 and num_heads == 1 and shape[1] == block_size:
        return _Arrangement((0, 1, 2), "BNC", 1)  # a latent cache, whole on every rank
    fits = [
        (heads, tokens)
        for heads, tokens in ((1, 2), (2, 1))
        if len(shape) == 4 and (shape[heads], shape[tokens]) == (num_heads, block_size)
    ]
    if not fits:
        raise ConfigError(
            f"KV cache of {name}: cannot tell {num_heads} heads and {block_size} tokens per "
            f"block in shape {shape}"
        )
    heads, tokens = fits[0] if is_alone else fits[-1]
    is_told_by_shape = num_heads == 1 and tokens < heads
    if tensor.stride(heads) > tensor.stride(tokens) and not is_told_by_shape:
        return _Arrangement((0, heads, tokens, 3), "BHNC", 1)
    return _Arrangement((0, tokens, heads, 3), "BNHC", block_size)


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
