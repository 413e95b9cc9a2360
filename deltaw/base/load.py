"""Name or path → Base: a frozen causal language model, its tokenizer, and where they come from.

A name is one of ours ("smollm2-135m"), a local transformers folder, a GGUF file or a hub id; all end as a local folder
of safetensors, so there is one way in. No code from a model folder is run and no pickle is read. A local folder is
opened without touching a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from deltaw.adapter.weight import stored_tensors
from deltaw.base import forward
from deltaw.base.builtin import cache_folder
from deltaw.base.decoder import Decoder
from deltaw.base.formed import (
    FormedLinear,
    asks_its_layers,
    has_one_dtype,
    is_widened,
    keep_stored,
    makes_unknown_numbers,
    require_formed,
    stored_bytes,
    stored_dtype,
    stored_weights,
    weight_files,
    within_block,
)
from deltaw.base.locate import locate, open_tokenizer, public_name
from deltaw.base.proof import prove
from deltaw.base.quant import quantise
from deltaw.base.stream import Pager, blocks_of, follow_modules, may_stream, release
from deltaw.base.stream import stream as streaming
from deltaw.config import AUTO
from deltaw.disk import disk_errors, remembered_digest
from deltaw.errors import BaseError, DiskError, UsageError, bullet_list, signals_kept
from deltaw.hardware import (
    choose_device,
    compute_dtype,
    look,
    remembered_products,
    set_threads,
    tune_gpu,
    tune_memory,
)
from deltaw.kernels import compiled, continued_spans

# Products that the layers of a block take for a pass of one length; and passes that may share a reading.
LAYER_PRODUCTS, MOST_TOGETHER = 32, 4
MAX_JSON_BYTES = 128 << 20  # a tokenizer.json of 256,000 tokens has 33 MB
# Layers: the deepest published models have about 130.
_COUNTS, MAX_COUNT = ("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4096
MAX_CONTEXT = 1 << 20
FREE_SHARE = 0.9  # of the free memory, which the weights of a base may take
WAYS = ("kernels", "modules", "plain")  # how a batch is computed, the fastest first
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass
class Base:
    """A frozen model with its tokenizer. `name` is what the user asked for, `folder` where the files lie.

    `plain_reason` says why documents go one at a time through the model's own forward; None means flat batches. These
    run through `decoder`, or, for `module_reason`, through the model's modules.
    """

    name: str
    folder: Path
    model: Any
    tokenizer: Any
    plain_reason: str | None = None
    decoder: Decoder | None = None
    module_reason: str | None = None
    revision: str | None = None
    pager: Pager | None = None
    quant: str = "none"
    _digests: dict[str, str] = field(default_factory=dict, repr=False)
    _followed: list[RemovableHandle] = field(default_factory=list, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In what the model computes."""
        return next(self.model.parameters()).dtype

    @property
    def vocabulary(self) -> int:
        """Number of rows of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def parameters(self) -> int:
        """Number of frozen parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def weight_bytes(self) -> int:
        """Size of the weight files on disk."""
        return stored_bytes(self.folder)

    @cached_property
    def context_tokens(self) -> int:
        """How many tokens the model was made for."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or MAX_CONTEXT)

    @cached_property
    def digest(self) -> str:
        """sha256 over the weight files, remembered by size and time of change."""
        return weight_digest(self.folder)

    @cached_property
    def template_digest(self) -> str:
        """sha256 over the chat template and the tokenizer: two bases that render alike have the same."""
        tokenizer = getattr(self.tokenizer, "backend_tokenizer", None)
        text = json.dumps([self.tokenizer.chat_template, tokenizer.to_str() if tokenizer is not None else None])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def origin(self) -> dict[str, str]:
        """What an adapter remembers of this base; never a path of the user's machine when a name exists."""
        origin = {"base": self.name, "base_digest": self.digest, "template_digest": self.template_digest}
        return origin if self.revision is None else {**origin, "revision": self.revision}

    def hidden_states(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        bounds: Sequence[int],
        rows_N: Tensor | None = None,
        before: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Final hidden states [T, H] of a flat row of documents, or [N, H] of some rows of it.

        `before` names for each document the rows that it continues; only where `shares_prefixes`.
        """
        by_kernels = self.decoder is not None and self.slow_reason is None and forward.may_be_flat(self.model, bounds)
        self._follow_modules(not by_kernels)
        if self.decoder is not None and by_kernels:
            return self.decoder.hidden_states(tokens_T, positions_T, continued_spans(bounds, before), rows_N)
        assert not before, "only the kernels know documents that continue others"
        h_TH = forward.flat_hidden_states(self.model, tokens_T, positions_T, bounds)
        return h_TH if rows_N is None else h_TH[rows_N]

    def _follow_modules(self, wanted: bool) -> None:
        """Tells the pager of modules while they run in place of the kernels, as under DoRA or dropout."""
        if self.pager is None or self.decoder is None or wanted == bool(self._followed):
            return
        for handle in self._followed:
            handle.remove()
        self._followed = follow_modules(self.model) if wanted else []
        self.decoder.following = {handle.id for handle in self._followed}

    @property
    def shares_prefixes(self) -> bool:
        """Whether documents may continue rows that they have in common, as the model stands now."""
        return self.way == "kernels" and forward.independent_tokens(self.model.config.get_text_config()) == math.inf

    @property
    def way(self) -> str:
        """How a batch is computed as the model stands now: by "kernels", by its "modules", or "plain", one by one."""
        if self.plain_reason is not None:
            return "plain"
        return "kernels" if self.slow_reason is None else "modules"

    @property
    def computing(self) -> str:
        """`way`, and which compiled passes take part: bits of a step depend on both."""
        passes = compiled.in_use() if self.device.type == "cpu" else None
        return self.way if passes is None else f"{self.way}, compiled passes {passes}"

    @property
    def slow_reason(self) -> str | None:
        """Why the model as it stands now runs by its modules and not by the kernels; None where it does not."""
        if self.decoder is None:
            return self.module_reason or "it was not tried"
        return self.decoder.refusal()

    def recompute(self, count: int) -> None:
        """The first `count` blocks keep only their input for backward and compute the rest again, to the same bits."""
        if self.decoder is not None:
            self.decoder.recompute = count
        forward.recompute_modules(blocks_of(self.model), count)

    @property
    def tokens_a_reading(self) -> int:
        """How many tokens one reading of a streamed base serves: as many as blocks' inputs take a block's bytes.

        0 where passes run one by one.
        """
        layers = len(blocks_of(self.model))
        if self.pager is None or not self.shares_prefixes or self.decoder is None or self.decoder.recompute < layers:
            return 0
        block_bytes = sum(tensor.nbytes for tensor in stored_tensors(blocks_of(self.model)[0]))
        return block_bytes // ((layers + 1) * self.model.config.get_text_config().hidden_size * self.dtype.itemsize)

    def logits(self, h_NH: Tensor) -> Tensor:
        """Logits [N, V] from hidden states."""
        return forward.flat_logits(self.model, h_NH)

    def document_logits(self, tokens_T: Tensor) -> Tensor:
        """Logits [T, V] of one document, in whichever way this base computes."""
        if self.plain_reason is not None:
            with forward.plain_attention(self.model):
                logits_TV: Tensor = self.model(input_ids=tokens_T[None], use_cache=False).logits[0]
                return logits_TV
        positions_T = torch.arange(len(tokens_T), device=tokens_T.device)
        return self.logits(self.hidden_states(tokens_T, positions_T, (0, len(tokens_T))))


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    threads: int | None = None,
    tokenizer: Any = None,
    quant: str = "none",
    stream: bool | str = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Base:
    """Opens a base by built-in name, local folder, GGUF file or hub id; its tokenizer too, unless the caller has it.

    `quant` "nf4" or "int8" stores the linear layers of its blocks in so many bits; `stream` reads blocks from their
    files when they are needed and lets them go afterwards; "auto" does so where the whole base takes more memory than
    is free.
    `dtype` "auto" is bf16 where the processor or GPU is faster in it, else fp32. Raises BaseError, saying what to do,
    when there is nothing to open or opening it would need code or pickles from the folder.
    """
    set_threads(threads)
    tune_memory()
    where, chosen = place(device, dtype)
    streamed = stream is True
    if streamed and not may_stream(where):
        raise UsageError(f"--stream needs Linux and a CPU; this would run on {where} and {sys.platform}.")
    folder = locate(name, revision)
    check_folder(folder)
    if stream == AUTO and quant == "none" and may_stream(where) and (excess := _more_than_is_free(folder, chosen)):
        with contextlib.suppress(BaseError):  # what cannot be streamed is opened as it is
            base = load(name, device=device, dtype=dtype, revision=revision, tokenizer=tokenizer, stream=True)
            tell(f"{excess}: its blocks are read from its files when they are needed.")
            return base
    quiet_transformers()
    model = open_model(folder, _opened_dtype(folder, where, chosen, quant, streamed))
    if quant != "none":
        quantise(model, quant, weight_digest(folder), where, chosen, tell)
    elif streamed and model.dtype != chosen:
        if not has_one_dtype(folder) or makes_unknown_numbers(model):
            raise BaseError(
                f"The base in {folder} cannot be streamed in {chosen}: opened in the dtype of its files, some of its "
                "numbers would be rounded. Leave out --stream."
            )
        keep_stored(model, chosen)
    elif where.type != "cpu" or model.dtype == chosen:
        model = model.to(where)
    elif not _keeps_stored(model, chosen):
        del model
        model = open_model(folder, chosen)
    model.requires_grad_(False).eval()
    if (streamed or quant != "none") and any(type(module) is FormedLinear for module in model.modules()):
        require_formed(model)
    pager = streaming(model) if streamed else None
    followed = follow_modules(model) if streamed else []  # the proofs run modules too
    reason, decoder, module_reason = prove(model)
    if reason is not None and forward.sees_later_tokens(model):
        raise BaseError(
            f"The base in {folder} reads in both directions, so it cannot learn to write. Use a causal one."
        )
    tokenizer = tokenizer or open_tokenizer(folder)
    if decoder is not None:  # which reads weights through the seam
        for handle in followed:
            handle.remove()
    return Base(public_name(name), folder, model, tokenizer, reason, decoder, module_reason, revision, pager, quant)


def _keeps_stored(model: Any, dtype: torch.dtype) -> bool:
    """Has a model compute in `dtype`, with its layers' weights as they are stored; False, and it is spoilt, if not."""
    if makes_unknown_numbers(model) or not asks_its_layers(model):
        return False
    keep_stored(model, dtype)
    try:
        require_formed(model.eval())
    except BaseError:
        release(stored_tensors(model))
        return False
    return True


def _more_than_is_free(folder: Path, dtype: torch.dtype) -> str | None:
    """By how much the weights in a folder exceed what memory is free, as a clause; None where they do not."""
    kept, size = is_widened(folder, torch.device("cpu"), dtype), 0
    for name, weight in stored_weights(folder).items():
        held = weight.dtype if kept and within_block(name) else dtype
        size += math.prod(weight.shape) * held.itemsize
    free = look().available_bytes
    return None if size < FREE_SHARE * free else f"The base takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _opened_dtype(
    folder: Path, device: torch.device, computed: torch.dtype, quant: str, stream: bool
) -> torch.dtype | str:
    """In what the weights are to be opened: as they are stored, where deltaw itself forms, quantises or widens them."""
    if quant != "none":
        return "auto"
    return stored_dtype(folder) if stream or is_widened(folder, device, computed) else computed


def most_together() -> int:
    """How many passes may share a reading of a streamed base.

    More have more shapes of products than oneDNN remembers, and preparing them anew takes longer than they do.
    """
    return min(MOST_TOGETHER, max(1, remembered_products() // LAYER_PRODUCTS))


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where a base computes, and in what. Raises UsageError."""
    where = choose_device(device)
    if where.type == "cuda":
        tune_gpu()
    return where, _dtype(dtype, where)


def quiet_transformers() -> None:
    """Errors only, and no progress bars of its own."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check_folder(folder: Path) -> dict[str, Any]:
    """The folder's config, when the folder can be opened without running anything from it; BaseError otherwise."""
    path = folder / "config.json"
    if not path.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It is an adapter: give the base it was made for, and this folder as --adapter."
        raise BaseError(f"{folder} is not a model folder: it has no config.json.{hint}")
    for file in sorted(folder.glob("*.json")):
        if file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise BaseError(f"{file} has {file.stat().st_size:,} bytes; such a file has a few million at most.")
    try:
        with disk_errors("read", path):
            config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DiskError):
            raise
        raise BaseError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise BaseError(f"{path} must hold an object, not {type(config).__name__}.")
    faults = []
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        code = " and brings its own code, which deltaw does not run" if config.get("auto_map") else ""
        faults.append(
            f"model_type {kind!r} is not known to the installed transformers{code}; a newer transformers may know it"
        )
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        faults.append(f"model_type {kind!r} is no causal language model, and deltaw trains nothing else")
    faults += _odd_settings(config)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        why = f"only {', '.join(pickles)}, which can run code when read" if pickles else "no weights"
        faults.append(f"it holds {why}; save the model as safetensors (model.save_pretrained does) and try again")
    if (folder / "adapter_config.json").is_file():  # transformers would load it, and its base, by itself
        faults.append("it holds adapter_config.json beside a model; move the adapter away and give it as --adapter")
    if faults:
        raise BaseError(f"The base in {folder} is refused:\n" + bullet_list(faults))
    return config


def _odd_settings(config: dict[str, Any]) -> list[str]:
    """Counts for which transformers would build for ever, or nothing, and quantisations that it would pass over."""
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    faults = [
        f"{key} is {part[key]!r}, not a number between 1 and {MAX_COUNT:,}"
        for part in parts
        for key in _COUNTS
        if isinstance(part.get(key), int | float) and not 1 <= part[key] <= MAX_COUNT
    ]
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if isinstance(method, str) and method.startswith("bitsandbytes"):
        faults.append("bitsandbytes stored its weights; take the full ones, and --quant nf4 keeps them as small")
    elif quantised is not None and (not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING):
        faults.append(
            f"quantization_config has the method {method!r}, which is not known to the installed transformers"
        )
    return faults


def open_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """The model in a folder as transformers opens it; `dtype` "auto" is what its config says. Raises BaseError."""
    try:
        with signals_kept():
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # damaged files make every part of transformers fail in its own way
        raise BaseError(f"The base in {folder} cannot be opened: {error}") from error
    model, found = opened
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        raise BaseError(
            f"The base in {folder} lacks these weights:\n"
            + bullet_list(sorted(found["missing_keys"]))
            + "\nFetch it again, or save it whole with model.save_pretrained."
        )
    left_out = _blocks_left_out(model, found["unexpected_keys"])
    if left_out:
        raise BaseError(
            f"The base in {folder} holds blocks that its config.json does not count: {', '.join(map(str, left_out))}. "
            "Set num_hidden_layers right, or save the model anew with model.save_pretrained."
        )
    return model


def _blocks_left_out(model: Any, unexpected: Iterable[str]) -> list[int]:
    """Numbers of blocks that lie in the files with weights such as the model's own have, and that it does without.

    Blocks with others besides predict several tokens ahead (DeepSeek, GLM) and are left out on purpose.
    """
    held, own = _weights_by_block(unexpected), _weights_by_block(model.state_dict())
    usual = set[tuple[str, str]]().union(*own.values())
    return sorted(number for number, names in held.items() if number not in own and names <= usual)


def _weights_by_block(names: Iterable[str]) -> dict[int, set[tuple[str, str]]]:
    """{4: {("model.layers", "mlp.up_proj.weight"), …}, …}."""
    found: dict[int, set[tuple[str, str]]] = {}
    for name in names:
        if place := within_block(name):
            before, number, rest = place
            found.setdefault(number, set()).add((before, rest))
    return found


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return compute_dtype(device, look())
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name)
    if chosen is None:
        raise UsageError(
            f"dtype {name!r} is not one of auto, float32, bfloat16 (float16 loses gradients, and crawls on CPUs)."
        )
    return chosen


def weight_digest(folder: Path) -> str:
    """sha256 over the folder's weight files, each remembered in the cache by path, size and time of change."""
    memory = cache_folder() / "digests"
    digests = (file.name + remembered_digest(file, memory) for file in weight_files(folder))
    return hashlib.sha256("".join(digests).encode()).hexdigest()
