"""Tables in the docs are those that benchmarks make of their own figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_table_beside_the_incumbent_is_that_of_the_measured_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    incumbent = importlib.import_module("incumbent")
    rows = json.loads(incumbent.RESULTS.read_text())["rows"]
    assert rows.keys() == incumbent.ROWS.keys()
    assert incumbent.table(rows) in (ROOT / "docs" / "reliability.md").read_text(), "paste what the script prints"


def test_the_table_of_bases_larger_than_memory_is_that_of_the_measured_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    big_base = importlib.import_module("big_base")
    rows = {row["name"]: row for row in json.loads(big_base.RESULTS.read_text())}
    guide = (ROOT / "docs" / "guides" / "memory.md").read_text()
    assert big_base.table(rows) in guide, "paste what table() gives"
    kept, memory = big_base.answers(rows)["1.7b fp32 speed kept"]["median"], rows["1.7b fp32 in memory"]["peak_bytes"]
    limit = rows["1.7b fp32 streamed"]["setup"]["limit_mb"] / 1000
    said = f"1.7B takes {memory / 1e9:.1f} GB there in memory, and streamed {limit:g} GB at {kept:.2f} of the speed"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_what_is_said_of_plans_is_what_the_grid_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plan_accuracy = importlib.import_module("plan_accuracy")
    found = json.loads((plan_accuracy.RESULTS / "plan_accuracy.json").read_text())
    assert found["errors"] == plan_accuracy.errors(found["rows"])
    assert plan_accuracy.sentence(found["errors"]["all"]) in " ".join((ROOT / "README.md").read_text().split())
    fitted = sum(row["case"]["fitted"] for row in found["rows"])
    said = f"{fitted} of the {len(found['rows'])} are those by which its constants were chosen"
    assert said in " ".join((ROOT / "README.md").read_text().split())
    most = 100 * found["errors"]["held out"]["peak_most_under"]
    said = f"of the others none is planned more than {most:.1f} % too low"
    assert said in " ".join((ROOT / "README.md").read_text().split())
    steady = [
        json.loads(line) for line in (plan_accuracy.RESULTS / "plan_accuracy_steady.jsonl").read_text().splitlines()
    ]
    times = plan_accuracy.errors(steady)["all"]
    said = f"[{100 * times['time_median']:.0f} and {100 * times['time_most']:.0f} %](benchmarks/results/plan_accuracy_steady"
    assert said in (ROOT / "README.md").read_text()
    assert {case.name for case in plan_accuracy.CASES} == {row["name"] for row in found["rows"]}
    guide = (ROOT / "docs" / "guides" / "memory.md").read_text()
    assert plan_accuracy.table(found["rows"]) in guide
    assert plan_accuracy.beside(found["errors"]) in " ".join(guide.split())
    in_fp32 = json.loads((plan_accuracy.RESULTS / "plan_accuracy_fp32.json").read_text())
    assert in_fp32["errors"] == plan_accuracy.errors(in_fp32["rows"])
    assert plan_accuracy.sentence(in_fp32["errors"]["all"]) in " ".join(guide.split())
    fitted = sum(row["case"]["fitted"] for row in in_fp32["rows"])
    assert f"({fitted} of the [{len(in_fp32['rows'])} runs]" in " ".join(guide.split())


def test_what_is_said_of_layers_that_stay_as_they_are_stored_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stored_layers = importlib.import_module("stored_layers")
    guide = (ROOT / "docs" / "guides" / "memory.md").read_text()
    assert stored_layers.sentence(json.loads(stored_layers.RESULT.read_text())) in " ".join(guide.split())


@pytest.mark.parametrize("task", ["phonemes", "sentiment"])
def test_the_tables_of_sweeps_are_those_of_the_measured_figures(task):
    ranks = json.loads((ROOT / "benchmarks" / "results" / "rank_calibration.json").read_text())["tasks"][task]["ranks"]
    guide = (ROOT / "docs" / "guides" / "measuring-rank.md").read_text().replace("−", "-")
    for rank, found in ranks.items():
        behind = "{nats:.3f} ({low:.3f} to {high:.3f}) ".format(**found["behind"]) if found["behind"]["nats"] else ""
        assert f"| {rank} | {found['loss']:.3f} | {behind}|" in guide


def test_the_table_of_ways_to_choose_a_rank_is_that_of_the_measured_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    calibration = importlib.import_module("rank_calibration")
    found = json.loads(calibration.SUMMARY.read_text())["tasks"]
    guide = (ROOT / "docs" / "guides" / "measuring-rank.md").read_text()
    assert calibration.ways_table(found) in guide, "paste what the script prints"
    said = " ".join(guide.split())
    assert f"{found['sentiment']['cells']} of 42 cells of sentiment and {found['phonemes']['cells']} of 42" in said
    times = json.loads(calibration.SUMMARY.read_text())["cost"]["time_ratios"]
    assert f"as long as apart ({times['step_seconds']:.2f} times" in said
    assert f"{times['process_seconds']:.2f} of the time of five processes" in said


def test_what_is_said_of_planted_ranks_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = json.loads(importlib.import_module("rank_calibration").SUMMARY.read_text())["planted"]
    scores, rows = found["scores"], found["usual_rows"]
    right = [scores[share]["covers"] for share in ("95", "99")]
    pages = [" ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/guides/measuring-rank.md")]
    assert f"finds {right[0]} of {rows} at 95 % of the gain and {right[1]} at 99 %" in pages[0]
    assert f"At 95 % of the gain {right[0]} of {rows} are found exactly; at 99 % {right[1]} are" in pages[1]
    energy, effective = (scores[name]["within_octave"] for name in ("energy_90", "effective"))
    assert f"energy@90 is within an octave in {energy} of {rows}, effective rank in {effective}." in pages[1]


def test_what_is_said_of_start_up_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    start_up = importlib.import_module("start_up")
    said = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    assert start_up.sentence(json.loads(start_up.RESULTS.read_text())) in said


def test_what_the_readme_says_of_the_measured_rows_is_what_they_hold():
    results, readme = ROOT / "benchmarks" / "results", " ".join((ROOT / "README.md").read_text().split())
    sweep = json.loads((results / "versus_sweep.json").read_text())
    assert f"fastest setting of its own sweep, {len(sweep)} in all" in readme


def test_the_table_of_speeds_is_that_of_the_measured_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    summary = importlib.import_module("rivals.summary")
    found = json.loads((ROOT / "benchmarks" / "results" / "versus.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert " ".join(summary.readme_table(found).split()) in readme, "paste what it gives"
    assert all(sentence in readme for sentence in summary.readme_sentences(found)), summary.readme_sentences(found)


def test_what_is_said_of_shared_beginnings_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shared_scoring = importlib.import_module("shared_scoring")
    stored = json.loads(shared_scoring.RESULT.read_text())
    found, common = stored["files"], stored["demo_common_tokens"]
    assert shared_scoring.sentence(found, common) in " ".join((ROOT / "CHANGELOG.md").read_text().split())
    for ways in found.values():
        assert ways["shared"] == pytest.approx({**ways["alone"], "seconds": ways["shared"]["seconds"]}, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "pages", "words"),
    [
        ("passes", ("README.md", "CHANGELOG.md", "docs/architecture.md"), "a step takes {} less"),
        ("passes_fp32", ("README.md", "CHANGELOG.md"), "{} less"),
    ],
)
def test_what_is_said_of_the_compiled_passes_is_what_was_measured(name, pages, words):
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    saved = [1 - 1 / row["ratio"] for row in found["workloads"]]
    said = words.format(f"{100 * min(saved):.0f} to {100 * max(saved):.0f} %")
    for page in pages:
        assert said in " ".join((ROOT / page).read_text().split()), (page, said)
