"""Imports point one way, and help is quick because it imports little."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: A module may import modules of a lower number, and of its own part.
LAYERS = {
    "robench.recipes": 0,
    "robench.core": 1,
    "robench.attacks": 2,
    "robench.defenses": 3,
    "robench.store": 3,
    "robench.training": 4,
    "robench.evaluation": 4,
    "robench.reports": 5,
    "robench.validity": 5,
    "robench.api": 6,
    "robench.session": 7,
    "robench.studies": 8,
    "robench.commands": 9,
    "robench.cli": 10,
    "robench.__main__": 11,
    # The names for Python users, imported on first use.
    "robench": 11,
}


def modules() -> dict[str, Path]:
    """Every module of ours, by its import name."""
    found = {}
    for folder, package in (
        ("robench", "robench"),
        ("attacks", "robench.attacks"),
        ("defenses", "robench.defenses"),
        ("reports", "robench.reports"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def part(module: str) -> str:
    """The part of the house that a module is in."""
    return ".".join(module.split(".")[:2])


def imported(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """What a module imports of ours, wherever it does, and the line."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "robench":
                yield name, node.lineno


def violations(module: str, path: Path) -> list[str]:
    own = part(module)
    return [
        f"{path}:{line} imports {name}"
        for name, line in imported(module, path)
        if part(name) != own and LAYERS.get(part(name), 99) >= LAYERS[own]
    ]


def test_the_tree_is_all_there() -> None:
    assert {"robench.core.linf", "robench.attacks.pgd", "robench.defenses.dverge", "robench.training.loop"} <= set(
        MODULES
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    assert part(module) in LAYERS, f"give {part(module)} a layer in {Path(__file__).name}"
    assert violations(module, MODULES[module]) == []


def test_a_violation_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from robench.core import linf\n"
        "from robench import attacks\n"
        "def f():\n"
        "    import robench.defenses.dverge\n"
        "    from .. import training\n"
        "    from ..reports.style import x\n"
        "    from robench.unheard_of import y\n"
    )
    found = [line.rpartition(" ")[2] for line in violations("robench.core.x", path)]
    wanted = ["attacks", "defenses.dverge", "training", "reports.style", "unheard_of"]
    assert found == [f"robench.{name}" for name in wanted]


def loaded(code: str) -> set[str]:
    """Modules that are loaded in a fresh interpreter after ``code``."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "torchvision", "pandas", "pyarrow", "matplotlib", "sklearn", "scipy", "numpy"}


def test_import_robench_is_light() -> None:
    assert not loaded("import robench") & HEAVY


def test_help_imports_neither_torch_nor_pandas() -> None:
    if not (ROOT / "robench/cli.py").exists():
        pytest.skip("robench/cli.py is not written yet")
    code = (
        "sys.argv = ['robench', '--help']\n"
        "from robench.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code"
    )
    assert not loaded(code) & {"torch", "torchvision", "pandas", "pyarrow", "matplotlib", "sklearn"}


def test_what_evaluates_starts_without_statistics_and_compilers() -> None:
    """Each process of an evaluation starts so; these would take a quarter of that time."""
    assert not loaded("import robench.session") & {"scipy.stats", "scipy.optimize", "triton", "matplotlib", "sklearn"}
