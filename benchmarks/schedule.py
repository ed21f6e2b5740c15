"""How long k workers take for a study: its own task graph, with the durations that its tasks had.

    robench run dverge2020-digits
    python benchmarks/schedule.py dverge2020-digits --out dverge2020-digits   # measured durations
    python benchmarks/schedule.py dverge2020 --pass-seconds 2e-5              # passes times a measured cost

Prints a table: workers, hours, speed-up, share of the workers' time that is idle. A simulation: it knows the graph and
the order in which `robench run` begins tasks, but no start of processes, no shared disk and no shared memory bandwidth.
"""

from __future__ import annotations

from pathlib import Path

import click

from robench.studies.plan import Step, expand, makespan, ranks
from robench.studies.state import StudyFolder
from robench.studies.study import find, parse


@click.command()
@click.argument("study")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of a study that is done: its tasks' durations.")
@click.option("--pass-seconds", type=float, help="Seconds of a forward and backward pass, where nothing was measured.")
@click.option("--set", "settings", multiple=True, help="As given to robench run.")
@click.option("--data-dir", default="data", show_default=True)
def main(study: str, out: Path | None, pass_seconds: float | None, settings: tuple[str, ...], data_dir: str) -> None:
    if (out is None) == (pass_seconds is None):
        raise click.UsageError("give --out or --pass-seconds")
    name, text = find(study)
    plan = expand(name, parse(name, text, settings), data_dir)

    def cost(step: Step) -> float:
        if out is None:
            return step.passes * (pass_seconds or 0.0)
        record = StudyFolder(out).record(step)
        if record.get("state") != "done":
            raise click.UsageError(f"{step.title} is not done in {out}")
        return float(record["seconds"])

    costs = {step.key: cost(step) for step in plan.steps.values()}
    total = sum(costs.values())
    chain = max(ranks(plan.steps, lambda step: costs[step.key]).values())
    click.echo(f"{len(costs)} tasks, {total / 3600:.3g} hours in all, of which the longest chain is {chain / 3600:.3g}")
    click.echo("| workers | hours | speed-up | idle |\n|---|---|---|---|")
    for workers in (1, 2, 4, 8, 16, 32, 64):
        took = makespan(plan.steps, lambda step: costs[step.key], workers)
        idle = 1 - total / (workers * took)
        click.echo(f"| {workers} | {took / 3600:.3g} | {total / took:.1f} | {100 * idle:.0f} % |")


if __name__ == "__main__":
    main()
