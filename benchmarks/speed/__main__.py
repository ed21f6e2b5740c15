"""`python -m benchmarks.speed`, from the root of the repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from robench import cli
from robench.commands._shared import dataset_of, device_of, folder_of, refuse_given, shared, split
from robench.core.data import load
from robench.core.errors import RobenchError
from robench.core.files import write_json, write_text
from robench.core.terminal import drawn
from robench.store.runs import Run, Runs

from . import measure, table


@click.command()
@click.option("--run", "name", help="Whose ensemble; by default a Baseline/3 on digits, trained for 3 epochs.")
@click.option("--dataset", help="By default the one that the run was trained on; without a run, digits.")
@click.option("--parts", help="Of pgd, mdi2, sgm, whitebox, dverge, with commas; by default all.")
@click.option("--images", default=100, show_default=True, help="In a step of an attack.")
@click.option("--steps", default=10, show_default=True, help="In a turn of an attack.")
@click.option("--rounds", default=3, show_default=True, help="Turns of every variant.")
@click.option("--whitebox-images", default=50, show_default=True)
@click.option("--whitebox-steps", default=50, show_default=True)
@click.option("--restarts", default=5, show_default=True, help="Of the white-box protocol.")
@click.option("--layers", help="Of the DVERGE step, with commas; by default all.")
@click.option("--batch-size", default=128, show_default=True, help="Of the DVERGE step.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for bench.json, bench.md and the figure.")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
@shared("data_dir", "device", "runs")
def command(
    name: str | None,
    dataset: str | None,
    parts: str | None,
    layers: str | None,
    out: Path | None,
    style: str,
    data_dir: str,
    device: str,
    runs: str,
    **amounts: int,
) -> None:
    """How fast attacks and training are here, beside the published formulas, torchattacks and foolbox.

    The same work on the same weights, in turns; on the CPU on one thread, in processor time.
    """
    if name is None:
        refuse_given({"runs"}, "has no effect without --run")
    run: Run | None = Runs(runs).get(name) if name else None
    folder_of(out)
    data = load(dataset or (dataset_of([run]) if run else "digits"), data_dir)
    place = device_of(device)
    try:
        chosen = [int(layer) for layer in split(layers)]
    except ValueError as error:
        raise RobenchError(f"expected --layers such as 1,10,20, got {layers!r}") from error
    ensemble = run.load().to(place) if run else measure.classifier(data, place)
    plan = measure.Plan(ensemble=ensemble, data=data, device=place, layers=chosen, **amounts)
    rows = measure.bench(plan, split(parts))
    report: dict[str, Any] = measure.report(plan, rows, run.name if run else "a Baseline/3, 3 epochs")
    if out:
        write_json(out / "bench.json", report)
        write_text(out / "bench.md", table.markdown(report))
        for path in table.write(report, out):
            click.echo(f"wrote {path}", err=True)
    click.echo(
        json.dumps(report, indent=2)
        if style == "json"
        else drawn(table.title(report), list(table.HEADINGS), table.lines(report))
    )


if __name__ == "__main__":
    sys.exit(cli.run(sys.argv[1:], command, "python -m benchmarks.speed"))
