"""Every row is counted as used, cut or lost; too many losses stop the run; held-out rows are apart by their text."""

import datetime
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import byte_tokenizer

from deltaw.data.chat import Encoder
from deltaw.data.encoding import LazyEncoder
from deltaw.data.formats import Row, parse_sources, read_rows
from deltaw.data.prepare import cache_key, held_out_share, prepare, share_of
from deltaw.errors import DataError, DiskError


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
    noted = tuple({**message, "id": number, "at": datetime.datetime.now()} for number, message in enumerate(messages))
    assert share_of(Row("b.jsonl", 99, noted)) == share
    thought = tuple({**message, "reasoning_content": "hm"} for message in messages)
    assert share_of(Row("b.jsonl", 99, thought)) != share
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


# -- the cache ---------------------------------------------------------------------------------------------------------


class Counting(Encoder):
    """An encoder that counts the rows it was asked for."""

    asked = 0

    def encode_many(self, rows):
        for found in super().encode_many(rows):
            self.asked += 1
            yield found


def test_a_second_start_encodes_nothing_and_finds_the_same(tmp_path):
    file = write(tmp_path / "a.jsonl", pair("one"), "{", pair("two"), pair("two"))
    first, again = (Counting(byte_tokenizer(), 60) for _ in range(2))
    data = prepare([file], first, tmp_path / "cache", refuse_above=None)
    cached = prepare([file], again, tmp_path / "cache", refuse_above=None)
    assert (first.asked, again.asked) == (4, 0)
    assert cached.report.as_dict() == data.report.as_dict() and texts(cached, again.tokenizer) == texts(
        data, again.tokenizer
    )
    assert [found.code for found in cached.report.findings] == ["unreadable", "duplicate"]


def test_whatever_changes_the_tokens_changes_the_entry(tmp_path):
    file = write(tmp_path / "a.jsonl", pair("one"), pair("two"))
    other = write(tmp_path / "b.jsonl", pair("one"), pair("twp"))
    template = byte_tokenizer()
    template.chat_template = "{{ ' ' }}" + template.chat_template
    special = byte_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["<x>"]})
    plain = Encoder(byte_tokenizer(), 60)
    keys = [cache_key(parse_sources([str(file)]), one) for one in (
        plain, Encoder(template, 60), Encoder(special, 60), Encoder(byte_tokenizer(), 61),
        Encoder(byte_tokenizer(), 60, "last"), Encoder(byte_tokenizer(), 60, allow=("control-tokens",)),
    )]  # fmt: skip
    keys += [cache_key(parse_sources([text]), plain) for text in (str(other), f"{file}::cap=1", f"{file}::text=prompt")]
    assert len(set(keys)) == len(keys)
    assert cache_key(parse_sources([str(file)]), Encoder(byte_tokenizer(), 60)) == keys[0]
    assert cache_key(parse_sources([f"{file}::weight=3"]), plain) == keys[0], "a weight changes no token"


def test_a_file_that_changes_in_place_is_seen(tmp_path, encoder):
    file = write(tmp_path / "a.jsonl", pair("one"))
    first = prepare([file], encoder, tmp_path / "cache").report.digest
    write(file, pair("two"))
    os.utime(file, ns=(1, 1))
    assert prepare([file], encoder, tmp_path / "cache").report.digest != first


def test_an_encoder_is_not_opened_where_the_entry_stands(tmp_path):
    file = write(tmp_path / "a.jsonl", pair("one"))
    real = Encoder(byte_tokenizer(), 60)
    prepare([file], real, tmp_path / "cache")
    lazy = LazyEncoder(lambda: pytest.fail("opened"), real.digest)
    assert prepare([file], lazy, tmp_path / "cache").report.used == 1


def test_what_a_killed_process_left_is_removed_and_what_one_still_writes_is_not(tmp_path, encoder):
    begun = [tmp_path / "cache" / name for name in (".left", ".written")]
    for folder in begun:
        folder.mkdir(parents=True)
        (folder / "all.tokens").write_bytes(b"1234")
        os.utime(folder, (1, 1))  # when its last name was added
    os.utime(begun[0] / "all.tokens", (1, 1))
    prepare([write(tmp_path / "a.jsonl", pair("one"))], encoder, tmp_path / "cache")
    assert not begun[0].exists() and begun[1].exists()


def test_a_write_that_fails_leaves_no_entry(tmp_path, encoder):
    def broken(_rows):
        raise OSError(28, "No space left on device")

    many = write(tmp_path / "many.jsonl", *[pair(f"q {n}") for n in range(300)])
    with pytest.raises(DiskError, match="No space left"):
        prepare([many], encoder, tmp_path / "cache", progress=broken)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "file", ["all.tokens", "all.weights", "all.offsets", "all.rows", "all.files", "all.shares", "report.json"]
)
@pytest.mark.parametrize("left", [0, 4])
def test_an_entry_that_was_cut_short_is_made_anew(tmp_path, file, left):
    data = write(tmp_path / "a.jsonl", pair("one"), pair("two"))
    first, again = (Counting(byte_tokenizer(), 60) for _ in range(2))
    whole = prepare([data], first, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    content = (entry / file).read_bytes()
    (entry / file).unlink()  # the first data set still maps it
    (entry / file).write_bytes(content[:left])
    made = prepare([data], again, tmp_path / "cache")
    assert again.asked == 2 and made.report.digest == whole.report.digest == made.store.digest()
    assert texts(made, again.tokenizer) == texts(whole, again.tokenizer)


def test_entries_that_nobody_used_for_a_month_are_forgotten(tmp_path, encoder):
    old, new = (write(tmp_path / f"{name}.jsonl", pair(name)) for name in ("old", "new"))
    prepare([old], encoder, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    os.utime(entry, (1, 1))
    prepare([old], encoder, tmp_path / "cache")  # used again: it stays
    prepare([new], encoder, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    os.utime(entry, (1, 1))
    prepare([write(tmp_path / "more.jsonl", pair("more"))], encoder, tmp_path / "cache")
    assert not entry.exists() and len(list((tmp_path / "cache").iterdir())) == 2
    begun, fresh = tmp_path / "cache" / ".of-a-killed-process", tmp_path / "cache" / ".just-now"
    for folder in (begun, fresh):
        folder.mkdir()
    os.utime(begun, (1, 1))
    prepare([write(tmp_path / "last.jsonl", pair("last"))], encoder, tmp_path / "cache")
    assert fresh.exists() and not begun.exists()


@pytest.mark.parametrize("threads", ["1", "4"])
def test_tokens_and_their_order_do_not_depend_on_the_number_of_threads(tmp_path, encoder, threads):
    """In a process of its own, since the tokenizer's threads are chosen once."""
    file = write(
        tmp_path / "a.jsonl", *[pair(f"question {number} é", "yes" * (number % 7 + 1)) for number in range(700)]
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom models import byte_tokenizer\n"
        "from deltaw.data.chat import Encoder\nfrom deltaw.data.prepare import prepare\n"
        "data = prepare([Path(sys.argv[2])], Encoder(byte_tokenizer(), 60), Path(sys.argv[3]))\n"
        "print(data.report.digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent.parent), str(file), str(tmp_path / "cache")],
        env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == prepare([file], encoder, tmp_path / "here").report.digest


def test_any_conversation_trains_exactly_its_answers_with_their_ends(encoder):
    """2,000 conversations drawn at random."""
    random_ = random.Random(0)
    alphabet = ["a", "b", " ", "\n", "é", "\U0001f600", ".", "<", "|", "im_end", "0"]
    rows = []
    for number in range(2000):

        def text():
            drawn = "".join(random_.choices(alphabet, k=random_.randint(1, 12)))
            return drawn if drawn.strip() else drawn + "x"

        messages = [{"role": "system", "content": text()}] * random_.randint(0, 1)
        for _ in range(random_.randint(1, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        rows.append(Row("drawn", number, tuple(messages)))
    one = Encoder(byte_tokenizer(), 1000)
    for row, found in zip(rows, one.encode_many(rows), strict=True):
        (example,) = found.examples
        answers = [message["content"] + "<|im_end|>" for message in row.messages if message["role"] == "assistant"]
        assert one.tokenizer.decode(example.tokens[example.weights > 0]) == "".join(answers)
        assert one.tokenizer.decode(example.tokens) == one.render(row.messages)
