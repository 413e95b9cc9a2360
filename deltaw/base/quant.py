"""Frozen linear layers of the blocks in 4 or 8 bits: NF4 (QLoRA, arXiv 2305.14314) or block-wise 8 bit.

bitsandbytes stores them, and only the storage differs. A layer stays a Linear of its shape; its dense weight is formed
when the seam to weights is asked for it, in forward and again in backward, and let go. bitsandbytes' own layers are not
used: they repack weights when a model evaluates, and a later backward is then wrong.

Quantised once, blocks lie in the cache and are mapped from there, so that a second run starts at once and the whole
base is never in memory.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaw.adapter.weight import READER, dense_weight
from deltaw.base.builtin import cache_folder
from deltaw.base.stream import blocks_of, release
from deltaw.disk import new_folder
from deltaw.errors import UsageError

# Bytes for each weight: NF4 in blocks of 64 with 8-bit scales, and 8 bit in blocks of 64 with fp32 scales.
BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1 + 4 / 64}
_BLOCK, _VERSION = 64, 1


class QuantisedLinear(nn.Linear):
    """A Linear whose `weight` has the shape alone; keeps nothing of W between forward and backward."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _Product.apply(input, self)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dense_weight(layer), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None]:
        return upstream[0] @ dense_weight(ctx.layer), None


def quantise(
    model: Any, kind: str, digest: str, device: torch.device, dtype: torch.dtype, tell: Callable[[str], None]
) -> None:
    """Stores the linear layers of the model's blocks as `kind`; everything else is cast to `dtype`. All on `device`.

    `digest` names the base in the cache. Raises UsageError when bitsandbytes is missing.
    """
    codec = _codec(kind)
    folder = cache_folder() / "quantised" / f"{hashlib.sha256(digest.encode()).hexdigest()[:16]}-{kind}-v{_VERSION}"
    if not folder.is_dir():
        _write(model, codec, folder, tell)
    for number, block in enumerate(blocks_of(model)):
        with safe_open(folder / f"block-{number:04}.safetensors", "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
        for name, layer in _linear_layers(block):
            parts = {key.removeprefix(f"{name}:"): value for key, value in stored.items() if key.startswith(f"{name}:")}
            _exchange(layer, {key: value.to(device) for key, value in parts.items()}, codec, dtype)
    for module in model.modules():
        if READER not in module.__dict__:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device, dtype)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _linear_layers(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear)]


def _write(model: Any, codec: _Codec, folder: Path, tell: Callable[[str], None]) -> None:
    blocks = blocks_of(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as new:
        for number, block in enumerate(blocks):
            tell(f"Quantising the base, once: block {number + 1} of {len(blocks)}")
            parts = {}
            for name, layer in _linear_layers(block):
                parts.update({f"{name}:{key}": value for key, value in codec.encode(layer.weight.detach()).items()})
            save_file(parts, new / f"block-{number:04}.safetensors")
            release(block.parameters())


def _exchange(layer: nn.Linear, parts: dict[str, Tensor], codec: _Codec, dtype: torch.dtype) -> None:
    shape, device = layer.weight.shape, parts["codes"].device
    layer.__class__ = QuantisedLinear
    layer.__dict__[READER] = _Reader(codec, parts, shape, dtype)
    # The shape for whoever asks, one number of memory.
    layer.weight = nn.Parameter(torch.zeros(1, dtype=dtype, device=device).expand(shape), requires_grad=False)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(device, dtype)


def quantised_reader(layer: nn.Linear, kind: str) -> Callable[[], Tensor]:
    """What forms the weight of this layer anew, as it does where the base is stored as `kind`."""
    codec, weight = _codec(kind), layer.weight.detach()
    return _Reader(codec, codec.encode(weight), weight.shape, weight.dtype)


class _Reader:
    """W of one layer, formed anew at each call."""

    def __init__(self, codec: _Codec, parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self.tensors = list(parts.values())
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
        if self.kind == "nf4":
            rest = {key: value for key, value in parts.items() if key != "codes"}
            state = self.functional.QuantState.from_dict(rest, codes.device)
            state.dtype = dtype
            return lambda: self.functional.dequantize_4bit(codes, state)
        state = self.functional.QuantState(parts["absmax"], code=parts["map"], blocksize=_BLOCK, dtype=dtype)
        return lambda: self.functional.dequantize_blockwise(codes, state).view(shape)


def _codec(kind: str) -> _Codec:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that is not used here
    try:
        return _Codec(importlib.import_module("bitsandbytes.functional"), kind)
    except ImportError as error:
        raise UsageError(f"--quant {kind} needs bitsandbytes: pip install 'deltaw[quant]'. ({error})") from error
