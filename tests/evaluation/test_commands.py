"""`eval --strict`, `--probe`, `compare` and `check model` from the command line, on runs that nothing had to train."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robench.cli import run
from robench.commands import _helpers
from robench.core.data import Data, load
from robench.core.files import read_record
from robench.core.pool import Processes
from robench.store.claims import Claims
from robench.store.runs import Runs, lineage
from robench.validity import probe
from tests import forged
from tests.core import chores
from tests.small import SPEC, ensemble

pytestmark = pytest.mark.slow

ON = ["--dataset", "npz:noise.npz", "--samples", "24", "--steps", "3", "--restarts", "2"]
EVAL = [*ON, "--device", "cpu"]


@pytest.fixture(scope="module")
def work(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("commands")
    images, labels = data.test.images.numpy(), data.test.labels.numpy()
    np.savez(folder / "noise.npz", x_train=255 - images, y_train=labels, x_test=images, y_test=labels)
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
    around = "mef:steps=25:neighbours=1:radius=1:inner_ratio=0 ce"
    tried = f"{around} and mora:steps=20:targets=0 ce and pgd cw and square:queries=200 cw"
    assert f"fail  survivors attacked again: {tried} take" in printed
    assert run(["show", "gal0"]) == 0
    shown = capsys.readouterr().out
    assert "fail  survivors attacked again" in shown, "a finding is kept beside the rows"
    assert "probe" not in shown, "rows that serve a check are no result"


def test_what_lacks_memory_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("robench.evaluation.judging.predict", failing)
    assert run(["eval", "adp0", "--threat", "whitebox", "--eps", "0.02", *EVAL]) == 2
    # The first says what the data are.
    _, line = capsys.readouterr().err.strip().splitlines()
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
    assert re.search("gal0 +│ blackbox-related", printed)


def test_probe_says_its_cost_and_what_it_found(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("QUERIES", 100), ("OTHER_STEPS", 10), ("DRAWS", 20)):
        monkeypatch.setattr(probe, name, few)
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


def test_check_model(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["check", "model", "gal0", "--dataset", "npz:noise.npz", "--device", "cpu"]) == 0
    manifest = Runs().get("gal1").manifest
    assert run(["check", "model", "gal1", "--dataset", "digits", "--device", "cpu"]) == 1
    assert "fail  number of classes (member 1, 2): the model has 4 outputs, digits has 10" in capsys.readouterr().out
    assert read_record(Path("runs/gal1/manifest.json")) == manifest
    monkeypatch.syspath_prepend(str(work))
    Path("made_here.py").write_text(
        "from torch import nn\n"
        "def soft(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes), nn.Softmax(1))\n"
    )
    try:
        assert run(["check", "model", "made_here:soft", "--dataset", "digits", "--device", "cpu"]) == 1
    finally:
        sys.modules.pop("made_here", None)
    assert "fail  probabilities" in capsys.readouterr().out
    assert run(["check", "model", "made_here:soft"]) == 2
    assert "--dataset" in capsys.readouterr().err


def test_old_names_of_checks_work_and_say_the_new_ones(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "gal1", "--dataset", "digits", "--device", "cpu"]) == 1
    old = capsys.readouterr()
    assert old.err.splitlines()[0].startswith("`robench doctor` is now `robench check model`")
    assert run(["check", "model", "gal1", "--dataset", "digits", "--device", "cpu"]) == 1
    assert capsys.readouterr() == (old.out, "")
    assert run(["verify", "absent"]) == 2
    assert "`robench verify` is now `robench check result`" in capsys.readouterr().err
    assert run(["check", "baseline"]) == 0
    old = capsys.readouterr()
    assert old.err.splitlines() == [
        "`robench check NAME` is now `robench check plugin NAME`; the old form goes with the next release"
    ]
    assert run(["check", "plugin", "baseline"]) == 0
    assert capsys.readouterr() == (old.out, "")
    assert run(["-h"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert "check" in listed
    assert not {"doctor", "verify"} & set(listed)
    assert run(["check", "-h"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {"plugin", "model", "result"} <= set(listed)


def test_weights_that_were_replaced_are_not_mixed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "hold-out1", "hold-out2", "--threat", "whitebox", "--eps", "0.02", *EVAL]) == 0

    def another(cell: dict[str, Any]) -> None:
        if cell["threat"] == "clean":
            cell["recipe"]["target"] = "other"

    forged.cells(Path("runs/hold-out1/outcomes"), another)
    capsys.readouterr()
    told = (
        "1 of 2 cells of an evaluation under whitebox in runs/hold-out1/outcomes are of other weights than it says: it "
        "is left out"
    )
    for threat in ("whitebox", "clean"):
        assert run(["compare", "hold-out1", "hold-out2", "--threat", threat]) == 2
        assert told in capsys.readouterr().err
    assert run(["show", "hold-out1", "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert told in printed.err
    assert json.loads(printed.out)["scores"] == []


def test_helpers_do_the_work(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does nothing: every row is theirs, and the one that is killed loses none."""
    arguments = ["eval", "adp1", "--threat", "whitebox", "--eps", "0.05,0.1", *EVAL, "--format", "csv"]
    assert run(arguments) == 0
    alone = capsys.readouterr().out
    shutil.rmtree("runs/adp1/outcomes")
    killed: list[int] = []

    @contextmanager
    def kill_first_owner(self: Claims, unit: str) -> Iterator[bool]:
        for path in Path("runs/.claims").glob("*.lock"):
            with suppress(OSError, TypeError):  # it may be written or gone by now
                owner = int(re.search("pid=(.*)", path.read_text())[1])  # type: ignore[index]
                if not killed and owner != os.getpid():
                    os.kill(owner, signal.SIGKILL)
                    killed.append(owner)
        time.sleep(0.001)
        yield False

    monkeypatch.setattr(Claims, "take", kill_first_owner)
    # Short, but a sleep: they need the processor.
    monkeypatch.setattr("robench.evaluation.sharing.PAUSE", 0.05)
    threads = torch.get_num_threads()
    assert run([*arguments, "--workers", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out == alone
    assert torch.get_num_threads() == threads
    assert ("of 2 ended early, its share was done here: BrokenProcessPool" in printed.err) == bool(killed)


def test_helpers_know_surrogates_and_code_by_their_names(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is typed as --model, they import; what their code prints goes nowhere."""
    Path("theirs.py").write_text(
        "from robench.core.models import MODELS\n"
        "def make(num_classes, in_channels):\n"
        "    print('made')\n"
        "    return MODELS.get('resnet8')(num_classes=num_classes, in_channels=in_channels)\n"
    )
    monkeypatch.syspath_prepend(str(work))
    spec = replace(SPEC, name="theirs:make")
    about: dict[str, Any] = {"members": [spec, spec], "defense": {"name": "gal"}, "seed": 0, "data": None}
    Runs().save("own", ensemble(40), role="target", **about)
    arguments = ["eval", "own", "--threat", "blackbox", "--surrogates", "adp0", "--eps", "0.1", *EVAL]
    arguments += ["--attacks", "pgd", "--model", "theirs:make"]
    assert run(arguments) == 0
    alone = capsys.readouterr().out
    for folder in ("runs/own/outcomes", "runs/adp0/checked", "runs/.crafted"):
        shutil.rmtree(folder)
    monkeypatch.setattr(Claims, "take", lambda *_: nullcontext(False))
    assert run([*arguments, "--workers", "2"]) == 0
    assert capsys.readouterr().out == alone


def test_a_helper_that_fails_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robench.commands.eval._assist", chores.fail)
    begun: list[Future[Any]] = []
    submit, take = Processes.submit, Claims.take

    def noting(self: Processes, call: tuple[Any, ...]) -> Future[Any]:
        begun.append(submit(self, call))
        return begun[-1]

    def taking(self: Claims, unit: str) -> AbstractContextManager[bool]:
        assert not wait(begun, timeout=120).not_done
        return take(self, unit)

    monkeypatch.setattr(Processes, "submit", noting)
    monkeypatch.setattr(Claims, "take", taking)
    arguments = ["eval", "adp1", "--threat", "whitebox", "--eps", "0.05", *EVAL, "--seed", "3", "--workers", "3"]
    assert run(arguments) == 0
    named = [line for line in capsys.readouterr().err.splitlines() if "ended early" in line]
    assert named == [f"helper {k} of 2 ended early, its share was done here: no help today" for k in (1, 2)]


def test_every_gpu_gets_a_process(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes the first."""
    asked: list[tuple[str, int, list[str]]] = []

    @contextmanager
    def noting(count: int, gpus: list[str], function: Any, typed: Any, *rest: Any) -> Iterator[None]:
        asked.append((typed.device, count, gpus))
        yield

    def on_cpu(name: str) -> torch.device:
        return torch.device("cpu")

    monkeypatch.setattr(_helpers, "helpers", noting)
    monkeypatch.setattr("robench.commands.eval.device_of", on_cpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    common = ["eval", "adp2", "--threat", "whitebox", "--eps", "0.05", *ON, "--no-probe"]
    for gpus, options in (
        (3, ["--device", "auto"]),
        (2, ["--device", "cuda", "--workers", "4"]),
        (2, ["--device", "cuda:1"]),
        (1, ["--device", "auto"]),
        (0, ["--device", "cpu", "--workers", "2"]),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert run([*common, *options]) == 0
    assert asked == [
        ("auto", 2, ["1", "2", "0"]),
        ("cuda", 3, ["1", "0"]),
        ("cuda:1", 0, []),
        ("auto", 0, ["0"]),
        ("cpu", 1, []),
    ]


def test_workers_without_work_are_an_error(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--threat", "whitebox", "--dry-run"], ["--threat", "diversity"]):
        assert run(["eval", "gal0", *arguments, "--dataset", "npz:noise.npz", "--workers", "2"]) == 2
        assert "--workers has no effect" in capsys.readouterr().err


def test_a_baseline_that_another_training_made_is_told(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Runs(tmp_path / "runs")
    about: dict[str, Any] = {
        "seed": 0,
        "role": "target",
        "data": {"name": load("npz:noise.npz").label, "fingerprint": ""},
    }
    start = store.save("start", ensemble(0), members=[SPEC, SPEC], defense={"name": "baseline"}, **about)
    lines = {"ancestors": lineage(start), **about}
    store.save("mine", ensemble(1), members=[SPEC, SPEC], defense={"name": "dverge"}, **lines)
    command = ["eval", "--threat", "whitebox", "--eps", "0.1", "--dry-run", "--runs", str(tmp_path / "runs"), *EVAL]
    assert run(command) == 0
    assert "start, which mine started from, is a target too" in capsys.readouterr().err
    assert run([*command, "start", "mine"]) == 0
    assert "is a target too" not in capsys.readouterr().err


def test_code_that_runs_need_is_named_at_once_and_first(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of targets and surrogates, before any of them is loaded."""
    about: dict[str, Any] = {"defense": {"name": "gal"}, "seed": 0, "role": "target", "data": None}
    for name in ("one", "two"):
        Runs("coded").save(name, ensemble(41), members=[replace(SPEC, name=f"absent:{name}")] * 2, **about)
    monkeypatch.setattr("robench.session.Session.load", lambda *_: pytest.fail("loaded for nothing"))
    arguments = ["eval", "one", "--runs", "coded", "--threat", "blackbox", "--surrogates", "two", "--eps", "0.1"]
    assert run([*arguments, *EVAL]) == 2
    assert "type it yourself: --model absent:one --model absent:two, or" in capsys.readouterr().err


def test_what_show_tells_of_rows_it_tells_once(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/gal0", "damaged/gal0", ignore=shutil.ignore_patterns("outcomes"))
    place = ["--runs", "damaged"]
    assert run(["eval", "gal0", "--threat", "whitebox", "--eps", "0.05", "--no-probe", *place, *EVAL]) == 0
    for path in Path("damaged/gal0/outcomes").glob("part-*"):
        path.write_bytes(b"")
    capsys.readouterr()
    assert run(["show", "gal0", *place]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--epochs", "2", "--set", "epochs=1"], "`epochs` is said by --epochs and by --set"),
        (["--set", "gamma=1", "--set", "gamma=2"], "--set says `gamma` twice, '1' and '2'"),
        (["--log-to", "wndb"], "unknown log 'wndb'; did you mean wandb"),
    ],
)
def test_a_training_that_is_told_two_things_or_a_wrong_log_is_refused_at_once(
    work: Path, options: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robench.core.data.load", lambda *_: pytest.fail("loaded for nothing"))
    assert run(["train", "baseline", "--dataset", "npz:noise.npz", "--n", "2", *options]) == 2
    assert told in capsys.readouterr().err


def test_what_draws_takes_the_code_of_a_network(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("drawn_here.py").write_text(
        "from robench.core.models import MODELS\n"
        "def make(num_classes, in_channels):\n"
        "    return MODELS.get('resnet8')(num_classes=num_classes, in_channels=in_channels)\n"
    )
    monkeypatch.syspath_prepend(str(work))
    about: dict[str, Any] = {"defense": {"name": "gal"}, "seed": 0, "role": "target", "data": None}
    store, code = ["--runs", "drawn"], ["--model", "drawn_here:make"]
    Runs("drawn").save("own", ensemble(42), members=[replace(SPEC, name="drawn_here:make")] * 2, **about)
    assert run(["eval", "own", "--threat", "whitebox", "--eps", "0.1", "--no-probe", *store, *code, *EVAL]) == 0
    commands = (
        ["report", "own", "--dataset", "npz:noise.npz", "--images", "2", "--device", "cpu", "--out", "figures"],
        ["show", "own", "--dataset", "npz:noise.npz", "--images", "fell.png", "--device", "cpu"],
        ["publish", "own", "--out", "card"],
    )
    for command in commands:
        monkeypatch.setattr("robench.core.models._IMPORTED", {})
        capsys.readouterr()
        assert run([*command, *store]) == 2
        assert "type it yourself: --model drawn_here:make" in capsys.readouterr().err
        assert run([*command, *store, *code]) == 0
    monkeypatch.setattr("robench.core.models._IMPORTED", {})
    assert run(["board", "drawn", "--out", "drawn.html"]) == 0
    assert "gal" in Path("drawn.html").read_text().split("<tbody>")[1], "its size is not known, its accuracy is"
