"""`robench publish`: what it writes verifies, comes back, and its commands make the same again."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from robench.cli import run
from robench.core.files import file_hash
from robench.evaluation.words import attacks
from robench.session import OUTCOMES, Session, rows_of, stored
from robench.store.runs import Runs
from robench.studies.card import judge_commands

TRAIN = ["train", "dverge", "--dataset", "digits", "--n", "2", "--epochs", "1", "--set", "steps=1"]
TRAIN += ["--set", "batch_size=240"]
JUDGE = ["eval", "mine", "--eps", "0.1", "--samples", "8", "--device", "cpu", "--steps", "2", "--restarts", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs``, of which "mine" is judged, and ``card``, what is published of it."""
    folder = tmp_path_factory.mktemp("published")
    runs = ["--runs", str(folder / "runs")]
    assert run([*TRAIN, "--init", "scratch", "--name", "mine", "--device", "cpu", *runs]) == 0
    assert run([*JUDGE, "--threat", "whitebox", *runs]) == 0
    assert run([*JUDGE, "--threat", "transfer", *runs]) == 0
    assert run(["publish", "mine", "--out", str(folder / "card"), *runs]) == 0
    return folder


def commands(card: Path) -> list[list[str]]:
    blocks = re.findall("```bash\n(.*?)\n```", card.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_card_says_numbers_hashes_and_normalisation(trained: Path) -> None:
    text = (trained / "card" / "README.md").read_text()
    made = Runs(trained / "runs").get("mine")
    for said in (
        file_hash(trained / "card/runs/mine/weights.safetensors"), made.weights,
        made.manifest["member_weights"][0][:16],
        ",".join(f"{value:g}" for value in made.specs[0].mean), "| digits | white-box | 0.1 |", "figures/report.html",
        "fingerprint " + made.manifest["data"]["fingerprint"],
    ):  # fmt: skip
        assert said in text, said
    low, high = re.findall(r"\| digits \| none \| 0 \| [0-9.]+ \[([0-9.]+), ([0-9.]+)\]", text)[0]
    assert float(low) < float(high)
    for picture in re.findall(r"\]\((figures/[^)]*)\)", text):
        assert (trained / "card" / picture).is_file()


def test_the_commands_on_the_card_make_the_same_again(trained: Path, tmp_path: Path) -> None:
    said = commands(trained / "card" / "README.md")
    own = [words for words in said if words[1] in ("train", "eval")]
    assert [words[1] for words in own] == ["train", "eval", "eval"]
    for words in own:
        assert run([*words[1:], "--device", "cpu", "--runs", str(tmp_path / "again")]) == 0
    first, again = (Runs(folder).get("mine") for folder in (trained / "runs", tmp_path / "again"))
    assert again.weights == first.weights
    assert again.manifest["recipe"] == first.manifest["recipe"]
    assert stored([again]).frame.equals(stored([first]).frame)


def test_it_verifies_is_read_by_a_board_and_comes_back(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "card", tmp_path / "card")
    monkeypatch.chdir(tmp_path / "card")
    checks = [words[1:] for words in commands(Path("README.md")) if words[1] == "check"]
    assert len(checks) == 2
    for words in checks:
        assert run(words) == 0
    assert run(["board", ".", "--out", "../board.html"]) == 0
    assert ">card</a>" in (tmp_path / "board.html").read_text()
    monkeypatch.chdir(tmp_path)
    assert run(["import", "card"]) == 0
    assert run(["import", "card"]) == 0  # it is there already
    taken = Runs("runs").get("mine")
    assert stored([taken]).frame.equals(stored([Runs(trained / "runs").get("mine")]).frame)
    assert taken.load().rule == "softmax"


def test_surrogates_come_along(judged: Session, tmp_path: Path) -> None:
    runs = ["--runs", str(judged.store.root)]
    assert run(["publish", "base", "--out", str(tmp_path / "card"), *runs]) == 0
    assert sorted(path.name for path in (tmp_path / "card/runs").iterdir()) == ["base", "sub"]
    assert not (tmp_path / "card/runs/sub" / OUTCOMES).exists()
    assert "Surrogates, in `runs/`: `sub`." in (tmp_path / "card/README.md").read_text()
    data = ["--dataset", f"npz:{tmp_path / 'noise.npz'}", "--device", "cpu", "--cells", "50"]
    assert run(["check", "result", str(tmp_path / "card"), *data]) == 0
    assert run(["import", str(tmp_path / "card"), "--runs", str(tmp_path / "taken")]) == 0
    assert Runs(tmp_path / "taken").names() == ["base", "sub"]


def test_a_command_on_the_card_names_the_images_the_radius_and_the_data_that_were_judged(judged: Session) -> None:
    base = judged.store.get("base")
    options = {"eps": (8 / 255,), "restarts": 1, "attacks": attacks("whitebox", steps=1)}
    session = Session(judged.store, judged.data, judged.settings, 8, "random")
    session.whitebox([base], **options)
    commands = [line for line in judge_commands(base, rows_of(base).evaluations()) if repr(8 / 255) in line]
    assert [f"--eps {8 / 255!r}" in line and "--samples 8 --subset random" in line for line in commands] == [True]
    assert "--dataset DATA" in commands[0]  # the run was made for CIFAR-10
    usual = [line for line in judge_commands(base, rows_of(base).evaluations()) if "--eps 0.1,0.3" in line]
    assert usual
    assert not any("--subset" in line for line in usual)


def test_what_cannot_be_given_or_taken_is_one_line(
    judged: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run(["publish", "base", "--out", "card"]) == 0
    for words, said in (
        (["publish", "base", "--out", "full"], "expected --out as a new folder"),
        (["publish", "base", "--out", "noise.npz"], "expected --out as a new folder"),
        (["publish", "sub"], "nothing was measured on 'sub'"),
        (["publish", "nobody"], "unknown run 'nobody'"),
        (["import", "card", "--model", "resnet20"], "--model has no effect for a folder"),
        (["import", "full"], "holds no rows"),
        (["import", "card", "card"], "is not a file"),
    ):
        assert run(words) == 2
        assert said in capsys.readouterr().err
    shutil.copy("runs/sub/weights.safetensors", "runs/base/weights.safetensors")
    assert run(["publish", "base", "--out", "other"]) == 2
    assert "weights: are not those that its manifest names" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    shutil.copy("runs/sub/weights.safetensors", "card/runs/base/weights.safetensors")
    assert run(["import", "card", "--runs", "taken"]) == 2
    assert "weights: are not those" in capsys.readouterr().err
    assert not (tmp_path / "taken").exists()


def test_another_run_of_the_name_is_left_alone(
    judged: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["publish", "base", "--out", "card"]) == 0
    shutil.copytree("runs/sub", "taken/base")
    assert run(["import", "card", "--runs", "taken"]) == 2
    assert "run 'base' exists with other weights" in capsys.readouterr().err
    assert Runs("taken").names() == ["base"]
