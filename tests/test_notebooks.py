"""The notebooks run from top to bottom, as they stand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # Its kernel and the `robench` that it calls are those of this environment.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "Error: " not in said, said
    shown = [output.data for cell in code for output in cell.outputs if "data" in output]
    assert any("Accuracy in % [95 % interval]" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)
    # Of a bar one output is kept, which is empty when its job is done.
    assert 1 <= len([data for data in shown if data.get("text/html") == ""]) <= 8
    assert not any("<progress" in data.get("text/html", "") for data in shown)
    assert len(said.splitlines()) < 100


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_two_defenses", "evaluate_my_model"]
