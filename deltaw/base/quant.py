"""Frozen linear layers of the blocks in 4 or 8 bits: NF4 (QLoRA, arXiv 2305.14314) or block-wise 8 bit.

bitsandbytes stores them; what forms their weights when they are read is in deltaw/base/formed.py. bitsandbytes' own
layers are not used: they repack weights when a model evaluates, and a later backward is then wrong.

Quantised once, blocks lie in the cache and are mapped from there, so that a second run starts at once and the whole
base is never in memory.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deltaw.adapter.files import save_tensors
from deltaw.base.builtin import cache_folder
from deltaw.base.formed import BUFFERS, cast_rest, exchange, linear_layers
from deltaw.base.stream import blocks_of, release
from deltaw.disk import make_once, new_folder
from deltaw.errors import UsageError, signals_kept

# Bytes for each weight: NF4 in blocks of 64 with 8-bit scales, and 8 bit in blocks of 64 with fp32 scales.
BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1 + 4 / 64}
_BLOCK, _VERSION = 64, 1
# Scales of NF4 are themselves quantised, in blocks of 256; a piece that is decoded at once is a multiple of both.
_NESTED = 256 * _BLOCK
_PIECE, _ROW = 64 * _NESTED, 1024


def quantise(
    model: Any, kind: str, digest: str, device: torch.device, dtype: torch.dtype, tell: Callable[[str], None]
) -> None:
    """Stores the linear layers of the model's blocks as `kind`; everything else is cast to `dtype`. All on `device`.

    `digest` names the base in the cache. Raises UsageError when bitsandbytes is missing.
    """
    codec = _codec(kind)
    folder = cache_folder() / "quantised" / f"{hashlib.sha256(digest.encode()).hexdigest()[:16]}-{kind}-v{_VERSION}"
    files = [folder / f"block-{number:04}.safetensors" for number in range(len(blocks_of(model)))]
    make_once(folder, lambda: all(file.is_file() for file in files), lambda: _write(model, codec, folder, tell))
    for path, block in zip(files, blocks_of(model), strict=True):
        with signals_kept(), safe_open(path, "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
        for name, layer in linear_layers(block):
            parts = {key.removeprefix(f"{name}:"): value for key, value in stored.items() if key.startswith(f"{name}:")}
            parts = {key: value.to(device) for key, value in parts.items()}
            exchange(layer, _Decoded(codec, parts, layer.weight.shape, dtype))
    cast_rest(model, device, dtype)


def _write(model: Any, codec: _Codec, folder: Path, tell: Callable[[str], None]) -> None:
    blocks = blocks_of(model)
    with new_folder(folder) as new:
        for number, block in enumerate(blocks):
            tell(f"Quantising the base, once: block {number + 1} of {len(blocks)}")
            parts = {}
            for name, layer in linear_layers(block):
                parts.update({f"{name}:{key}": value for key, value in codec.encode(layer.weight.detach()).items()})
            save_tensors(parts, new / f"block-{number:04}.safetensors")
            release(block.parameters())


def quantised_reader(layer: nn.Linear, kind: str) -> Callable[[], Tensor]:
    """What forms the weight of this layer anew, as it does where the base is stored as `kind`."""
    codec, weight = _codec(kind), layer.weight.detach()
    return _Decoded(codec, codec.encode(weight), weight.shape, weight.dtype)


class _Decoded:
    """W of one layer, decoded anew at each call."""

    def __init__(self, codec: _Codec, parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self.tensors: Sequence[Tensor] = list(parts.values())
        self.dtype = dtype
        self._decode = codec.decoder(parts, shape, dtype)

    def __call__(self) -> Tensor:
        return self._decode()


class _Codec:
    """How bitsandbytes writes and reads one kind."""

    def __init__(self, functional: Any, kind: str) -> None:
        self.functional, self.kind = functional, kind

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        if self.kind == "nf4":
            codes, state = self.functional.quantize_4bit(
                weight.contiguous(), blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
            )
            return {"codes": codes, **state.as_dict(packed=True)}
        codes, state = self.functional.quantize_blockwise(weight.contiguous(), blocksize=_BLOCK)
        return {"codes": codes, "absmax": state.absmax, "map": state.code}

    def decoder(self, parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Callable[[], Tensor]:
        codes = parts["codes"]
        state, read = self._state(parts, dtype), self.functional.dequantize_blockwise
        if self.kind == "nf4":
            read = self.functional.dequantize_4bit
        if codes.is_cuda:
            return lambda: read(codes, state).view(shape)
        pieces = list(self._pieces(codes.flatten(), state, shape.numel()))

        def form() -> Tensor:
            dense = BUFFERS.lend(shape, dtype, codes.device)
            for place, piece_codes, piece_state in pieces:
                dense.view(-1)[place] = read(piece_codes, piece_state).view(-1)
            return dense

        return form

    def _state(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Any:
        if self.kind != "nf4":
            return self.functional.QuantState(parts["absmax"], code=parts["map"], blocksize=_BLOCK, dtype=dtype)
        rest = {key: value for key, value in parts.items() if key != "codes"}
        state = self.functional.QuantState.from_dict(rest, parts["codes"].device)
        state.dtype = dtype
        return state

    def _pieces(self, codes: Tensor, state: Any, count: int) -> Iterator[tuple[slice, Tensor, Any]]:
        """(where, codes, state) of a part of the weight at a time, since bitsandbytes writes to new memory only."""
        for start in range(0, count, _PIECE):
            stop = min(count, start + _PIECE)
            part = copy.copy(state)
            part.absmax = state.absmax[start // _BLOCK : -(-stop // _BLOCK)]
            width = _ROW if (stop - start) % _ROW == 0 else stop - start  # threads share rows
            part.shape = torch.Size([(stop - start) // width, width])
            if state.nested:
                part.state2 = copy.copy(state.state2)
                part.state2.absmax = state.state2.absmax[start // _NESTED : -(-stop // _NESTED)]
            per_byte = 2 if self.kind == "nf4" else 1
            yield slice(start, stop), codes[start // per_byte : -(-stop // per_byte)], part


def _codec(kind: str) -> _Codec:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that is not used here
    try:
        return _Codec(importlib.import_module("bitsandbytes.functional"), kind)
    except ImportError as error:
        raise UsageError(f"--quant {kind} needs bitsandbytes: pip install bitsandbytes. ({error})") from error
