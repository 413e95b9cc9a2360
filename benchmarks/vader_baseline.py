"""How well VADER's rules label the demo's test split: the rival that the demo prints beside its own accuracy.

    python benchmarks/vader_baseline.py [--sdist vaderSentiment-3.3.2.tar.gz]

The rules run as their authors published them, from the checksummed source distribution; nothing is installed. VADER
gives one number, `compound`, from -1 to +1; two thresholds make three classes of it. Both settings are reported: the
conventional +-0.05, and the thresholds with the best accuracy on the train split. The better of them on the test split
is what the demo shows: rivals at their best. The result is also written beside the data, for the demo to read.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from prepare_snippets import DATA_FOLDER, LABELS, PACKAGE, SDIST_SHA256, VERSION, fetch_sdist, unpack_sdist

CONVENTIONAL = (-0.05, 0.05)
RESULT = Path(__file__).resolve().parent / "results" / "vader_baseline.json"
Pairs = list[tuple[str, str]]


def read_pairs(split: str) -> Pairs:
    """(text, label) of every row of a shipped split, the question taken off."""
    rows = map(json.loads, gzip.decompress((DATA_FOLDER / f"{split}.jsonl.gz").read_bytes()).decode().splitlines())
    chats = (row["messages"] for row in rows)
    return [(user["content"].rpartition("\n\n")[0], assistant["content"]) for user, assistant in chats]


def fingerprint(pairs: Pairs) -> str:
    """A hash of texts and labels, equal as long as the result still belongs to the shipped split."""
    return hashlib.sha256("".join(f"{text}\t{label}\n" for text, label in pairs).encode()).hexdigest()


def load_vader(sdist: Path | None) -> Callable[[str], float]:
    """A function from a text to VADER's compound score."""
    with tempfile.TemporaryDirectory() as temporary:
        root = unpack_sdist(fetch_sdist(sdist, Path(temporary)), Path(temporary))
        sys.path.insert(0, str(root))
        module = importlib.import_module("vaderSentiment.vaderSentiment")
        sys.path.remove(str(root))
        analyzer = module.SentimentIntensityAnalyzer()  # reads its word lists here, before the folder goes
    return lambda text: analyzer.polarity_scores(text)["compound"]


def classify(compound: float, thresholds: tuple[float, float]) -> str:
    """VADER's own rule: the thresholds themselves count as negative and positive."""
    below, above = thresholds
    return "positive" if compound >= above else "negative" if compound <= below else "neutral"


def tune(scores: list[float], labels: list[str]) -> tuple[float, float]:
    """The thresholds below < above of highest accuracy, on a grid of 0.01 over the whole range, of either sign.

    A row that a threshold takes out of neutral is won if the label agrees and lost if it is neutral, whatever the
    other threshold is; so the gains of the two add up, and one table of sums holds every pair.
    """
    score, label, grid = np.array(scores), np.array(labels), np.arange(-100, 101) / 100
    neutral = (label == "neutral").astype(int)
    gain_below = ((score <= grid[:, None]) * ((label == "negative") - neutral)).sum(axis=1)
    gain_above = ((score >= grid[:, None]) * ((label == "positive") - neutral)).sum(axis=1)
    gains = np.where(grid[:, None] < grid, gain_below[:, None] + gain_above, -len(labels))
    best_below, best_above = np.unravel_index(gains.argmax(), gains.shape)
    return float(grid[best_below]), float(grid[best_above])


def wilson(num_right: int, num_rows: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which holds near 0 and 1 too."""
    share, spread = num_right / num_rows, z * z / num_rows
    half = z * math.sqrt(share * (1 - share) / num_rows + spread / (4 * num_rows))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


def evaluate(scores: list[float], labels: list[str], thresholds: tuple[float, float]) -> dict[str, object]:
    """Accuracy with its interval, and the confusion counts {true label: {predicted label: rows}}."""
    confusion = {true: dict.fromkeys(LABELS, 0) for true in LABELS}
    for compound, true in zip(scores, labels, strict=True):
        confusion[true][classify(compound, thresholds)] += 1
    num_right = sum(confusion[label][label] for label in LABELS)
    low, high = wilson(num_right, len(labels))
    return {
        "thresholds": list(thresholds),
        "num_right": num_right,
        "accuracy": round(num_right / len(labels), 4),
        "accuracy_95": [round(low, 4), round(high, 4)],
        "confusion": confusion,
    }


def measure(vader: Callable[[str], float]) -> dict[str, object]:
    """The whole result: provenance, both settings, and which of them is the better."""
    train, test = read_pairs("train"), read_pairs("test")
    train_labels, test_labels = ([label for _, label in pairs] for pairs in (train, test))
    tuned = tune([vader(text) for text, _ in train], train_labels)
    scores = [vader(text) for text, _ in test]
    settings = {
        "conventional": evaluate(scores, test_labels, CONVENTIONAL),
        "tuned_on_train": evaluate(scores, test_labels, tuned),
    }
    return {
        "script": "benchmarks/vader_baseline.py",
        "package": PACKAGE,
        "version": VERSION,
        "sdist_sha256": SDIST_SHA256,
        "split": "test",
        "rows_sha256": fingerprint(test),
        "num_rows": len(test),
        "num_train_rows": len(train),
        "label_rows": {label: test_labels.count(label) for label in LABELS},
        "settings": settings,
        "best": max(settings, key=lambda name: settings[name]["num_right"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="a copy of the source distribution; without it, pip fetches it")
    result = measure(load_vader(parser.parse_args().sdist))
    print(f"VADER {VERSION} on {result['num_rows']:,} test snippets")
    print(f"{'setting':<16}{'below':>8}{'above':>8}{'accuracy':>10}  95 % interval")
    for name, found in result["settings"].items():
        (below, above), (low, high) = found["thresholds"], found["accuracy_95"]
        print(f"{name:<16}{below:>8.2f}{above:>8.2f}{found['accuracy']:>10.1%}  {low:.1%} to {high:.1%}")
    for path in (RESULT, DATA_FOLDER / "vader.json"):
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
