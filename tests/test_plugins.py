"""The example package, installed and used as a user would; and one that is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robench.cli import run
from robench.commands.init import has_pip

EXAMPLE = Path(__file__).parents[1] / "examples" / "robench-example"

#: Runs command lines in one process, as each costs seconds to start; prints (exit code, stdout, stderr) of each, and
#: which packages of networks the first one imported.
SCRIPT = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
from robench.cli import run
answers, heavy = [], None
for line in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line)
    heavy = heavy if answers else sorted({"torchvision", "timm", "torchattacks"} & set(sys.modules))
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps([answers, heavy]))
"""

DATA = "--dataset npz:data.npz --device cpu"
TRAIN = f"--n 2 --model resnet8 --epochs 1 --batch-size 32 {DATA}"
EVAL = f"--threat whitebox --eps 0.1,0.3 --samples 8 --restarts 1 --format json {DATA}"
LINES = {
    "list": "list",
    "check": "check plugin example-noise example-fgsm",
    "check own": "check plugin my-defense my-attack",
    "init again": "init my-defense --out elsewhere",
    "train": f"train example-noise --set sigma=0.05 --name noisy {TRAIN}",
    "eval": f"eval noisy --attacks example-fgsm {EVAL}",
    "broken attack": "check plugin broken",
    "wrong field": f"train example-noise --set sigma=2 {TRAIN}",
    "broken defense": f"train broken {TRAIN}",
    "not a class": "check plugin number",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example package is installed, and one whose module fails to import."""
    folder = tmp_path_factory.mktemp("plugins")
    packages = [shutil.copytree(EXAMPLE, folder / "source")]  # building leaves files behind
    for name, kind in (("my-defense", []), ("my-attack", ["--attack"])):
        packages.append(folder / name)
        assert run(["init", name, *kind, "--out", str(packages[-1])]) == 0
    site = folder / "site"
    uv = shutil.which("uv")
    if uv is not None:
        install = [uv, "pip", "install", "--quiet", "--offline", "--python", sys.executable]
    elif has_pip():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    else:
        pytest.skip("neither uv nor pip is there to install a package with")
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, and to fetch it needs a network")
    command = [*install, "--no-deps", "--no-build-isolation", "--target", str(site), *map(str, packages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (site / "robench_broken.py").write_text("raise OSError('no licence file')\n")
    (site / "robench_number.py").write_text("number = 7\n")
    record = site / "robench_broken-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: robench-broken\nVersion: 1.0\n")
    broken, number = "broken = robench_broken:Broken\n", "number = robench_number:number\n"
    (record / "entry_points.txt").write_text(f"[robench.attacks]\n{broken}{number}\n[robench.defenses]\n{broken}")
    return site


@pytest.fixture(scope="module")
def answers(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("work")
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (72, 1, 8, 8), dtype=np.uint8), np.arange(72) % 4
    images[:, 0, 0] = 60 * labels[:, None]
    np.savez(folder / "data.npz", x_train=images[:64], y_train=labels[:64], x_test=images[64:], y_test=labels[64:])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(site), json.dumps([line.split() for line in LINES.values()])],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found, heavy = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(LINES, found, strict=True)) | {"heavy": heavy, "folder": folder}


def test_list_shows_the_plug_ins_and_names_the_broken_one(answers: dict[str, Any]) -> None:
    code, out, err = answers["list"]
    assert code == 0
    assert "  example-noise    Σ_i CE(z_i(x + σ·n_i), y)" in out
    assert "  example-fgsm     x + ε·sign ∇loss" in out
    assert "  broken" not in out
    for kind in ("attack", "defense"):
        reason = (
            f"broken: skipped. {kind} 'broken' of package 'robench-broken' fails to load (OSError: no licence file)"
        )
        assert reason in err


def test_list_alone_imports_no_package_of_networks(answers: dict[str, Any]) -> None:
    assert answers["heavy"] == []
    assert "torchvision/<name>   robench list models" in answers["list"][1]


def test_check_passes_them(answers: dict[str, Any]) -> None:
    code, out, _ = answers["check"]
    assert code == 0
    verdicts = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert set(verdicts) == {"pass"}, out
    assert "defense example-noise:" in out
    assert "attack example-fgsm:" in out


def test_what_init_writes_keeps_the_contract(answers: dict[str, Any]) -> None:
    code, out, err = answers["check own"]
    assert code == 0, out + err
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} == {"pass"}, out
    assert "defense my-defense:" in out
    assert "attack my-attack:" in out
    code, _, err = answers["init again"]
    assert code == 2
    assert "'my-defense' is the name of a plug-in or package that is there; choose another" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["init", "My_Defense"], "expected NAME of lower-case letters, digits and single hyphens, such as my-defense"),
        (["init", "dverge"], "'dverge' is the name of a plug-in"),
        (["init", "pgd", "--attack"], "'pgd' is the name of a plug-in"),
        (["init", "numpy"], "'numpy' is the name of a plug-in or package"),
        (["init", "nobody-has-this", "--out", "."], ". exists; choose another --out"),
    ],
)
def test_init_overwrites_nothing(line: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "said"), [(True, "  pip install -e "), (False, f"  uv pip install --python {sys.executable} -e ")]
)
def test_init_names_an_installer_of_this_environment(
    there: bool, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robench.commands.init.has_pip", lambda: there)
    assert run(["init", "nobody-has-this", "--out", str(tmp_path / "mine")]) == 0
    assert f"{said}{tmp_path / 'mine'}" in capsys.readouterr().out


def test_list_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "defenses", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [each for each in lines if each.startswith("| `dverge` |")]
    assert line.endswith("(Yang et al. 2020, eq. 5, <https://arxiv.org/abs/2009.14720>). |")
    assert all(each.replace("\\|", "").count("|") == 3 for each in lines if each)
    assert run(["list", "runs", "--markdown"]) == 2


def test_the_shell_completes() -> None:
    """As docs/tutorial.md says; click answers the shell."""
    environment = {**os.environ, "_ROBENCH_COMPLETE": "bash_complete", "COMP_WORDS": "robench ev", "COMP_CWORD": "1"}
    robench = Path(sys.executable).with_name("robench")
    done = subprocess.run([robench], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "plain,eval"


def test_train_and_eval_use_them(answers: dict[str, Any]) -> None:
    code, out, err = answers["train"]
    assert (code, out.strip()) == (0, "noisy"), err
    manifest = json.loads((answers["folder"] / "runs" / "noisy" / "manifest.json").read_text())
    assert manifest["defense"] == {"name": "example-noise", "version": 1, "sigma": 0.05}
    code, out, err = answers["eval"]
    assert code == 0, err
    assert [row["eps"] for row in json.loads(out)] == [0.0, 0.1, 0.3]


def test_their_own_errors_are_one_line(answers: dict[str, Any]) -> None:
    code, _, err = answers["wrong field"]
    assert (code, err) == (2, "Error: expected `sigma` of defense 'example-noise' in (0, 1], got 2.0\n")


@pytest.mark.parametrize("use", ["broken attack", "broken defense"])
def test_a_broken_plug_in_is_an_error_when_it_is_used(answers: dict[str, Any], use: str) -> None:
    code, _, err = answers[use]
    assert code == 2
    assert "'robench-broken' fails to load (OSError: no licence file); repair or uninstall that package" in err


def test_a_plug_in_that_is_no_class_is_a_violation(answers: dict[str, Any]) -> None:
    code, out, _ = answers["not a class"]
    assert code == 1
    assert "fail  is a class of attacks: is 7, expected a subclass of robench.attacks.Attack" in out
