"""The KV cache that vllm-ascend registers, and kinds of it that cannot be exchanged.

As read in vllm-ascend 0.23.0, ``worker/model_runner_v1.py``: per layer a tuple of
two tensors, each contiguous, blocks first:

- grouped-query attention: K and V, ``[num_blocks, 128, heads, head_size]`` both;
- multi-head latent attention: ``[num_blocks, 128, 1, 512]`` and ``[num_blocks, 128, 1, 64]``,
  so the two have blocks of different lengths.

Each allocation is aligned to 2 MiB where there is a KV connector. Send and Recv need
no alignment; one-sided engines do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_pd.errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BLOCK_SIZE = 128
"""Tokens of a block that the attention kernels know (``attention_v1.py:143``)."""

ALIGNMENT = 2 * 1024 * 1024

_FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ in acl/acl_base_rt.h, of torch-npu 2.13's headers


def check_kv_caches(
    kv_caches: Mapping[str, Any],
    *,
    block_size: int,
    additional_config: Mapping[str, Any],
    format_of: Callable[[torch.Tensor], int] | None = None,
) -> None:
    """Refuse, by name, KV caches of an NPU whose blocks are not what they seem.

    Args:
        kv_caches: as given to ``register_kv_caches``.
        block_size: tokens per block.
        additional_config: vLLM's, for vllm-ascend.
        format_of: tells a tensor's format on the device; None: torch_npu does.

    Raises:
        ConfigError: the cache is in NZ format, compressed, hybrid, quantised or of
            another kind that is not supported.
    """
    if additional_config.get("enable_kv_nz"):
        raise ConfigError(
            "additional_config has enable_kv_nz: a KV cache in NZ format cannot be exchanged",
            hint="leave enable_kv_nz out on both sides",
        )
    if block_size != BLOCK_SIZE:
        raise ConfigError(
            f"KV cache blocks of {block_size} tokens; the NPU's kernels use {BLOCK_SIZE}",
            hint=f"--block-size {BLOCK_SIZE}",
        )
    for name, cache in kv_caches.items():
        tensors = _check_kind(name, cache)
        for tensor in tensors:
            _check_tensor(name, tensor, format_of or _format_of)
    first = next(iter(kv_caches.values()), ())
    if any(tensor.data_ptr() % ALIGNMENT for tensor in first):
        logger.info("the KV cache is not aligned to 2 MiB; HCCL does not need it")


def _check_kind(name: str, cache: Any) -> Sequence[torch.Tensor]:
    """Return K and V of a layer.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(cache, (tuple, list)):
        raise ConfigError(
            f"KV cache of {name}: one tensor instead of K and V",
            hint="caches of hidden states are not supported",
        )
    if any(not tensor.is_contiguous() for tensor in cache):
        raise ConfigError(
            f"KV cache of {name}: strided views of shared pages, a compressed cache (use_compress)",
            hint="models with a compressed KV cache, as DeepSeek-V4, are not supported",
        )
    if any(tensor.dim() != 4 for tensor in cache):
        raise ConfigError(
            f"KV cache of {name}: tensors of {[tensor.dim() for tensor in cache]} dimensions, "
            "the states of a hybrid model",
            hint="models with Mamba or other linear-attention layers are not supported",
        )
    if len(cache) != 2:
        raise ConfigError(
            f"KV cache of {name}: {len(cache)} tensors instead of K and V, a sparse-attention "
            "cache",
            hint="DeepSeek-V3.2 and other models with sparse attention are not supported",
        )
    if cache[0].shape[:3] != cache[1].shape[:3]:
        raise ConfigError(
            f"KV cache of {name}: K is {tuple(cache[0].shape)} and V {tuple(cache[1].shape)}"
        )
    return cache


def _check_tensor(name: str, tensor: torch.Tensor, format_of: Callable[[Any], int]) -> None:
    import torch

    if tensor.shape[1] != BLOCK_SIZE:
        raise ConfigError(
            f"KV cache of {name}: blocks of {tensor.shape[1]} tokens in the kernels and of "
            f"{BLOCK_SIZE} in the scheduler, a hybrid cache",
            hint="models that mix kinds of attention are not supported",
        )
    if tensor.dtype is torch.int8:
        raise ConfigError(
            f"KV cache of {name}: int8, a quantised cache (C8) that the kernels view as NZ",
            hint='--kv-cache-dtype auto, and no "kv_cache_type": "C8"',
        )
    if format_of(tensor) == _FRACTAL_NZ:
        raise ConfigError(
            f"KV cache of {name} is in NZ format, which cannot be exchanged",
            hint="leave enable_kv_nz out on both sides",
        )


def _format_of(tensor: torch.Tensor) -> int:
    import torch_npu

    number: int = torch_npu.get_npu_format(tensor)
    return number
