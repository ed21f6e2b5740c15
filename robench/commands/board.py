"""`robench board`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robench.commands._help import Group, Grouped
from robench.commands._shared import device_of, refuse_given, shared
from robench.core.errors import RobenchError

if TYPE_CHECKING:
    from robench.evaluation.findings import Finding
    from robench.studies.board import Again
    from robench.studies.intact import ResultFolder


_GROUPS = (Group("Cells made again", ("dataset", "cells", "seed", "tolerance")),)
_EXAMPLES = (
    "robench board runs --out board.html",
    "robench board my-runs from-alice --dataset digits --cells 2",
)


@click.command("board", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", default="board.html", show_default=True, type=click.Path(path_type=Path), help="The page.")
@click.option("--dataset", help="Make cells of what was judged on it again; else only files are looked at.")
@click.option("--cells", type=click.IntRange(1), default=5, show_default=True, help="How many of each result.")
@click.option("--seed", default=0, show_default=True, help="Draws the cells.")
@click.option(
    "--tolerance", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Share of a cell's rows that may differ: in float32 another machine or a GPU rounds otherwise.",
)  # fmt: skip
@shared("data_dir", "device")
def command(
    folders: tuple[Path, ...],
    out: Path,
    dataset: str | None,
    cells: int,
    seed: int,
    tolerance: float,
    data_dir: str,
    device: str,
) -> None:
    """Put the results in FOLDERS on one page, to filter and sort, each marked with whether it verifies.

    A FOLDER is a study's (its --out), one of runs, one run's, or what robench publish wrote.
    """
    for folder in folders:  # before anything slow is imported
        if not folder.is_dir():
            raise RobenchError(f"{folder} is no folder; name the folder of a study, of a run or of runs")
    from robench.studies.board import draw

    if out.is_dir():
        raise RobenchError(f"expected --out as a file, {out} is a folder; name {out / 'board.html'}")
    again, data = None, None
    if dataset is None:
        refuse_given({"cells", "seed", "tolerance", "data_dir", "device"}, "has an effect only with --dataset")
    else:
        from robench.core.data import load

        data = load(dataset, data_dir).identity
        again = _again(dataset, cells, seed, tolerance, data_dir, device)
    click.echo(draw(folders, out, again=again, data=data))


def _again(dataset: str, cells: int, seed: int, tolerance: float, data_dir: str, device: str) -> Again:
    """Makes cells of a result anew."""
    from robench.studies.verify import verify

    def tried(result: ResultFolder, runs: Sequence[str]) -> Iterator[Finding]:
        return verify(
            result.folder, cells=cells, seed=seed, tolerance=tolerance, dataset=dataset, data_dir=data_dir,
            device=device_of(device), only=runs,
        )  # fmt: skip

    return tried
