"""Every row is counted as used, cut or lost; too many losses stop the run; held-out rows are apart by their text."""

import json

import numpy as np
import pytest
from models import byte_tokenizer

from deltaw.data.chat import Encoder
from deltaw.data.formats import Row, read_rows
from deltaw.data.prepare import held_out_share, prepare, share_of
from deltaw.errors import DataError


@pytest.fixture
def encoder():
    return Encoder(byte_tokenizer(), 60)


def pair(prompt, answer="yes"):
    return {"prompt": prompt, "completion": answer}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(data, tokenizer):
    return [tokenizer.decode(data.store[document].tokens) for document in range(len(data.store))]


def split(files, encoder, tmp_path, **options):
    data = prepare(files, encoder, tmp_path / "cache", **options)
    return data.split(held_out_share(data.row_shares))


def test_a_report_counts_rows_and_names_faults(tmp_path, encoder):
    files = [
        write(tmp_path / "a.jsonl", pair("one"), "{", pair("two", "x" * 50), pair("p" * 80), pair("three")),
        write(tmp_path / "b.txt", "t" * 200),
        write(tmp_path / "c.txt", "u" * 20),
    ]
    data = prepare(files, encoder, tmp_path / "t", refuse_above=0.5)
    report = data.report
    assert (report.rows, report.used, report.cut, report.lost) == (7, 5, 1, 2)
    assert [found.code for found in report.findings] == ["unreadable", "too-long", "answer-cut"]
    assert [found.rows for found in report.findings] == [[("a.jsonl", n)] for n in (2, 4, 3)]
    assert len(data.store) == 3 + 4 + 1  # a text of 202 tokens makes 4 pieces of at most 60, which overlap by one
    assert len(data.row_shares) == 5 and [data.store.place(d) for d in (2, 3, 6, 7)] == [
        ("a.jsonl", 5), ("b.txt", 1), ("b.txt", 1), ("c.txt", 1),
    ]  # fmt: skip
    assert report.formats == {"a.jsonl": {"prompt and completion": 3}, "b.txt": {"text": 1}, "c.txt": {"text": 1}}
    assert json.loads(json.dumps(report.as_dict()))["findings"][0]["examples"][0].startswith(
        "a.jsonl, row 2: not valid"
    )


def test_the_stored_texts_are_the_rows_in_their_order(tmp_path, encoder):
    data = prepare([write(tmp_path / "a.jsonl", pair("one"), pair("two", "no"))], encoder, tmp_path / "t")
    assert texts(data, encoder.tokenizer) == [
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for prompt, answer in (("one", "yes"), ("two", "no"))
    ]
    assert data.store.rows.tolist() == [1, 2] and data.prompts == []
    kept = prepare([tmp_path / "a.jsonl"], encoder, tmp_path / "t", keep_rows=True)
    assert [row.answer for row in kept.prompts] == ["yes", "no"]


def test_one_percent_of_the_rows_may_be_lost_and_not_one_more(tmp_path, encoder):
    good = [pair(f"question {number}") for number in range(198)]
    assert prepare([write(tmp_path / "a.jsonl", *good, "{", "{")], encoder, tmp_path / "t").report.lost == 2
    bad = write(tmp_path / "b.jsonl", *good[:-1], "{", "{", "[]")
    with pytest.raises(DataError, match=r"3 of 200 rows \(1\.5%\)") as caught:
        prepare([bad], encoder, tmp_path / "t")
    assert "b.jsonl, row 200: a row must be an object" in str(caught.value) and "--allow-lost 0.015" in str(
        caught.value
    )
    assert prepare([bad], encoder, tmp_path / "t", refuse_above=0.015).report.used == 197


def test_the_advised_allowance_is_always_enough(tmp_path, encoder):
    file = write(tmp_path / "a.jsonl", *[pair(f"question {number}") for number in range(67)], *["{"] * 2)
    with pytest.raises(DataError) as caught:
        prepare([file], encoder, tmp_path / "t")
    advised = float(str(caught.value).rsplit("--allow-lost ", 1)[1].rstrip("."))
    assert prepare([file], encoder, tmp_path / "t", refuse_above=advised).report.lost == 2


def test_nothing_usable_is_refused_with_the_reasons(tmp_path, encoder):
    with pytest.raises(DataError, match="holds no rows"):
        prepare([write(tmp_path / "a.jsonl", "")], encoder, tmp_path / "t")
    with pytest.raises(DataError, match=r"None of the 2 rows can be used:\n.*row 1") as caught:
        prepare([write(tmp_path / "a.jsonl", "{", "[]")], encoder, tmp_path / "t", refuse_above=1.0)
    assert "row 2" in str(caught.value)


@pytest.mark.parametrize("rows", [2, 3, 20, 200, 1000])
def test_held_out_rows_are_a_twentieth_and_apart_from_the_rest(tmp_path, encoder, rows):
    file = write(tmp_path / "a.jsonl", *[pair(f"question {number}") for number in range(rows)])
    train, held_out = split([file], encoder, tmp_path)
    a, b = (texts(part, encoder.tokenizer) for part in (train, held_out))
    assert len(b) == max(1, rows // 20) and len(a) == rows - len(b)
    assert not set(a) & set(b) and len(set(a) | set(b)) == rows
    assert (len(train.row_shares), len(held_out.row_shares)) == (len(a), len(b))
    assert train.report.digest != held_out.report.digest


def test_at_most_five_hundred_rows_are_held_out(tmp_path):
    file = write(tmp_path / "a.jsonl", *[{"text": f"text {number}"} for number in range(12_000)])
    shares = np.asarray([share_of(row) for row in read_rows([file])])
    assert (shares < held_out_share(shares)).sum() == 500


def test_equal_texts_stay_together_whatever_row_they_stand_in(tmp_path, encoder):
    for copies in (2, 7, 30):
        rows = [pair(f"question {number % 20}") for number in range(20 * copies)]
        train, held_out = split([write(tmp_path / "a.jsonl", *rows)], encoder, tmp_path)
        a, b = (texts(part, encoder.tokenizer) for part in (train, held_out))
        assert b and not set(a) & set(b) and len(a) + len(b) == len(rows)
        assert len(b) == copies  # a twentieth is one of 20 texts, with all its copies


def test_nothing_is_held_out_where_all_rows_are_equal_or_there_is_one():
    assert held_out_share(np.full(50, 0.3)) == held_out_share(np.asarray([0.5])) == held_out_share(np.zeros(0)) == 0


def test_a_rows_share_depends_on_what_it_says_and_not_on_where_it_stands():
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    share = share_of(Row("a.jsonl", 1, messages))
    assert 0 <= share < 1 and share_of(Row("b.jsonl", 99, messages)) == share
    assert share_of(Row("a.jsonl", 1, messages, tools=({"name": "add"},))) != share
    assert share_of(Row("a.jsonl", 1, messages[::-1])) != share


def test_the_split_does_not_change_with_the_order_of_the_rows(tmp_path, encoder):
    rows = [pair(f"question {number}") for number in range(100)]
    first = split([write(tmp_path / "a.jsonl", *rows)], encoder, tmp_path)[1]
    held_out = set(texts(first, encoder.tokenizer))
    again = split([write(tmp_path / "a.jsonl", *rows[::-1])], encoder, tmp_path)[1]
    assert set(texts(again, encoder.tokenizer)) == held_out


def test_unreadable_rows_are_counted_once_for_the_whole_file(tmp_path, encoder):
    """One bad line in 200 is 0.5 % of the file, though it would be 9 % of the held-out rows."""
    rows = [pair(f"question {number}") for number in range(199)]
    train, held_out = split([write(tmp_path / "a.jsonl", *rows, "{")], encoder, tmp_path)
    assert (train.report.rows, train.report.lost) == (200, 1)
    assert len(train.store) + len(held_out.store) == 199


def test_a_digest_is_that_of_the_tokens_and_their_weights(tmp_path, encoder):
    def digest(*rows):
        return prepare([write(tmp_path / "a.jsonl", *rows)], encoder, tmp_path / "t").report.digest

    first = digest(pair("one"), pair("two"))
    same = {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "yes"}]}
    assert first == digest(pair("one"), same)
    others = [digest(pair("two"), pair("one")), digest(pair("one")), digest(pair("one"), pair("two", "yet"))]
    assert len({first, *others}) == 4


def test_few_answers_are_labels_and_many_are_not(tmp_path, encoder):
    def labels(answers):
        file = write(tmp_path / "a.jsonl", *[pair(f"q {n}", answer) for n, answer in enumerate(answers)])
        return prepare([file], encoder, tmp_path / "t", keep_rows=True).labels()

    found = labels(["good", "bad", " good ", "bad", "bad", "good"])
    assert found.names == ["bad", "good"] and found.of_document == [1, 0, 1, 0, 0, 1]
    assert labels(["good", "bad", "fair", "good", "bad"]) is None  # fewer than three rows for each
    assert labels(["good"] * 9) is None
    assert labels([f"answer {number % 21}" for number in range(100)]) is None
    assert prepare([write(tmp_path / "b.txt", "some text")], encoder, tmp_path / "t", keep_rows=True).labels() is None
