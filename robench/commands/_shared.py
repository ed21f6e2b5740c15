"""What commands have in common: options, results as text, bars and notices on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from robench.core.runs import Run


def shared(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that several commands have."""
    options = {
        "runs": click.option("--runs", default="runs", show_default=True, help="Folder that holds all runs."),
        "data_dir": click.option("--data-dir", default="data", show_default=True, help="Folder of official data sets."),
        "device": click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        "yes": click.option("--yes", is_flag=True, help="Do not ask before ten minutes or more of training."),
    }

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            function = options[name](function)
        return function

    return decorate


def as_text(rows: list[dict[str, Any]], style: str) -> str:
    """JSON or CSV; nothing for a table."""
    import json

    import pandas as pd

    if style == "json":
        return json.dumps(rows, indent=2)
    return pd.DataFrame(rows).to_csv(index=False).rstrip() if style == "csv" else ""


def split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def pairs(settings: Sequence[str]) -> dict[str, Any]:
    from robench.core.errors import RobenchError

    found = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RobenchError(f"expected --set NAME=VALUE, got {text!r}")
        found[name] = value
    return found


def dataset_of(runs: Sequence[Run]) -> str:
    """The official data set that all runs were made for."""
    from robench.core.data import DATASETS
    from robench.core.errors import RobenchError

    found = {str((run.manifest.get("data") or {}).get("name") or run.manifest.get("dataset")) for run in runs}
    if not found:
        return "cifar10"
    if len(found) > 1 or not found <= set(DATASETS.names()):
        raise RobenchError(f"these runs are of {', '.join(sorted(found))}; say which data to judge on: --dataset")
    return found.pop()


def device_of(name: str) -> torch.device:
    import torch

    from robench.core.errors import RobenchError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RobenchError(f"device {name!r} is not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def refuse_given(names: set[str], reason: str) -> None:
    """A flag that has no effect is an error."""
    from robench.core.errors import RobenchError

    context = click.get_current_context()
    for name in sorted(names):
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise RobenchError(f"--{name.replace('_', '-')} {reason}; leave it away")


def notice(text: str) -> None:
    click.echo(text, err=True)


def confirm(yes: bool) -> Callable[[str], bool]:
    return lambda question: yes or (sys.stdin.isatty() and click.confirm(question, err=True))


@contextmanager
def bar() -> Iterator[Callable[[int, int, str], None]]:
    """One bar on stderr with the time left; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
