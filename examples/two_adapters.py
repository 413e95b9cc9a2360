"""Two adapters over one base: switch between them, turn one down, take both off."""

from __future__ import annotations

import torch
from torch import nn

from deltaw import LoraSpec, choose, inject, new_adapter

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
x = torch.randn(1, 8)
adapters = []
for seed in (1, 2):
    spec = LoraSpec(rank=2, alpha=4)
    adapter = new_adapter(choose(base, spec), spec, seed=seed)
    for factors in adapter.factors.values():
        factors.B.normal_()  # as if it had been trained
    adapters.append(adapter)

with torch.no_grad(), inject(base, *adapters) as injection:
    for injection.active in (None, 0, 1):
        print("adapter", injection.active, base(x).tolist())
    injection.strength = 0.5
    print("half of adapter 1", base(x).tolist())
print("ejected", base(x).tolist())
