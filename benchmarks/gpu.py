"""Does robench work on this card, is it right, and how fast is it? One command, some twelve minutes, no network.

    python benchmarks/gpu.py --data ../shared/data --out results/gpu

Stages one after the other, each in a process of its own with its share of the time: one that fails or hangs is named,
and the rest goes on. Every stage adds to ``gpu.json`` and ``gpu.md`` what it has found, as it finds it. robench need
not be installed: the packages that setup.cfg asks for suffice, and a copy of the tree.

DATA holds what ``../shared/data/README.md`` describes; what is missing there is left out, and said.
``--tiny --device cpu`` runs everything in miniature.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
#: What each stage gets of the time, in this order; what one leaves, the next ones have.
STAGES = {"device": 1.0, "works": 3.0, "right": 3.0, "crafting": 2.0, "training": 2.0, "cifar10": 1.0}
TITLES = {
    "device": "What it is",
    "works": "Does it work",
    "right": "Is it right",
    "crafting": "How fast is crafting",
    "training": "How fast is training",
    "cifar10": "CIFAR-10 (JPEG), trained here",
}
#: Seconds that a stage has beyond its own reckoning, for a process to start and to end.
GRACE = 20.0


@click.command()
@click.option("--data", default=str(ROOT.parent / "shared/data"), show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default="results/gpu", show_default=True, type=click.Path(path_type=Path))
@click.option("--minutes", default=12.0, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--only", default=",".join(STAGES), help="Stages, with commas.")
@click.option("--tiny", is_flag=True, help="Little of everything, in under three minutes on two cores.")
def main(data: Path, out: Path, minutes: float, device: str, only: str, tiny: bool) -> None:
    names = only.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise click.UsageError(f"there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_importable(Path(folder)))}
        for name in names:
            waiting = sum(STAGES[each] for each in names[names.index(name) :])
            seconds = (end - time.monotonic()) * STAGES[name] / waiting
            part = Path(folder) / f"{name}.json"
            options = {"data": str(data), "out": str(out), "device": device, "tiny": tiny, "seconds": seconds}
            click.echo(f"{TITLES[name]}: up to {seconds:.0f} s")
            began = time.monotonic()
            failure = _run([sys.executable, str(Path(__file__).with_name("gpu_stages.py")), name, str(part)], options,
                           environment, max(seconds, GRACE) + GRACE)  # fmt: skip
            rows = json.loads(part.read_text()) if part.exists() else []
            found[name] = {"rows": rows, "failure": failure, "seconds": round(time.monotonic() - began, 1)}
            if failure:
                click.echo("  FAILED: " + ", ".join(failure.strip().splitlines()[-2:]))
            _write(out / "gpu.json", json.dumps(found, indent=1) + "\n")
            _write(out / "gpu.md", page(found, tiny))
    bad = [
        name for name, stage in found.items() if stage["failure"] or any(row["ok"] is False for row in stage["rows"])
    ]
    click.echo(f"{out / 'gpu.md'}: " + (f"not all is well in {', '.join(bad)}" if bad else "all is well"))
    sys.exit(bool(bad))


def page(found: dict[str, Any], tiny: bool = False) -> str:
    """All stages as Markdown."""
    lines = ["# robench on this device", ""]
    if tiny:
        lines += ["In miniature (`--tiny`): whether it runs, not how fast or how right it is.", ""]
    for name, stage in found.items():
        lines += [f"## {TITLES[name]}", "", f"{stage['seconds']:.0f} s.", ""]
        if stage["rows"]:
            lines += ["| what | | |", "|---|---|---|"]
            marks = {True: "yes", False: "**no**", None: ""}
            lines += [f"| {row['what']} | {row['value']} | {marks[row['ok']]} |" for row in stage["rows"]]
            lines.append("")
        if stage["failure"]:
            lines += ["**This stage failed:**", "", "```", stage["failure"].strip(), "```", ""]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


def _run(command: list[str], options: dict[str, Any], environment: dict[str, str], seconds: float) -> str:
    """Runs a stage with ``options`` as JSON on its standard input; what went wrong, empty where nothing did."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=errors, text=True, env=environment, process_group=0
        )
        try:
            process.communicate(json.dumps(options), timeout=seconds)
            ended = f"exit code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            # With whatever it started; nobody is left where it has ended well.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        return f"{errors.read()[-4000:].strip()}\n{ended}" if ended else ""


def _importable(folder: Path) -> list[str]:
    """The folder of a package `robench` as it is installed, where it is not: the top-level folders belong inside."""
    try:
        if find_spec("robench.attacks") is not None:
            return [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    except ModuleNotFoundError:
        pass
    shutil.copytree(ROOT / "robench", folder / "tree/robench")
    for name in ("attacks", "defenses", "reports"):
        shutil.copytree(ROOT / name, folder / "tree/robench" / name)
    if (ROOT / "tests").is_dir():
        shutil.copytree(ROOT / "tests", folder / "tree/tests")
        shutil.copy(ROOT / "setup.cfg", folder / "tree")
    return [str(folder / "tree"), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]


if __name__ == "__main__":
    main()
