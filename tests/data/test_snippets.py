"""The shipped demo data keeps its promises: disjoint splits, known labels, a licence, a result that belongs to it."""

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "deltaw" / "data" / "snippets"
SPLITS = ("train", "validation", "test")
LABELS = {"positive", "negative", "neutral"}


def read(split):
    return [json.loads(line) for line in gzip.decompress((FOLDER / f"{split}.jsonl.gz").read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def rows():
    return {split: read(split) for split in SPLITS}


def text_of(row):
    return row["messages"][0]["content"].rpartition("\n\n")[0]


def normalised(text):
    """Letters and digits, casefolded; written again here, so that an error in the script does not hide itself."""
    return "".join(c for c in text.casefold() if c.isalnum())


def test_no_text_occurs_twice_within_or_across_splits(rows):
    seen = Counter(normalised(text_of(row)) for split in SPLITS for row in rows[split])
    assert [text for text, times in seen.items() if times > 1] == []


def test_every_row_is_one_question_and_a_known_one_word_answer(rows):
    for row in rows["train"] + rows["validation"] + rows["test"]:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert set(row) == {"messages", "source", "rating"}
        assert row["messages"][1]["content"] in LABELS
        assert row["source"] in {"amazon", "movie", "tweet"}


def test_the_label_is_what_the_rating_says(rows):
    for row in rows["train"] + rows["validation"] + rows["test"]:
        assert -4 <= row["rating"] <= 4
        expected = "positive" if row["rating"] > 0.8 else "negative" if row["rating"] < -0.8 else "neutral"
        assert row["messages"][1]["content"] == expected


def test_all_rows_ask_the_same_question(rows):
    questions = {row["messages"][0]["content"].rpartition("\n\n")[2] for split in SPLITS for row in rows[split]}
    assert len(questions) == 1 and questions != {""}


def test_texts_are_clean(rows):
    for split in SPLITS:
        for text in map(text_of, rows[split]):
            assert text == " ".join(text.split()) and len(text.split()) <= 60
            assert len(re.findall(r"[^\W_]+", text)) >= 3
            assert "\ufffd" not in text and "&amp;" not in text and "&#" not in text


def test_splits_have_the_sizes_that_the_readme_states(rows):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(rows["test"]) >= 1000
    for split in SPLITS:
        assert f"| {split} | {len(rows[split]):,} |" in readme


def test_splits_share_their_proportions_of_source_and_label(rows):
    def shares(split):
        counts = Counter((row["source"], row["messages"][1]["content"]) for row in rows[split])
        return {stratum: count / len(rows[split]) for stratum, count in counts.items()}

    reference = shares("train")
    assert len(reference) == 9
    for split in ("validation", "test"):
        assert shares(split) == pytest.approx(reference, abs=1 / len(rows[split]))


def test_licence_and_citation_lie_beside_the_data():
    licence = (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")
    assert "MIT License" in licence and "C.J. Hutto" in licence and "WITHOUT WARRANTY" in licence
    assert "ICWSM-14" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_shipped_files_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


def test_the_vader_result_belongs_to_the_shipped_test_split(rows):
    result = json.loads((FOLDER / "vader.json").read_text(encoding="utf-8"))
    pairs = [(text_of(row), row["messages"][1]["content"]) for row in rows["test"]]
    lines = "".join(f"{text}\t{label}\n" for text, label in pairs)
    assert result["rows_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert result["num_rows"] == len(pairs)
    best = result["settings"][result["best"]]
    right = sum(best["confusion"][label][label] for label in LABELS)
    assert best["num_right"] == right == max(setting["num_right"] for setting in result["settings"].values())
    assert best["accuracy_95"][0] < best["accuracy"] < best["accuracy_95"][1]
