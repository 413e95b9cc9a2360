"""PEFT as a reader of what deltaw writes."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
from torch import nn


def opened_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model, trainable since it then stays in the model's mode.

    It may warn about anything but keys that it misses or does not know.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    said = [str(warning.message) for warning in caught]
    assert not [message for message in said if "missing" in message or "unexpected" in message.lower()], said
    return opened.train(model.training)
