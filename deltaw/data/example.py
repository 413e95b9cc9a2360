"""Example: one document as token ids with a weight for each. What files become and batches are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """One document: `tokens` (int32) and `weights` (float32, 0 = context), both [T].

    `file` and `row` say where it stood, `cut` that its row was longer and lost its end.
    """

    tokens: np.ndarray
    weights: np.ndarray
    row: int = 0
    cut: bool = False
    file: str = ""

    def as_bytes(self) -> bytes:
        """What a digest of documents is made over."""
        return len(self.tokens).to_bytes(8, "big") + self.tokens.tobytes() + self.weights.tobytes()
