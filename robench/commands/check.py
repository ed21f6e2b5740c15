"""`robench check plugin`, `model` and `result`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from robench.commands._help import Group, Grouped, Sections
from robench.commands._shared import dataset_of, device_of, import_models, refuse_given, shared
from robench.core.errors import RobenchError
from robench.evaluation.findings import Finding, failed

log = logging.getLogger(__name__)


class _Kinds(Sections):
    """What can be checked; a name alone is a plug-in's, as it was before there were kinds."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *self.get_help_option_names(ctx)):
            log.warning(
                "`robench check NAME` is now `robench check plugin NAME`; the old form goes with the next release"
            )
            args = ["plugin", *args]
        return super().parse_args(ctx, args)


@click.group(
    "check",
    cls=_Kinds,
    sections={"Kinds": ("plugin", "model", "result")},
    examples=("robench check model my-dverge", "robench check result runs --files"),
)
def command() -> None:
    """Check a plug-in, a model or a result; exit code 1 where something fails."""


@command.command("plugin", cls=Grouped, examples=("robench check plugin dverge",))
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@shared("data_dir")
def plugin(names: tuple[str, ...], data_dir: str) -> int:
    """Whether attacks, defenses, models or data sets keep their contract.

    A NAME is one that `robench list` shows, package.module:factory of a model, npz:PATH, folder:PATH or
    hf:OWNER/NAME of data.
    """
    from robench.validity.conformance import examine, kinds

    found = []
    for kind, name in [(kind, each) for each in names for kind in kinds(each)]:
        click.echo(f"{kind} {name}:")
        found += _told(examine(kind, name, data_dir), indent="  ")
    return int(failed(found))


@command.command("model", cls=Grouped, examples=("robench check model my-dverge",))
@click.argument("what", metavar="RUN|FACTORY")
@click.option("--dataset", help="By default the one that the run was trained on; needed for a FACTORY.")
@click.option("--model", multiple=True, help="package.module:factory that a run needs: allows to import it.")
@shared("data_dir", "device", "runs")
def model(what: str, dataset: str | None, model: tuple[str, ...], data_dir: str, device: str, runs: str) -> int:
    """What is wrong with a RUN, or with the model that FACTORY, package.module:factory, makes, and the fix of each."""
    from robench.core.data import load
    from robench.core.ensemble import Ensemble
    from robench.core.models import build, import_model
    from robench.evaluation.doctor import diagnose
    from robench.store.runs import Runs

    if ":" in what:
        refuse_given({"model", "runs"}, "has no effect for a FACTORY")
        if dataset is None:
            raise RobenchError("a model is examined on data: add --dataset")
        data = load(dataset, data_dir)
        import_model(what)
        ensemble = Ensemble([build(data.model(what), 0)]).eval()
    else:
        run = Runs(runs).get(what)
        data = load(dataset or dataset_of([run]), data_dir)
        import_models(model, [run])
        ensemble = run.load()
    found = _told(diagnose(ensemble.to(device_of(device)), data))
    if not found:
        click.echo(f"{what}: nothing found")
    return int(failed(found))


_GROUPS = (Group("Cells made again", ("cells", "seed", "tolerance", "dataset", "model")),)
_EXAMPLES = (
    "robench check result runs --files",
    "robench check result runs --dataset digits --cells 2 --device cpu",
)


@command.command(
    "result",
    cls=Grouped,
    groups=_GROUPS,
    examples=_EXAMPLES,
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cells", type=click.IntRange(1), default=20, show_default=True, help="How many are tried again.")
@click.option("--seed", default=0, show_default=True, help="Draws the cells.")
@click.option(
    "--tolerance", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Share of a cell's rows that may differ: in float32 another machine or a GPU rounds otherwise.",
)  # fmt: skip
@click.option("--dataset", help="By default the one that the runs were trained on.")
@click.option("--model", multiple=True, help="package.module:factory that a run needs: allows to import it.")
@click.option("--files", is_flag=True, help="Only whether the files agree with each other: in seconds, without data.")
@shared("data_dir", "device")
def result(
    folder: Path,
    cells: int,
    seed: int,
    tolerance: float,
    dataset: str | None,
    model: tuple[str, ...],
    files: bool,
    data_dir: str,
    device: str,
) -> int:
    """Craft random cells of FOLDER again and compare the rows.

    FOLDER is a study's (its --out), one of runs, one run's, or what robench publish wrote.
    """
    from robench.studies.intact import ResultFolder
    from robench.studies.verify import verify

    if files:
        refuse_given(
            {"cells", "seed", "tolerance", "dataset", "model", "data_dir", "device"}, "has no effect with --files"
        )
        opened = ResultFolder.at(folder)
        told = _told(finding for _, finding in opened.intact(opened.rows()))
        click.echo(_counted(told, "the files agree", "do not hold"))
        return int(failed(told))
    import_models(model)
    found = _told(
        verify(
            folder, cells=cells, seed=seed, tolerance=tolerance, dataset=dataset, data_dir=data_dir,
            device=device_of(device),
        )
    )  # fmt: skip
    click.echo(_counted(found, "confirmed", "differ"))
    return int(failed(found))


def _counted(found: Sequence[Finding], good: str, bad: str) -> str:
    """The last line: how many fail, or else how many pass; what warns is neither."""
    failing, passing = (sum(each.status == status for each in found) for status in ("fail", "pass"))
    return f"refused: {failing} of {len(found)} {bad}" if failing else f"{good}: {passing} of {len(found)}"


def _told(findings: Iterable[Finding], indent: str = "") -> list[Finding]:
    """Prints each finding as it comes; all of them."""
    found = []
    for each in findings:
        found.append(each)
        click.echo(f"{indent}{each}")
    return found
