"""Every setting, once. Flags, recipe keys, help texts, docs and the resolved settings of a run derive from this list.

A setting's value comes from a flag, else from the recipe, else from a rule that knows the model and the data, else from
the default; where it came from is kept beside it and written into the run folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from deltaw.errors import UsageError, bullet_list

AUTO = "auto"
EVALUATIONS_PER_RUN = 6  # where nothing else is said
LENGTHS = ("steps", "epochs", "minutes")  # of which a run has one
HUB = "hub:"  # how the name of a data set of the hub begins, where a file might stand

ABOVE_0, FROM_0, SHARE = "must be above 0", "must not be below 0", "must be between 0 and 1"
_RANGES: dict[str, Callable[[float], bool]] = {
    ABOVE_0: lambda value: value > 0,
    FROM_0: lambda value: value >= 0,
    SHARE: lambda value: 0 <= value <= 1,
}


def setting(
    default: Any,
    help_text: str,
    *,
    kind: type = str,
    many: bool = False,
    choices: tuple[str, ...] = (),
    group: str = "",
    path: bool = False,
    within: str | None = None,
) -> Any:
    """A field of Settings: its default, its one line of help, the type of a value, and whether it may be repeated.

    A value that may be repeated may also be a list with commas, unless it is a `path`. `within` is one of `_RANGES`.
    """
    metadata = {"help": help_text, "kind": kind, "many": many, "choices": choices, "group": group, "path": path}
    return dataclasses.field(default=default, metadata={**metadata, "within": within})


@dataclass
class Settings:
    """The settings of a training run. `auto` and None are replaced by rules, see `resolve_rules`."""

    model: str = setting("smollm2-135m", "Base: built-in name, folder, GGUF file or hub id.", group="what", path=True)
    data: tuple[str, ...] = setting(
        (),
        "Training file, glob, Arrow folder or hub:NAME, with options as in FILE::weight=2,cap=500; may be repeated.",
        many=True,
        group="what",
        path=True,
    )
    eval_data: tuple[str, ...] = setting(
        (),
        "Validation file; without it 5 % of the rows (at most 500) are held out.",
        many=True,
        group="what",
        path=True,
    )
    columns: tuple[str, ...] = setting(
        (), "How columns are named in the data: canonical=yours, such as prompt=question.", many=True, group="data"
    )
    train_on: str = setting(
        "assistant",
        "Which tokens are trained: every answer, the last one, the completion, or all.",
        choices=("assistant", "last", "completion", "all"),
        group="data",
    )
    max_length: int | str = setting(
        AUTO, "Longest document in tokens, or auto.", kind=int, within=ABOVE_0, group="data"
    )
    allow: tuple[str, ...] = setting(
        (), "Findings of `deltaw data check` that shall not stop the run, by name.", many=True, group="data"
    )
    allow_lost: float = setting(
        0.01, "Share of rows that may be unusable before the run refuses.", kind=float, within=SHARE, group="data"
    )
    date: str = setting(AUTO, "Day that chat templates print which ask for one, as 2026-01-31.", group="data")

    out: str | None = setting(None, "Run folder to make; default: a dated folder under runs/.", group="what")
    adapter: str | None = setting(None, "Start from the factors of this adapter folder.", group="what", path=True)
    revision: str | None = setting(None, "Revision of a hub base.", group="what")

    rank: int | str = setting(
        AUTO,
        "Rank r of the update, or auto; for the verbs train and plan also measure.",
        kind=int,
        within=ABOVE_0,
        group="adapter",
    )
    alpha: float = setting(32.0, "Alpha; the update is scaled by alpha/r.", kind=float, within=ABOVE_0, group="adapter")
    targets: tuple[str, ...] = setting(
        ("all-linear",),
        "all-linear (the head left out, and what PEFT could not load), or suffixes of module names; may be repeated.",
        many=True,
        group="adapter",
    )
    exclude: tuple[str, ...] = setting((), "Suffixes of module names to leave out.", many=True, group="adapter")
    layers: str | None = setting(None, "Block numbers to adapt, such as 0-11,20.", group="adapter")
    rank_pattern: tuple[str, ...] = setting(
        (), "Another rank for modules by suffix, such as v_proj=4.", many=True, group="adapter"
    )
    alpha_pattern: tuple[str, ...] = setting(
        (), "Another alpha for modules by suffix, such as v_proj=16.", many=True, group="adapter"
    )
    dropout: float = setting(
        0.0, "Dropout on the input of the low-rank branch.", kind=float, within=SHARE, group="adapter"
    )
    rslora: bool = setting(False, "Scale by alpha/√r instead of alpha/r.", kind=bool, group="adapter")
    dora: bool = setting(False, "Train magnitudes too (DoRA).", kind=bool, group="adapter")

    steps: int | None = setting(None, "Length as optimiser steps.", kind=int, within=ABOVE_0, group="length")
    epochs: float | None = setting(
        None, "Length as passes over the data (default: 1).", kind=float, within=ABOVE_0, group="length"
    )
    minutes: float | None = setting(
        None,
        "Length as minutes of training; the rate falls to zero with the budget.",
        kind=float,
        within=ABOVE_0,
        group="length",
    )
    batch_tokens: int | str = setting(
        AUTO, "Tokens per optimiser step, context included, or auto.", kind=int, within=ABOVE_0, group="length"
    )
    micro_tokens: int | str = setting(
        AUTO, "Tokens per forward pass, or auto; changes memory, not results.", kind=int, within=ABOVE_0, group="length"
    )
    share_prefixes: bool = setting(
        True,
        "Compute once what documents of a step begin with alike (evaluations always do).",
        kind=bool,
        group="length",
    )

    lr: float | str = setting(AUTO, "Peak learning rate, or auto.", kind=float, within=ABOVE_0, group="optimiser")
    lora_plus: float = setting(
        1.0, "Rate of B divided by rate of A (LoRA+).", kind=float, within=ABOVE_0, group="optimiser"
    )
    schedule: str = setting(
        "linear",
        "How the rate goes on after the warm-up: in a line or a cosine to zero, or as it is.",
        choices=("linear", "cosine", "constant"),
        group="optimiser",
    )
    warmup: float = setting(
        0.03, "Share of the run over which the rate rises.", kind=float, within=SHARE, group="optimiser"
    )
    clip: float = setting(
        1.0,
        "Largest gradient norm of an adapter; 0 switches clipping off.",
        kind=float,
        within=FROM_0,
        group="optimiser",
    )
    weight_decay: float = setting(0.0, "AdamW weight decay.", kind=float, within=FROM_0, group="optimiser")
    seed: int = setting(
        0, "Seed of the start, the order of the data and dropout.", kind=int, within=FROM_0, group="optimiser"
    )

    eval_steps: int | str = setting(
        AUTO, "Steps between evaluations, or auto (at most 6 in a run).", kind=int, within=ABOVE_0, group="watching"
    )
    eval_rows: int = setting(
        500,
        "Rows of the validation data measured during the run; all of them would only cost time.",
        kind=int,
        within=ABOVE_0,
        group="watching",
    )
    patience: int = setting(
        0, "Stop after this many evaluations without a better one; 0 never.", kind=int, within=FROM_0, group="watching"
    )
    checkpoint_steps: int | str = setting(
        AUTO,
        "Steps between checkpoints, or auto (as often as evaluations).",
        kind=int,
        within=ABOVE_0,
        group="watching",
    )
    checkpoint_seconds: float = setting(
        300.0, "A checkpoint too after this many seconds without one.", kind=float, within=ABOVE_0, group="watching"
    )
    keep_checkpoints: int = setting(2, "Checkpoints kept.", kind=int, within=ABOVE_0, group="watching")
    track: tuple[str, ...] = setting(
        (),
        "Also log to tensorboard, wandb or trackio.",
        many=True,
        choices=("tensorboard", "wandb", "trackio"),
        group="watching",
    )

    device: str = setting(AUTO, "auto, cpu, cuda or mps.", choices=("auto", "cpu", "cuda", "mps"), group="machine")
    dtype: str = setting(AUTO, "auto, float32 or bfloat16.", choices=("auto", "float32", "bfloat16"), group="machine")
    threads: int | None = setting(None, "CPU threads.", kind=int, within=ABOVE_0, group="machine")
    memory: str | None = setting(
        None,
        "Memory that the run may take, such as 4GB or 900MiB; what does not fit is refused before it starts.",
        group="machine",
    )
    recompute: int | str = setting(
        AUTO,
        "Blocks that are computed twice instead of kept for backward, or auto.",
        kind=int,
        within=FROM_0,
        group="machine",
    )
    stream: bool | str = setting(
        AUTO, "Read blocks of the base from disk when they are needed, or auto.", kind=bool, group="machine"
    )
    quant: str = setting(
        AUTO,
        "Store the base's layers in 4 or 8 bits; auto does so only where nothing exact fits the memory.",
        choices=("auto", "none", "nf4", "int8"),
        group="machine",
    )

    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def put(self, name: str, value: Any, source: str) -> None:
        """Sets a value and remembers where it came from."""
        setattr(self, name, value)
        self.sources[name] = source

    def by_rule(self, name: str) -> bool:
        """Whether a rule decided a setting, and not its user."""
        return self.sources.get(name, "").startswith("rule")

    def asked_for(self, name: str) -> bool:
        """Whether someone set it: no rule, no plan that suited one machine, and no default."""
        return not self.sources.get(name, "default").startswith(("rule", "plan", "default"))

    @property
    def whole_epochs(self) -> float | None:
        """How many epochs the run has; None where steps or minutes bound it, and data comes again and again."""
        return None if self.steps is not None or self.minutes is not None else self.epochs or 1.0

    def without_places(self) -> dict[str, Any]:
        """Every setting that says how something is trained, and none that says where things lie."""
        places = ("model", "data", "eval_data", "out", "adapter", "track", "threads")
        return {f.name: _plain(getattr(self, f.name)) for f in settings_fields() if f.name not in places}

    def resolved(self) -> dict[str, dict[str, Any]]:
        """{name: {value, source}} of every setting, for the run folder."""
        return {
            field.name: {"value": _plain(getattr(self, field.name)), "source": self.sources.get(field.name, "default")}
            for field in settings_fields()
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def settings_fields() -> list[dataclasses.Field[Any]]:
    """The settings in their order."""
    return [field for field in dataclasses.fields(Settings) if "help" in field.metadata]


def make_settings(given: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Settings:
    """Settings from what the caller gave, over a recipe, over the defaults. Raises UsageError listing every fault."""
    settings, faults = Settings(), []
    fields = {field.name: field for field in settings_fields()}
    if any(given.get(name) is not None for name in LENGTHS):  # one length wins over another, as over itself
        recipe = {name: value for name, value in (recipe or {}).items() if name not in LENGTHS}
    for source, values in (("recipe", recipe or {}), ("given", given)):
        for raw_name, raw in values.items():
            name = str(raw_name).replace("-", "_")
            if name not in fields:
                faults.append(f"{source}: unknown setting {raw_name!r}{_near(name, fields)}")
            elif raw is not None:
                _put(settings, fields[name], raw, source, faults)
    faults += _contradictions(settings)
    if faults:
        raise UsageError("These settings cannot be used:\n" + bullet_list(faults))
    return settings


def _near(name: str, fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(fields), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _put(settings: Settings, field: dataclasses.Field[Any], raw: Any, source: str, faults: list[str]) -> None:
    try:
        settings.put(field.name, _convert(field, raw), source)
    except (TypeError, ValueError, OverflowError) as error:
        words = field.default == AUTO and not field.metadata["choices"]  # the help names those it takes too
        about = field.metadata["help"].rstrip(".") if words else ""
        faults.append(f"{field.name} = {raw!r}: {error}" + (f" ({about})" if about else ""))


def _convert(field: dataclasses.Field[Any], raw: Any) -> Any:
    kind, choices = field.metadata["kind"], field.metadata["choices"]
    if field.metadata["many"]:
        return tuple(_choice(value, choices) for value in _items(raw, commas=not field.metadata["path"]))
    if raw == AUTO and field.default == AUTO:
        return AUTO
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        raise ValueError("must be true or false")
    if kind is not str:
        return _number(kind, raw)
    if isinstance(raw, datetime.date):  # as YAML reads one
        return raw.isoformat()
    if not isinstance(raw, str | Path | int | float) or isinstance(raw, bool):
        raise ValueError("must be text")
    return _choice(str(raw), choices)


def _items(raw: Any, *, commas: bool) -> list[str]:
    items = [raw] if isinstance(raw, str | Path | Mapping) else raw
    if isinstance(items, list | tuple):
        items = [_source_text(item) if isinstance(item, Mapping) and not commas else item for item in items]
    if commas and isinstance(raw, Mapping):  # patterns, as a recipe spells them
        items = [f"{key}={value}" for key, value in raw.items()]
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Path | int) for item in items):
        raise ValueError("must be text or a list of texts")
    texts = [str(item) for item in items]
    parts = [part.strip() for text in texts for part in text.split(",")] if commas else texts
    return [part for part in parts if part]


def _source_text(source: Mapping[str, Any]) -> str:
    """A data source that a recipe spells as `{path: FILE, weight: 2}`, as FILE::weight=2."""
    options = [f"{key}={value}" for key, value in source.items() if key != "path"]
    if "path" not in source:
        raise ValueError(f"{dict(source)} has no path")
    return f"{source['path']}::{','.join(options)}" if options else str(source["path"])


def _number(kind: type, raw: Any) -> int | float:
    try:
        if isinstance(raw, bool):
            raise ValueError
        if kind is int and isinstance(raw, int | str):
            with contextlib.suppress(ValueError):  # not by way of a float, which holds 53 bits; but 1e3 is one
                return int(raw)
        number = float(raw)
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"must be {'a whole' if kind is int else 'a finite'} number") from None
    return int(number) if kind is int else number


def _choice(value: Any, choices: tuple[str, ...]) -> Any:
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    return value


def _contradictions(settings: Settings) -> list[str]:
    """Every value that has no meaning, alone or beside another."""
    faults = []
    lengths = [name for name in LENGTHS if getattr(settings, name) is not None]
    if len(lengths) > 1:
        faults.append(f"{' and '.join(lengths)} are given; the length of a run is one of steps, epochs, minutes")
    for field in settings_fields():
        value, within = getattr(settings, field.name), field.metadata["within"]
        if within is not None and isinstance(value, int | float) and not _RANGES[within](value):
            faults.append(f"{field.name} = {value}: {within}")
    for name, parse in _PARSED.items():
        value = getattr(settings, name)
        try:
            if value != getattr(Settings, name):
                parse(value)
        except ValueError as error:
            faults.append(f"{name} = {', '.join(value) if isinstance(value, tuple) else repr(value)}: {error}")
    if settings.dropout == 1:
        faults.append("dropout = 1: would drop everything")
    if settings.max_length == 1:
        faults.append("max_length = 1: a document of one token predicts nothing")
    return faults


def parse_pattern(entries: tuple[str, ...], kind: type) -> dict[str, Any]:
    """{"v_proj": 4} from ("v_proj=4",); ValueError when an entry is no such pair, or its number has no meaning."""
    found: dict[str, Any] = {}
    for entry in entries:
        suffix, equals, value = (part.strip() for part in entry.partition("="))
        if not suffix or not equals:
            raise ValueError("must look like v_proj=4")
        number = _number(kind, value)
        if number <= 0:
            raise ValueError(f"{entry} must be above 0")
        found[suffix] = number
    return found


class Reading(NamedTuple):
    """How data files are read where an adapter is measured; None: as those it was trained on."""

    columns: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    allow_lost: float = 0.01
    max_length: int | None = None
    train_on: str | None = None
    date: str | None = None


AS_TRAINED = Reading()


def parted(options: Mapping[str, Any]) -> tuple[Reading, dict[str, Any]]:
    """(how data is read, the other options) of keywords that are spelt as for `train`. Raises UsageError."""
    given = {name: value for name, value in options.items() if name in Reading._fields and value is not None}
    settings = make_settings(given)
    read = {name: getattr(settings, name) for name in given if getattr(settings, name) != AUTO}
    return Reading(**read), {name: value for name, value in options.items() if name not in Reading._fields}


_UNITS = {
    **{unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), 1)},
}


def parse_bytes(text: str) -> int:
    """4000000000 from "4GB" (10⁹), 943718400 from "900MiB" (2²⁰); ValueError when it is no such size."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-z]{1,3})", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError("must be a number with a unit, such as 4GB (10⁹ bytes) or 900MiB (2²⁰)")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_layers(text: str) -> tuple[int, ...]:
    """(0, 1, 2, 20) from "0-2,20"; ValueError when it is not such a list."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        if match is None:
            raise ValueError("must look like 0-11,20")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part.strip()} runs backwards")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def parse_date(text: str) -> datetime.date:
    """The day of "2026-01-31"; ValueError when it is none."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError("must look like 2026-01-31") from None


# Settings whose text must be one that can be read, and what reads it.
_PARSED: dict[str, Callable[[Any], Any]] = {
    "rank_pattern": lambda entries: parse_pattern(entries, int),
    "alpha_pattern": lambda entries: parse_pattern(entries, float),
    "layers": parse_layers,
    "memory": parse_bytes,
    "date": parse_date,
}


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what a YAML reader usually drops: the first of two values of a key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if node.start_mark.column == 0:  # of settings, not of what one holds
            names = [name.replace("-", "_") for name in names]
        if twice := sorted({name for name in names if names.count(name) > 1 and name != "<<"}):
            raise yaml.YAMLError(f"{', '.join(twice)} stands there twice")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises UsageError when it is no such file.

    Of a run's config.yaml, those that someone asked for, but for `out`: the same again. Paths of what exists (data,
    adapters, a model folder) are relative to the file; `out` is relative to where one is.
    """
    try:
        values = yaml.load(path.read_text("utf-8"), _Loader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or a day that never was
        raise UsageError(f"{path} cannot be read as a YAML recipe: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold settings as `name: value`, not {type(values).__name__}.")
    if values and all(isinstance(each, dict) and each.keys() == {"value", "source"} for each in values.values()):
        asked = {name: each["value"] for name, each in values.items() if each["source"] in ("given", "recipe")}
        values = {name: value for name, value in asked.items() if name != "out"}
    paths = {field.name for field in settings_fields() if field.metadata["path"]}
    return {
        name: _beside(path.parent, value, str(name)) if str(name).replace("-", "_") in paths else value
        for name, value in values.items()
    }


def _beside(folder: Path, value: Any, name: str) -> Any:
    """A path of a recipe, or each of several, seen from the recipe's folder; what is no text is left for the checks."""
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _beside(folder, value["path"], name)}
    if isinstance(value, list):
        return [_beside(folder, item, name) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(HUB):
        return value
    path = folder / Path(value).expanduser()
    return value if name == "model" and not path.exists() else str(path)


# -- rules: defaults that depend on the model and the data -------------------------------------------------------------

DEFAULT_MAX_LENGTH = 2048
MOST_PARAMETERS = 45_000_000
MOST_SHARE = 0.04


def default_rank(parameters_per_rank: int, base_parameters: int) -> tuple[int, str]:
    """The largest power of two whose adapter stays within 45M parameters and 4 % of the base, from 1 to 128.

    45M is where the public rank sweeps level off for 1B to 9B models; 4 % keeps a small base's adapter small.
    """
    affordable = min(MOST_PARAMETERS, MOST_SHARE * base_parameters) / parameters_per_rank
    rank = 2 ** int(math.log2(affordable)) if affordable >= 1 else 1
    return min(128, rank), "rule: the largest power of two within 45M parameters and 4 % of the base"


def default_rate(hidden: int, model_type: str) -> tuple[float, str]:
    """5e-4·(2000/hidden)^p: p = 0.781 for Llama shapes, 0.0775 for Qwen (Thinking Machines' sweep); else 3e-4."""
    family = model_type.lower()
    if family.startswith(("llama", "smollm", "mistral")):
        power = 0.781
    elif family.startswith("qwen"):
        power = 0.0775
    else:
        return 3e-4, "rule: 3e-4 for architectures without a fitted formula"
    rate = 5e-4 * (2000 / hidden) ** power
    return float(f"{rate:.3g}"), f"rule: 5e-4·(2000/{hidden})^{power} for {model_type}"


def steps_between(steps: int) -> int:
    """How many steps of a run lie between evaluations, where nothing else is said."""
    return max(1, math.ceil(steps / EVALUATIONS_PER_RUN))


def default_batch_tokens(mean_tokens: float) -> tuple[int, str]:
    """About 16 documents a step, as a power of two from 1,024 to 16,384 tokens: small batches suit LoRA."""
    wanted = 2 ** round(math.log2(max(1.0, 16 * mean_tokens)))
    rule = f"rule: 16 documents of {mean_tokens:.0f} tokens, as a power of two from 1,024 to 16,384"
    return min(16_384, max(1024, wanted)), rule
