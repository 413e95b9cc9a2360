"""The report says what the files say, of a whole run or of what a crash left; their text cannot act in the page."""

import json
import math
import re

import numpy as np
import pytest
import yaml
from pages import Page

from deltaw.errors import DiskError, UsageError
from deltaw.report import curves, headline, plots, quantities, read_contents, sweep_page, tables, write_report

HOSTILE = '</title><script>alert(1)</script><img src=x onerror="alert(2)"> $x^{ & {{ 7*7 }} \' 😀 \x00 \ud800'
MODULES = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576)}
MODULES |= {"self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576)}
MODULES |= {"mlp.down_proj": (576, 1536)}
SECTIONS = ["figures", "curves", "results", "samples", "adapted", "settings", "data", "origin", "next"]


def step_lines(num_steps):
    """A run like the demo's: a noisy loss that falls fast and then slowly, warm-up and cosine, one slow step."""
    random = np.random.default_rng(7)
    lines = []
    for step in range(1, num_steps + 1):
        done, trained = step / num_steps, int(random.integers(20, 60))
        tokens = int(random.integers(900, 1100))
        loss = 0.45 + 1.9 * math.exp(-9 * done) + random.gamma(2, 1.2 / trained)
        line = {"step": step, "loss": loss, "tokens": tokens, "computed_tokens": tokens, "trained_tokens": trained}
        line["seconds"] = tokens / random.normal(560, 18) * (4 if step == num_steps // 3 else 1)
        line["lr"] = 3e-4 * min(step / 10, 0.5 + 0.5 * math.cos(math.pi * done))
        line["grad_norm"] = 0.5 + 2 * math.exp(-6 * done) + random.gamma(1.5, 0.2)
        lines.append({**line, "peak_bytes": int(7.1e8 + 9e7 * min(1, 3 * done))})
    return lines


def evaluation_lines(num_steps, every):
    losses = ((step, 0.52 + 1.6 * math.exp(-9 * step / num_steps)) for step in range(0, num_steps + 1, every))
    return [{"step": step, "eval_loss": loss, "eval_tokens": 9012, "eval_seconds": 3.2} for step, loss in losses]


def targets():
    return [
        {"name": f"model.layers.{layer}.{name}", "kind": "linear", "shape": list(shape), "rank": 16, "alpha": 32}
        | {"parameters": 16 * sum(shape)}
        for layer in range(30)
        for name, shape in MODULES.items()
    ]


def summary(num_steps):
    return {
        "status": "done",
        "verb": "train",
        "message": "",
        "steps": num_steps,
        "best_step": num_steps,
        "best_eval_loss": 0.52019,
        "train_seconds": 380.4,
        "peak_bytes": 803_210_240,
        "tokens": 121_212,
        "trained_tokens": 4_711,
        "gemm_gflops": 181.3,
        "device": "cpu",
        "dtype": "float32",
        "machine": {
            "cpu_name": "Example CPU at 2.5 GHz",
            "cores": 2,
            "memory_bytes": 8_000_000_000,
            "hostname": "secret",
        },
        "sizes": {"adapter_bytes": 19_560_960, "base_bytes": 269_060_552}
        | {"trained_parameters": 4_884_480, "base_parameters": 134_515_008},
        "targets": targets(),
        "origin": {"base": "smollm2-135m", "base_digest": "sha256:" + "0123456789abcdef" * 4}
        | {"template_digest": "sha256:" + "ab" * 32, "data_digest": "sha256:" + "cd" * 32}
        | {"config_digest": "sha256:" + "ef" * 32, "deltaw_version": "0.1.0"},
        "data": {
            "train": {"rows": 8000, "used": 7990, "tokens": 412_345, "trained_tokens": 15_980, "longest_tokens": 187},
            "eval": {"rows": 1200, "used": 1200, "tokens": 61_234, "trained_tokens": 2_400, "longest_tokens": 143},
        },
        "results": [
            {"label": "base model", "accuracy": 0.531, "low": 0.503, "high": 0.559, "rows": 1200, "loss": 2.118}
            | {"perplexity": 8.314},
            {"label": "VADER rules", "accuracy": 0.634, "low": 0.606, "high": 0.661, "rows": 1200},
            {"label": "adapter", "accuracy": 0.782, "low": 0.758, "high": 0.804, "rows": 1200, "loss": 0.5202}
            | {"perplexity": 1.682},
        ],
        "samples": [
            {
                "prompt": f"What is the tone of this text: positive, negative or neutral?\n\n{text}",
                "reference": tone,
                "before": f"The text is rather {before}, because the writer speaks about it in a matter-of-fact way.",
                "after": tone,
            }
            for text, tone, before in [
                ("The battery lasts two days and the screen is a joy.", "positive", "neutral"),
                ("It broke in a week. Twice.", "negative", "neutral"),
                ("Arrived on Tuesday in a brown box.", "neutral", "positive"),
                ("Not the worst film of the year, but it does try.", "negative", "positive"),
                ("I'd buy it again.", "positive", "neutral"),
                ("A plot as thin as its paper.", "negative", "neutral"),
            ]
        ],
    }


SETTINGS = {
    "base": {"value": "smollm2-135m", "source": "flag"},
    "rank": {"value": 16, "source": "rule: parameter budget"},
    "alpha": {"value": 32, "source": "default"},
    "learning_rate": {"value": 0.0003, "source": "rule: model size"},
    "targets": {"value": ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"], "source": "recipe"},
    "memory": {"value": "4GB", "source": "flag"},
    "dropout": {"value": 0.0, "source": "default"},
    "seed": {"value": 0, "source": "default"},
    "recompute": {"value": False, "source": "default"},
    "data": {"value": "reviews.jsonl", "source": "flag"},
}


def write_run(folder, num_steps=120, every=20, **changes):
    """A run folder with everything in it; `changes` replace entries of the summary."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False), encoding="utf-8")
    lines = step_lines(num_steps) + evaluation_lines(num_steps, every)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary(num_steps) | changes), encoding="utf-8")
    return folder


def sentence_of(run):
    return headline.sentence(read_contents(run)).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "snippets-r16")


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run))


def test_every_section_and_plot_is_present(page):
    assert [value for value in page.values("id") if value in SECTIONS] == SECTIONS
    assert page.tags.count("figure") == 5
    assert page.tags.count("svg") == 10
    for svg in re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL):
        assert 'role="img"' in svg and 'aria-label="' in svg and "<title>" in svg


def test_numbers_in_the_page_equal_those_in_the_files(page, run):
    speeds = [line["tokens"] / line["seconds"] for line in step_lines(120)]
    expected = ["Accuracy on 1,200 rows rose from 53.1 % to 78.2 % in 120 steps (6 min 20 s).", "+25.1 points"]
    expected += ["803 MB", "19.6 MB", "269 MB", "3.6 %", "4.88 M beside 135 M frozen", "4,711", "181 GFLOP/s"]
    expected += [f"{np.median(speeds):.0f}", "8,000", "7,990", "412,345", "50.3 to 55.9 %", "2.12", "8.31", "1.68"]
    expected += ["0.0003", "rule: model size", "4,884,480", "552,960", "576 × 576", "sha256:" + "ef" * 32, "8.00 GB"]
    expected += [f"{line['eval_loss']:.4f}" for line in evaluation_lines(120, 20)]
    assert [text for text in expected if text not in page.text] == []


def test_result_without_significance_is_reported_as_such(tmp_path):
    close = [{"label": "base model", "accuracy": 0.53, "low": 0.50, "high": 0.56, "rows": 300}]
    close += [{"label": "adapter", "accuracy": 0.55, "low": 0.52, "high": 0.58, "rows": 300}]
    text = sentence_of(write_run(tmp_path / "run", results=close))
    assert "rose from 53.0 % to 55.0 %" in text
    assert "the intervals overlap, so it may be chance" in text


def test_a_worse_adapter_is_not_called_better(tmp_path):
    worse = [{"label": "base model", "accuracy": 0.78}, {"label": "adapter", "accuracy": 0.53}]
    assert "Accuracy fell from 78.0 % to 53.0 %" in sentence_of(write_run(tmp_path / "run", results=worse))


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / "run", num_steps=12)
    hostile = summary(12) | {"status": HOSTILE, "verb": HOSTILE, "message": HOSTILE, "machine": {HOSTILE: HOSTILE}}
    hostile["origin"] = {"base": HOSTILE, "deltaw_version": HOSTILE}
    hostile["data"] = {HOSTILE: {HOSTILE: HOSTILE}}
    hostile["targets"] = [
        {"name": HOSTILE, "kind": HOSTILE, "shape": [HOSTILE], "rank": HOSTILE, "parameters": HOSTILE}
    ]
    hostile["results"] = [
        {"label": HOSTILE, "accuracy": 0.5},
        {"label": "adapter", "accuracy": HOSTILE, "rows": HOSTILE},
    ]
    hostile["samples"] = [dict.fromkeys(("prompt", "reference", "before", "after"), HOSTILE)]
    (run / "summary.json").write_text(json.dumps(hostile), encoding="utf-8")
    settings = {HOSTILE[:-4]: {"value": [HOSTILE[:-4]], "source": HOSTILE[:-4]}, "plain": HOSTILE[:-4]}
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    page = Page(write_report(run))
    assert not {"script", "img", "iframe", "object", "link", "base", "form"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.tags.count("title") == 11  # the page's and one in each of 10 plots
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "{{ 7*7 }}" in page.text


def test_page_loads_nothing(page):
    assert "://" not in page.source
    assert page.values("src") == []
    assert [value for value in page.values("href") if not value.startswith("#")] == []
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert "default-src 'none'" in page.source


def test_plots_are_themed_and_refer_only_to_their_own_ids(page):
    assert [colour for colour in plots.SENTINELS if colour in page.source] == []
    for svg in re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL):
        # Whatever colour is left would be invisible in one of the two themes.
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
        assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)) == {
            pair for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg) if f'id="{"".join(pair)}"' in svg
        }
        assert "<text" in svg
    ids = page.values("id")
    assert len(ids) == len(set(ids))


def test_private_names_stay_out(page, run):
    assert "secret" not in page.source
    assert str(run.parent) not in page.source


def test_same_folder_gives_the_same_page(run, page):
    assert Page(write_report(run, read_contents(run))).source == page.source
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]


def test_config_alone_gives_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    page = Page(write_report(tmp_path))
    assert [value for value in page.values("id") if value in SECTIONS] == ["settings", "next"]
    assert "unfinished" in page.text and "There is no summary.json." in page.text
    assert "reviews.jsonl" in page.text


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.yaml"):
        write_report(tmp_path)


def test_crashed_run_shows_what_it_left(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text('{"status": "do', encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 121, "loss": NaN, "tokens": 1000, "seconds": 0}\n{"step": 122, "lo')
    page = Page(write_report(run))
    assert "1 of 129 lines of metrics.jsonl could not be read." in page.text
    assert "summary.json could not be read" in page.text
    assert page.tags.count("figure") == 5
    assert "Held-out loss fell from 2.12 at step 0 to 0.520 at step 120, its best; 121 steps" in page.text


def test_a_run_that_got_worse_from_its_first_evaluation_on_is_said_to(tmp_path):
    run = write_run(tmp_path / "run", results=[], best_step=20, best_eval_loss=0.52)
    lines = step_lines(120) + [{"step": step, "eval_loss": 0.5 + step / 1000} for step in range(20, 121, 20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = "Held-out loss was never better than 0.520, where it was first measured, at step 20; 120 steps"
    assert sentence_of(run).startswith(said)


def test_the_base_alone_is_what_a_run_is_compared_with_where_it_was_measured(tmp_path):
    run = write_run(tmp_path / "run", results=[], best_step=20, best_eval_loss=0.52, base_eval_loss=2.5)
    assert sentence_of(run).startswith(
        "Held-out loss fell from 2.50 without the adapter to 0.520 at step 20, its best;"
    )
    run = write_run(tmp_path / "worse", results=[], best_step=20, best_eval_loss=0.52, base_eval_loss=0.4)
    assert sentence_of(run).startswith("Held-out loss rose from 0.400 without the adapter to 0.520")


def test_a_plan_stands_beside_what_the_run_took(tmp_path):
    plan = {
        "peak_bytes": 1.2e9, "peak_bytes_interval": [1e9, 1.3e9], "peak_phase": "step", "step_seconds": 2.0,
        "step_seconds_interval": [1.5, 3.2], "choice": {"micro_tokens": 512, "stream": False},
        "phases": {"step": {"base": 2.7e8, "loss": 0}},
    }  # fmt: skip
    run = write_run(tmp_path / "run", plan=plan)
    text = Page(write_report(run)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "1.20 GB" in text and "1.00 GB to 1.30 GB" in text and "803 MB" in text
    assert "4 min 00 s" in text and "3 min 00 s to 6 min 24 s" in text and "6 min 20 s" in text
    assert "base 270 MB" in text and "loss" not in text.split("At the peak")[1].split("How it was fitted")[0]
    assert "micro tokens: 512" in text
    assert "plan" in Page(write_report(run)).values("id")


def test_the_peak_is_that_of_every_process_that_the_run_has_had(tmp_path):
    run = write_run(tmp_path / "run", peak_bytes=500_000_000)
    assert "800 MB" in Page(write_report(run)).text


def test_a_report_says_nothing_of_the_folders_above_and_offers_what_can_be_done(tmp_path):
    run = write_run(tmp_path / "run")
    page = Page(write_report(run))
    assert "--resume" not in page.text
    paths = {name: {"value": f"/srv/alice/acme/{name}", "source": "given"} for name in ("model", "adapter", "out")}
    paths |= {
        name: {"value": [f"/srv/alice/{name}.jsonl::weight=2"], "source": "given"} for name in ("data", "eval_data")
    }
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS | paths))
    origin = {"base": "b", "config": "{}", "template_examples": "[1, 2, 3]"}
    (run / "summary.json").write_text(
        json.dumps(summary(120) | {"status": "interrupted", "origin": origin, "data": {}})
    )
    page = Page(write_report(run))
    assert "alice" not in page.source and "data.jsonl::weight=2" in page.text
    assert "Template examples" not in page.text and "[1, 2, 3]" not in page.text
    assert "deltaw train --resume run" in page.text and "deltaw rank run --data FILE" in page.text


def test_steps_repeated_after_a_resume_count_once(tmp_path):
    run = write_run(tmp_path / "run", num_steps=30)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(step_lines(30)[19] | {"loss": 9.0}) + "\n")
    contents = read_contents(run)
    assert [line["step"] for line in contents.steps] == list(range(1, 31))
    assert contents.steps[19]["loss"] == 9.0


def test_one_step_is_enough(tmp_path):
    assert Page(write_report(write_run(tmp_path / "run", num_steps=1))).tags.count("figure") == 5


def test_5000_steps_stay_below_one_and_a_half_megabytes(tmp_path):
    path = write_report(write_run(tmp_path / "run", num_steps=5000))
    assert path.stat().st_size < 1_500_000


def test_full_disk_leaves_the_old_page_and_no_debris(tmp_path, monkeypatch):
    def fail(_path):
        raise OSError(28, "No space left on device")

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    (tmp_path / "report.html").write_text("the old page", encoding="utf-8")
    monkeypatch.setattr("deltaw.disk.fsync_path", fail)
    with pytest.raises(DiskError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "the old page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "report.html"]


def test_a_spike_does_not_press_the_curve_flat_and_is_mentioned():
    values = np.ones(300)
    values[100] = 50
    curve = curves.Curve(np.arange(300.0), values, np.ones(300))
    assert "1 step lies outside the frame." in plots.trace_plot("Norm", "", curve, quantities.plain, noisy=True).caption


def test_diverged_run_can_be_drawn():
    values = 10.0 ** np.linspace(0, 38, 50)
    curve = curves.Curve(np.arange(50.0), values, np.ones(50))
    assert "<svg" in plots.loss_plot(curve, curve, (0, 1.0), "").wide
    assert "<svg" in plots.trace_plot("Norm", "", curve, quantities.plain, noisy=True).narrow


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, None, "1"])
def test_what_is_not_a_showable_number_becomes_a_dash(value):
    assert quantities.significant(value) == quantities.whole(value) == quantities.percent(value) == "–"


def test_thinning_keeps_every_extreme_and_both_ends():
    values = np.zeros(5000)
    values[[17, 4321]] = 9, -9
    curve = curves.Curve(np.arange(5000.0), values, np.ones(5000))
    thin = curves.thinned(curve)
    assert len(thin) <= curves.MAX_POINTS
    assert (thin.values.max(), thin.values.min()) == (9, -9)
    assert (thin.steps[0], thin.steps[-1]) == (0, 4999)
    assert (np.diff(thin.steps) > 0).all()


def test_smoothed_loss_is_the_sum_over_the_window_divided_by_its_tokens():
    lines = [{"step": step, "loss": loss, "trained_tokens": n} for step, loss, n in [(1, 4, 1), (2, 1, 3), (3, 7, 0)]]
    smooth = curves.smoothed(curves.column(lines, "loss", weight="trained_tokens"))
    np.testing.assert_allclose(smooth.values, [7 / 4] * 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23e9, "1.23 GB"), (9_770_000, "9.77 MB"), (999_999, "1.00 MB"), (512, "512 B"), (None, "–"), (True, "–")],
)
def test_bytes_are_decimal(value, text):
    assert quantities.human_bytes(value).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.853, "0.853 s"), (59.97, "1 min 00 s"), (380.4, "6 min 20 s"), (3899, "1 h 05 min")]
)
def test_durations_have_two_units(seconds, text):
    assert quantities.human_seconds(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.7.w1", "mlp.experts.*.w1"),
        ("lm_head", "lm_head"),
        ("blocks.4", "blocks.*"),
    ],
)
def test_modules_are_grouped_by_what_stands_behind_the_layer(name, short):
    assert tables.suffix(name) == short


def test_the_page_of_the_spectra_is_led_to_where_it_lies_beside_the_report(tmp_path):
    run = write_run(tmp_path / "run")
    assert "inspect.html" not in Page(write_report(run)).values("href")
    (run / "inspect.html").write_text("<p>")
    assert "inspect.html" in Page(write_report(run)).values("href")


def test_what_was_forgotten_is_drawn_in_the_report_of_its_run(tmp_path):
    rows = [
        {"strength": s, "loss": 2 + s / 10, "change": s / 10, "change_low": s / 20, "change_high": s / 5, "kl": s / 8}
        | {"data_loss": 1.5 - s}
        for s in (0.0, 0.5, 1.0)
    ]
    run = write_run(tmp_path / "run")
    assert "forgetting" not in Page(write_report(run)).values("id")
    (run / "forgetting.json").write_text(json.dumps(rows))
    page = Page(write_report(run))
    assert "forgetting" in page.values("id") and "+0.1000 (+0.0500 to +0.2000)" in page.text
    assert "KL on prompts" not in page.text, "it was not measured"
    (run / "forgetting.json").write_text(json.dumps([{**row, "prompt_kl": 0.4567} for row in rows]))
    page = Page(write_report(run))
    assert "KL on prompts" in page.text and "0.457" in page.text
    (run / "forgetting.json").write_text("[{}]")
    assert "forgetting.json could not be read" in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("losses", "ticks"), [((0.7639, 0.7644), (0.764, 0.7642)), ((0.3, 0.5), (0.3, 0.4)), ((2.0,), (2.0, 2.1))]
)
def test_losses_on_the_axes_of_a_sweep_have_the_digits_that_tell_its_cells_apart(losses, ticks):
    show = sweep_page._telling_apart([{"loss": loss} for loss in losses])
    assert len({show(tick) for tick in ticks}) == 2 and all(len(show(tick)) <= 7 for tick in ticks)
