"""Parts of a Qwen2 checkpoint folder: its config, its tensors and their file.

bfloat16 is made from float32 bits with numpy, and the safetensors file is
written here, because neither needs torch: a launcher that only makes a model
folder should not wait for torch to import.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Their ids are their positions, also in ``data/generation_config.json``."""
PAD_ID, CHAT_START_ID, EOS_ID = range(3)

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
"""Config name → safetensors name and bytes per element."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Size and initial scale of a model.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_size: elements per head; even.
        intermediate_size: width of the MLP; None: 8/3 of ``hidden_size``,
            rounded up to a multiple of 64.
        max_len: longest sequence, in tokens.
        init_range: standard deviation of the weights. Trained models start at
            0.02; at 0.1 the greedy output depends strongly on the whole prompt.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
    """

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    intermediate_size: int | None = None
    max_len: int = 4096
    init_range: float = 0.1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"head_size must be even, not {self.head_size}")
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"intermediate_size must be positive, not {self.intermediate_size}")
        if self.init_range <= 0:
            raise ValueError(f"init_range must be positive, not {self.init_range}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def mlp_size(self) -> int:
        """Width of the MLP, with the default filled in."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-self.hidden_size * 8 // (3 * 64)) * 64


def model_config(geometry: Geometry, *, tied: bool) -> dict[str, Any]:
    """Return the ``config.json`` of a Qwen2 model.

    Args:
        geometry: the model's size.
        tied: whether the output layer shares the input embedding.
    """
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        # Both names: transformers 5 writes the first, 4 reads the second.
        "dtype": geometry.dtype,
        "torch_dtype": geometry.dtype,
        "eos_token_id": EOS_ID,
        "head_dim": geometry.head_size,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden_size,
        "initializer_range": geometry.init_range,
        "intermediate_size": geometry.mlp_size,
        "max_position_embeddings": geometry.max_len,
        "model_type": "qwen2",
        "num_attention_heads": geometry.num_heads,
        "num_hidden_layers": geometry.num_layers,
        "num_key_value_heads": geometry.num_kv_heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return name → shape of all tensors of a Qwen2 checkpoint, in file order."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.q_proj.bias": (q_size,),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.k_proj.bias": (kv_size,),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.bias": (kv_size,),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def untrained_tensors(
    geometry: Geometry, config: Mapping[str, Any], seed: int
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield name and float32 values of every tensor; the same for the same seed.

    Norms are 1, biases small, and the output rows of the special tokens 0: with a
    large initial scale the largest logit is far above 0, so greedy output does
    not end at a chance end-of-text token.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    for name, shape in tensor_shapes(config).items():
        if "norm" in name:
            yield name, np.ones(shape, np.float32)
            continue
        scale = geometry.init_range * (0.1 if name.endswith(".bias") else 1.0)
        values = rng.standard_normal(shape, np.float32)
        values *= np.float32(scale)
        if name == "lm_head.weight":
            values[: len(SPECIAL_TOKENS)] = 0
        yield name, values


def to_bytes(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Return the little-endian bytes of finite ``values`` in ``dtype``, rounded to nearest even."""
    import numpy as np

    if dtype == "float32":
        return values.astype("<f4").tobytes()
    if dtype == "float16":
        return values.astype("<f2").tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # bfloat16 is the upper half of float32; adding just under half a unit, plus the
    # lowest bit that stays, rounds ties to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").tobytes()


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Shape],
    dtype: str,
    tensors: Iterator[tuple[str, npt.NDArray[np.float32]]],
) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    The format is eight bytes of header length, a JSON header, then the raw
    tensors; the library's own writer takes no bfloat16 from numpy.

    Args:
        path: the file to make.
        shapes: name → shape, in the order in which ``tensors`` yields.
        dtype: config name of the type of all tensors.
        tensors: names and float32 values.
    """
    code, item_len = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + item_len * _num_elements(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8, as readers map them
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for (name, shape), (given, values) in zip(shapes.items(), tensors, strict=True):
            if (name, shape) != (given, values.shape):
                raise ValueError(f"expected {name} {shape}, got {given} {values.shape}")
            file.write(to_bytes(values, dtype))


def is_complete_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says. Reads the header only.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        header_len = int.from_bytes(file.read(8), "little")
        if header_len > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(header_len))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return False
    return path.stat().st_size == 8 + header_len + max(ends, default=0)


def _num_elements(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
