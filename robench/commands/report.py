"""`robench report`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands._shared import dataset_of, device_of, notice, refuse_given, shared


@click.command("report")
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--out", default="figures", show_default=True, type=click.Path(path_type=Path))
@click.option("--against", type=click.Choice(["dverge2020"]), help="Published numbers to set beside ours.")
@click.option("--regions", type=int, help="Points along each axis of Figure 1; needs a surrogate run and --dataset.")
@click.option("--dataset", help="For --regions; by default the one that the runs were trained on.")
@shared("data_dir", "device", "runs")
def command(
    names: tuple[str, ...],
    out: Path,
    against: str | None,
    regions: int | None,
    dataset: str | None,
    data_dir: str,
    device: str,
    runs: str,
) -> None:
    """Draw what was measured on RUNs, or on all: figures as PDF and PNG, their values, tables, report.html."""
    from robench.core.data import load
    from robench.core.errors import RobenchError
    from robench.core.runs import Runs
    from robench.evaluation.engine import Settings
    from robench.studies.drawing import draw
    from robench.studies.plane import decision_regions
    from robench.studies.workbench import Workbench, stored

    store = Runs(runs)
    chosen = [store.get(name) for name in names] or store.all()
    outcomes = stored(chosen, notice)
    chosen = [run for run in chosen if run.name in set(outcomes.frame["target"])]
    plane = None
    if regions is None:
        refuse_given({"dataset", "data_dir", "device"}, "has an effect only with --regions")
    else:
        data = load(dataset or dataset_of(chosen), data_dir)
        hold_outs = [run for run in store.all() if run.role == "surrogate"]
        if not hold_outs or not chosen:
            raise RobenchError(
                "--regions needs a surrogate run, and outcomes; robench eval --threat blackbox makes both"
            )
        bench = Workbench(store, data, Settings(device_of(device)), notice=notice)
        plane = decision_regions(bench, chosen, hold_outs[0], resolution=regions)
    for path in draw(outcomes, chosen, out, regions=plane, paper=against, notice=notice):
        click.echo(path)
