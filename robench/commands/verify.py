"""`robench verify`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands._shared import shared


@click.command("verify")
@click.argument("result", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cells", type=click.IntRange(1), default=20, show_default=True, help="How many are tried again.")
@click.option("--seed", default=0, show_default=True, help="Draws the cells.")
@click.option(
    "--tolerance", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Share of a cell's rows that may differ: in float32 another machine or a GPU rounds otherwise.",
)  # fmt: skip
@click.option("--dataset", help="By default the one that the runs were trained on.")
@shared("data_dir", "device")
def command(
    result: Path, cells: int, seed: int, tolerance: float, dataset: str | None, data_dir: str, device: str
) -> int:
    """Craft random cells of RESULT, a study's folder or one of runs, again, and compare: exit code 1 if any differs."""
    from robench.commands._shared import device_of
    from robench.studies.verify import verify

    found = []
    for each in verify(
        result, cells=cells, seed=seed, tolerance=tolerance, dataset=dataset, data_dir=data_dir,
        device=device_of(device),
    ):  # fmt: skip
        found.append(each)
        click.echo(f"{'same' if each.good else 'REFUSED'}  {each.what}: {each.evidence}")
    bad = sum(not each.good for each in found)
    click.echo(f"refused: {bad} of {len(found)} differ" if bad else f"confirmed: {len(found)} of {len(found)}")
    return int(bad > 0)
