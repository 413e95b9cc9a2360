"""Strange adapters, tensors and templates, given to PEFT and transformers, and to deltaw (benchmarks/incumbent.py).

Adapters are made by PEFT. deltaw reads each as PEFT left it, and once more from a folder that deltaw had written, whose
manifest holds the sha256 of both files. What can hang or take all memory runs in a child.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from cases import drawn
from incumbent_runs import RANK, in_child, said
from models import byte_tokenizer
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaw.adapter import LoraSpec, choose, inject, new_adapter, read_adapter, write_adapter
from deltaw.adapter.files import CONFIG, MANIFEST, WEIGHTS
from deltaw.data.template import Renderer
from deltaw.errors import DeltawError

CHAT = [{"role": "user", "content": "hi"}]
REGEX_BOMB = "(([a-z0-9_.]+)+)+!"
TEMPLATE_BOMB = "{{ 'a' * 10**9 }}"
Tensors = dict[str, Tensor]


# -- material ----------------------------------------------------------------------------------------------------------


def base_model(ground: Path) -> Any:
    """The tiny base, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(ground / "base", dtype=torch.float32).eval()


def peft_model(model: Any, targets: str | list[str] = "all-linear") -> Any:
    """The base with LoRA on all linear layers whose B is not zero."""
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return adapted


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What the model says of a fixed text."""
    return model(torch.arange(3, 40)[None]).logits


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return edit


def _edit_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = change(safetensors.torch.load_file(folder / WEIGHTS))
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def _with_nan(tensors: Tensors) -> Tensors:
    first = next(key for key in sorted(tensors) if "lora_B" in key)
    tensors[first][0, 0] = float("nan")
    return tensors


BAD: dict[str, Callable[[Path], None]] = {
    "no tensors": _edit_tensors(lambda _: {}),
    "prefix base_model.model. missing": _edit_tensors(
        lambda tensors: {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    ),
    "half of the keys missing": _edit_tensors(
        lambda tensors: {key: tensors[key] for key in sorted(tensors)[: len(tensors) // 2]}
    ),
    "NaN weights": _edit_tensors(_with_nan),
    "extra keys": _edit_tensors(lambda tensors: tensors | {"base_model.model.unknown.weight": torch.ones(3)}),
    "int8 tensors": _edit_tensors(lambda tensors: {key: (t * 99).to(torch.int8) for key, t in tensors.items()}),
    "alpha 8 → 800": _edit_config(lora_alpha=800),
    "another base's name": _edit_config(base_model_name_or_path="somebody/else"),
    "use_dora without magnitudes": _edit_config(use_dora=True),
    "target_modules fewer than the file": _edit_config(target_modules=["q_proj"]),
    "wrong r": _edit_config(r=4),
}


# -- readers -----------------------------------------------------------------------------------------------------------


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def read_with_peft(ground: Path, folder: Path) -> dict[str, Any]:
    """What PEFT makes of the folder: refused, or loaded with how many warnings; and the logits."""
    records = _Records()
    for name in ("transformers", "peft"):
        logging.getLogger(name).addHandler(records)
    model = base_model(ground)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = peft.PeftModel.from_pretrained(model, folder).eval()
        except Exception as error:
            return {"outcome": "refused", "says": f"{type(error).__name__}: {said(str(error), folder)}"}
    texts = [str(w.message) for w in caught if not issubclass(w.category, (FutureWarning, DeprecationWarning))]
    texts += records.texts
    outcome = (
        "loaded silently"
        if not texts
        else "loaded with a warning"
        if len(texts) == 1
        else f"loaded with {len(texts)} warnings"
    )
    return {"outcome": outcome, "says": said(texts[0], folder) if texts else "", "logits": logits(adapted)}


def read_with_deltaw(ground: Path, folder: Path) -> dict[str, Any]:
    """What deltaw makes of the folder."""
    model = base_model(ground)
    try:
        with inject(model, read_adapter(folder)):
            return {"outcome": "loaded silently", "says": "", "logits": logits(model)}
    except DeltawError as error:
        return {"outcome": "refused", "says": _first_fault(error, folder)}


def _first_fault(error: DeltawError, folder: Path) -> str:
    fault = next((line for line in str(error).splitlines() if line.startswith("  - ")), str(error))
    return f"{type(error).__name__}: {said(fault.strip(' -'), folder)}"


def _compare(found: dict[str, Any], good: Tensor, plain: Tensor) -> dict[str, Any]:
    """The same without logits, but with what became of the output."""
    out = found.pop("logits", None)
    if out is None:
        return found
    if not torch.isfinite(out).all():
        return found | {"output": "NaN"}
    same = [name for name, wanted in (("as trained", good), ("as the plain base", plain)) if _near(out, wanted)]
    return found | {"output": same[0] if same else "changed"}


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-5)


# -- the accidents -----------------------------------------------------------------------------------------------------


def make_adapters(ground: Path) -> None:
    """The good adapter as PEFT saves it, and the same as deltaw saves it."""
    peft_model(base_model(ground)).save_pretrained(ground / "peft-adapter")
    write_adapter(read_adapter(ground / "peft-adapter"), ground / "deltaw-adapter")


def bad_adapters(ground: Path) -> dict[str, Any]:
    """B7: eleven bad adapters: refused, loaded with a warning or silently, and what became of the output."""
    plain, good = logits(base_model(ground)), read_with_peft(ground, ground / "peft-adapter")["logits"]
    assert not _near(plain, good) and _near(read_with_deltaw(ground, ground / "deltaw-adapter")["logits"], good)
    found: dict[str, Any] = {}
    for name, spoil in BAD.items():
        found[name] = {}
        for reader, source, read in (
            ("incumbent", "peft-adapter", read_with_peft),
            ("deltaw", "peft-adapter", read_with_deltaw),
            ("deltaw, with its manifest", "deltaw-adapter", read_with_deltaw),
        ):
            folder = fresh_copy(ground / source, ground / "bad")
            spoil(folder)
            found[name][reader] = _compare(read(ground, folder), good, plain)
    return found


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy of a folder in the place of another."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def regex_bomb(ground: Path, limit: float = 20) -> dict[str, Any]:
    """B8: a regular expression in target_modules that takes for ever."""
    folder = fresh_copy(ground / "peft-adapter", ground / "bad")
    _edit_config(target_modules=REGEX_BOMB)(folder)

    def outcome(read: Callable[[Path, Path], dict[str, Any]]) -> dict[str, Any]:
        ended = in_child(lambda: {k: v for k, v in read(ground, folder).items() if k != "logits"}, ground, limit)
        late = ended.code is None
        what = f"still running at {limit:g} s, killed" if late else ended.value["outcome"]
        return {"outcome": what, "seconds": round(ended.seconds, 2)}

    return {"incumbent": outcome(read_with_peft), "deltaw": outcome(read_with_deltaw)}


def mutations(ground: Path, count: int) -> dict[str, Any]:
    """B9: a safetensors file changed in one place, read by `peft.load_peft_weights` and by deltaw."""
    random_, small = random.Random(9), small_adapter(ground)
    wanted = safetensors.torch.load((small / WEIGHTS).read_bytes())
    content, manifest = (small / WEIGHTS).read_bytes(), (small / MANIFEST).read_bytes()
    found = {reader: Counter[str]() for reader in ("incumbent", "deltaw", "deltaw, with its manifest")}
    for _ in range(count):
        (small / WEIGHTS).unlink()  # a new file each time: what was read may still be mapped
        (small / WEIGHTS).write_bytes(_mutated(content, random_))
        found["incumbent"][_taken(lambda: peft.load_peft_weights(str(small), device="cpu"), wanted)] += 1
        (small / MANIFEST).unlink(missing_ok=True)
        found["deltaw"][_taken(lambda: _stored(small), wanted)] += 1
        (small / MANIFEST).write_bytes(manifest)
        found["deltaw, with its manifest"][_taken(lambda: _stored(small), wanted)] += 1
    return {"mutated": count, **{reader: dict(each) for reader, each in found.items()}}


def small_adapter(ground: Path) -> Path:
    """An adapter folder of deltaw with a few small tensors."""
    model = torch.nn.Sequential()
    model.add_module("q_proj", torch.nn.Linear(16, 8))
    model.add_module("v_proj", torch.nn.Linear(16, 8))
    spec = LoraSpec(rank=2, alpha=4)
    return write_adapter(drawn(new_adapter(choose(model, spec), spec)), ground / "small")


def _stored(folder: Path) -> Tensors:
    adapter = read_adapter(folder)
    return {f"base_model.model.{name}.lora_{part}.weight": tensor for name, part, tensor in adapter.tensors()}


def _taken(read: Callable[[], Tensors], wanted: Tensors) -> str:
    try:
        tensors = read()
    except Exception as error:
        return "refused" if isinstance(error, (DeltawError, safetensors.SafetensorError)) else type(error).__name__
    same = tensors.keys() == wanted.keys() and all(_same_bits(tensors[key], wanted[key]) for key in wanted)
    return "accepted unchanged" if same else "accepted with changed content"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _mutated(content: bytes, random_: random.Random) -> bytes:
    """One bit, a few bytes, a cut, a doubled piece or bytes at the end."""
    changed, place, way = bytearray(content), random_.randrange(len(content)), random_.randrange(5)
    if way == 0:
        changed[place] ^= 1 << random_.randrange(8)
    elif way == 1:
        changed[place : place + 8] = random_.randbytes(len(changed[place : place + 8]))
    elif way == 2:
        del changed[place:]
    elif way == 3:
        changed[place:place] = changed[place : place + 1 + random_.randrange(40)]
    else:
        changed += random_.randbytes(1 + random_.randrange(20))
    return bytes(changed)


def template_bomb(ground: Path, limit: float = 15) -> dict[str, Any]:
    """B10: a chat template that builds a string of 1 GB."""
    tokenizer = byte_tokenizer(TEMPLATE_BOMB)

    def theirs() -> int:
        return len(tokenizer.apply_chat_template(CHAT, tokenize=False))

    def ours() -> int:
        return len(Renderer(tokenizer).text(CHAT))

    found = {}
    for name, render in (("incumbent", theirs), ("deltaw", ours)):
        ended = in_child(render, ground, limit)
        built = f"built {ended.value:,} characters" if ended.code == 0 else f"refused: {said(ended.said, ground)}"
        what = f"still running at {limit:g} s, killed" if ended.code is None else built
        found[name] = {"outcome": what, "seconds": round(ended.seconds, 2), "added_mb": round(ended.added_mb)}
    return found


def compiled(ground: Path) -> dict[str, Any]:
    """B11: an adapter saved from a base that went through torch.compile, and what each reader makes of the file."""
    plain = logits(base_model(ground))
    found: dict[str, Any] = {}
    for name, targets in (("targets by suffix", ["q_proj", "v_proj", "down_proj"]), ("all-linear", "all-linear")):
        good = logits(peft_model(base_model(ground), targets))
        folder = ground / f"compiled {name}"
        peft_model(torch.compile(base_model(ground)), targets).save_pretrained(folder)
        found[name] = {
            "key": next(iter(_keys(folder))),
            "incumbent": _compare(read_with_peft(ground, folder), good, plain),
            "deltaw": _compare(read_with_deltaw(ground, folder), good, plain),
        }
    return found | {"deltaw, making one itself": _deltaw_from_compiled(ground)}


def _deltaw_from_compiled(ground: Path) -> dict[str, Any]:
    spec = LoraSpec(rank=RANK, alpha=RANK)
    try:
        model = torch.compile(base_model(ground))
        folder = write_adapter(new_adapter(choose(model, spec), spec), ground / "compiled-by-deltaw")
    except DeltawError as error:
        return {"outcome": "refused to save", "says": _first_fault(error, ground)}
    return {"outcome": "saved", "key": next(iter(_keys(folder)))}


def _keys(folder: Path) -> list[str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return list(file.keys())


def resized(ground: Path) -> dict[str, Any]:
    """B12: four new tokens, a base that cannot be looked up, saved; and a file that holds them, given to deltaw."""
    model = base_model(ground)
    model.resize_token_embeddings(model.config.vocab_size + 4)
    model.config._name_or_path = model.name_or_path = "nobody/nowhere"
    adapted = peft_model(model)
    adapted.peft_config["default"].base_model_name_or_path = "nobody/nowhere"
    records = _saved_quietly(adapted, ground / "resized")
    adapted.save_pretrained(ground / "resized-asked", save_embedding_layers=True)
    rows = [
        sum("embed_tokens" in key or "lm_head" in key for key in _keys(ground / name))
        for name in ("resized", "resized-asked")
    ]
    return {
        "incumbent": {
            "embedding_tensors_in_file": rows[0],
            "warnings": records,
            "embedding_tensors_when_asked_for": rows[1],
        },
        "deltaw": read_with_deltaw(ground, ground / "resized-asked"),
    }


def _saved_quietly(adapted: Any, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted.save_pretrained(folder)
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return [said(text, folder) for text in texts]
