"""Does training for every smaller rank at once beat cutting a plain adapter, at equal cost?

    python benchmarks/nested.py [--tasks sentiment phonemes] [--seeds 2]

A nested run draws a rank for each step, the full one half of the time and else 1, 2, 4 or 8, and gives gradients to the
first rows of A and columns of B alone (AdamW's momentum moves the others a little all the same): as many passes as a
plain run, and one adapter whose first k directions are meant to serve as an adapter of rank k (Matryoshka training,
after DyLoRA, arXiv 2210.07558). Plain runs are cut by the SVD of each layer's ΔW, nested ones by position and by the
SVD, and all are measured on the test documents that benchmarks/rank_calibration.py sets apart, against the plain run of
the same seed. Intervals are paired bootstraps over documents. Rows go to results/nested.jsonl as they are measured;
what has its row is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rank_calibration import BASE, LENGTH_OF_RUN, WORK, task_files

ROWS = Path(__file__).parent / "results" / "nested.jsonl"
RANK, SMALLER, FULL_SHARE = 16, (1, 2, 4, 8), 0.5
KINDS = ("plain", "nested")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["sentiment", "phonemes"])
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    for seed in range(asked.seeds):
        for task in asked.tasks:
            name = f"{task} s{seed}"
            if name not in {row["name"] for row in _rows()}:
                row = {"name": name, **_measured(task, seed)}
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for row in _rows():
        print(f"{row['name']}: base {row['base_loss']:.4f}")
        for point in row["points"]:
            print("  rank {rank:2} {kind:13} {loss:.4f}  {more:+.4f} ({low:+.4f} to {high:+.4f})".format(**point))


def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


def _measured(task: str, seed: int) -> dict[str, Any]:
    """Both runs, each in a process of its own, then every cut on the test documents."""
    folders = {kind: WORK / "nested" / f"{task}-{kind}-s{seed}" for kind in KINDS}
    for kind, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        given = json.dumps({"task": task, "seed": seed, "out": str(folder), "kind": kind})
        subprocess.run([sys.executable, __file__, "--child", given], check=True, stdout=subprocess.DEVNULL)
    return _compare(folders, task_files(task)["test"])


def train(task: str, seed: int, out: str, kind: str) -> None:
    """One run of rank 16."""
    import deltaw

    files = task_files(task)
    given = {"model": BASE, "data": files["train"], "eval_data": files["validation"], "rank": RANK, "seed": seed}
    with nested(seed) if kind == "nested" else nullcontext():
        deltaw.train(**given, out=out, **LENGTH_OF_RUN)


@contextmanager
def nested(seed: int) -> Iterator[None]:
    """Steps train the first directions alone, as many as are drawn."""
    import torch

    from deltaw.adapter import injection_of
    from deltaw.engine import loop

    whole, drawn = loop.accumulate, random.Random(seed)

    def accumulate(base: Any, *rest: Any) -> float | None:
        rank = RANK if drawn.random() < FULL_SHARE else drawn.choice(SMALLER)
        injection = injection_of(base.model)
        assert injection is not None
        tails = [tail for layer in injection.layers[0].values() for tail in (layer.A[rank:], layer.B[:, rank:])]
        kept = [tail.detach().clone() for tail in tails]
        with torch.no_grad():
            for tail in tails:
                tail.zero_()  # both of a direction are zero, so neither gets a gradient
            with torch.enable_grad():
                found = whole(base, *rest)
            for tail, numbers in zip(tails, kept, strict=True):
                tail.copy_(numbers)
        return found

    loop.accumulate = accumulate
    try:
        yield
    finally:
        loop.accumulate = whole


def _compare(folders: dict[str, Path], test: str) -> dict[str, Any]:
    """Loss of every cut, and how much more than the plain run's cut of that rank it is, with an interval."""
    from deltaw.adapter import Factors, read_adapter
    from deltaw.analysis.curve import mean_interval
    from deltaw.analysis.spectrum import spectra
    from deltaw.ranks import cut, open_held_out

    made = {kind: read_adapter(folder / "adapter") for kind, folder in folders.items()}
    known = {kind: spectra(adapter) for kind, adapter in made.items()}
    whole = made["nested"]
    cuts, names = [None], []
    for rank in (*SMALLER, RANK):
        by_place = whole.with_factors({
            name: Factors(_first(f.A, rank, 0), _first(f.B, rank, 1), f.magnitude) for name, f in whole.factors.items()
        })  # fmt: skip
        cuts += [cut(made["plain"], known["plain"], rank), by_place, cut(whole, known["nested"], rank)]
        names += [(rank, "plain, cut"), (rank, "nested, first"), (rank, "nested, cut")]
    with tempfile.TemporaryDirectory() as work:
        held_out = open_held_out(str(folders["plain"]), [test], BASE, Path(work))
        losses_KD, tokens_D = held_out.curve_losses(cuts), held_out.tokens_D
    plain, points = {}, []
    for (rank, kind), sums_D in zip(names, losses_KD[1:], strict=True):
        plain.setdefault(rank, sums_D)
        low, high = mean_interval(sums_D - plain[rank], tokens_D)
        points.append({
            "rank": rank, "kind": kind, "loss": float(sums_D.sum() / tokens_D.sum()),
            "more": float((sums_D - plain[rank]).sum() / tokens_D.sum()), "low": low, "high": high,
        })  # fmt: skip
    return {"base_loss": float(losses_KD[0].sum() / tokens_D.sum()), "documents": len(tokens_D), "points": points}


def _first(numbers: Any, rank: int, along: int) -> Any:
    """Zeros behind the first so many directions."""
    found = numbers.clone()
    found.narrow(along, rank, numbers.shape[along] - rank).zero_()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train(**json.loads(sys.argv[2]))
    else:
        main()
