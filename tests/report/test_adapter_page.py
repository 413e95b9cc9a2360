"""The page of one adapter shows the numbers of `inspect --json`, and colours nothing that is no more than chance."""

from __future__ import annotations

import math
import re

import pytest
import torch
from pages import Page

from deltaw import adapters, api
from deltaw.adapter import Factors, LoraSpec, choose, new_adapter, write_adapter
from deltaw.report.adapter_page import heat_map, write_adapter_page
from deltaw.report.plots import SENTINELS


@pytest.fixture(scope="module")
def facts(tmp_path_factory, llama_folder):
    """Two random adapters of the tiny base, as `deltaw inspect A --base --against B --json` has them."""
    from deltaw.base.load import load

    spec, folder = LoraSpec(rank=4, alpha=8), tmp_path_factory.mktemp("adapters")
    base = load(llama_folder, dtype="float32")
    for seed, name in enumerate("ab"):
        made = new_adapter(choose(base.model, spec), spec, seed)
        generator = torch.Generator().manual_seed(seed)
        filled = {n: Factors(f.A, 0.1 * torch.randn(f.B.shape, generator=generator)) for n, f in made.factors.items()}
        write_adapter(made.with_factors(filled), folder / name)
    one, other = folder / "a", folder / "b"
    return {
        **adapters.inspect(one),
        "spectra": adapters.layer_spectra(one),
        "beside": api.beside_base(one, str(llama_folder), device="cpu", dtype="float32"),
        "against": adapters.compare(one, other),
    }


def cells(source, heading):
    """The texts and strengths of one heat map."""
    figure = source.split(f"<h3>{heading}</h3>")[1].split("</figure>")[0]
    return re.findall(r'--strength:([\d.]+)">([^<]*)<', figure)


def test_the_page_has_every_map_and_the_numbers_of_the_facts(facts, tmp_path):
    page = Page(write_adapter_page(tmp_path / "inspect.html", "mine", facts, "other"))
    effective = [text for _, text in cells(page.source, "Effective rank")]
    assert effective == [f"{layer['effective']:.1f}" for layer in facts["spectra"]]
    intruders = [text for _, text in cells(page.source, "Intruder dimensions")]
    assert intruders == [str(layer["intruders"]) for layer in facts["beside"]]
    phi = facts["against"]["overlap"]["output"]
    assert (
        cells(page.source, "Shared directions, output side")[0][1]
        == f"{phi['phi'][0][0]:.2f} ({phi['null'][0][0]:.2f})"
    )
    for layer in facts["spectra"]:
        assert layer["name"] in page.text and f"{layer['norm']:.4g}" in page.text
    modules = {layer["name"].split(".", 3)[-1] for layer in facts["spectra"]}
    assert page.tags.count("svg") == 2 * len(modules)
    assert "Against other" in page.text and not any(colour in page.source for colour in SENTINELS)
    assert page.values("src") == [] and "://" not in page.source and "nan" not in page.text


def test_without_base_or_another_adapter_their_parts_are_left_out(facts, tmp_path):
    alone = {name: facts[name] for name in ("rank", "parameters", "spectra")}
    page = Page(write_adapter_page(tmp_path / "inspect.html", "mine", alone))
    assert {"update", "spectra", "numbers"} <= set(page.values("id"))
    assert not {"beside", "against"} & set(page.values("id")) and "‖ΔW‖" in page.text


def test_colour_begins_at_the_null_and_ends_at_the_largest_number():
    layers = [
        {"name": f"model.layers.{block}.{module}", "number": number}
        for (block, module), number in {(0, "q"): 0.5, (0, "v"): 1.0, (10, "q"): 3.0, (2, "v"): math.nan}.items()
    ]
    layers.append({"name": "lm_head", "number": 2.0})
    found = heat_map("Title", "", layers, lambda layer: layer["number"], lambda number: f"{number:g}", 1.0)
    assert found.columns == ["q", "v", "lm_head"]
    assert [name for name, _ in found.rows] == ["0", "2", "10", "–"]
    assert found.rows[0][1] == [("0.5", 0.0), ("1", 0.0), None]
    assert found.rows[1][1] == [None, ("nan", 0.0), None] and found.rows[2][1][0] == ("3", 1.0)
    assert found.rows[3][1] == [None, None, ("2", 0.5)]


def test_layers_that_would_share_a_cell_have_columns_of_their_own():
    names = [f"model.layers.{block}.mlp.experts.{expert}.w1" for block in (0, 1) for expert in (0, 1)]
    names += ["vision.layers.0.q_proj", "language.layers.0.q_proj", "0.fc", "1.fc"]
    layers = [{"name": name, "number": float(number)} for number, name in enumerate(names)]
    found = heat_map("", "", layers, lambda layer: layer["number"], lambda number: f"{number:g}")
    shown = [cell[0] for _, cells in found.rows for cell in cells if cell is not None]
    assert sorted(shown, key=float) == [f"{number:g}" for number in range(len(names))]
    assert "model.layers.*.mlp.experts.1.w1" in found.columns and "fc" in found.columns


def test_layers_that_no_base_was_put_beside_have_spectra_all_the_same_and_opposed_updates_are_as_dark(facts, tmp_path):
    opposed = {**facts["against"], "layers": [{**x, "cosine": -1.0} for x in facts["against"]["layers"]]}
    notes = {"same_seed": True, "of_first_expert": ["a"]}
    some = {**facts, "variant": "DoRA", "beside": facts["beside"][:2], "against": {**opposed, **notes}}
    page = Page(write_adapter_page(tmp_path / "inspect.html", "mine", some, "other"))
    assert {strength for strength, _ in cells(page.source, "Cosine")} == {"1.0"}
    assert "A began alike" in page.text and "of the first" in page.text and "low-rank part" in page.text
