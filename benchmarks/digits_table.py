"""The table of all defenses on digits (docs/results.md), and the study of `craft_bn`: mean ± sd over seeds.

    python benchmarks/digits_table.py                 # six defenses, 3 seeds: about half an hour on two cores
    python benchmarks/digits_table.py --craft-bn      # DVERGE, BatchNorm while crafting in train, batch, eval mode

Interrupted, it goes on where it was. Three threats, 20 steps, 2 starts, surrogates Baseline/3 and /5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from robench.core.data import load
from robench.core.files import write_text
from robench.evaluation import words
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.settings import Settings
from robench.reports.document import Table, TableCell, markdown
from robench.session import Session
from robench.store.runs import Runs
from robench.training.task import resolve

DEFENSES = ("baseline", "adp", "gal", "dverge", "advt", "dverge-advt")
MODES = ("train", "batch", "eval")
EPS = (0.1, 0.2)


@click.command()
@click.option("--craft-bn", is_flag=True, help="Compare DVERGE's BatchNorm modes instead of the defenses.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=250, show_default=True)
@click.option("--runs", default="runs/digits-table", show_default=True)
@click.option("--out", default="results/digits", show_default=True, type=click.Path(path_type=Path))
def main(craft_bn: bool, seeds: int, samples: int, runs: str, out: Path) -> None:
    data = load("digits")
    session = Session(Runs(runs), data, Settings(torch.device("cpu"), batch_size=samples), samples)
    surrogates = session.train(session.surrogate_tasks((3, 5), "baseline"))
    variants: dict[str, tuple[str, dict[str, Any]]] = (
        {f"craft_bn={mode}": ("dverge", {} if mode == "train" else {"craft_bn": mode}) for mode in MODES}
        if craft_bn
        else {name: (name, {}) for name in DEFENSES}
    )
    rows = []
    for label, (defense, overrides) in variants.items():
        for seed in range(seeds):
            targets = session.train([resolve(data, defense, 3, seed=seed, overrides=overrides)])
            transfer = session.transfer(
                targets, eps=(0.2,), attacks=words.attacks("transfer", steps=20), restarts=2
            ).transferability()
            off = transfer[(transfer["member"] != "ensemble") & (transfer["member"] != transfer["source"].astype(str))]
            judged = Outcomes.concat(
                [
                    session.whitebox(targets, eps=EPS, attacks=words.attacks("whitebox", steps=20), restarts=2),
                    session.blackbox(
                        targets, surrogates, eps=EPS, attacks=words.attacks("blackbox", steps=20), restarts=2
                    ),
                ]
            ).accuracy(["threat", "eps"])
            found = {f"{row['threat']} {row['eps']:g}": row["accuracy"] for row in judged.to_dict("records")}
            rows.append({"variant": label, "seed": seed, "transfer 0.2": off["success"].mean(), **found})
            click.echo(rows[-1], err=True)
    frame = pd.DataFrame(rows)
    columns = ["clean 0", "transfer 0.2", *(f"{t} {e:g}" for t in ("whitebox", "blackbox") for e in EPS)]
    lines = []
    for label in variants:
        own = 100 * frame.loc[frame["variant"] == label, columns]
        means = [TableCell(f"{own[name].mean():.1f} ± {own[name].std():.1f}", own[name].mean()) for name in columns]
        lines.append([TableCell.of(label), *means])
    table = markdown(Table(["", "clean", *columns[1:]], lines))
    name = "craft_bn" if craft_bn else "defenses"
    write_text(out / f"{name}.csv", frame.to_csv(index=False))
    write_text(out / f"{name}.md", table)
    click.echo(table, nl=False)


if __name__ == "__main__":
    main()
