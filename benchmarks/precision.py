"""Whether the precision of crafting decides a verdict: the same images, crafted in float32 and in another precision.

    robench import dverge.pth --model resnet20 --dataset cifar10 --defense dverge --name dverge-3
    python benchmarks/precision.py dverge-3 --surrogate surrogate-3 --dataset npz:cifar10.npz

White-box PGD and black-box momentum PGD on the same images from the same starts, one start each. A precision may be
the default where no accuracy moves by more than a point. Interrupted, it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pandas as pd

from robench.commands._shared import device_of
from robench.core.data import load
from robench.core.fast import Precision
from robench.core.files import write_text
from robench.evaluation import words
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.settings import Settings
from robench.evaluation.statistics import bootstrap_difference, mcnemar
from robench.session import Session
from robench.store.runs import Runs

#: Points of accuracy by which a precision may differ from float32.
ALLOWED = 0.01


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--surrogate", required=True, help="A hold-out run.")
@click.option("--precision", type=click.Choice(["bfloat16", "float64"]), default="bfloat16", show_default=True)
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--eps", default="0.01,0.02,0.03", show_default=True)
@click.option("--samples", default=1000, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--runs", default="runs", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", default="results", show_default=True, type=click.Path(path_type=Path))
def main(
    names: tuple[str, ...],
    surrogate: str,
    precision: Precision,
    dataset: str,
    eps: str,
    samples: int,
    steps: int,
    batch_size: int,
    runs: str,
    device: str,
    out: Path,
) -> None:
    data, store, radii = load(dataset), Runs(runs), words.radii(eps)
    targets = [store.get(name) for name in names]
    verdicts: dict[str, pd.Series] = {}
    for kind in ("float32", precision):
        settings = Settings(device_of(device), precision=kind, batch_size=batch_size)
        session = Session(store, data, settings, samples)
        found = [
            session.whitebox(targets, eps=radii, restarts=1, attacks=words.attacks("whitebox", steps=steps)),
            session.blackbox(
                targets,
                [store.get(surrogate)],
                eps=radii,
                restarts=1,
                attacks=words.attacks("blackbox", ["pgd"], ["ce"], steps=steps),
            ),
        ]
        frame = Outcomes.concat(found).frame
        attacked = frame[frame["threat"] != "clean"]
        verdicts[kind] = attacked.set_index(["threat", "target", "eps", "sample"])["correct"].astype(bool).sort_index()
    both = pd.DataFrame({"float32": verdicts["float32"], "other": verdicts[precision]})
    assert not both.isna().to_numpy().any(), "the two precisions were judged on other images"
    rows: list[dict[str, Any]] = []
    for (threat, target, radius), part in both.groupby(level=["threat", "target", "eps"]):
        low, high = bootstrap_difference(part["other"], part["float32"])
        difference = float(part["other"].mean() - part["float32"].mean())
        rows.append(
            {
                "threat": threat,
                "target": target,
                "eps": radius,
                "images": len(part),
                "float32": part["float32"].mean(),
                precision: part["other"].mean(),
                "difference": difference,
                "low": low,
                "high": high,
                "differing verdicts": (part["other"] != part["float32"]).mean(),
                "p": mcnemar(part["other"], part["float32"]),
                "within a point": abs(difference) <= ALLOWED,
            }
        )
    table = pd.DataFrame(rows)
    lines = ["| threat | target | ε | images | float32 | " + precision + " | difference | differing verdicts | p |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        moved = f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        lines.append(
            f"| {row['threat']} | {row['target']} | {row['eps']:g} | {row['images']} | {100 * row['float32']:.1f} | "
            f"{100 * row[precision]:.1f} | {moved} | {100 * row['differing verdicts']:.1f} | {row['p']:.2g} |"
        )
    verdict = "every accuracy within a point" if table["within a point"].all() else "not every accuracy within a point"
    text = "\n".join(
        [
            f"Accuracy in % of images crafted in float32 and in {precision}, judged in float32 on the original "
            f"weights; PGD, CE, {steps} steps, one start, the same for both; black-box with momentum from {surrogate}. "
            f"Difference with its 95 % interval, paired by image (bootstrap); p is McNemar's, exact. {data.label}.",
            "",
            *lines,
            "",
            f"Largest difference {100 * table['difference'].abs().max():.1f} points: {verdict}.",
        ]
    )
    write_text(out / "precision.csv", table.to_csv(index=False))
    write_text(out / "precision.md", text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
