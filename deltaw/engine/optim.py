"""All factors of all adapters in one flat buffer: one fused AdamW call, one tensor to checkpoint, one to all-reduce.

fp32 masters lie adapter by adapter, A's first, then B's (and magnitudes). A live layer's factors are views of the
buffer, or of a working copy in the dtype of the computation that is written once per step. Rate, decay and clipping
are per slice, so LoRA+ and several adapters at once need nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import Adapter, Factors, Injection


@dataclass(frozen=True)
class OptimSettings:
    """How one adapter is optimised. `rate` is the peak rate of A; B's is `lora_plus` times that (arXiv 2402.12354)."""

    rate: float
    schedule: str = "linear"
    warmup: float = 0.03
    lora_plus: float = 1.0
    clip: float = 1.0
    weight_decay: float = 0.0


def rate_factor(done: float, schedule: str, warmup: float) -> float:
    """The rate as a share of its peak when `done` of the run (0 to 1) is behind: a ramp, then linear, cosine or flat.

    It is 0 at the two ends only: 0.5 in the middle of a warm-up, and from the ramp's end 1 → 0 (constant: 1).
    """
    done = min(1.0, max(0.0, done))
    if done < warmup:
        return done / warmup
    rest = (1 - done) / (1 - warmup) if warmup < 1 else 0.0
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * rest))
    return rest


@dataclass(frozen=True)
class _Place:
    adapter: int
    name: str
    part: str
    start: int
    stop: int
    shape: torch.Size


class FlatFactors:
    """The trained numbers of an Injection as flat tensors `master`, `grad` (fp32) and `work` (the live dtype)."""

    def __init__(self, injection: Injection, settings: Sequence[OptimSettings]) -> None:
        self.injection, self.settings = injection, list(settings)
        self.places, self.adapter_slices = _layout(injection)
        live = next(tensor for _, _, tensor in injection.trained())
        size = self.places[-1].stop
        self.master = torch.zeros(size, dtype=torch.float32, device=live.device)
        self.grad = torch.zeros_like(self.master)
        self.work = self.master if live.dtype == torch.float32 else torch.zeros_like(self.master, dtype=live.dtype)
        for place in self.places:
            given = getattr(injection.adapters[place.adapter].factors[place.name], place.part)
            self.master[place.start : place.stop].copy_(given.detach().flatten())
            self._point_at(place)
        # Views, so that whoever made the adapters may let them go: a copy less for as long as the run lasts.
        injection.adapters = [self._view(index, self.master) for index in range(len(injection.adapters))]
        self.moments = {name: torch.zeros_like(self.master) for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer = self._optimizer()
        self.write_work()

    def _point_at(self, place: _Place) -> None:
        """Makes the live factor a view of the work buffer whose gradient ends in the flat gradient."""
        part = slice(place.start, place.stop)
        live = self.work[part].view(place.shape).detach().requires_grad_()
        if self.work is self.master:
            live.grad = self.grad[part].view(place.shape)
        else:
            live.register_post_accumulate_grad_hook(lambda tensor, part=part: self._collect(tensor, part))
        setattr(self.injection.layers[place.adapter][place.name], place.part, live)

    def _collect(self, live: Tensor, part: slice) -> None:
        """Adds a working-copy gradient to the fp32 one, so that micro-batches are summed in fp32."""
        assert live.grad is not None
        self.grad[part] += live.grad.flatten()
        live.grad = None

    def _optimizer(self) -> torch.optim.AdamW:
        groups: list[dict[str, Any]] = []
        for index, (start, middle, stop) in enumerate(self.adapter_slices):
            settings = self.settings[index]
            for part, ratio in ((slice(start, middle), 1.0), (slice(middle, stop), settings.lora_plus)):
                parameter = torch.nn.Parameter(self.master[part])
                parameter.grad = self.grad[part]
                groups.append(
                    {"params": [parameter], "ratio": ratio, "adapter": index, "weight_decay": settings.weight_decay}
                )
        fused = self.master.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        for group in groups:
            (parameter,) = group["params"]
            start = parameter.storage_offset()
            flat = {name: moment[start : start + parameter.numel()] for name, moment in self.moments.items()}
            optimizer.state[parameter] = {"step": torch.zeros((), device=self.master.device), **flat}
        return optimizer

    @property
    def _counts(self) -> list[Tensor]:
        """How many steps each group has taken, as AdamW counts them."""
        return [self.optimizer.state[group["params"][0]]["step"] for group in self.optimizer.param_groups]

    def write_work(self) -> None:
        """Copies the masters into the working copy, if there is one."""
        if self.work is not self.master:
            self.work.copy_(self.master)

    def clip(self) -> list[float]:
        """Each adapter's gradient norm, [adapters]; gradients above its clip value are scaled down to it."""
        norms = []
        for (start, _, stop), settings in zip(self.adapter_slices, self.settings, strict=True):
            norm = float(self.grad[start:stop].norm())
            if settings.clip and norm > settings.clip:
                self.grad[start:stop] *= settings.clip / norm
            norms.append(norm)
        return norms

    def forget_gradient(self, index: int) -> None:
        """Makes adapter `index` have none in this step."""
        start, _, stop = self.adapter_slices[index]
        self.grad[start:stop] = 0

    def step(self, rate_factors: Sequence[float]) -> None:
        """One AdamW step over all adapters at these shares of their peak rates; gradients are zero afterwards."""
        for group in self.optimizer.param_groups:
            index = group["adapter"]
            group["lr"] = self.settings[index].rate * rate_factors[index] * group["ratio"]
        self.optimizer.step()
        self.grad.zero_()
        self.write_work()

    def reset(self, master: Tensor) -> None:
        """These numbers, no gradient, and an optimiser that has not seen a step."""
        self.master.copy_(master)
        for tensor in (self.grad, *self.moments.values(), *self._counts):
            tensor.zero_()
        self.write_work()

    def adapter(self, index: int = 0, values: Tensor | None = None) -> Adapter:
        """Adapter `index` with the numbers of `values`, a flat tensor like `master` (default: the masters'), copied."""
        viewed = self._view(index, self.master if values is None else values)
        return viewed.with_factors(
            {
                name: Factors(**{part: tensor.cpu().clone() for part, tensor in factors.tensors()})
                for name, factors in viewed.factors.items()
            }
        )

    def _view(self, index: int, flat: Tensor) -> Adapter:
        """Adapter `index` as views of a flat tensor."""
        parts: dict[str, dict[str, Tensor]] = {}
        for place in self.places:
            if place.adapter == index:
                parts.setdefault(place.name, {})[place.part] = flat[place.start : place.stop].view(place.shape)
        source = self.injection.adapters[index]
        return source.with_factors({name: Factors(**parts[name]) for name in source.factors})

    def all_zero(self, values: Tensor, index: int, part: str) -> set[str]:
        """Names of adapter `index` whose factor `part` is nothing but zeros in `values` (`master`, or `grad`)."""
        mine = (place for place in self.places if place.adapter == index and place.part == part)
        return {place.name for place in mine if not values[place.start : place.stop].any()}

    def state(self) -> dict[str, Tensor]:
        """Everything the optimiser needs to go on, as flat tensors, not copied."""
        return {"master": self.master, **self.moments, "step": torch.stack(self._counts)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes `state()` of a run with the same layout."""
        assert state["master"].shape == self.master.shape, "checkpoint and adapter differ in layout"
        self.master.copy_(state["master"])
        for name, moment in self.moments.items():
            moment.copy_(state[name])
        for count, taken in zip(self._counts, state["step"], strict=True):
            count.copy_(taken)
        self.write_work()


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. By the extremes, which hand NaN on and take no memory."""
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def _layout(injection: Injection) -> tuple[list[_Place], list[tuple[int, int, int]]]:
    """Where each tensor lies, and (start, first B, stop) of each adapter."""
    places: list[_Place] = []
    slices: list[tuple[int, int, int]] = []
    offset = 0
    for index in range(len(injection.layers)):
        start, middle = offset, offset
        for wanted in ("A", "others"):
            for name, part, tensor in injection.trained(index):
                if (part == "A") is (wanted == "A"):
                    places.append(_Place(index, name, part, offset, offset + tensor.numel(), tensor.shape))
                    offset += tensor.numel()
            middle = offset if wanted == "A" else middle
        slices.append((start, middle, offset))
    return places, slices
