"""One page on a whole data set: what was understood, what is wrong with it, and the numbers that planning needs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from deltaw.data.findings import ROW, SET, WARNING
from deltaw.data.prepare import DataSet
from deltaw.data.store import TokenStore

BINS = 12
LONGEST = 5


def check(data: DataSet, held_out: DataSet | None = None) -> dict[str, Any]:
    """The page as plain values: counts, formats, findings (each with all its rows), statistics, and `ok`.

    `held_out` is a validation set; rows that stand in both become a finding. `ok` is False on any error that was not
    allowed.
    """
    findings = data.report.findings
    if held_out is not None:
        _find_overlap(data, held_out)
    report = data.report.as_dict()
    parts = [findings] if held_out is None else [findings, held_out.report.findings]
    found = [
        {**entry, "set": name} for part, name in zip(parts, ("train", "eval"), strict=False) for entry in part.as_list()
    ]
    severities = [entry["severity"] for entry in found if not entry["allowed"]]
    return {
        "ok": not any(severity in (ROW, SET) for severity in severities),
        "errors": sum(severity in (ROW, SET) for severity in severities),
        "warnings": severities.count(WARNING),
        "rows": report["rows"],
        "used": report["used"],
        "lost": report["lost"],
        "skipped": report["skipped"],
        "cut": report["cut"],
        "formats": report["formats"],
        "digest": report["digest"],
        "findings": found,
        "statistics": statistics(data.store) if len(data.store) else {},
    }


def _find_overlap(data: DataSet, held_out: DataSet) -> None:
    _, places, _ = np.intersect1d(held_out.shares, data.shares, return_indices=True)
    for document in np.sort(places):
        file, row = held_out.store.place(int(document))
        held_out.report.findings.add("overlap", file, row, "it is a training row too")


def statistics(store: TokenStore) -> dict[str, Any]:
    """Lengths in tokens (quantiles and a histogram with logarithmic bins), trained share, and the longest rows."""
    lengths = store.lengths
    edges = np.unique(np.round(np.geomspace(max(1, lengths.min()), lengths.max() + 1, BINS + 1)).astype(np.int64))
    counts = np.histogram(lengths, edges)[0] if len(edges) > 1 else np.asarray([len(lengths)])
    longest = np.argsort(lengths, kind="stable")[::-1][:LONGEST]
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99])
    return {
        "documents": len(store),
        "tokens": store.tokens,
        "trained_tokens": store.trained_tokens,
        "trained_share": store.trained_tokens / max(1, store.tokens),
        "length": {
            "mean": float(lengths.mean()),
            "median": float(quantiles[0]),
            "p90": float(quantiles[1]),
            "p99": float(quantiles[2]),
            "max": int(lengths.max()),
        },
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "longest": [
            {"file": f, "row": r, "tokens": int(lengths[d])} for d in longest for f, r in [store.place(int(d))]
        ],
    }


def summary_lines(checked: dict[str, Any], train_on: str, data: dict[str, DataSet]) -> list[str]:
    """The check in five lines at most, for the start of a run."""
    read = Counter[str]()
    for counts in checked["formats"].values():
        read.update(counts)
    formats = ", ".join(f"{count:,} {name}" for name, count in read.items())
    lines = [f"{formats} in {len(checked['formats'])} file{'s' if len(checked['formats']) > 1 else ''}"]
    left_out = [f"{checked['lost']:,} left out"] + (
        [f"{checked['skipped']:,} not meant to be trained"] if checked["skipped"] else []
    )
    lines.append(f"{checked['used']:,} rows used, {', '.join(left_out)}")
    numbers = checked["statistics"]
    share, length = numbers["trained_share"], numbers["length"]
    lines.append(
        f"{numbers['tokens']:,} tokens, {share:.1%} trained ({train_on}); "
        f"a document has {length['median']:.0f}, at most {length['max']:,}"
    )
    if "eval" in data:
        lines.append(f"{len(data['eval'].row_shares):,} rows held out for validation")
    if checked["findings"]:
        found = ", ".join(f"{entry['count']:,} {entry['code']}" for entry in checked["findings"])
        example = next((text for entry in checked["findings"] for text in entry["examples"]), "")
        lines.append(f"found: {found} (such as {example}); see `deltaw data check`")
    return lines
