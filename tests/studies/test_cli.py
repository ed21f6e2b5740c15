"""The command line as users type it, on data of a few images; exit codes and one-line errors."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from robench.cli import run
from robench.session import stored
from robench.store.runs import Runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 96 + 40 digits, and in it the runs that the tests of this module share."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("work")
    raw = load_digits(n_class=4)
    images = (raw.images * 15.9).astype(np.uint8)
    np.savez(
        folder / "data.npz",
        x_train=images[:256],
        y_train=raw.target[:256],
        x_test=images[256:296],
        y_test=raw.target[256:296],
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


TRAIN = ["--dataset", "npz:data.npz", "--model", "resnet8", "--epochs", "2", "--batch-size", "64", "--device", "cpu"]
ON = ["--dataset", "npz:data.npz", "--samples", "16", "--restarts", "2", "--device", "cpu"]
EVAL = [*ON, "--steps", "2"]


@pytest.fixture(scope="module")
def baseline(work: Path) -> str:
    assert run(["train", "baseline", "--n", "2", "--name", "base", *TRAIN]) == 0
    return "base"


@pytest.fixture(scope="module")
def surrogate(work: Path) -> str:
    assert run(["train", "baseline", "--n", "1", "--name", "sub", "--role", "surrogate", *TRAIN]) == 0
    return "sub"


def test_train_prints_the_name_last_and_is_complete_the_second_time(
    baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "baseline", "--n", "2", "--name", "base", *TRAIN]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "base"
    assert "complete" in printed.err


def test_dverge_starts_from_a_run(baseline: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "dverge", "--n", "2", "--init", "base", "--set", "eps=0.2", *TRAIN]) == 0
    name = capsys.readouterr().out.splitlines()[-1]
    manifest = Runs("runs").get(name).manifest
    assert manifest["ancestors"][0]["run"] == "base"
    assert manifest["defense"]["eps"] == 0.2
    assert list(manifest["history"][-1]["terms"]) == ["distilled"]


def test_eval_json_has_the_promised_keys(baseline: str, surrogate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "base", "--threat", "whitebox", "--eps", "0.1,0.2", "--format", "json", *EVAL]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["eps"] for row in rows] == [0.0, 0.1, 0.2]
    keys = ["target", "defense", "n", "seed", "threat", "eps", "accuracy", "low", "high", "samples"]
    assert all(sorted(row) == sorted(keys) for row in rows)
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["samples"] == 16 for row in rows)

    assert run(["eval", "base", "--threat", "transfer", "--eps", "0.2", "--format", "json", *EVAL]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(sorted(row) == ["eps", "run", "samples", "source", "success", "target"] for row in rows)
    assert {(row["source"], row["target"]) for row in rows} == {(i, j) for i in (1, 2) for j in (1, 2, "ensemble")}

    arguments = [
        "eval",
        "base",
        "--threat",
        "blackbox",
        "--surrogates",
        "sub",
        "--eps",
        "0.2",
        "--format",
        "csv",
        *EVAL,
    ]
    assert run(arguments) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["threat"], row["eps"]) for row in table] == [("blackbox", "0.2"), ("clean", "0.0")]
    versions = stored([Runs("runs").get("base")]).where(threat="blackbox").frame
    # Two starts of PGD, one version of M-DI² and of SGM, each with two losses.
    assert versions.groupby(["attack", "loss", "restart"]).ngroups == 2 * (2 + 1 + 1)


def test_convergence_and_diversity(baseline: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--dataset", "npz:data.npz", "--samples", "16", "--device", "cpu"]
    attacks = ["--attacks", "fgsm,pgd:steps=2,pgd:steps=4"]
    assert run(["eval", "base", "--threat", "convergence", "--eps", "0.1", *attacks, *common]) == 0
    printed = capsys.readouterr().out
    places = [printed.index(f"convergence {attack} ") for attack in ("fgsm", "pgd:steps=2", "pgd:steps=4")]
    assert places == sorted(places)
    assert "attack converged" in printed
    for _ in range(2):
        assert run(["eval", "base", "--threat", "diversity", "--steps", "2", "--format", "json", *common]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["low"] < found["diversity"] < found["high"]
        assert found["eps"] == 0.07
    parts = list(Path("runs/base/diversity").glob("part-*"))
    assert len(parts) == 1
    assert run(["eval", "base", "--threat", "diversity", "--format", "table", *common]) == 0
    assert "mean cross-entropy" in capsys.readouterr().out


def test_missing_surrogates_are_trained_or_refused(baseline: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "base", "--threat", "blackbox", "--surrogates", "1", "--eps", "0.2", *EVAL]
    assert run([*arguments, "--no-train"]) == 2
    assert "--role surrogate" in capsys.readouterr().err


def test_report_writes_figures(baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "base", "--threat", "whitebox", "--eps", "0.1,0.2", *EVAL]) == 0
    capsys.readouterr()
    assert run(["report", "--out", str(tmp_path / "figures")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {".pdf", ".csv"} <= {path.suffix for path in files}
    assert all(path.stat().st_size > 0 for path in files)


def test_list_shows_what_there_is(baseline: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("dverge", "pgd", "resnet20", "cifar10", "folder:PATH", "base"):
        assert name in printed


def test_import_the_ways_weights_come(baseline: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble = Runs("runs").get("base").load()
    states = [member.model.state_dict() for member in ensemble.members]
    flat = {f"model{i}.{name}": value for i, state in enumerate(states) for name, value in state.items()}
    nested = {f"model{i}": {f"model.{n}": v for n, v in state.items()} for i, state in enumerate(states)}
    for state in nested.values():
        state["normalizer.mean"], state["normalizer.std"] = torch.tensor([0.25]), torch.tensor([0.5])
    torch.save(nested, "nested.pth")
    for file, state in zip(("one.pth", "two.pth"), states, strict=True):
        torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}}, file)
    from safetensors.torch import save_file

    save_file(flat, "flat.safetensors")
    common = ["--model", "resnet8", "--dataset", "npz:data.npz"]
    assert run(["import", "nested.pth", "--name", "nested", "--derived-from", "base", *common]) == 0
    spec = Runs("runs").get("base").specs[0]
    said = ["--mean", str(spec.mean[0]), "--std", str(spec.std[0])]
    assert run(["import", "flat.safetensors", "--name", "flat", *common, *said]) == 0
    assert run(["import", "one.pth", "two.pth", "--name", "pair", *common, *said]) == 0
    images = torch.rand(3, 1, 8, 8)
    runs = Runs("runs")
    torch.testing.assert_close(runs.get("flat").load()(images), ensemble.eval()(images))
    assert runs.get("nested").specs[0].mean == (0.25,)
    assert runs.get("nested").manifest["ancestors"][0]["run"] == "base"
    assert runs.get("pair").n == 2
    capsys.readouterr()
    assert run(["import", "flat.safetensors", "--name", "flat", *common]) == 2
    assert "exists" in capsys.readouterr().err
    for wrong in (["--mean", "0.5"], ["--mean", "a", "--std", "b"], ["--mean", "128", "--std", "64"]):
        assert run(["import", "flat.safetensors", "--name", "other", *common, *wrong]) == 2
        assert "expected --mean and --std as numbers with commas" in capsys.readouterr().err


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil-was-here",)


def test_wrong_input_ends_in_one_line_and_exit_code_2(
    baseline: str, surrogate: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("truncated.pth").write_bytes(b"PK\x03\x04 not the rest")
    Path("code.pth").write_bytes(pickle.dumps(_Evil()))
    torch.save({"w": torch.zeros(2)}, "wrong.pth")
    white = ["eval", "base", "--threat", "whitebox", *EVAL]
    cases = {
        ("train", "dvrege", "--dataset", "digits"): "did you mean dverge",
        ("train", "dverge", "--n", "1", "--dataset", "digits"): "at least 2",
        ("train", "adp", "--n", "10", "--dataset", "digits"): "n",
        ("train", "baseline", "--n", "0", "--dataset", "digits"): "at least 1",
        ("train", "baseline", "--dataset", "digts"): "did you mean digits",
        ("train", "baseline", "--dataset", "npz:absent.npz"): "does not exist",
        ("train", "baseline", "--dataset", "digits", "--set", "epoch=3"): "did you mean epochs",
        ("train", "baseline", "--dataset", "digits", "--set", "epochs=many"): "epochs",
        ("train", "baseline", "--dataset", "digits", "--model", "resnet21"): "did you mean resnet",
        ("train", "baseline", "--dataset", "digits", "--name", "../up"): "match",
        ("train", "baseline", "--dataset", "digits", "--device", "cuda:99"): "device",
        ("train", "baseline", "--dataset", "digits", "--runs", "/proc/none"): "cannot write",
        (*white, "--eps", "-0.1"): "eps",
        (*white, "--eps", "8"): "8/255",
        (*white, "--attacks", "pdg"): "did you mean pgn or pgd",
        (*white, "--surrogates", "3"): "no effect",
        ("eval", "bsae", "--threat", "whitebox"): "did you mean base",
        ("eval", "base", "--threat", "blackbox", "--surrogates", "base", *EVAL): "share a member",
        ("eval", "base", "--threat", "blackbox", "--surrogates", "x,0", *EVAL): "Sizes to make or reuse",
        ("eval", "sub", "--threat", "transfer", *EVAL): "has one",
        ("eval", "base", "--threat", "whitebox", "--dataset", "digits"): "choose another --dataset",
        ("eval", "--threat", "whitebox"): "say which data to judge on: --dataset",
        ("import", "absent.pth"): "does not exist",
        ("import", "truncated.pth"): "complete checkpoint",
        ("import", "code.pth"): "refused",
        ("import", "wrong.pth", "--model", "resnet8"): "--model",
        ("report", "--runs", "nowhere"): "nothing was measured",
        ("eval", "--threat", "whitebox", "--runs", "nowhere"): "holds no target run",
    }
    before = sorted(Path("runs").iterdir())
    for arguments, expected in cases.items():
        assert run(list(arguments)) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()
        assert expected in error[-1], (arguments, error)
        assert [line for line in error if "rror" in line] == error[-1:], (arguments, error)
    assert sorted(Path("runs").iterdir()) == before
    assert not Path("evil-was-here").exists()


def test_help_needs_neither_torch_nor_time(work: Path) -> None:
    code = (
        "import sys, robench.cli; robench.cli.run(['--help']); print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    "command",
    [
        ["show", "nobody"], ["report", "nobody"], ["publish", "nobody"], ["board", "nobody"],
        ["eval", "nobody", "--threat", "whitebox"],
    ],
)  # fmt: skip
def test_a_typo_is_answered_before_anything_slow_is_imported(work: Path, command: list[str]) -> None:
    """They imported torch and matplotlib first, which takes seconds."""
    code = (
        f"import sys, robench.cli; code = robench.cli.run({command!r}); "
        f"print(code, *(name in sys.modules for name in ('torch', 'pandas', 'matplotlib')))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "2 False False False\n"
    assert "nobody" in finished.stderr


#: An evaluation that takes a second or two, so that it can be cut off or shared.
LONG = [
    "eval",
    "base",
    "--threat",
    "whitebox",
    *ON,
    "--eps",
    "0.05:0.3:0.05",
    "--steps",
    "12",
    "--precision",
    "float64",
]


def unjudged(work: Path, folder: Path) -> Path:
    """A folder of runs that holds "base" alone, without rows."""
    shutil.copytree(work / "runs" / "base", folder / "base", ignore=shutil.ignore_patterns("outcomes"))
    return folder


def judged(folder: Path) -> pd.DataFrame:
    return stored([Runs(folder).get("base")]).frame


@pytest.fixture(scope="module")
def alone(baseline: str, work: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The rows of `LONG`, by one process that nobody disturbs."""
    folder = unjudged(work, tmp_path_factory.mktemp("alone"))
    assert run([*LONG, "--batch-size", "8", "--runs", str(folder)]) == 0
    return judged(folder)


@pytest.mark.parametrize("delay", [0.4, 1.5])
def test_kill_during_evaluation_then_the_same_command_gives_the_same_rows(
    work: Path, alone: pd.DataFrame, delay: float, tmp_path: Path
) -> None:
    """kill -9 once the first rows are there, or a little later."""
    killed = unjudged(work, tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "robench", *LONG, "--batch-size", "8", "--runs", str(killed)])
    outcomes = killed / "base" / "outcomes"
    deadline = time.monotonic() + 100
    # The first part is the clean rows; wait for one of the attack.
    while len(list(outcomes.glob("part-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run([*LONG, "--batch-size", "8", "--runs", str(killed)]) == 0
    pd.testing.assert_frame_equal(judged(killed), alone, check_exact=False, atol=1e-6)


def test_two_processes_share_the_work_and_give_the_same_rows(work: Path, alone: pd.DataFrame, tmp_path: Path) -> None:
    shared = unjudged(work, tmp_path)
    # Other batches than those of one process, too.
    command = [sys.executable, "-m", "robench", *LONG, "--batch-size", "12", "--runs", str(shared)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    pd.testing.assert_frame_equal(judged(shared), alone, check_exact=False, atol=1e-6)
    assert not list((shared / ".claims").glob("*"))


def test_dry_run_says_what_it_would_take_and_writes_nothing(
    baseline: str, surrogate: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (baseline, surrogate):
        shutil.copytree(work / "runs" / name, tmp_path / name, ignore=shutil.ignore_patterns("outcomes", "checked"))
    common = ["--runs", str(tmp_path), "--dry-run", *EVAL]
    before = sorted(tmp_path.rglob("*"))
    assert run(["eval", "base", "--threat", "blackbox", "--surrogates", "sub", "--eps", "0.1,0.2", *common]) == 0
    printed = capsys.readouterr().out.splitlines()
    # Two losses, two radii; two starts of PGD, one each of M-DI² and SGM; 16 images, 2 steps and what looks at them;
    # one member of the surrogate and two of the target judge these, and clean ones.
    passes = 16 * 16 * (2 + 5 / 3 + 1 / 3 + 2 / 3) + 16
    assert printed[-1].startswith(f"in all at most 16 of 16 cells, {passes:.4g} forward and backward passes")
    assert run(["eval", "base", "--threat", "blackbox", "--surrogates", "1", "--eps", "0.1", *common]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("train npz-")
    assert printed[-1].startswith("in all at most 8 of 8 cells")
    assert sorted(tmp_path.rglob("*")) == before


def test_cache_lists_verifies_and_clears(
    baseline: str, surrogate: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "base", "--threat", "blackbox", "--surrogates", "sub", "--eps", "0.3", *EVAL]) == 0
    capsys.readouterr()
    assert run(["cache", "list"]) == 0
    assert "sub pgd:steps=2:momentum=1 ce 0.3" in capsys.readouterr().out
    victim = sorted(Path("runs/.crafted").glob("*/part-*"))[0]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert run(["cache", "verify"]) == 1
    assert "1 damaged" in capsys.readouterr().out
    assert run(["cache", "clear"]) == 0
    assert not Path("runs/.crafted").exists()
