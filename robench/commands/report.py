"""`robench report`."""

from __future__ import annotations

from pathlib import Path

import click

from robench.commands._help import Group, Grouped
from robench.commands._shared import device_of, import_models, judged, refuse_given, require_models, shared
from robench.core.errors import RobenchError
from robench.core.progress import bar
from robench.reports.published import names
from robench.store.names import RunNames

#: Images that fell, shown in the page unless another number is asked for.
IMAGES = 100


_GROUPS = (
    Group("Published numbers", ("against", "same_data")),
    Group("Images and regions", ("images", "regions", "dataset", "model")),
)
_EXAMPLES = (
    "robench report my-dverge my-baseline --out figures --images 8",
    "robench report --against dverge2020",
)


@click.command("report", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option(
    "--out", default="figures", show_default=True, type=click.Path(file_okay=False, path_type=Path), help="Folder."
)
@click.option("--against", type=click.Choice(names()), help="Published numbers to set beside ours.")
@click.option("--same-data", is_flag=True, help="With --against: I vouch that these are the paper's test images.")
@click.option("--regions", type=int, help="Points along each axis of Figure 1; needs a surrogate run.")
@click.option(
    "--images", type=click.IntRange(0), help=f"Images that fell in report.html, by default {IMAGES}; 0: none."
)
@click.option("--dataset", help="Which rows; needed for several data sets, and for pictures of npz: and folder: data.")
@shared("model", "data_dir", "device", "runs")
def command(
    names: tuple[str, ...],
    out: Path,
    against: str | None,
    same_data: bool,
    regions: int | None,
    images: int | None,
    dataset: str | None,
    model: tuple[str, ...],
    data_dir: str,
    device: str,
    runs: str,
) -> None:
    """Draw what was measured on RUNs, or on all: figures as PDF and PNG, their values, tables, report.html."""
    for name in names:
        RunNames(runs).manifest(name)
    from robench.evaluation.settings import Settings
    from robench.session import Session
    from robench.store.runs import Runs
    from robench.studies.drawing import draw
    from robench.studies.pictures import pictures
    from robench.studies.plane import decision_regions

    if against is None:
        refuse_given({"same_data"}, "has an effect only with --against")
    if regions is None and images == 0:
        refuse_given({"data_dir", "device"}, "has an effect only with --regions or --images")
    store = Runs(runs)
    chosen = [store.get(name) for name in names] or store.all()
    import_models(model, store.all())
    # By default nothing is downloaded for pictures.
    needed = True if images or regions is not None else None if images is None else False
    outcomes, data = judged(chosen, dataset, data_dir, needed)
    chosen = [run for run in chosen if run.name in set(outcomes.frame["target"])]
    plane, seen = None, []
    if data is not None:
        require_models(chosen)
        session = Session(store, data, Settings(device_of(device)), bar=bar)
        if regions is not None:
            hold_outs = [run for run in store.all() if run.role == "surrogate"]
            if not hold_outs:
                raise RobenchError("--regions needs a surrogate run; robench eval --threat blackbox makes one")
            plane = decision_regions(session, chosen, hold_outs[0], resolution=regions)
        seen = pictures(session, outcomes, chosen, IMAGES if images is None else images)
    shape = None if data is None else data.test.images.shape[1:]
    files = draw(
        outcomes, chosen, out, regions=plane, pictures=seen, paper=against, same_data=same_data, shape=shape
    )  # fmt: skip
    for path in files:
        click.echo(path)
