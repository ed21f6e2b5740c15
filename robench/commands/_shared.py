"""What commands have in common: options, results as text."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from robench.core.errors import RobenchError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from robench.core.data import Data
    from robench.evaluation.outcomes import Outcomes
    from robench.store.runs import Run


#: Options of `shared` that say where things lie and where the work is done.
PLACES = ("data_dir", "device", "runs")


def shared(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that several commands have."""
    options = {
        "runs": click.option("--runs", default="runs", show_default=True, help="Folder that holds all runs."),
        "data_dir": click.option("--data-dir", default="data", show_default=True, help="Folder of official data sets."),
        "device": click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        "log_to": click.option(
            "--log-to",
            multiple=True,
            metavar="LOG",
            help="jsonl, tensorboard, wandb or mlflow; also several times.",
        ),
        "style": click.option(
            "--format",
            "style",
            type=click.Choice(["table", "csv", "json"]),
            default="table",
            show_default=True,
            help="Of what is printed.",
        ),
        "model": click.option(
            "--model", multiple=True, help="package.module:factory that a run needs: allows to import it."
        ),
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
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RobenchError(f"expected --set NAME=VALUE, got {text!r}")
        if name in found:
            raise RobenchError(f"--set says `{name}` twice, {found[name]!r} and {value!r}; omit one")
        found[name] = value
    return found


def dataset_of(runs: Sequence[Run]) -> str:
    """The official data set, or that of a hub, that all runs were made for."""
    from robench.core.data import has_name

    found = {run.dataset for run in runs}
    if not found:
        return "cifar10"
    if len(found) > 1 or not all(map(has_name, found)):
        told = ", ".join(sorted(filter(None, found))) or "data without a name"
        raise RobenchError(
            f"these runs are of {told}; say which data to judge on: --dataset NAME, folder:PATH, npz:PATH or "
            f"hf:OWNER/NAME"
        )
    return found.pop()


def judged(
    runs: Sequence[Run], dataset: str | None, data_dir: str, needed: bool | None
) -> tuple[Outcomes, Data | None]:
    """The rows of ``runs`` on one data set, and the data.

    Args:
        needed: None takes the data only where it is at hand, False only where the user names it.
    """
    from robench.core.data import DATASETS, at_hand, load
    from robench.session import stored

    parts = stored(runs).by_data()
    found = ", ".join(sorted(parts))
    if not parts:
        raise RobenchError("nothing was measured on these runs; robench eval does it")
    if dataset is not None:
        data = load(dataset, data_dir)
        if data.identity not in parts:
            raise RobenchError(f"nothing was measured on {data.label}, but on data {found}; choose another --dataset")
        return parts[data.identity], data
    if len(parts) > 1:
        raise RobenchError(f"these runs were judged on several data sets, {found}; choose one with --dataset")
    ((identity, outcomes),) = parts.items()
    if needed and identity not in DATASETS.names():
        raise RobenchError(f"the images are of data {identity}, which has no name; --dataset npz:PATH or folder:PATH")
    if needed or (needed is None and at_hand(identity, data_dir)):
        return outcomes, load(identity, data_dir)
    if needed is None:
        log.info(f"no pictures of what fell: data {identity} is not at hand; --dataset or --data-dir says where it is")
    return outcomes, None


def device_of(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RobenchError(
            f"device {name!r} is not available ({str(error).splitlines()[0][:120]}); expected auto, cpu, cuda or cuda:N"
        ) from error
    return device


def import_models(given: Sequence[str], runs: Sequence[Run] | None = None) -> None:
    """Imports the code that the user typed as --model; code that none of ``runs`` needs is a mistake."""
    from robench.core.models import import_model

    if runs is not None:
        needed = {spec.name for run in runs for spec in run.specs if ":" in spec.name}
        if unneeded := [name for name in given if name not in needed]:
            which = f"they need {', '.join(sorted(needed))}" if needed else "they need none; omit it"
            raise RobenchError(f"--model {unneeded[0]} is no code of these runs; {which}")
    for name in given:
        import_model(name)


def require_models(runs: Sequence[Run]) -> None:
    """Refuses, before anything is loaded, ``runs`` whose code was not typed as --model."""
    from robench.core.models import is_imported

    names = sorted({spec.name for run in runs for spec in run.specs if ":" in spec.name and not is_imported(spec.name)})
    if names:
        told = " ".join(f"--model {name}" for name in names)
        raise RobenchError(
            f"models {', '.join(names)} name code, which a file may not; type it yourself: {told}, or register it "
            f"under the entry point `robench.models`"
        )


def log_results(runs: Sequence[Run], kinds: Sequence[str], rows: Sequence[dict[str, Any]], threat: str) -> None:
    """Logs what an evaluation found of each run, see `robench.studies.summary.objects`."""
    from robench.core.logbook import opened

    for run in runs if kinds else ():
        values: dict[str, float] = {}
        for row in rows:
            if row.get("run", row["target"]) != run.name:
                continue
            place = f"{row['source']} to {row['target']}/" if "success" in row else f"{row.get('attack', '')}/"
            name = f"{row.get('threat', threat)}/{place}eps {row['eps']:g}/".replace("//", "/")
            values |= {name + key: float(row[key]) for key in ("accuracy", "low", "high", "success") if key in row}
        with opened(kinds, run.folder, "eval", {"run": run.name, "weights": run.weights}) as book:
            book.result(values)


def folder_of(out: Path | None) -> None:
    """Refuses, before the work, a place that cannot be a folder."""
    if out is not None and out.exists() and not out.is_dir():
        raise RobenchError(f"expected --out as a folder, {out} is a file; name another")


def refuse_given(names: set[str], reason: str) -> None:
    """A flag that has no effect is an error."""
    context = click.get_current_context()
    for name in sorted(names):
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise RobenchError(f"--{name.replace('_', '-')} {reason}; omit it")


def confirm(yes: bool) -> Callable[[str], bool]:
    return lambda question: yes or (sys.stdin.isatty() and click.confirm(question, err=True))
