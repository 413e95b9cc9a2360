"""Frozen layers whose weight is formed each time it is read: stored in another dtype than is computed in, or quantised.

A layer stays a Linear of its shape for whoever looks at it. Its dense weight exists while the seam to weights is asked
for it, in forward and again in backward, in memory that is lent to the next one.

Nearly all published bases are stored in bf16, and many processors cannot compute in it. Cast at once, a base would take
twice its files there and could no longer be read from them. bf16 → fp32 loses nothing, so forming gives the same bits
as a base that was cast when it was opened. benchmarks/stored_layers.py measures what that costs and saves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaw.adapter.files import DTYPES
from deltaw.adapter.weight import READER, dense_weight, stored_tensors
from deltaw.base.stream import blocks_of, release
from deltaw.errors import BaseError

_NUMBER = re.compile(r"\.([0-9]{1,4})\.")  # of a block, in the name of a weight
ROUNDED = (torch.bfloat16, torch.float16)
RENEWED = ("embed_scale",)  # numbers that modules work out, and that `_renew_buffers` makes anew: of Gemma's embedding
_UNUSED = (".rotary_emb.inv_freq", ".masked_bias")  # what older checkpoints hold, and no model reads
_NOT_FORMED = (
    "This base cannot be streamed in a dtype that its files do not have, nor quantised: "
    + "it reads weights past its layers"
)


class Reader(Protocol):
    """Gives W of one layer in `dtype`, formed anew at each call from the `tensors` that are stored."""

    tensors: Sequence[Tensor]
    dtype: torch.dtype

    def __call__(self) -> Tensor: ...


class FormedLinear(nn.Linear):
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


class FormedEmbedding(nn.Embedding):
    """An Embedding that casts the rows it is asked for, and no others."""

    def forward(self, input: Tensor) -> Tensor:
        reader: Cast = self.__dict__[READER]
        return F.embedding(input, reader.tensors[0]).to(reader.dtype)


class Cast:
    """W of one layer, cast anew at each call from how it is stored."""

    def __init__(self, stored: Tensor, dtype: torch.dtype) -> None:
        self.tensors: Sequence[Tensor] = [stored]
        self.dtype = dtype

    def __call__(self) -> Tensor:
        stored = self.tensors[0]
        return BUFFERS.lend(stored.shape, self.dtype, stored.device).copy_(stored)


class _Widened:
    """W of one layer in fp32, at each call from what gives it otherwise."""

    def __init__(self, layer: nn.Linear, buffers: Buffers) -> None:
        self.tensors: Sequence[Tensor] = list(stored_tensors(layer))
        self.dtype = torch.float32
        self._read = layer.__dict__.get(READER) or partial(getattr, layer, "weight")
        self._buffers = buffers

    def __call__(self) -> Tensor:
        weight = self._read()
        return self._buffers.lend(weight.shape, self.dtype, weight.device).copy_(weight)


@contextlib.contextmanager
def widened(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """While inside, these layers have the weights that they have in fp32, and compute in it."""
    before, buffers = [(layer, layer.__class__, layer.__dict__.get(READER), layer.bias) for layer in layers], Buffers()
    for layer, _, _, bias in before:
        layer.__dict__[READER] = _Widened(layer, buffers)
        layer.__class__ = FormedLinear
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(torch.float32), requires_grad=False)
    try:
        yield
    finally:
        for layer, kind, reader, bias in before:
            layer.__class__, layer.bias = kind, bias
            layer.__dict__.pop(READER)
            if reader is not None:
                layer.__dict__[READER] = reader


class Buffers:
    """Memory for dense weights, lent again as soon as nobody holds what was formed in it.

    On the heap, something small that lives longer would settle in each hole that a weight leaves, and the next weight
    would need new memory: steps of 1.7B parameters in NF4 came to hold 6 GB.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        self._lock = threading.Lock()

    def lend(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor of this shape, in memory that is nobody else's."""
        with self._lock:
            known = self._known.setdefault((shape.numel(), dtype, device), [])
            for buffer in known:
                if _holders(buffer) <= _IDLE_HOLDERS:
                    return buffer.view(shape)
            known.append(torch.empty(shape.numel(), dtype=dtype, device=device))
            return known[-1].view(shape)


def _holders(buffer: Tensor) -> int:
    """How many tensors and storages refer to this memory, this call's own among them."""
    count: int = torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)
    return count


BUFFERS = Buffers()
_IDLE_HOLDERS = _holders(torch.empty(1))


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from: those of the index, or the single one, or, without either, all.

    Some folders hold the same weights once more under other names.
    """
    found = sorted(folder.glob("*.safetensors"))
    # Of a damaged index opening the base will tell.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if (folder / SINGLE).is_file():
            named = {SINGLE}
        else:
            named = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
        return [path for path in found if path.name in named] or found
    return found


def stored_bytes(folder: Path) -> int:
    """Size of the weight files in a folder."""
    return sum(path.stat().st_size for path in weight_files(folder))


def stored_dtype(folder: Path) -> torch.dtype:
    """In what most of the weights in a folder are stored, by the header of its largest file. Raises BaseError."""
    file = max(weight_files(folder), key=lambda path: path.stat().st_size)
    with _opened(file) as opened:
        return DTYPES[opened.get_slice(next(iter(opened.keys()))).get_dtype()]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A file of weights. BaseError where it is damaged, which makes every part of its reader fail in its own way."""
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except Exception as error:
        raise BaseError(f"The base in {file.parent} cannot be opened: {file.name}: {error}") from error


class Stored(NamedTuple):
    """Where a weight lies, its shape and its dtype."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_weights(folder: Path) -> dict[str, Stored]:
    """Every weight that transformers would read, by the name that it has in its file; of headers alone. BaseError."""
    found = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                found[name] = Stored(path.name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
    return found


class Mapped(NamedTuple):
    """Numbers of a model's blocks: those that stand in files as they are used, of linear layers and others; and all."""

    linear: int
    others: int
    all_linear: int
    all_others: int


def mapped_numbers(model: Any, folder: Path) -> Mapped:
    """What of a model's blocks stands in its files as it is used; nothing where the files lie in memory.

    What does not has been put together from several weights, as experts are that lie apart. `model` may be without
    weights.
    """
    weights = {} if folder.resolve().is_relative_to("/dev") else stored_weights(folder)
    stored = {(*place[1:], weight.shape) for name, weight in weights.items() if (place := within_block(name))}
    found: Counter[tuple[bool, bool]] = Counter()
    for number, block in enumerate(blocks_of(model)):
        linear = {f"{name}.weight" for name, _ in linear_layers(block)}
        for name, parameter in block.named_parameters():
            found[name in linear, (number, name, tuple(parameter.shape)) in stored] += parameter.numel()
    mapped = found[True, True], found[False, True]
    return Mapped(*mapped, mapped[0] + found[True, False], mapped[1] + found[False, False])


def within_block(name: str) -> tuple[str, int, str] | None:
    """("model.layers", 3, "mlp.up_proj.weight") of "model.layers.3.mlp.up_proj.weight"; None without a block."""
    before, *numbered = _NUMBER.split(name, maxsplit=1)
    return (before, int(numbered[0]), numbered[1]) if numbered else None


def has_one_dtype(folder: Path) -> bool:
    """Whether all weights in a folder are stored in one dtype, so that opening them in it rounds none."""
    used = (weight for name, weight in stored_weights(folder).items() if not name.endswith(_UNUSED))
    return len({weight.dtype for weight in used if weight.dtype.is_floating_point}) == 1


def is_widened(folder: Path, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a base that is stored in bf16 or fp16 is computed in fp32 there, which rounds none of its weights."""
    computed = device.type == "cpu" and dtype == torch.float32
    return computed and stored_dtype(folder) in ROUNDED and has_one_dtype(folder)


def makes_unknown_numbers(model: Any) -> bool:
    """Whether modules worked out numbers in the dtype in which the model was opened that casting cannot make anew."""
    return any(
        buffer.dtype in ROUNDED and name not in RENEWED
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    )


def keep_stored(model: Any, dtype: torch.dtype) -> None:
    """Has the linear layers of the model's blocks cast their weights to `dtype` when they are read; the rest is cast.

    A head is read for each chunk of labels, so that forming it would take as long as its product: it is cast too. What
    is cast is let go part by part: no two copies are held.
    """
    device = next(model.parameters()).device
    for block in blocks_of(model):
        for _, layer in linear_layers(block):
            exchange(layer, Cast(layer.weight.detach(), dtype))
    _keep_embedding(model, device, dtype)
    rest = (part for part in model.modules() if any(p.dtype != dtype for p in part.parameters(recurse=False)))
    for part in itertools.chain(blocks_of(model), rest, [model]):
        stored = [parameter.data for parameter in part.parameters() if parameter.dtype != dtype]
        _cast(model, part.modules(), device, dtype)
        release(stored)


def asks_its_layers(model: Any) -> bool:
    """Whether weights of linear layers are read by those alone, as far as can be seen. `model` may be without weights.

    Mixers that have numbers of their own beside their layers, as those of state-space models, read some themselves.
    """
    parts = (part for block in blocks_of(model) for part in block.modules())
    return not any(
        next(part.parameters(recurse=False), None) is not None
        and any(isinstance(child, nn.Linear) for child in part.children())
        for part in parts
    )


def cast_rest(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Casts what no reader forms to `dtype` and `device`; on CPU but for an embedding, of which few rows are read."""
    _keep_embedding(model, device, dtype)
    _cast(model, model.modules(), device, dtype)


def _keep_embedding(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and may_form_embedding(model):
        embedding = model.get_input_embeddings()
        exchange(embedding, Cast(embedding.weight.detach(), dtype))


def _cast(model: Any, modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    for module in modules:
        if READER not in module.__dict__:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device, dtype)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
        _renew_buffers(model, module, dtype)


@torch.no_grad()
def _renew_buffers(model: Any, module: nn.Module, dtype: torch.dtype) -> None:
    """Widens a module's buffers to fp32, and makes anew those that it worked out itself in the dtype of the files.

    transformers makes them when a model is opened, as it does first weights; weights are marked, so that they stay.
    """
    rounded = [name for name, buffer in module.named_buffers(recurse=False) if buffer.dtype in ROUNDED]
    if not rounded or dtype != torch.float32:
        return
    for name in rounded:
        setattr(module, name, getattr(module, name).to(dtype))
    if any(name in RENEWED for name in rounded):
        for tensor in module.parameters(recurse=False):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(module)


def may_form_embedding(model: Any) -> bool:
    """Whether rows of the embedding may be cast as they are looked up: it is none of the head and does nothing else."""
    embedding = model.get_input_embeddings()
    alone = embedding.weight is not model.get_output_embeddings().weight
    return alone and type(embedding) is nn.Embedding and embedding.max_norm is None


def linear_layers(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers of a block whose weights may be formed, by name: those that compute as a Linear does."""
    return [
        (name, part)
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) and type(part).forward in (nn.Linear.forward, FormedLinear.forward)
    ]


def require_formed(model: Any) -> None:
    """Raises BaseError where a model reads weights elsewhere than in their layers, so that it computes with none."""
    tokens_T = torch.arange(4, device=model.device)
    try:
        with torch.no_grad():
            finite = bool(model(input_ids=tokens_T[None], use_cache=False).logits.isfinite().all())
    except Exception as error:  # a model may object in any way it likes
        raise BaseError(f"{_NOT_FORMED} ({type(error).__name__}: {error})") from error
    if not finite:
        raise BaseError(_NOT_FORMED)


def exchange(layer: nn.Linear | nn.Embedding, reader: Reader) -> None:
    """Has a Linear or an Embedding ask `reader` for its weight; where that is stored, the layer is."""
    device, dtype = reader.tensors[0].device, reader.dtype
    layer.__class__ = FormedLinear if isinstance(layer, nn.Linear) else FormedEmbedding
    layer.__dict__[READER] = reader
    # The shape for whoever asks, one number of memory; whoever computes with it shall be found out (`require_formed`).
    shape = torch.full((1,), math.nan, dtype=dtype, device=device).expand(layer.weight.shape)
    layer.weight = nn.Parameter(shape, requires_grad=False)
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        layer.bias.data = layer.bias.data.to(device, dtype)
