"""`benchmarks/gpu.py`: no minute on a card is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAGES = """
import json, subprocess, sys, time
name, part, given = sys.argv[1], sys.argv[2], json.load(sys.stdin)
rows = [{"what": name, "value": "found", "ok": True}]
open(part, "w").write(json.dumps(rows))
if name == "raises":
    raise RuntimeError("no such kernel")
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(given["out"] + "/child", "w").write(str(child.pid))
    time.sleep(600)
if name == "dies":
    import os, signal
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "no":
    rows.append({"what": "a sum", "value": "5", "ok": False})
    open(part, "w").write(json.dumps(rows))
"""


def driver(folder: Path, stages: list[str]) -> Path:
    """A copy of the driver, with other stages beside it."""
    text = (ROOT / "benchmarks/gpu.py").read_text()
    first, last = text.index("#: What each stage gets"), text.index("#: Seconds that a stage has")
    shares = f"STAGES = dict.fromkeys({stages!r}, 1.0)\nTITLES = dict(zip(STAGES, STAGES))\n"
    text = text[:first] + shares + text[last:].replace("GRACE = 20.0", "GRACE = 2.0")
    (folder / "gpu.py").write_text(text)
    (folder / "gpu_stages.py").write_text(STAGES)
    for name in ("robench", "attacks", "defenses", "reports"):
        (folder.parent / name).mkdir()
    return folder / "gpu.py"


def test_a_stage_that_raises_hangs_or_dies_loses_no_other(tmp_path: Path) -> None:
    stages = ["first", "raises", "hangs", "dies", "no", "last"]
    (tmp_path / "benchmarks").mkdir()
    script, out = driver(tmp_path / "benchmarks", stages), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(out), "--minutes", ".05"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads((out / "gpu.json").read_text())
    assert list(found) == stages
    assert all(stage["rows"][0]["value"] == "found" for stage in found.values()), "what was found before is kept"
    assert {name for name in stages if not found[name]["failure"]} == {"first", "no", "last"}
    assert "no such kernel" in found["raises"]["failure"]
    assert "stopped after" in found["hangs"]["failure"]
    assert "exit code -11" in found["dies"]["failure"]
    page = (out / "gpu.md").read_text()
    assert "Traceback" in page
    assert "| a sum | 5 | **no** |" in page
    assert "not all is well in raises, hangs, dies, no" in done.stdout
    # Nor does anybody hold the card on.
    child = int((out / "child").read_text())
    for _ in range(50):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a process that a stage began goes on")


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--only", "device,speed", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no stage 'speed'; there are device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(900)  # two minutes, of a machine that does nothing else
def test_every_stage_runs_in_miniature(tmp_path: Path) -> None:
    """From a copy of the tree, with a Python in which robench is not installed, as a bare machine with a GPU has it."""
    for name in ("robench", "attacks", "defenses", "reports", "benchmarks", "results/gpu"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(tmp_path / "bare", symlinks=True)
    bare = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
    python = str(tmp_path / "bare/bin/python")
    there = subprocess.run(
        [python, "-c", "import robench.attacks"], env=bare, cwd=tmp_path, capture_output=True, check=False
    )
    assert there.returncode == 1, "robench is installed after all"
    # From within the tree: its folder `robench` lacks attacks and defenses, and must not be the one that is imported.
    command = [python, "benchmarks/gpu.py", "--tiny", "--device", "cpu", "--minutes", "13"]
    done = subprocess.run(
        [*command, "--data", str(ROOT.parent / "shared/data"), "--out", str(tmp_path / "out")],
        env=bare,
        cwd=tmp_path / "tree",
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert list(found) == ["device", "works", "right", "crafting", "training", "cifar10"]
    bad = [row for stage in found.values() for row in stage["rows"] if row["ok"] is False]
    assert not bad, bad
    assert not [stage["failure"] for stage in found.values() if stage["failure"]], done.stderr
    assert done.returncode == 0
    assert "all is well" in done.stdout


def test_what_takes_too_long_is_left_with_where_it_was() -> None:
    """One attack that hung took all others of its stage along."""
    code = (
        "import json, time\n"
        "from gpu_stages import tried\n"
        "def waiting():\n    time.sleep(60)\n"
        "print(json.dumps([tried('one', waiting, 1), tried('two', lambda: 'done', 1)]))"
    )
    folder = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": folder},
    )
    one, two = json.loads(done.stdout)
    assert one["ok"] is False
    assert "TimeoutError: not done after 1 s" in one["value"]
    assert "waiting" in one["value"]
    assert two["ok"] is True
