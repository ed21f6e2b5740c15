"""The code in CONTRIBUTING.md works as it stands there: one new file, found and tested by itself."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from robench.defenses import DEFENSES
from robench.reports import build, html
from robench.reports.sheet import FIGURES
from tests.reports.frames import rows, share, study

ROOT = Path(__file__).parents[1]

#: Adds a folder to a package, as if its files lay in the package's own, and runs command lines.
SCRIPT = """
import importlib, json, sys
from robench.cli import run
package, folder, lines = json.loads(sys.argv[1])
importlib.import_module(package).__path__.append(folder)
sys.exit(max(run(line) for line in lines))
"""


def snippets() -> dict[str, str]:
    """Every Python block, by the path in its first line."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    return {path: f"# {path}\n{code}" for path, code in blocks}


def test_there_is_one_of_each() -> None:
    assert [Path(path).parent.name for path in snippets()] == ["defenses", "attacks", "reports"]


@pytest.mark.parametrize("path", [path for path in snippets() if not path.startswith("reports/")])
def test_the_file_is_found_and_keeps_the_contract(path: str, tmp_path: Path) -> None:
    file = tmp_path / Path(path).name
    file.write_text(snippets()[path], encoding="utf-8")
    package = f"robench.{Path(path).parent.name}"
    lines = [["list", package.rpartition(".")[2]], ["check", "plugin", file.stem]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([package, str(tmp_path), lines])],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^  {file.stem} +\S", done.stdout, re.MULTILINE)
    assert "pass  is data" in done.stdout
    assert not re.search("^  (warn|fail) ", done.stdout, re.MULTILINE), done.stdout


def test_a_figure_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (path for path in snippets() if path.startswith("reports/"))
    file = tmp_path / Path(path).name
    file.write_text(snippets()[path], encoding="utf-8")
    before = FIGURES.names()
    monkeypatch.setattr(FIGURES, "_items", dict(FIGURES._items))
    runpy.run_path(str(file))
    (name,) = set(FIGURES.names()) - set(before)
    drawn = build.draw(study(defenses=("dverge",), sizes=(2,), radii=(0.03,), samples=5))
    written = {path.name for path in build.write(drawn, tmp_path, {}, formats=["pdf"])}
    assert {f"{name}.pdf", f"{name}.csv", "fig4_accuracy.pdf"} <= written
    assert name in html.write(drawn, tmp_path / "report.html", {}).read_text("utf-8")
    skipped = build.draw(rows(share(90), threat="clean")).notices
    assert f"{name} skipped: no white-box accuracy in these outcomes" in skipped


def test_the_code_is_formatted(tmp_path: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    for path, code in snippets().items():
        file = tmp_path / path
        file.parent.mkdir()
        file.write_text(code, encoding="utf-8")
    config = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, *config, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_defense_is_one_short_file_that_nothing_else_names() -> None:
    """Its own, and data: of recipes, studies, papers. The DVERGE paper has six with looks and roles of their own."""
    paper = {"baseline", "adp", "gal", "dverge", "advt", "dverge-advt"}
    own = {name: Path(inspect.getfile(DEFENSES.get(name))) for name in DEFENSES.names()}
    own = {name: path for name, path in own.items() if path.parent == ROOT / "defenses"}
    assert len(own) == 15
    assert {name: lines for name, path in own.items() if (lines := len(path.read_text().splitlines())) > 100} == {}
    named = []
    for path in (
        path for part in ("robench", "attacks", "reports", "defenses") for path in (ROOT / part).rglob("*.py")
    ):
        # What defenses share is of one of them, and keys its draws by that name.
        if path in own.values() or (path.parent.name == "defenses" and path.name.startswith("_")):
            continue
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        named += [(path.name, name) for name in words & (own.keys() - paper)]
    assert named == []


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        (path.name, node.name): lines
        for part in ("robench", "attacks", "reports", "defenses")
        for path in (ROOT / part).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}
