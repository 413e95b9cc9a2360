"""A GGUF file → a complete transformers folder: bf16 safetensors, config, tokenizer, chat template.

It is not a loader (`load.py` opens the folder that this file writes), and no general converter: three dense
architectures and byte-level BPE tokenizers, of which every key and tensor is either understood or refused by name.

The idea that keeps it short: one walk over the header both checks it and reads it, so nothing is parsed that was not
checked. The walk maps the file and believes no count: each is compared with the bytes that are left before a step is
taken. Weights then pass through one buffer of a few MB, chunk of rows by chunk of rows, so that peak memory does not
depend on the model. gguf's own GGUFReader makes an array object per token (for 49k tokens: 4 to 6 seconds and 155 MB,
where the walk takes 0.03 s), and trusts the counts; it is the reference in the tests.

Whoever changes what is written for a given file raises CONVERTER_VERSION in `builtin.py`: caches carry it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from deltaw.errors import BaseError, DiskError

MAX_KEYS, MAX_TENSORS = 4096, 65536  # the largest published models have about 70 keys and 3,000 tensors
MAX_NAME_BYTES, MAX_TEXT_BYTES, MAX_ARRAY_STRINGS = 65535, 1 << 20, 1 << 22
CHUNK_ELEMENTS = 1 << 21  # 8 MB in fp32; dequantising needs about four times that for a moment

_DAMAGED = "the file is damaged or cut short: fetch it again and compare its size and checksum with its source"


# ── The header: checked and read in one walk ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Array:
    """Where an array value lies; its items are read only when asked for."""

    item_type: int
    count: int
    start: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as stored: shape outermost first, type, first byte in the file, and size."""

    name: str
    shape: tuple[int, ...]
    quant: GGMLQuantizationType
    start: int
    num_bytes: int


@dataclass
class _Header:
    """What the walk found: metadata by key, tensors by name."""

    path: Path
    data: mmap.mmap
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, _Tensor] = field(default_factory=dict)


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    kind: struct.Struct("<" + code) for kind, code in zip((*range(8), *range(10, 13)), "BbHhIif?Qqd", strict=True)
}


class _Walk:
    """A position in the mapped file; every step is checked against the end of the file before it is taken."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.end, self.position = path, data, len(data), 0

    def fail(self, what: str, hint: str = _DAMAGED) -> NoReturn:
        raise BaseError(f"{self.path}: {what} (at byte {self.position:,} of {self.end:,}); {hint}")

    def number(self, kind: struct.Struct, what: str) -> Any:
        if self.end - self.position < kind.size:
            self.fail(f"the file ends inside {what}")
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def count(self, what: str, item_bytes: int, limit: int) -> int:
        """A number of items, each of at least `item_bytes`, that can exist in what is left of the file."""
        value: int = self.number(_U64, what)
        room = (self.end - self.position) // item_bytes
        if value > min(room, limit):
            self.fail(f"{what} is {value:,}, but at most {min(room, limit):,} are possible here")
        return value

    def text(self, what: str, limit_bytes: int) -> str:
        size = self.count(f"the length of {what}", 1, limit_bytes)
        raw = self.data[self.position : self.position + size]
        self.position += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8 text: {raw[:40]!r}")

    def value(self, key: str) -> Any:
        kind = self.number(_U32, f"the type of {key}")
        if kind == _STRING:
            return self.text(key, MAX_TEXT_BYTES)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.fail(f"{key} has the unknown value type {kind}")
        return self.number(_SCALARS[kind], key)

    def array(self, key: str) -> _Array:
        item_type = self.number(_U32, f"the item type of {key}")
        if item_type == _STRING:
            count = self.count(f"the number of strings in {key}", 8, MAX_ARRAY_STRINGS)
            array = _Array(item_type, count, self.position)
            self.skip_strings(key, count)
            return array
        if item_type not in _SCALARS:  # arrays of arrays are in the format, but in no model that can be converted
            self.fail(f"{key} is an array of the unsupported item type {item_type}")
        item_bytes = _SCALARS[item_type].size
        count = self.count(f"the number of items in {key}", item_bytes, self.end)
        array = _Array(item_type, count, self.position)
        self.position += count * item_bytes
        return array

    def skip_strings(self, key: str, count: int) -> None:
        # The only loop over file contents that is long (two times 49,152 steps), hence the local names.
        data, unpack, position, last = self.data, _U64.unpack_from, self.position, self.end - 8
        for index in range(count):
            if position > last:
                self.fail(f"the file ends before string {index:,} of {count:,} in {key}")
            (size,) = unpack(data, position)
            position += 8 + size
            if position > self.end:
                self.fail(f"string {index:,} of {key} has the length {size:,}, which runs past the end of the file")
        self.position = position

    def tensor(self) -> _Tensor:
        """The next tensor entry; `start` is still relative to the data section."""
        name = self.text("a tensor's name", MAX_NAME_BYTES)
        num_dims = self.number(_U32, f"the dimensions of {name}")
        if not 1 <= num_dims <= 4:
            self.fail(f"tensor {name} has {num_dims:,} dimensions, where 1 to 4 are possible")
        dims = [self.number(_U64, f"the shape of {name}") for _ in range(num_dims)]
        kind = self.number(_U32, f"the type of {name}")
        offset = self.number(_U64, f"the offset of {name}")
        try:
            quant = GGMLQuantizationType(kind)
        except ValueError:
            self.fail(f"tensor {name} has the unknown type {kind}", "a newer `gguf` package may know it")
        block_elements, block_bytes = GGML_QUANT_SIZES[quant]
        if 0 in dims or dims[0] % block_elements:
            self.fail(f"tensor {name} has the shape {dims}, not whole blocks of {block_elements} for {quant.name}")
        return _Tensor(name, tuple(reversed(dims)), quant, offset, math.prod(dims) // block_elements * block_bytes)


@contextmanager
def _open_header(path: Path) -> Iterator[_Header]:
    """The checked header of a file, whose arrays can be read while the block runs."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise BaseError(f"{path} cannot be opened: {error.strerror}; check the path and its permissions") from error
    with file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes < 24:
            raise BaseError(f"{path}: {size_bytes} bytes are too few for a GGUF header; {_DAMAGED}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _walk(path, data)


def _walk(path: Path, data: mmap.mmap) -> _Header:
    walk, header = _Walk(path, data), _Header(path, data)
    num_tensors, num_keys = _walk_preamble(walk)
    for _ in range(num_keys):
        key = walk.text("a metadata key", MAX_NAME_BYTES)
        if key in header.values:
            walk.fail(f"the metadata key {key} occurs twice")
        header.values[key] = walk.value(key)
    entries = [walk.tensor() for _ in range(num_tensors)]
    header.tensors = _place_tensors(walk, entries, header.values.get("general.alignment", 32))
    return header


def _walk_preamble(walk: _Walk) -> tuple[int, int]:
    if walk.data[:4] != b"GGUF":
        walk.fail(
            f"it begins with {walk.data[:4]!r} where a GGUF file has b'GGUF'", "name a GGUF file or a model folder"
        )
    walk.position = 4
    version = walk.number(_U32, "the format version")
    if version not in (2, 3):
        kind = "big-endian" if version in (2 << 24, 3 << 24) else "unsupported"
        walk.fail(f"{kind} format version {version:#x}", "deltaw reads little-endian GGUF versions 2 and 3")
    # The smallest tensor entry has 32 bytes (an empty name, one dimension), the smallest key and value 13.
    return walk.count("the number of tensors", 32, MAX_TENSORS), walk.count("the number of keys", 13, MAX_KEYS)


def _place_tensors(walk: _Walk, entries: list[_Tensor], alignment: Any) -> dict[str, _Tensor]:
    """The tensors by name with absolute positions, each inside the file, aligned, and apart from the others."""
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        walk.fail(f"general.alignment is {alignment!r}, not a power of two")
    data_start = -(-walk.position // alignment) * alignment
    placed: dict[str, _Tensor] = {}
    free_from, previous = data_start, "the header"
    for entry in sorted(entries, key=lambda entry: entry.start):
        start = data_start + entry.start
        tensor = _Tensor(entry.name, entry.shape, entry.quant, start, entry.num_bytes)
        if start + tensor.num_bytes > walk.end:
            walk.fail(
                f"tensor {tensor.name} with the shape {list(tensor.shape)} ({tensor.quant.name}) would lie at bytes "
                f"{start:,} to {start + tensor.num_bytes:,}, past the end of the file"
            )
        if entry.start % alignment or start < free_from:
            walk.fail(f"tensor {tensor.name} has the offset {entry.start:,}, unaligned or overlapping {previous}")
        if tensor.name in placed:
            walk.fail(f"the tensor {tensor.name} occurs twice")
        placed[tensor.name] = tensor
        free_from, previous = start + tensor.num_bytes, tensor.name
    return placed


def check_gguf(path: str | Path) -> None:
    """Nothing, if every count, length, type, shape and offset in the header fits into the file.

    Takes 0.03 s for 49k tokens and merges, and allocates nothing that an unchecked number asks for.
    Raises BaseError with what is wrong, where, the value, and the way out.
    """
    with _open_header(Path(path)):
        pass


# ── Metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────


_REQUIRED: Any = object()


def _get(header: _Header, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """The value at a key, of the given kind; `default` where the key is absent. Numbers must be finite and >= 0."""
    value = header.values.get(key, default)
    if value is _REQUIRED:
        raise BaseError(f"{header.path}: the metadata key {key} is missing; convert the model again with llama.cpp")
    if value is default:
        return value
    if kind is float and type(value) is int:
        value = float(value)
    is_impossible = isinstance(value, (int, float)) and not 0 <= value < math.inf
    if is_impossible or type(value) is not kind:
        raise BaseError(f"{header.path}: the metadata key {key} is {value!r}, where a usable {kind.__name__} is needed")
    return value


def _strings(header: _Header, key: str) -> list[str]:
    array = _get(header, key, _Array)
    if array.item_type != _STRING:
        raise BaseError(f"{header.path}: the metadata key {key} is not an array of strings; {_DAMAGED}")
    data, position, texts = header.data, array.start, []
    for _ in range(array.count):
        (size,) = _U64.unpack_from(data, position)
        texts.append(data[position + 8 : position + 8 + size].decode("utf-8", errors="replace"))
        position += 8 + size
    return texts


def _integers(header: _Header, key: str) -> list[int]:
    array = _get(header, key, _Array)
    if array.item_type not in (4, 5):  # uint32, int32
        raise BaseError(f"{header.path}: the metadata key {key} is not an array of 32-bit integers; {_DAMAGED}")
    return np.frombuffer(header.data, "<i4", array.count, array.start).tolist()


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
    source: _Tensor
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


def _architecture(header: _Header) -> tuple[str, _Architecture]:
    name = _get(header, "general.architecture", str)
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
    if _get(header, "split.count", int, 1) > 1:
        raise BaseError(f"{header.path} is one part of several; join them first: llama-gguf-split --merge FIRST OUTPUT")
    return name, _ARCHITECTURES[name]


def _sizes(header: _Header, arch: str) -> _Sizes:
    heads, hidden = (_get(header, f"{arch}.{key}", int) for key in ("attention.head_count", "embedding_length"))
    rotary_dim = _get(header, f"{arch}.rope.dimension_count", int, None)
    head_dim = _get(header, f"{arch}.attention.key_length", int, rotary_dim or hidden // max(heads, 1))
    if rotary_dim not in (None, head_dim) or head_dim % 2:
        raise BaseError(
            f"{header.path}: rotary size {rotary_dim} and head size {head_dim}: they must be equal and even"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise BaseError(f"{header.path}: the tensor token_embd.weight is missing; {_DAMAGED}")
    return _Sizes(
        num_layers=_get(header, f"{arch}.block_count", int),
        hidden=hidden,
        ffn=_get(header, f"{arch}.feed_forward_length", int),
        heads=heads,
        kv_heads=_get(header, f"{arch}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab=embedding.shape[0],
    )


def _weights(header: _Header, architecture: _Architecture, sizes: _Sizes) -> list[_Weight]:
    """What is to be written, in the file's order. Every missing, unknown or misshapen tensor is named at once."""
    if sizes.num_layers > len(header.tensors):  # the list of expected names must not grow with a lie
        raise BaseError(
            f"{header.path}: {len(header.tensors)} tensors are too few for {sizes.num_layers} layers; {_DAMAGED}"
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


def _undecodable(tensors: dict[str, _Tensor]) -> list[GGMLQuantizationType]:
    """The storage types that gguf knows by size but cannot dequantise; tried on one block of zeros each."""
    refused = []
    for quant in {tensor.quant for tensor in tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[quant][1]), np.uint8), quant)
        except NotImplementedError:
            refused.append(quant)
    return refused


_ROPE_FACTORS = "rope_freqs.weight"


def _rope_parameters(header: _Header, arch: str, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json: plain, linearly scaled, or Llama 3.1's. Others are refused."""
    theta = _get(header, f"{arch}.rope.freq_base", float, 10000.0)
    plain_factor = _get(header, f"{arch}.rope.scale_linear", float, 1.0)
    factor = _get(header, f"{arch}.rope.scaling.factor", float, plain_factor)
    kind = _get(header, f"{arch}.rope.scaling.type", str, "linear" if factor not in (0.0, 1.0) else "none")
    if kind not in ("none", "linear"):
        raise BaseError(f"{header.path}: rope scaling {kind!r} cannot be converted (can be: none, linear, llama3)")
    if _ROPE_FACTORS in header.tensors:
        return {"rope_theta": theta} | _llama3_scaling(header, theta, head_dim)
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_scaling(header: _Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, recognised by its divisors: GGUF stores one per frequency instead of the four settings.

    Llama 3.1 to 3.3 differ only in the factor, which is the divisor of the slowest frequency.
    """
    tensor = header.tensors[_ROPE_FACTORS]
    if tensor.quant != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise BaseError(f"{header.path}: {_ROPE_FACTORS} is {tensor.quant.name} {list(tensor.shape)}; {_DAMAGED}")
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


def _special_ids(header: _Header) -> dict[str, int | list[int]]:
    """bos, eos and pad ids as config.json names them; those that the file does not have are left out."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: _get(header, f"tokenizer.ggml.{key}", int, None) for name, key in keys.items()}
    found: dict[str, int | list[int]] = {name: value for name, value in ids.items() if value is not None}
    end_of_turn = _get(header, "tokenizer.ggml.eot_token_id", int, None)
    if end_of_turn is not None and "eos_token_id" in found and end_of_turn != found["eos_token_id"]:
        found["eos_token_id"] = [ids["eos_token_id"], end_of_turn]  # Llama 3: either ends an answer
    return found


def _config(header: _Header, arch: str, sizes: _Sizes) -> dict[str, Any]:
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
        "max_position_embeddings": _get(header, f"{arch}.context_length", int),
        "rms_norm_eps": _get(header, f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope_parameters(header, arch, sizes.head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": sizes.vocab,
        **_special_ids(header),
    }


# ── Tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────

# The expressions are those of the published tokenizers; none is ever taken from a file.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip


@dataclass(frozen=True)
class _Splitting:
    """How text is cut into words before the merges, and what else the named tokenizer family does."""

    regex: str | None = None  # None: GPT-2's, which is built into ByteLevel
    digits_apart: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False  # when the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits_apart:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.regex is not None:
            steps.append(pre_tokenizers.Split(Regex(self.regex), behavior="isolated", invert=False))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.regex is None))
        return pre_tokenizers.Sequence(steps)


_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "default": _Splitting(),
    "smollm": _Splitting(digits_apart=True),
    "llama-bpe": _Splitting(_WORDS % "{1,3}", ignore_merges=True, adds_bos=True),
    "qwen2": _Splitting(_WORDS % "", nfc=True),
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def _splitting(header: _Header) -> _Splitting:
    model, pre = _get(header, "tokenizer.ggml.model", str), _get(header, "tokenizer.ggml.pre", str, "(absent)")
    if model != "gpt2" or pre not in _SPLITTINGS:
        raise BaseError(
            f"{header.path}: tokenizer {model!r} with pre-tokenizer {pre!r} cannot be converted (can be: gpt2 with "
            f"{', '.join(_SPLITTINGS)}); convert the model to a folder with transformers first"
        )
    return _SPLITTINGS[pre]


def _vocabulary(header: _Header, num_rows: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, one of each per id; no more tokens than the embedding has rows, none twice."""
    tokens, types = _strings(header, "tokenizer.ggml.tokens"), _integers(header, "tokenizer.ggml.token_type")
    if len(tokens) != len(types) or len(tokens) > num_rows or len(set(tokens)) != len(tokens):
        raise BaseError(
            f"{header.path}: {len(tokens):,} tokens ({len(set(tokens)):,} different), {len(types):,} token types and "
            f"{num_rows:,} embedding rows do not fit together; {_DAMAGED}"
        )
    return tokens, types


def _merges(header: _Header, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for index, line in enumerate(_strings(header, "tokenizer.ggml.merges")):
        left, space, right = line.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise BaseError(f"{header.path}: merge {index:,} ({line!r}) is not made of two known tokens; {_DAMAGED}")
        pairs.append((left, right))
    return pairs


def _tokenizer(header: _Header, num_rows: int) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its named special tokens as tokenizer_config.json holds them."""
    splitting = _splitting(header)
    tokens, types = _vocabulary(header, num_rows)
    vocabulary = {token: id for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    merges = _merges(header, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges))
    tokenizer.normalizer = normalizers.NFC() if splitting.nfc else None
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in added])
    named = _named_tokens(header, tokens)
    _frame(header, tokenizer, named, splitting.adds_bos)
    return tokenizer, named


def _named_tokens(header: _Header, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _get(header, f"tokenizer.ggml.{key}_token_id", int, None) for name, key in keys.items()}
    for name, id in ids.items():
        if id is not None and id >= len(tokens):
            raise BaseError(
                f"{header.path}: {name} has the id {id:,}, but there are {len(tokens):,} tokens; {_DAMAGED}"
            )
    return {name: tokens[id] for name, id in ids.items() if id is not None}


def _frame(header: _Header, tokenizer: Tokenizer, named: dict[str, str], adds_bos: bool) -> None:
    """Makes the tokenizer put bos before, and eos after, each text, where the file says so."""
    wanted = {"bos_token": adds_bos, "eos_token": False}
    for name in wanted:
        wanted[name] = _get(header, f"tokenizer.ggml.add_{name}", bool, wanted[name]) and name in named
    if not any(wanted.values()):
        return
    bos, eos = ([named[name]] if wanted[name] else [] for name in ("bos_token", "eos_token"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A:0", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(bos + eos)],
    )


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
        writer.flush()
        os.fsync(writer.fileno())


def _text_files(header: _Header, arch: str, sizes: _Sizes) -> dict[str, str]:
    """Every file of the folder except the weights, by name."""
    config = _config(header, arch, sizes)
    tokenizer, named = _tokenizer(header, sizes.vocab)
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
    template = _get(header, "tokenizer.chat_template", str, None)
    return files if template is None else files | {"chat_template.jinja": template}


def write_synced(path: Path, text: str) -> None:
    """Writes a text file as it is and waits until the disk has it. Raises OSError."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the disk has a folder's list of names, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(folder: Path, fill: Callable[[Path], None], needed_bytes: int) -> None:
    """Fills a hidden sibling and renames it to `folder`, so that a folder of that name is always complete."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        free_bytes = shutil.disk_usage(partial).free
        if free_bytes < needed_bytes:
            raise DiskError(
                f"{folder} needs {needed_bytes / 1e6:,.0f} MB, but {free_bytes / 1e6:,.0f} MB are free there"
            )
        fill(partial)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise DiskError(
            f"{folder} could not be written: {error.strerror or error}; free space or name another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert_gguf(path: str | Path, folder: str | Path) -> None:
    """Nothing; afterwards `folder` is a model folder that transformers opens, with the file's weights in bf16.

    For a 98 MB file with 135 M parameters this takes 4 seconds and 100 MB of memory; the memory does not grow
    with the number of layers. Raises BaseError, before anything is written, if the file is damaged or holds something
    that the folder could not express (each fault by name), or if `folder` exists; DiskError if writing fails.
    """
    path, folder = Path(path), Path(folder).absolute()
    if folder.exists():
        raise BaseError(f"{folder} exists already; name a new folder, or delete that one first")
    with _open_header(path) as header:
        arch, architecture = _architecture(header)
        sizes = _sizes(header, arch)
        weights = _weights(header, architecture, sizes)
        texts = _text_files(header, arch, sizes)

    def fill(partial: Path) -> None:
        for name, text in texts.items():
            write_synced(partial / name, text)
        _write_weights(path, partial / "model.safetensors", weights)

    num_weights = sum(math.prod(weight.source.shape) for weight in weights)
    _publish(folder, fill, 2 * num_weights + sum(4 * len(text) for text in texts.values()))
