"""How far sums of adapters are from the sum of their updates: deltaw.combine and PEFT's add_weighted_adapter.

Two adapters with random factors over one small random model, for pairs of kinds that people have. The error is
‖got − Σ wᵢΔWᵢ‖ / ‖Σ wᵢΔWᵢ‖ over all layers, in fp64. PEFT's ways are asked for in turn, its svd at the rank that it
takes by default; what they refuse is shown as that.
Prints a table; results/combine_error.json holds it.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from deltaw.adapter import Adapter, Factors, LoraSpec, choose, new_adapter, read_adapter, write_adapter
from deltaw.adapters import combine
from deltaw.analysis.spectrum import matrices

RESULTS = Path(__file__).parent / "results" / "combine_error.json"
WAYS = ("linear", "cat", "svd")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[float, float]]] = {
    "equal rank and scale": ({"rank": 8}, {"rank": 8}, (0.7, 0.3)),
    "difference": ({"rank": 8}, {"rank": 8}, (1.0, -1.0)),
    "other alphas": ({"rank": 8, "alpha": 8}, {"rank": 8, "alpha": 32}, (0.7, 0.3)),
    "unequal ranks": ({"rank": 4}, {"rank": 16}, (0.7, 0.3)),
    "one with rsLoRA": ({"rank": 8}, {"rank": 8, "rslora": True}, (0.7, 0.3)),
    "a rank pattern": ({"rank": 8, "rank_pattern": {"v_proj": 2}}, {"rank": 8}, (0.7, 0.3)),
}


def main() -> None:
    warnings.filterwarnings("ignore")
    rows = []
    for name, (first, second, weights) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"case": name, **measure(Path(folder), first, second, weights)})
        shown = "  ".join(
            f"{way} {value if isinstance(value, str) else f'{value:.1e}'}" for way, value in rows[-1].items()
        )
        print(shown, flush=True)
    RESULTS.write_text(json.dumps({"peft": peft.__version__, "rows": rows}, indent=1) + "\n")


def measure(
    folder: Path, first: dict[str, Any], second: dict[str, Any], weights: tuple[float, float]
) -> dict[str, float | str]:
    """The error of each way, or why it refuses."""
    model = small_model()
    adapters = [drawn(model, given, seed) for seed, given in enumerate((first, second))]
    wanted = {
        name: sum(weight * update(adapter, name) for weight, adapter in zip(weights, adapters, strict=True))
        for name in adapters[0].factors
    }
    paths = [write_adapter(adapter, folder / f"a{number}") for number, adapter in enumerate(adapters)]
    combine(paths, folder / "sum", weights)
    made = read_adapter(folder / "sum")
    found: dict[str, float | str] = {"deltaw": error({name: update(made, name) for name in wanted}, wanted)}
    for way in WAYS:
        found[f"PEFT {way}"] = by_peft(paths, weights, way, wanted)
    return found


def by_peft(paths: list[Path], weights: tuple[float, float], way: str, wanted: dict[str, Any]) -> float | str:
    model = peft.PeftModel.from_pretrained(small_model(), str(paths[0]), adapter_name="a")
    model.load_adapter(str(paths[1]), adapter_name="b")
    try:
        model.add_weighted_adapter(["a", "b"], list(weights), "sum", combination_type=way)
    except (ValueError, RuntimeError) as refused:
        return "refused" if isinstance(refused, ValueError) else "fails"
    modules = dict(model.base_model.model.named_modules())
    return error({name: modules[name].get_delta_weight("sum").detach().double() for name in wanted}, wanted)


def small_model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
        )
    )


def drawn(model: Any, given: dict[str, Any], seed: int) -> Adapter:
    """An adapter whose B is random, as after training."""
    spec = LoraSpec(**given)
    adapter = new_adapter(choose(model, spec), spec, seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(each.A, 0.02 * torch.randn(each.B.shape, generator=generator))
        for name, each in adapter.factors.items()
    }
    return adapter.with_factors(factors)


def update(adapter: Adapter, name: str) -> torch.Tensor:
    A, B = matrices(adapter, name)
    return adapter.scale_of(name) * (B @ A)


def error(got: dict[str, torch.Tensor], wanted: dict[str, Any]) -> float:
    apart = sum(float((got[name] - wanted[name]).square().sum()) for name in wanted)
    return (apart / sum(float(each.square().sum()) for each in wanted.values())) ** 0.5


if __name__ == "__main__":
    main()
