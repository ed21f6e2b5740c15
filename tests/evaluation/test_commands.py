"""`eval --strict`, `--probe`, `compare` and `doctor` from the command line, on runs that nothing had to train."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robench.cli import run
from robench.commands import _helpers
from robench.core.data import Data, load
from robench.core.runs import Runs
from robench.core.store import read_record
from robench.evaluation.engine import Evaluator
from tests import forged
from tests.evaluation.conftest import SPEC, ensemble

EVAL = ["--dataset", "npz:noise.npz", "--samples", "24", "--steps", "3", "--restarts", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("commands")
    images, labels = data.test.images.numpy(), data.test.labels.numpy()
    np.savez(folder / "noise.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for seed in range(3):
            for defense, key in (("gal", seed), ("adp", 10 + seed), ("hold-out", 20 + seed)):
                Runs().save(
                    f"{defense}{seed}",
                    ensemble(key),
                    members=[SPEC, SPEC],
                    defense={"name": defense},
                    seed=seed,
                    role="target",
                    data={"name": load("npz:noise.npz").label, "fingerprint": ""},
                )
        yield folder
    finally:
        os.chdir(before)


def test_checks_come_after_the_table_and_beside_csv(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "gal0", "--threat", "whitebox", "--eps", "0.02,0.1", *EVAL]
    assert run([*arguments, "--strict", "--no-probe"]) == 0
    printed = capsys.readouterr()
    assert "24 images, not probed" in printed.out
    names = [line.split(":")[0] for line in printed.out.splitlines()[-7:]]
    assert names == [
        "pass  outputs repeat",
        "pass  gradient true",
        "pass  sample stands for the data",
        "pass  rows possible",
        "pass  images moved",
        "pass  gradients there",
        "pass  accuracy falls with ε",
    ]
    assert run([*arguments, "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert "pass  rows possible" in printed.err


def test_survivors_of_too_few_steps_fall_to_what_is_always_tried(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "gal0", "--threat", "whitebox", "--eps", "0.1", *EVAL]
    assert run([*arguments, "--strict"]) == 1
    printed = capsys.readouterr().out
    assert "not probed" not in printed
    assert "fail  survivors attacked again: pgd cw and square:queries=200 cw take" in printed
    assert run(["show", "gal0"]) == 0
    shown = capsys.readouterr().out
    assert "fail  survivors attacked again" in shown, "a finding is kept beside the rows"
    assert "probe" not in shown, "rows that serve a check are no result"


def test_what_lacks_memory_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("robench.evaluation.engine.predict", failing)
    assert run(["eval", "adp0", "--threat", "whitebox", "--eps", "0.02", *EVAL]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("Error: the memory does not suffice (CUDA out of memory. Tried to allocate); try a smaller")


def test_strict_sets_the_exit_code(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An attack whose steps move nothing to speak of."""
    lame = "pgd:step_ratio=0.001:random_start=false"
    arguments = ["eval", "gal0", "--threat", "whitebox", "--eps", "0.1", "--attacks", lame, *EVAL]
    assert run(arguments) == 0
    assert run([*arguments, "--strict"]) == 1
    assert "fail  images moved" in capsys.readouterr().out


def test_require_sets_the_exit_code(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "gal0", "--threat", "whitebox", "--eps", "0.1", *EVAL]
    assert run([*arguments, "--require", "whitebox@0.1>=0", "--require", "clean>=0"]) == 0
    assert "met   whitebox@0.1>=0: gal0 has " in capsys.readouterr().out
    assert run([*arguments, "--require", "whitebox@0.1>=100", "--format", "json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [each["met"] for each in printed["requirements"]] == [False]
    assert {row["threat"] for row in printed["results"]} == {"clean", "whitebox"}
    assert run([*arguments, "--require", "whitebox@0.2>=0"]) == 2
    assert "this evaluation has no such number; there are clean, whitebox@0.1" in capsys.readouterr().err
    assert run([*arguments[:2], "--threat", "transfer", "--require", "clean>=0", *EVAL]) == 2
    assert "--require has no effect under --threat transfer" in capsys.readouterr().err


def test_an_allowed_relation_labels_the_result(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "gal0", "--threat", "blackbox", "--eps", "0.1", "--surrogates", "gal0", *EVAL]
    assert run(arguments) == 2
    assert "--allow-related" in capsys.readouterr().err
    assert run([*arguments, "--allow-related"]) == 0
    printed = capsys.readouterr().out
    assert "warn  surrogates unrelated: no black-box result, for gal0 and gal0 share" in printed
    assert "gal0 (blackbox-related)" in printed


def test_probe_says_its_cost_and_what_it_found(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    black = ["eval", "gal0", "--threat", "blackbox", "--surrogates", "adp0", "--probe", *EVAL]
    assert run(black) == 2
    assert "--probe has no effect" in capsys.readouterr().err
    assert run(["eval", "gal0", "--threat", "whitebox", "--eps", "0.02", "--probe", *EVAL]) == 0
    printed = capsys.readouterr()
    assert "survivors of gal0 at ε 0.02: at most" in printed.err
    assert "a large ε takes all" in printed.out


def test_compare_two_ensembles_and_two_defenses(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{defense}{seed}" for seed in range(3) for defense in ("gal", "adp")]
    assert run(["eval", *names, "--threat", "whitebox", "--eps", "0.02", *EVAL]) == 0
    capsys.readouterr()
    assert run(["compare", "gal0", "adp0", "--threat", "whitebox", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["a"], row["b"], row["samples"], row["eps"]) == ("gal0", "adp0", 24, 0.02)
    assert run(["compare", "gal", "adp", "--defenses", "--threat", "clean"]) == 0
    assert "± sd over seeds" in capsys.readouterr().out
    cases = {
        ("compare", "gal0", "adp0", "--threat", "blackbox"): "robench eval gal0 --threat blackbox",
        ("compare", "gal0", "adp0", "--threat", "whitebox", "--eps", "0.3"): "--eps 0.3",
        ("compare", "gal0", "adp0", "--threat", "clean", "--n", "2"): "no effect",
        ("compare", "gal", "adp", "--defenses", "--threat", "clean", "--n", "5"): "choose with --n",
        ("compare", "gal", "hold-out", "--defenses", "--threat", "clean"): "no clean rows of 'hold-out0'",
        ("compare", "gal", "ghal", "--defenses", "--threat", "clean"): "did you mean gal",
    }
    for arguments, expected in cases.items():
        assert run(list(arguments)) == 2, arguments
        assert expected in capsys.readouterr().err.splitlines()[-1]


def test_doctor(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["doctor", "gal0", "--dataset", "npz:noise.npz", "--device", "cpu"]) == 0
    manifest = Runs().get("gal1").manifest
    assert run(["doctor", "gal1", "--dataset", "digits", "--device", "cpu"]) == 1
    assert "fail  number of classes (member 1, 2): the model has 4 outputs, digits has 10" in capsys.readouterr().out
    assert read_record(Path("runs/gal1/manifest.json")) == manifest
    monkeypatch.syspath_prepend(str(work))
    Path("made_here.py").write_text(
        "from torch import nn\n"
        "def soft(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes), nn.Softmax(1))\n"
    )
    try:
        assert run(["doctor", "made_here:soft", "--dataset", "digits", "--device", "cpu"]) == 1
    finally:
        sys.modules.pop("made_here", None)
    assert "fail  probabilities" in capsys.readouterr().out
    assert run(["doctor", "made_here:soft"]) == 2
    assert "--dataset" in capsys.readouterr().err


def test_weights_that_were_replaced_are_not_mixed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "hold-out1", "hold-out2", "--threat", "whitebox", "--eps", "0.02", *EVAL]) == 0

    def another(cell: dict[str, Any]) -> None:
        if cell["threat"] == "clean":
            cell["recipe"]["target"] = "other"

    forged.cells(Path("runs/hold-out1/outcomes"), another)
    capsys.readouterr()
    told = "1 of 2 cells in runs/hold-out1/outcomes are of other weights: left out"
    for threat, code in (("whitebox", 0), ("clean", 2)):
        assert run(["compare", "hold-out1", "hold-out2", "--threat", threat]) == code
        assert told in capsys.readouterr().err
    assert run(["show", "hold-out1", "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert told in printed.err
    assert {score["threat"] for score in json.loads(printed.out)["scores"]} == {"whitebox"}


def test_helpers_do_the_work(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does nothing: every row is theirs, and the one that is killed loses none."""
    arguments = ["eval", "--threat", "whitebox", "--eps", "0.05,0.1", *EVAL, "--format", "csv", "--", "adp1"]
    assert run(arguments) == 0
    alone = capsys.readouterr().out
    shutil.rmtree("runs/adp1/outcomes")
    monkeypatch.setattr(_helpers, "places_of", lambda *_: ["cpu", "cpu", "cpu"])
    killed: list[int] = []

    def kill_first_owner(self: Evaluator, *_: object) -> bool:
        for path in Path("runs/.claims").glob("*.json"):
            with suppress(OSError, ValueError):  # it may be written or gone by now
                owner = json.loads(path.read_text())["process"]
                if not killed and owner != os.getpid():
                    os.kill(owner, signal.SIGKILL)
                    killed.append(owner)
        time.sleep(0.001)
        return False

    monkeypatch.setattr(Evaluator, "_share", kill_first_owner)
    monkeypatch.setattr("robench.evaluation.engine.time.sleep", lambda seconds: None)
    threads = torch.get_num_threads()
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == alone
    assert torch.get_num_threads() == threads
    assert ("exit code -9" in printed.err) == bool(killed)


def test_a_helper_that_fails_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gets the words of the caller, with which all cut the work alike."""
    monkeypatch.setattr(_helpers, "PROGRAM", (sys.executable, "-c", "import sys; sys.exit(' '.join(sys.argv[1:]))"))
    monkeypatch.setattr(_helpers, "places_of", lambda *_: ["cpu", "cpu", "cpu"])
    started: list[subprocess.Popen[bytes]] = []
    original, share = subprocess.Popen, Evaluator._share

    def starting(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(original(*arguments, **options))
        return started[-1]

    def sharing(self: Evaluator, *arguments: Any) -> bool:
        assert [process.wait() for process in started] == [1, 1]
        return share(self, *arguments)

    monkeypatch.setattr(subprocess, "Popen", starting)
    monkeypatch.setattr(Evaluator, "_share", sharing)
    arguments = ["eval", "--threat", "whitebox", "--eps", "0.05", *EVAL, "--seed", "3"]
    assert run([*arguments, "--", "adp1"]) == 0
    named = [line for line in capsys.readouterr().err.splitlines() if "ended early, its share was done here" in line]
    assert [line.endswith("--workers 3 --helper --device cpu -- adp1") for line in named] == [True, True]


def test_a_helper_ends_with_its_caller(work: Path) -> None:
    code = "from robench.commands._helpers import end_with_caller; end_with_caller(); import time; time.sleep(60)"
    helper = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert helper.stdin is not None
    assert helper.poll() is None
    helper.stdin.close()
    assert helper.wait(timeout=30) == 1


def test_every_gpu_gets_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _helpers.places_of("auto", None) == ["cuda:0", "cuda:1"]
    assert _helpers.places_of("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert _helpers.places_of("cuda:1", None) == ["cuda:1"]
    assert _helpers.places_of("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _helpers.places_of("auto", None) == ["auto"]


def test_workers_without_work_are_an_error(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--threat", "whitebox", "--dry-run"], ["--threat", "diversity"]):
        assert run(["eval", "gal0", *arguments, "--dataset", "npz:noise.npz", "--workers", "2"]) == 2
        assert "--workers has no effect" in capsys.readouterr().err
