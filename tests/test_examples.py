"""Every example runs as a user would run it, and stays short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.config import make_settings, read_recipe

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path, tmp_path):
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_recipe_holds_settings_that_can_be_used():
    path = EXAMPLES[0].parent / "recipe.yaml"
    settings = make_settings({}, read_recipe(path))
    assert settings.rank == 16 and settings.data[0] == f"{path.parent}/chats/*.jsonl::weight=2"


def test_examples_are_short():
    assert EXAMPLES
    assert [path.name for path in EXAMPLES if len(path.read_text().splitlines()) > 80] == []
