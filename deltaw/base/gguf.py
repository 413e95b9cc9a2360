"""A GGUF file → a complete transformers folder: bf16 safetensors, config, tokenizer, chat template.

It is not a loader (`load.py` opens the folder that this file writes), and no general converter: three dense
architectures and byte-level BPE tokenizers, of which every key and tensor is either understood or refused by name.

The idea that keeps it short: one walk over the header (`gguf_header.py`) both checks it and reads it, so nothing is
parsed that was not checked. Weights then pass through one buffer of a few MB, chunk of rows by chunk of rows, so that
peak memory does not depend on the model.

Whoever changes what is written for a given file raises CONVERTER_VERSION in `builtin.py`: caches carry it.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from deltaw.base.gguf_header import DAMAGED, Header, StoredTensor, get, open_header
from deltaw.base.gguf_tokenizer import build_tokenizer
from deltaw.disk import new_folder, write_text
from deltaw.errors import BaseError, DiskError

CHUNK_ELEMENTS = 1 << 21  # 8 MB in fp32; dequantising needs about four times that for a moment
_U64 = struct.Struct("<Q")

# ── Architecture: names, shapes, config ──────────────────────────────────────────────────────────────────────────

# GGUF name → (transformers name, shape). A letter is one size: v vocabulary, d hidden, f feed-forward,
# q query heads x head size, k key-value heads x head size, h head size.
_TOP = {
    "token_embd.weight": ("model.embed_tokens.weight", "vd"),
    "output_norm.weight": ("model.norm.weight", "d"),
    "output.weight": ("lm_head.weight", "vd"),
}
_BLOCK = {
    "attn_norm.weight": ("input_layernorm.weight", "d"),
    "attn_q.weight": ("self_attn.q_proj.weight", "qd"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kd"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": ("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "d"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": ("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": ("mlp.down_proj.weight", "df"),
}
_QWEN2_BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", "q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "k"),
    "attn_v.bias": ("self_attn.v_proj.bias", "k"),
}
_QWEN3_NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "h"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "h"),
}


@dataclass(frozen=True)
class _Architecture:
    model_class: str
    block: dict[str, tuple[str, str]]
    permuted: tuple[str, ...] = ()  # block tensors whose rows llama.cpp reorders for its rotary embedding


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", _BLOCK, ("attn_q.weight", "attn_k.weight")),
    "qwen2": _Architecture("Qwen2ForCausalLM", _BLOCK | _QWEN2_BIASES),
    "qwen3": _Architecture("Qwen3ForCausalLM", _BLOCK | _QWEN3_NORMS),
}
# Keys that change the computation in a way that these three classes do not have; absent or zero is fine.
_UNSUPPORTED_KEYS = ("expert_count", "attention.sliding_window", "attention.scale", "logit_scale", "residual_scale",
                     "embedding_scale", "attention.max_alibi_bias", "attention.clamp_kqv")  # fmt: skip


@dataclass(frozen=True)
class _Weight:
    """One tensor to write: its new name, where it comes from, and the head size if its rows must be reordered."""

    name: str
    source: StoredTensor
    permuted_head_dim: int = 0


@dataclass(frozen=True)
class _Sizes:
    """The sizes that config.json and the tensors' shapes are both made from."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def shape(self, letters: str) -> tuple[int, ...]:
        size_by_letter = {"v": self.vocab, "d": self.hidden, "f": self.ffn, "h": self.head_dim,
                          "q": self.heads * self.head_dim, "k": self.kv_heads * self.head_dim}  # fmt: skip
        return tuple(size_by_letter[letter] for letter in letters)


def _architecture(header: Header) -> tuple[str, _Architecture]:
    name = get(header, "general.architecture", str)
    if name not in _ARCHITECTURES:
        raise BaseError(
            f"{header.path}: architecture {name!r} cannot be converted (can be: {', '.join(_ARCHITECTURES)}); "
            "use the model's original transformers folder"
        )
    for key in _UNSUPPORTED_KEYS:
        if header.values.get(f"{name}.{key}", 0):
            raise BaseError(
                f"{header.path}: {name}.{key} = {header.values[f'{name}.{key}']!r} has no counterpart in "
                f"{_ARCHITECTURES[name].model_class}; use the model's original transformers folder"
            )
    if get(header, "split.count", int, 1) > 1:
        raise BaseError(f"{header.path} is one part of several; join them first: llama-gguf-split --merge FIRST OUTPUT")
    return name, _ARCHITECTURES[name]


def _sizes(header: Header, arch: str) -> _Sizes:
    heads, hidden = (get(header, f"{arch}.{key}", int) for key in ("attention.head_count", "embedding_length"))
    rotary_dim = get(header, f"{arch}.rope.dimension_count", int, None)
    head_dim = get(header, f"{arch}.attention.key_length", int, rotary_dim or hidden // max(heads, 1))
    if rotary_dim not in (None, head_dim) or head_dim % 2:
        raise BaseError(
            f"{header.path}: rotary size {rotary_dim} and head size {head_dim}: they must be equal and even"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise BaseError(f"{header.path}: the tensor token_embd.weight is missing; {DAMAGED}")
    return _Sizes(
        num_layers=get(header, f"{arch}.block_count", int),
        hidden=hidden,
        ffn=get(header, f"{arch}.feed_forward_length", int),
        heads=heads,
        kv_heads=get(header, f"{arch}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab=embedding.shape[0],
    )


def _weights(header: Header, architecture: _Architecture, sizes: _Sizes) -> list[_Weight]:
    """What is to be written, in the file's order. Every missing, unknown or misshapen tensor is named at once."""
    if sizes.num_layers > len(header.tensors):  # the list of expected names must not grow with a lie
        raise BaseError(
            f"{header.path}: {len(header.tensors)} tensors are too few for {sizes.num_layers} layers; {DAMAGED}"
        )
    targets = {name: (new_name, letters, 0) for name, (new_name, letters) in _TOP.items()}
    for layer in range(sizes.num_layers):
        for name, (new_name, letters) in architecture.block.items():
            head_dim = sizes.head_dim if name in architecture.permuted else 0
            targets[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{new_name}", letters, head_dim)
    tensors = {name: tensor for name, tensor in header.tensors.items() if name != _ROPE_FACTORS}
    faults = [f"{name} is missing" for name in targets.keys() - tensors.keys() - {"output.weight"}]
    faults += [f"{name} is unknown" for name in tensors.keys() - targets.keys()]
    for name in tensors.keys() & targets.keys():
        expected = sizes.shape(targets[name][1])
        if tensors[name].shape != expected:
            faults.append(f"{name} has the shape {list(tensors[name].shape)}, the metadata say {list(expected)}")
    faults += [f"tensors of type {quant.name} cannot be read" for quant in _undecodable(tensors)]
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise BaseError(f"{header.path}: {shown}. Use the model's original transformers folder")
    return [_Weight(targets[name][0], tensor, targets[name][2]) for name, tensor in tensors.items()]


def _undecodable(tensors: dict[str, StoredTensor]) -> list[GGMLQuantizationType]:
    """The storage types that gguf knows by size but cannot dequantise; tried on one block of zeros each."""
    refused = []
    for quant in {tensor.quant for tensor in tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[quant][1]), np.uint8), quant)
        except NotImplementedError:
            refused.append(quant)
    return refused


_ROPE_FACTORS = "rope_freqs.weight"


def _rope_parameters(header: Header, arch: str, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json: plain, linearly scaled, or Llama 3.1's. Others are refused."""
    theta = get(header, f"{arch}.rope.freq_base", float, 10000.0)
    plain_factor = get(header, f"{arch}.rope.scale_linear", float, 1.0)
    factor = get(header, f"{arch}.rope.scaling.factor", float, plain_factor)
    kind = get(header, f"{arch}.rope.scaling.type", str, "linear" if factor not in (0.0, 1.0) else "none")
    if kind not in ("none", "linear"):
        raise BaseError(f"{header.path}: rope scaling {kind!r} cannot be converted (can be: none, linear, llama3)")
    if _ROPE_FACTORS in header.tensors:
        return {"rope_theta": theta} | _llama3_scaling(header, theta, head_dim)
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_scaling(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, recognised by its divisors: GGUF stores one per frequency instead of the four settings.

    Llama 3.1 to 3.3 differ only in the factor, which is the divisor of the slowest frequency.
    """
    tensor = header.tensors[_ROPE_FACTORS]
    if tensor.quant != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise BaseError(f"{header.path}: {_ROPE_FACTORS} is {tensor.quant.name} {list(tensor.shape)}; {DAMAGED}")
    stored = np.frombuffer(header.data, "<f4", head_dim // 2, tensor.start).astype(np.float64)
    factor, low, high, original_tokens = float(stored[-1]), 1.0, 4.0, 8192
    turns = original_tokens * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not (factor >= 1.0 and np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4)):
        raise BaseError(
            f"{header.path}: {_ROPE_FACTORS} is not Llama 3.1's scaling; use the original transformers folder"
        )
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original_tokens}  # fmt: skip


def _special_ids(header: Header) -> dict[str, int | list[int]]:
    """bos, eos and pad ids as config.json names them; those that the file does not have are left out."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: get(header, f"tokenizer.ggml.{key}", int, None) for name, key in keys.items()}
    found: dict[str, int | list[int]] = {name: value for name, value in ids.items() if value is not None}
    end_of_turn = get(header, "tokenizer.ggml.eot_token_id", int, None)
    if end_of_turn is not None and "eos_token_id" in found and end_of_turn != found["eos_token_id"]:
        found["eos_token_id"] = [ids["eos_token_id"], end_of_turn]  # Llama 3: either ends an answer
    return found


def _config(header: Header, arch: str, sizes: _Sizes) -> dict[str, Any]:
    return {
        "architectures": [_ARCHITECTURES[arch].model_class],
        "model_type": arch,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": get(header, f"{arch}.context_length", int),
        "rms_norm_eps": get(header, f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope_parameters(header, arch, sizes.head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": sizes.vocab,
        **_special_ids(header),
    }


# ── Weights ────────────────────────────────────────────────────────────────────────────────────────────────────


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 values as the 16 bits of bf16, rounded to nearest with ties to even; NaN stays a quiet NaN.

    1.00390625 (1 + 2^-8, halfway) becomes 0x3F80, that is 1.0.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    high = bits >> np.uint32(16)
    rounded = (bits + (np.uint32(0x7FFF) + (high & np.uint32(1)))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # adding to these could overflow into zero
    return np.where(is_nan, high | np.uint32(0x40), rounded).astype("<u2")


def _read_chunks(file: BinaryIO, weight: _Weight) -> Iterator[np.ndarray]:
    """The tensor's rows in fp32, some millions of elements at a time, in the order that transformers wants.

    Read, not mapped: pages of a mapped file would count as memory of this process until the end.
    """
    tensor, head_dim = weight.source, weight.permuted_head_dim
    width = tensor.shape[-1]
    num_rows = math.prod(tensor.shape) // width
    row_bytes = tensor.num_bytes // num_rows
    group = head_dim or 1  # rows move within a head only, so a chunk is a whole number of heads
    step = max(CHUNK_ELEMENTS // width // group, 1) * group
    file.seek(tensor.start)
    for row in range(0, num_rows, step):
        rows = min(step, num_rows - row)
        raw = np.fromfile(file, np.uint8, rows * row_bytes)
        if raw.size != rows * row_bytes:
            raise BaseError(
                f"the file ended inside {tensor.name} although it was complete before; do not change it now"
            )
        values = dequantize(raw.reshape(rows, row_bytes), tensor.quant)
        yield _unpermute(values, head_dim) if head_dim else values


def _unpermute(values_RC: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order (pairs adjacent: 0, h/2, 1, h/2+1 …) back to halves (0, 1, 2 …)."""
    pairs = values_RC.reshape(-1, head_dim // 2, 2, values_RC.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values_RC.shape)


def _safetensors_header(weights: list[_Weight]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + 2 * math.prod(weight.source.shape)
        entries[weight.name] = {"dtype": "BF16", "shape": list(weight.source.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin aligned
    return _U64.pack(len(text)) + text


def _write_weights(source: Path, target: Path, weights: list[_Weight]) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(_safetensors_header(weights))
        for weight in weights:
            for values in _read_chunks(reader, weight):
                writer.write(to_bfloat16(values).data)


# ── The folder ───────────────────────────────────────────────────────────────────────────────────────────────────


def _text_files(header: Header, arch: str, sizes: _Sizes) -> dict[str, str]:
    """Every file of the folder except the weights, by name."""
    config = _config(header, arch, sizes)
    tokenizer, named = build_tokenizer(header, sizes.vocab)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **named,
    }
    files = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(_special_ids(header), indent=2),
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False),
    }
    template = get(header, "tokenizer.chat_template", str, None)
    return files if template is None else files | {"chat_template.jinja": template}


def _require_free(folder: Path, needed_bytes: int) -> None:
    """Nothing where the disk on which `folder` will lie has so much room; raises DiskError otherwise."""
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < needed_bytes:
        raise DiskError(f"{folder} needs {needed_bytes / 1e6:,.0f} MB, but {free_bytes / 1e6:,.0f} MB are free there")


def convert_gguf(path: str | Path, folder: str | Path) -> None:
    """Nothing; afterwards `folder` is a model folder that transformers opens, with the file's weights in bf16.

    For a 98 MB file with 135 M parameters this takes 4 seconds and 100 MB of memory; the memory does not grow
    with the number of layers. Raises BaseError, before anything is written, if the file is damaged or holds something
    that the folder could not express (each fault by name), or if `folder` exists; DiskError if writing fails.
    """
    path, folder = Path(path), Path(folder).absolute()
    if folder.exists():
        raise BaseError(f"{folder} exists already; name a new folder, or delete that one first")
    with open_header(path) as header:
        arch, architecture = _architecture(header)
        sizes = _sizes(header, arch)
        weights = _weights(header, architecture, sizes)
        texts = _text_files(header, arch, sizes)

    num_weights = sum(math.prod(weight.source.shape) for weight in weights)
    with new_folder(folder) as partial:
        _require_free(folder, 2 * num_weights + sum(4 * len(text) for text in texts.values()))
        for name, text in texts.items():
            write_text(partial / name, text)
        _write_weights(path, partial / "model.safetensors", weights)
