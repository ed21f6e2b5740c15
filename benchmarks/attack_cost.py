"""What a step of each attack costs against a step of PGD: passes per image counted, seconds as a ratio in one run.

    python benchmarks/attack_cost.py --out results/attack_cost

Three untrained ResNet-20 in one ensemble, 32-pixel images of noise, labelled as the ensemble sees them, and an ε at
which none falls, so that attacks in parts make every part. Every attack runs with few steps, in turns with PGD of as
many: a machine that does other things slows both. Passes are counted on the members themselves, forward and backward,
and divided by images and members.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack
from robench.attacks.pgd import PGD
from robench.core.ensemble import Ensemble
from robench.core.fast import attackable, members
from robench.core.files import write_text
from robench.core.frozen import hooked
from robench.core.models import ModelSpec, build
from robench.core.rng import Draws, Stream
from robench.reports.document import Table, TableCell, markdown

#: Steps of every attack, and what else it takes to make it short; fields are the authors' otherwise.
STEPS = 3
FIELDS: dict[str, dict[str, Any]] = {
    "pgd": {"steps": STEPS},
    "fgsm": {},
    "apgd": {"steps": STEPS},
    "apgd, targeted": {"objective": "dlr", "targets": 2, "steps": STEPS},
    "members, normalised": {"steps": STEPS},
    "members, minmax": {"steps": STEPS, "combine": "minmax"},
    "mora": {"steps": STEPS, "targets": 2},
    "square": {"queries": STEPS},
    "sgm": {"steps": STEPS},
    "mdi2": {"steps": STEPS},
    "tim": {"steps": STEPS},
    "sim": {"steps": STEPS},
    "admix": {"steps": STEPS},
    "vmi": {"steps": STEPS},
    "gra": {"steps": STEPS},
    "pgn": {"steps": STEPS},
    "mef": {"steps": STEPS},
    "bsr": {"steps": STEPS},
    "sia": {"steps": STEPS},
    "svre": {"steps": STEPS},
    "strongest": {"steps": STEPS, "queries": STEPS},
}
#: So small that no image falls, and every part of an attack is made.
EPS = 1e-6
COLUMNS = ("attack", "steps", "forward", "backward", "of pgd", "seconds of pgd", "low", "high")


@dataclass(frozen=True)
class Bench:
    """The ensemble that is attacked, images (B,C,H,W), and the classes that it gives them."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, count: int) -> Bench:
        spec = ModelSpec(name="resnet20", num_classes=10, in_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
        images = Stream(("attack_cost",)).uniform((count, 3, 32, 32), "images")
        model = attackable(Ensemble(build(spec, number) for number in range(3)).eval(), images, "float32")
        with torch.no_grad():
            return cls(model, images.contiguous(memory_format=torch.channels_last), model(images).argmax(dim=1))

    def seconds(self, attack: Attack) -> float:
        began = time.perf_counter()
        attack.perturb(*self.given(attack))
        return time.perf_counter() - began

    def given(self, attack: Attack) -> tuple[nn.Module, Tensor, Tensor, Tensor, Draws]:
        eps = torch.full((len(self.images),), EPS)
        return self.model, self.images.clone(), self.labels, eps, Draws.of(range(len(self.images)))

    def passes(self, attack: Attack) -> tuple[float, float]:
        """Forward and backward passes per image, on average over members."""
        found: Counter[str] = Counter()
        with _counted(self.model, found):
            attack.perturb(*self.given(attack))
        whole = len(self.images) * len(members(self.model))
        return found["forward"] / whole, found["backward"] / whole


@contextmanager
def _counted(model: nn.Module, found: Counter[str]) -> Iterator[None]:
    """Adds up the images that go forward and backward through each member, within."""

    def forward(module: nn.Module, inputs: tuple[Any, ...], outputs: Tensor) -> None:
        found["forward"] += len(outputs)
        if outputs.requires_grad:
            outputs.register_hook(_adding(found, len(outputs)))

    ensemble = next(module for module in model.modules() if isinstance(module, Ensemble))
    with hooked(member.register_forward_hook(forward) for member in ensemble.members):
        yield


def _adding(found: Counter[str], count: int) -> Callable[[Tensor], None]:
    def add(slope: Tensor) -> None:
        found["backward"] += count

    return add


def made(name: str) -> Attack:
    attack: Attack = ATTACKS.get(name.partition(",")[0])(**FIELDS[name])
    return attack


def measured(bench: Bench, names: list[str], turns: int) -> pd.DataFrame:
    """A row per attack: passes of an image, these over PGD's of as many steps, and the median over turns of its seconds
    over PGD's in the same turn, with the least and the most."""
    usual = PGD(steps=STEPS)
    per_pgd = sum(bench.passes(usual))
    bench.seconds(usual)
    rows = []
    for name in names:
        attack = made(name)
        forward, backward = bench.passes(attack)
        ratios = []
        for _ in range(turns):
            before, own, after = bench.seconds(usual), bench.seconds(attack), bench.seconds(usual)
            ratios.append(2 * own / (before + after))
        steps = FIELDS[name].get("steps", FIELDS[name].get("queries", 1))
        scale = STEPS / steps  # of an attack of one step, per step
        passes = scale * (forward + backward) / per_pgd
        middle, *ends = (scale * each for each in (statistics.median(ratios), min(ratios), max(ratios)))
        rows.append((name, steps, forward, backward, passes, middle, *ends))
        click.echo(f"{name}: {passes:.2f} of PGD's passes, {middle:.2f} of its seconds")
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values("of pgd", kind="stable", ignore_index=True)


def described(table: pd.DataFrame, about: str) -> Table:
    rows = [
        [
            *(TableCell.of(row[name]) for name in ("attack", "steps")),
            *(TableCell.of(f"{row[name]:.1f}") for name in ("forward", "backward")),
            TableCell.of(f"{row['of pgd']:.2f}"),
            TableCell.measured(row["seconds of pgd"], row["low"], row["high"], scale=1, digits=2),
        ]
        for row in table.to_dict("records")
    ]
    headers = ["Attack", "Steps", "Forward", "Backward", "Passes / PGD's", "Seconds / PGD's"]
    return Table(headers, rows, "", about)


@click.command()
@click.option("--images", default=8, show_default=True, help="Of a batch.")
@click.option(
    "--turns", default=3, show_default=True, help="How often every attack runs, each between two runs of PGD."
)
@click.option("--attacks", default=",".join(dict.fromkeys(name.partition(",")[0] for name in FIELDS)))
@click.option("--out", default="results/attack_cost", show_default=True, type=click.Path(path_type=Path))
def main(images: int, turns: int, attacks: str, out: Path) -> None:
    """Writes attack_cost.csv and attack_cost.md."""
    torch.set_num_threads(1)
    names = [name for name in FIELDS if name.partition(",")[0] in attacks.split(",")]
    table = measured(Bench.of(images), names, turns)
    about = (
        f"What a step costs, three ResNet-20, {images} images of 32x32, one thread, {STEPS} steps: passes forward and "
        f"backward of one image through the ensemble, those over PGD's of as many steps, and seconds over PGD's, the "
        f"median of {turns} turns, each between two runs of PGD, with the least and the most. Attacks in parts (apgd "
        f"targeted with 2 targets, mora with 2, strongest) make every part here, as no image falls: at most. A step of "
        f"square is a query, of fgsm the whole attack. The row of pgd is PGD against itself: what it is away from 1 is "
        f"the noise of the machine, of which others used the same core."
    )
    write_text(out / "attack_cost.csv", table.round(4).to_csv(index=False))
    write_text(out / "attack_cost.md", markdown(described(table, about)))


if __name__ == "__main__":
    main()
