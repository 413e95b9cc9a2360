"""Adapt any nn.Module: choose, inject, train, save, eject. Here a small convolutional network, on made-up images."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from deltaw import LoraSpec, choose, inject, new_adapter, read_adapter, write_adapter

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)
)
images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 4

spec = LoraSpec(rank=4, alpha=8, targets=("0", "4"))  # module names; "all-linear" would take the Linear layer alone
targets = choose(network, spec)
for target in targets:
    print(f"{target.name}: {target.kind} {target.shape}, rank {target.rank}, {target.parameters} parameters")

injection = inject(network, new_adapter(targets, spec), trainable=True)
optimizer = torch.optim.AdamW([tensor for _, _, tensor in injection.trained()], lr=1e-2)
for step in range(100):
    loss = nn.functional.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 33 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "adapter"
write_adapter(injection.extract(), folder)
trained = network(images)
injection.eject()
print("saved:", sorted(path.name for path in folder.iterdir()))

inject(network, read_adapter(folder))  # in another program, over the same network
print("read back, the same outputs:", torch.allclose(network(images), trained, atol=1e-5))
