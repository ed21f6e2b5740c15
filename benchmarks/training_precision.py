"""Two reports of one study, seed by seed: what else differs is the precision of training.

    robench run benchmarks/training_precision.toml --out float32
    robench run benchmarks/training_precision.toml --out bfloat16 --set defenses.baseline.precision=bfloat16 \\
        --set defenses.dverge.precision=bfloat16 --set defenses.advt.precision=bfloat16
    python benchmarks/training_precision.py float32/report bfloat16/report

The seeds are pairs only in name: in another precision a training goes another way after some steps.
"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd
from scipy import stats

from robench.core.files import read_json, write_text

CELL = ["defense", "threat", "eps"]


def scores(report: Path) -> pd.DataFrame:
    """Percent per cell and seed: accuracy, and the mean success between different members."""
    table = pd.DataFrame(read_json(report / "summary.json"))
    accuracy = table[table["accuracy"].notna()].rename(columns={"accuracy": "score"})
    moves = pd.concat(map(pd.read_csv, report.glob("fig*_transferability*.csv"))).drop_duplicates()
    others = moves[(moves["member"] != "ensemble") & (moves["source"].astype(str) != moves["member"])]
    between = others.groupby(["defense", "eps", "seed"], as_index=False)["rate"].mean()
    found = [accuracy, between.rename(columns={"rate": "score"}).assign(threat="transfer, success")]
    return pd.concat(found, ignore_index=True).set_index([*CELL, "seed"])["score"].mul(100)


@click.command()
@click.argument("first", type=click.Path(exists=True, path_type=Path))
@click.argument("second", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for training.md.")
def main(first: Path, second: Path, out: Path | None) -> None:
    both = pd.concat({"a": scores(first), "b": scores(second)}, axis=1, join="inner")
    lines = ["| defense | threat | ε | float32 | bfloat16 | difference, 95 % |", "|---" * 6 + "|"]
    for (defense, threat, eps), cell in both.groupby(level=CELL):
        change = cell["b"] - cell["a"]
        half = stats.t.ppf(0.975, len(cell) - 1) * change.std() / len(cell) ** 0.5
        low, high = change.mean() - half, change.mean() + half
        means = " | ".join(f"{cell[name].mean():.1f} ± {cell[name].std():.1f}" for name in both)
        lines.append(f"| {defense} | {threat} | {eps:g} | {means} | {change.mean():+.1f} [{low:+.1f}, {high:+.1f}] |")
    text = "\n".join(
        [f"Percent, mean ± sd over {both.index.get_level_values('seed').nunique()} seeds.", "", *lines, ""]
    )
    if out:
        write_text(out / "training.md", text)
    click.echo(text)


if __name__ == "__main__":
    main()
