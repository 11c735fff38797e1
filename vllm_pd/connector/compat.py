"""What differs between the supported vLLM versions, 0.23.0 to 0.32.0.

Nothing else in this package looks at vLLM's version. Most differences need no
code, only care in how ``connector.py`` is written; they are listed here with
what it relies on. Read in the sources of 0.23.0 and 0.32.0, and run against both
by ``tests/connector``.

============================  ==========================  ============================
what                          0.23.0                      0.32.0
============================  ==========================  ============================
``start_load_kv``             before the forward pass     after it, with keywords:
                                                          loads start in
                                                          ``bind_connector_metadata``
``wait_for_save``             not on empty steps          on every step: does nothing
end of transfers              ``get_finished``            ``get_transfer_results``,
                                                          which wraps ``get_finished``
failed loads                  block ids                   block ids, or request ids for
                                                          several cache groups, which
                                                          the connector refuses
blocks in                     all that are allocated      those of computed tokens: cut
``request_finished``                                      to the prompt in both
scheduler's statistics        only beside the workers'    always
statistics on the wire        ``stats.data``              ``stats.to_dict()``, which is
                                                          ``data`` by default
label of external hits        none                        ``_cache_hit_source``
KV cache on CPU               one allocation per layer    one for all layers: shapes are
                                                          read from the tensors
KV cache on CUDA              keys and values in one      one tensor per layer; the
                              tensor of five dimensions:  order in memory is in its
                              refused                     strides
KV cache specs                in both ``FullAttentionSpec`` and ``MLAAttentionSpec``;
                              special kinds of them come and go
preferred layout              ``HND`` or ``NHD``          the same, or five letters
frees after a stop, with      at once                     once no step that may write
asynchronous scheduling                                   the blocks is in flight
============================  ==========================  ============================

Removed since 0.23.0 and never defined here: ``prefer_cross_layer_blocks`` and
``register_cross_layers_kv_cache``. Hooks that only 0.32.0 calls have defaults in its
base class that are right for this connector.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

T = TypeVar("T")


def cache_hit_source() -> Any:
    """Return the label under which vLLM counts prompt tokens that a peer computed.

    None where vLLM has no such label and reads none.
    """
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.P2P


def engine_index(parallel_config: ParallelConfig) -> int:
    """Return which of the data-parallel engines of one ``vllm serve`` this is.

    Not ``data_parallel_rank``: both versions set it to 0 in every engine of a dense
    model.
    """
    return parallel_config.data_parallel_index


def in_rank_order(metadata: Mapping[Any, T]) -> list[T]:
    """Return the workers' handshake metadata, by rank.

    Args:
        metadata: keyed by ``tp_rank``, by ``(pp_rank, tp_rank)`` or, on
            vllm-ascend with context parallelism, by ``(pp_rank, pcp_rank, tp_rank)``.
    """

    def rank(key: Hashable) -> tuple[Any, ...]:
        return key if isinstance(key, tuple) else (key,)

    return [metadata[key] for key in sorted(metadata, key=rank)]


def plain_mapping(additional_config: object) -> dict[str, Any]:
    """Return vLLM's ``additional_config``, which may be an object: then it is a platform's own."""
    return dict(additional_config) if isinstance(additional_config, dict) else {}


_SPECIAL_SPECS = ("HiddenStateCacheSpec", "RSWASpec", "SinkFullAttentionSpec")


def unsupported_specs(specs: Iterable[KVCacheSpec]) -> list[str]:
    """Return the names of those specs whose blocks cannot be transferred.

    With full attention, block i of a request holds the tokens from i * block_size. With
    a sliding window vLLM puts the null block, which everybody shares, in the place of
    blocks it no longer needs; other kinds have blocks of other meanings. Derived kinds of
    full attention, e.g. of a plugin, pass, but for those known to do such things.
    """
    from vllm.v1 import kv_cache_interface as interface

    special = tuple(getattr(interface, n) for n in _SPECIAL_SPECS if hasattr(interface, n))
    refused = [
        type(each).__name__
        for spec in specs
        for each in _of_layers(spec)
        if not isinstance(each, interface.FullAttentionSpec) or isinstance(each, special)
    ]
    return list(dict.fromkeys(refused))


def _of_layers(spec: KVCacheSpec) -> Iterable[KVCacheSpec]:
    """Return the specs of a group's layers where they differ, else the group's."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else (spec,)


def preferred_layout(vllm_config: VllmConfig) -> str | None:
    """Return the order of a block's contents that this connector asks vLLM for.

    With the heads before the tokens, what a rank of another tensor-parallel size wants
    of a block is one run of bytes. None where nothing is to be gained or to be chosen:
    with one latent head, and where the kernels know one order only.
    """
    from vllm.platforms import current_platform

    model: Any = vllm_config.model_config  # None in some of vLLM's own tools
    if model is None or model.use_mla or current_platform.device_type in {"cpu", "npu"}:
        return None
    return "HND"


def cpu_packing(vllm_config: VllmConfig) -> str:
    """Name the way in which the CPU kernels pack K and V inside a block.

    It differs per instruction set, and is no interface of vLLM's: a release may
    change it. So bytes are exchanged only between equal instruction sets of one
    release.
    """
    import torch
    from vllm.v1.attention.backends import cpu_attn

    capability = torch.backends.cpu.get_cpu_capability()
    dtype: Any = vllm_config.model_config.dtype
    try:
        isa = cpu_attn._get_attn_isa(  # noqa: SLF001 - no public way to ask
            dtype,
            vllm_config.cache_config.block_size,
            vllm_config.model_config.get_head_size(),
        )
    except (AttributeError, TypeError):
        isa = "unknown"
    return f"{isa}:{capability}:vllm-{_release()}"


def _release() -> str:
    """Return vLLM's version without its patch level, e.g. ``0.32``."""
    import vllm

    return ".".join(vllm.__version__.split(".")[:2])
