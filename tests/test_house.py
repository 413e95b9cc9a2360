"""The house rules that a machine can check: import direction, start-up, the trees in the docs, generated pages."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deltaw

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deltaw"
LAYERS = [
    {"errors"},
    {"disk", "hardware"},
    {"adapter"},
    {"kernels", "config"},
    {"base", "data", "analysis"},
    {"plan", "engine"},
    {"planning", "report", "serve"},
    {"api", "adapters", "datasets", "doctor"},
    {"demonstration", "ranks"},
    {"compression", "sweeps"},
    {"training"},
    {"terminal"},
    {"tables"},
    {"cli"},
]
ABOVE = {"__init__", "__main__"}


def _parts() -> dict[Path, str]:
    return {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}


def _imports(path: Path) -> set[str]:
    """The parts of the package that a file imports, also inside functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "deltaw":
            names = [f"deltaw.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("deltaw.")}
    return found


def test_imports_point_down():
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for path, part in _parts().items():
        for target in _imports(path) - {part}:
            if part not in ABOVE and level[target] >= level[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert wrong == []


def test_every_part_stands_in_a_layer():
    assert set(_parts().values()) - ABOVE <= set().union(*LAYERS)


@pytest.mark.parametrize("statement", ["import deltaw", "import deltaw.cli"])
def test_nothing_heavy_is_imported_at_the_front_door(statement):
    code = f"{statement}; import sys; print(sorted({{'torch', 'transformers', 'numpy', 'rich', 'matplotlib'}} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_all_names_can_be_imported():
    missing = [name for name in deltaw.__all__ if not hasattr(deltaw, name)]
    assert missing == []


def test_the_tree_in_the_architecture_page_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"[\w/]+\.py", text.split("## The tree")[1].split("```")[1]))
    shown = {name.rsplit("/", 1)[-1] for name in drawn}
    present = {path.name for path in PACKAGE.rglob("*.py")} - {"__main__.py"}
    assert shown - present == set()
    assert present - shown - {"__init__.py"} == set()


def _reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "dev" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "settings.md", "errors.md", "python.md", "findings.md", "machines.md"])
def test_the_reference_pages_are_what_the_code_says(name):
    assert (ROOT / "docs" / "reference" / name).read_text() == _reference().PAGES[name](), "run `make docs`"


def test_no_path_of_a_machine_stands_in_the_project():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(work|root|home|tmp)/[\w.]")
    texts = [
        p
        for p in tracked
        if Path(p).suffix in (".py", ".md", ".toml", ".json", ".jsonl", ".svg", ".txt", ".jinja", ".css", "")
    ]
    found = [
        p
        for p in texts
        if (ROOT / p).is_file() and p != "tests/test_house.py" and pattern.search((ROOT / p).read_text())
    ]
    assert found == []


README_BLOCK = re.compile(r"```python\n(.*?)```", re.S)


@pytest.mark.long
def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    code = README_BLOCK.search((ROOT / "README.md").read_text())[1]
    (tmp_path / "chats.jsonl").write_text(
        "".join(f'{{"prompt": "Is {n} even?", "completion": "{"no" if n % 2 else "yes"}"}}\n' for n in range(40))
    )
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert (tmp_path / "runs").is_dir()
