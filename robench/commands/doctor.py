"""`robench doctor`."""

from __future__ import annotations

import click

from robench.commands._shared import dataset_of, device_of, import_models, refuse_given, shared


@click.command("doctor")
@click.argument("what", metavar="RUN|MODEL")
@click.option("--dataset", help="By default the one that the run was trained on; needed for a MODEL.")
@click.option("--model", multiple=True, help="package.module:factory that a run needs: allows to import it.")
@shared("data_dir", "device", "runs")
def command(what: str, dataset: str | None, model: tuple[str, ...], data_dir: str, device: str, runs: str) -> int:
    """What is wrong with a RUN, or with the MODEL that package.module:factory makes, and the fix of each."""
    from robench.core.data import load
    from robench.core.ensemble import Ensemble
    from robench.core.errors import RobenchError
    from robench.core.models import build, import_model
    from robench.core.runs import Runs
    from robench.evaluation.doctor import diagnose

    if ":" in what:
        refuse_given({"model", "runs"}, "has no effect for a MODEL")
        if dataset is None:
            raise RobenchError("a MODEL is examined on data: add --dataset")
        data = load(dataset, data_dir)
        import_model(what)
        ensemble = Ensemble([build(data.model(what), 0)]).eval()
    else:
        run = Runs(runs).get(what)
        data = load(dataset or dataset_of([run]), data_dir)
        import_models(model, [run])
        ensemble = run.load()
    findings = diagnose(ensemble.to(device_of(device)), data)
    for finding in findings:
        click.echo(finding)
    if not findings:
        click.echo(f"{what}: nothing found")
    return int(any(finding.status == "fail" for finding in findings))
