"""The low-rank core: torch and safetensors only, no transformers.

Read in this order: spec (what is wanted), math (every formula), value (what is trained and stored), weight (the seam
to any weight storage), product (fp32 factors beside bf16 activations), layer (how one layer is adapted), inject
(choose, apply, remove), merge, keys (names and shapes in PEFT's file), files (PEFT's folder).
"""

from deltaw.adapter.files import read_adapter, write_adapter
from deltaw.adapter.inject import Injection, choose, choose_for, inject, injection_of
from deltaw.adapter.layer import AdaptedLayer
from deltaw.adapter.merge import Merged, merge_
from deltaw.adapter.spec import LoraSpec
from deltaw.adapter.value import Adapter, Factors, new_adapter

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "Factors",
    "Injection",
    "LoraSpec",
    "Merged",
    "choose",
    "choose_for",
    "inject",
    "injection_of",
    "merge_",
    "new_adapter",
    "read_adapter",
    "write_adapter",
]
