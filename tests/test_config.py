"""Every setting arrives converted with its source, every fault is told at once, and the rules give these numbers."""

import math
import types
from pathlib import Path

import pytest
import yaml

from deltaw.config import (
    AUTO,
    Settings,
    default_batch_tokens,
    default_rank,
    default_rate,
    make_settings,
    parse_layers,
    read_recipe,
    settings_fields,
)
from deltaw.errors import UsageError

# A value for each setting as it comes from a flag or a file, and as it must arrive.
VALUES = {
    "model": ("org/model", "org/model"),
    "data": (["a,b.jsonl", Path("c.jsonl")], ("a,b.jsonl", "c.jsonl")),
    "eval_data": ("e.jsonl", ("e.jsonl",)),
    "columns": ("prompt=question", ("prompt=question",)),
    "train_on": ("last", "last"),
    "max_length": ("300", 300),
    "allow": ("duplicate, too-long", ("duplicate", "too-long")),
    "allow_lost": ("0.5", 0.5),
    "date": ("2026-01-31", "2026-01-31"),
    "out": (Path("runs/one"), "runs/one"),
    "adapter": ("runs/zero", "runs/zero"),
    "revision": ("main", "main"),
    "rank": ("8", 8),
    "alpha": ("16", 16.0),
    "targets": ("q_proj, v_proj", ("q_proj", "v_proj")),
    "exclude": (["lm_head", "k_proj,o_proj"], ("lm_head", "k_proj", "o_proj")),
    "layers": (3, "3"),
    "rank_pattern": ({"v_proj": 4, "mlp.up_proj": 2}, ("v_proj=4", "mlp.up_proj=2")),
    "alpha_pattern": ("v_proj=16", ("v_proj=16",)),
    "dropout": ("0.1", 0.1),
    "rslora": (True, True),
    "dora": (True, True),
    "steps": (20.0, 20),
    "epochs": (None, None),
    "minutes": (None, None),
    "batch_tokens": ("2048", 2048),
    "micro_tokens": (512, 512),
    "share_prefixes": (False, False),
    "lr": ("1e-4", 1e-4),
    "lora_plus": (4, 4.0),
    "schedule": ("cosine", "cosine"),
    "warmup": (0, 0.0),
    "clip": ("0", 0.0),
    "weight_decay": (0.01, 0.01),
    "seed": ("9007199254740993", 9007199254740993),
    "eval_steps": (5, 5),
    "eval_rows": (50, 50),
    "patience": ("3", 3),
    "checkpoint_steps": (7, 7),
    "checkpoint_seconds": (7, 7.0),
    "keep_checkpoints": (1, 1),
    "track": ("wandb,tensorboard", ("wandb", "tensorboard")),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "threads": ("2", 2),
    "memory": ("900MiB", "900MiB"),
    "recompute": ("0", 0),
    "stream": (False, False),
    "quant": ("nf4", "nf4"),
}


def faults_of(given, recipe=None):
    with pytest.raises(UsageError) as caught:
        make_settings(given, recipe)
    return str(caught.value)


@pytest.mark.parametrize("source", ["given", "recipe"])
@pytest.mark.parametrize("dashes", [False, True])
def test_every_setting_arrives_converted_with_its_source(source, dashes):
    assert list(VALUES) == [field.name for field in settings_fields()]
    raw = {name.replace("_", "-") if dashes else name: value for name, (value, _) in VALUES.items()}
    settings = make_settings(raw) if source == "given" else make_settings({}, raw)
    for name, (given, expected) in VALUES.items():
        value = getattr(settings, name)
        assert (value, type(value)) == (expected, type(expected)), name
        assert settings.sources.get(name) == (None if given is None else source), name
    for name, value in (("epochs", "0.5"), ("minutes", 3)):
        assert getattr(make_settings({name: value}), name) == float(value)


def test_nothing_given_leaves_the_defaults_and_says_so():
    settings = make_settings(dict.fromkeys(VALUES))
    assert settings == Settings() and settings.sources == {}
    resolved = settings.resolved()
    assert list(resolved) == list(VALUES) and {entry["source"] for entry in resolved.values()} == {"default"}
    assert resolved["targets"]["value"] == ["all-linear"] and resolved["lr"]["value"] == AUTO


def test_resolved_settings_survive_a_yaml_file_and_come_back_the_same():
    settings = make_settings({name: given for name, (given, _) in VALUES.items()})
    settings.put("lr", 5e-5, "rule: some rule")
    resolved = yaml.safe_load(yaml.safe_dump(settings.resolved()))
    again = make_settings({name: entry["value"] for name, entry in resolved.items()})
    assert again.resolved().keys() == resolved.keys()
    assert {name: getattr(again, name) for name in VALUES} == {name: getattr(settings, name) for name in VALUES}
    assert resolved["lr"] == {"value": 5e-5, "source": "rule: some rule"}


def test_auto_is_taken_where_it_is_the_default_and_nowhere_else():
    automatic = [field.name for field in settings_fields() if field.default == AUTO]
    settings = make_settings(dict.fromkeys(automatic, AUTO))
    assert {getattr(settings, name) for name in automatic} == {AUTO} and set(settings.sources) == set(automatic)
    assert "steps = 'auto': must be a whole number" in faults_of({"steps": AUTO})


def test_flags_win_over_the_recipe():
    settings = make_settings({"rank": 4, "lr": None}, {"rank": 8, "lr": 1e-3, "seed": 5})
    assert (settings.rank, settings.lr, settings.seed) == (4, 1e-3, 5)
    assert settings.sources == {"rank": "given", "lr": "recipe", "seed": "recipe"}


def test_all_faults_are_listed_at_once_with_the_nearest_name():
    message = faults_of(
        {"learning_rat": 1, "rnak": 2, "rank": 1.5, "dtype": "float16"}, {"batch-token": 5, "steps": -1}
    )
    assert message.splitlines()[1:] == [
        "  - recipe: unknown setting 'batch-token'; did you mean 'batch_tokens'?",
        "  - given: unknown setting 'learning_rat'",
        "  - given: unknown setting 'rnak'; did you mean 'rank'?",
        "  - rank = 1.5: must be a whole number (Rank r of the update, or auto; for the verbs train and plan also "
        "measure)",
        "  - dtype = 'float16': must be one of auto, float32, bfloat16",
        "  - steps = -1: must be above 0",
    ]
    assert "unknown setting 'sources'" in faults_of({"sources": {}})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rank", True, "a whole number"),
        ("rank", "many", "a whole number"),
        ("rank", float("inf"), "a whole number"),
        ("rank", [8], "a whole number"),
        ("rank", 0, "above 0"),
        ("lr", True, "a finite number"),
        ("lr", "nan", "a finite number"),
        ("lr", 10**400, "too large"),
        ("lr", 0, "above 0"),
        ("rslora", "yes", "true or false"),
        ("rslora", 1, "true or false"),
        ("model", ["a"], "must be text"),
        ("dtype", True, "must be text"),
        ("data", 5, "text or a list of texts"),
        ("data", {"a": 1}, "has no path"),
        ("rank_pattern", "v_proj", "must look like v_proj=4"),
        ("rank_pattern", "v_proj=1.5", "a whole number"),
        ("alpha_pattern", "v_proj=-1", "above 0"),
        ("date", "tomorrow", "must look like 2026-01-31"),
        ("data", [["a"]], "text or a list of texts"),
        ("track", "wandb,nothing", "one of tensorboard, wandb, trackio"),
        ("schedule", "step", "one of linear, cosine, constant"),
        ("dropout", 1.5, "between 0 and 1"),
        ("dropout", 1, "drop everything"),
        ("warmup", -0.1, "between 0 and 1"),
        ("clip", -1, "must not be below 0"),
        ("weight_decay", -1, "must not be below 0"),
        ("seed", -1, "must not be below 0"),
        ("patience", -1, "must not be below 0"),
        ("max_length", 1, "predicts nothing"),
        ("layers", "a-b", "must look like"),
        ("layers", "auto", "must look like"),
        ("memory", "auto", "a number with a unit"),
    ],
)
def test_a_value_without_meaning_is_refused_by_name(name, value, says):
    message = faults_of({name: value})
    assert name in message and says in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data: a.jsonl\ndata: b.jsonl\n", "data stands there twice"),
        ("batch-tokens: 512\nbatch_tokens: 1024\n", "batch_tokens stands there twice"),
        ("date: 2026-02-30\n", "cannot be read as a YAML recipe"),
    ],
)
def test_a_recipe_that_says_two_things_or_names_no_day_is_refused(tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_recipe(path)


def test_a_run_has_one_length():
    assert "steps and epochs are given" in faults_of({"steps": 5, "epochs": 2})
    assert "steps and epochs are given" in faults_of({}, {"steps": 5, "epochs": 2})
    assert "steps and epochs and minutes" in faults_of({"steps": 5, "epochs": 2, "minutes": 1})


def test_a_length_that_is_given_wins_over_any_of_the_recipe():
    settings = make_settings({"steps": 5, "minutes": None}, {"epochs": 2, "rank": 8})
    assert (settings.steps, settings.epochs, settings.rank) == (5, None, 8)


def test_arguments_are_left_unchanged():
    given, recipe = types.MappingProxyType({"rank": "8"}), types.MappingProxyType({"data": ["a"]})
    make_settings(given, recipe)
    assert (given["rank"], recipe["data"]) == ("8", ["a"])


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_are_numbers_and_ranges():
    assert parse_layers("0-2,20") == (0, 1, 2, 20)
    assert parse_layers(" 3 , 3,1-3") == (3, 1, 2)


@pytest.mark.parametrize("text", ["", "1-", "-1", "1,,2", "5-2", "0-9999999", "a", "1-2-3", "²", "0x1"])
def test_what_is_no_list_of_layers_is_refused(text):
    with pytest.raises(ValueError):
        parse_layers(text)


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipe(tmp_path, text):
    (tmp_path / "recipes").mkdir(exist_ok=True)
    path = tmp_path / "recipes" / "train.yaml"
    path.write_text(text)
    return path


def test_paths_in_a_recipe_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    (tmp_path / "base").mkdir()
    path = recipe(
        tmp_path,
        "model: ../base\ndata: [a.jsonl, '../*.jsonl', /abs/b.jsonl, ~/c.jsonl]\neval-data: 'd,e.jsonl'\n"
        "adapter: ../old\nout: runs/new\nlr: 1e-4\n",
    )
    here = path.parent
    settings = make_settings({}, read_recipe(path))
    assert settings.model == str(here / "../base")
    assert settings.data == (f"{here}/a.jsonl", f"{here}/../*.jsonl", "/abs/b.jsonl", f"{tmp_path}/own/c.jsonl")
    assert settings.eval_data == (f"{here}/d,e.jsonl",) and settings.adapter == f"{here}/../old"
    assert settings.out == "runs/new" and settings.lr == 1e-4


def test_a_runs_own_settings_are_a_recipe_of_what_was_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    first = make_settings({"data": str(tmp_path / "a.jsonl"), "rank": 8, "out": "runs/a"}, {"steps": 5})
    first.put("lr", 1e-3, "rule: by width")
    first.put("micro_tokens", 256, "plan: the fastest that fits (RAM)")
    path = recipe(tmp_path, yaml.safe_dump(first.resolved()))
    again = make_settings({"seed": 2}, read_recipe(path))
    assert (again.rank, again.steps, again.seed, again.data) == (8, 5, 2, first.data)
    assert again.lr == again.micro_tokens == AUTO and again.out is None


def test_a_model_name_in_a_recipe_stays_a_name(tmp_path):
    for name in ("smollm2-135m", "org/model"):
        assert read_recipe(recipe(tmp_path, f"model: {name}")) == {"model": name}


def test_an_empty_recipe_gives_nothing_and_what_is_none_is_refused(tmp_path):
    assert read_recipe(recipe(tmp_path, "# nothing\n")) == {}
    for text, says in (("- a\n", "not list"), ("a: [", "YAML"), ("just words", "not str"), ("a: \x80", "YAML")):
        path = recipe(tmp_path, text)
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UsageError, match=says):
            read_recipe(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_faults_in_a_recipe_are_faults_and_no_crash(tmp_path):
    path = recipe(tmp_path, "data: 5\neval_data: [{a: 1}]\n3: 4\nsteps: yes\nmodel: [a]\n")
    message = faults_of({}, read_recipe(path))
    assert all(f"{name} = " in message for name in ("data", "eval_data", "steps", "model")) and "setting 3" in message


# -- rules -------------------------------------------------------------------------------------------------------------


def test_the_rank_of_smollm2_135m_is_16():
    """30 blocks with q and o of 576 to 576, k and v of 576 to 192, gate and up of 576 to 1,536, and down back again."""
    per_rank = 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert per_rank == 305_280
    assert default_rank(per_rank, 134_515_008)[0] == 16  # 4 % are 5.38M, enough for rank 17.6


@pytest.mark.parametrize(
    ("per_rank", "base", "rank"),
    [
        (1_000_000, 8_000_000_000, 32),  # 45M: rank 45
        (100_000, 10_000_000_000, 128),  # rank 450, but 128 is the most
        (1_000_000, 25_000_000, 1),  # 4 % are 1M: exactly rank 1
        (1_000_000, 10_000_000, 1),  # not even rank 1 fits, but less there is not
        (100_000, 20_000_000, 8),  # exactly rank 8
    ],
)
def test_the_rank_is_the_largest_power_of_two_within_both_budgets(per_rank, base, rank):
    assert default_rank(per_rank, base)[0] == rank


@pytest.mark.parametrize(
    ("hidden", "kind", "rate"),
    [
        (576, "llama", 0.00132),  # 5e-4 · 3.472^0.781 = 5e-4 · 2.644
        (2000, "llama", 5e-4),
        (4096, "mistral", 0.000286),  # 5e-4 · 0.4883^0.781 = 5e-4 · 0.5712
        (1024, "qwen3", 0.000527),  # 5e-4 · 1.953^0.0775 = 5e-4 · 1.0533
        (768, "gpt2", 3e-4),
    ],
)
def test_the_rate_follows_its_formula(hidden, kind, rate):
    value, rule = default_rate(hidden, kind)
    assert math.isclose(value, rate, rel_tol=1e-9) and rule.startswith("rule:")


@pytest.mark.parametrize(
    ("mean", "tokens"), [(1, 1024), (64, 1024), (89, 1024), (100, 2048), (188, 4096), (1000, 16_384), (1e6, 16_384)]
)
def test_a_batch_is_about_16_documents_as_a_power_of_two(mean, tokens):
    value, rule = default_batch_tokens(mean)
    assert value == tokens and isinstance(value, int) and f"{mean:.0f} tokens" in rule
