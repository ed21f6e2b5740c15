"""Every block of code on the pages runs as it stands there, page by page in an empty folder.

A block whose fence has a title, such as "takes hours", is only parsed: its commands and options are those that exist.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robench.attacks import ATTACKS
from robench.core.registry import Registry
from robench.defenses import DEFENSES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    *(f"docs/how-to/{name}.md" for name in ("model", "defense", "attack", "images", "logs", "share")),
]
BLOCK = re.compile(r"^```(\w+) *([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

#: Runs the pages' steps in one process, as each start costs many seconds; prints per page what went wrong, if anything.
SCRIPT = """
import json, os, sys, traceback
import click
from robench.cli import cli, run

def step(kind, what, names):
    if kind == "python":
        exec(what, names)
    elif kind == "command":
        assert run(what) == 0, what
    else:
        command = cli.get_command(click.Context(cli), what[0])
        assert command is not None, f"no command {what[0]}"
        command.make_context(what[0], what[1:])

said = {}
for page, steps in json.load(sys.stdin).items():
    os.mkdir(str(len(said)))
    os.chdir(str(len(said)))
    names, said[page] = {"__name__": "page"}, ""
    for kind, what in steps:
        try:
            step(kind, what, names)
        except BaseException:
            said[page] = f"{what}\\n{traceback.format_exc()}"
            break
    os.chdir("..")
print(json.dumps(said))
"""


def steps(page: str) -> list[tuple[str, str | list[str]]]:
    """A page's code: ``python`` to execute, ``command`` to run, ``parsed`` to understand."""
    found: list[tuple[str, str | list[str]]] = []
    for language, title, code in BLOCK.findall((ROOT / page).read_text("utf-8")):
        if language == "python":
            found.append(("python", code))
        elif language == "bash":
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["robench"]:
                    found.append(("parsed" if title else "command", words[1:]))
                elif words:
                    assert title, f"{page}: {line!r} is no command of robench, so that its block needs a title"
                    assert words[:2] == ["pip", "install"] or words[0] == "make", line
        else:
            assert language == "toml", f"{page}: a block of {language}, which no test understands"
    return found


#: Pages that do not work, on which the test must say so.
WRONG: dict[str, tuple[list[tuple[str, str | list[str]]], str]] = {
    "wrong option": ([("parsed", ["train", "dverge", "--no-such-option"])], "No such option"),
    "wrong code": ([("python", "1 / 0")], "ZeroDivisionError"),
    "wrong command": ([("command", ["show", "nobody"])], "AssertionError: ['show', 'nobody']"),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong on each page; nothing where nothing did."""
    pages = {page: steps(page) for page in PAGES} | {name: wrong for name, (wrong, _) in WRONG.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(pages),
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("pages"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, failures: dict[str, str]) -> None:
    assert failures[page] == ""


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_would_be_found(name: str, failures: dict[str, str]) -> None:
    assert WRONG[name][1] in failures[name]


@pytest.mark.parametrize("registry", [DEFENSES, ATTACKS], ids=["defenses", "attacks"])
def test_the_readme_names_them_all(registry: Registry[Any]) -> None:
    """Those that ship, each in the first column of a table."""
    columns = [line.split("|")[1] for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line[:1] == "|"]
    named = {name for column in columns for name in re.findall("`([a-z0-9-]+)`", column)}
    own = {name for name in registry.names() if registry.get(name).__module__.startswith("robench.")}
    assert own <= named, own - named
