"""Help: every option in its group, every command with examples, and every example works."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch

from robench.cli import SECTIONS, cli, run
from robench.commands._help import Examples, Grouped
from robench.core.data import load
from robench.core.ensemble import Ensemble
from robench.core.models import build
from robench.evaluation.settings import Settings
from robench.evaluation.words import attacks
from robench.session import Session
from robench.store.runs import Runs

ROOT = click.Context(cli, info_name="robench")


def commands() -> Iterator[tuple[str, click.Command]]:
    """All of them, with what they have below them."""
    yield "robench", cli
    for name in cli.list_commands(ROOT):
        command = cli.get_command(ROOT, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {below}", each) for below, each in command.commands.items())


COMMANDS = dict(commands())
EXAMPLES = sorted({line for command in COMMANDS.values() for line in getattr(command, "examples", ())})

#: What is only parsed, and why.
PARSED = {"demo": "takes minutes", "import": "needs a file and a network", "check plugin": "trains every second"}
#: What is said of random networks may be that they fail.
JUDGES = ("check model", "show")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the runs that the examples name: random networks of digits, three seeds of two defenses, judged."""
    folder = tmp_path_factory.mktemp("scene")
    data, store = load("digits"), Runs(folder / "runs")
    spec = data.model("resnet8")
    for defense in ("dverge", "baseline"):
        for seed in range(3):
            name = f"my-{defense}" if seed == 0 else f"{defense}-{seed}"
            networks = [build(spec, 100 + 10 * seed + member + 5 * (defense == "dverge")) for member in range(2)]
            store.save(
                name, Ensemble(networks).eval(), members=[spec] * 2, defense={"name": defense}, seed=seed,
                role="target", data={"name": data.label, "fingerprint": data.fingerprint},
            )  # fmt: skip
    session = Session(store, data, Settings(torch.device("cpu")), samples=8)
    session.whitebox(store.all(), eps=(0.1,), attacks=attacks("whitebox", steps=1), restarts=1)
    for copy in ("my-runs", "from-alice"):
        shutil.copytree(folder / "runs", folder / copy)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def named(words: list[str]) -> str:
    """The command that is called, with the one below it."""
    two = " ".join(words[:2])
    return two if two in COMMANDS else words[0]


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_works(line: str, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(line)
    assert program == "robench"
    if named(words) in PARSED:
        command = COMMANDS[named(words)]
        command.make_context(words[0], words[len(named(words).split()) :])
        return
    # Everything up to the first step of the training.
    monkeypatch.setattr("robench.training.loop.ensure", lambda task, *_, **__: SimpleNamespace(name=task.name))
    if any(option.name == "dry_run" for option in COMMANDS[named(words)].params) and "--dry-run" not in words:
        words.append("--dry-run")
    assert run(words) in ((0, 1) if named(words) in JUDGES else (0,))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Examples)
    assert command.examples
    text = command.get_help(click.Context(command, info_name=name, parent=ROOT))
    assert text.split("\n\n")[-1] == "\n  ".join(["Examples:", *command.examples])
    if name != "robench":
        assert all(line.startswith(f"robench {name} ") or line == f"robench {name}" for line in command.examples)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if isinstance(command, Grouped)])
def test_groups_hold_options_that_exist_and_none_twice(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Grouped)
    there = {option.name for option in command.params}
    grouped = [option for group in command.groups[:-1] for option in group.names]
    assert set(grouped) <= there
    assert len(set(grouped)) == len(grouped)
    text = command.get_help(click.Context(command, info_name=name, parent=ROOT))
    assert all(f"\n{group.heading}:\n" in text for group in command.groups[:-1])
    loose = [option for option in command.params if isinstance(option, click.Option) and option.name not in grouped]
    assert len(loose) <= 10, "a longer list than a reader takes in; put some into groups"


def test_every_command_is_listed_once() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(cli.list_commands(ROOT))
    text = cli.get_help(ROOT)
    assert text.count("...") == 1  # of the usage


def test_a_command_that_is_not_there_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian"]) == 2
    assert "did you mean train" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "run demo", "status demo", "demo", "init mine"])
def test_a_file_where_a_folder_is_meant_is_refused_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert run([*command.split(), "--out", "file"]) == 2
    assert "'--out'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("eval a --attacks pgd --attacks mora", "expected --attacks once, got it 2 times"),
        ("train --n 3 dverge --n 4", "expected --n once, got it 2 times"),
        ("eval nobody --threat blackbox --log-to jsonl --log-to tensorboard --yes --yes", "nobody"),
    ],
)
def test_an_option_that_is_given_twice_is_refused(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Click keeps the last; options that may be repeated, and flags, are not meant."""
    assert run(line.split()) == 2
    assert told in capsys.readouterr().err
