"""The command line: parses, calls, prints. Results go to stdout; bars and notices to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from robench.core.data import Data
    from robench.core.fast import Precision
    from robench.core.runs import Run, Runs
    from robench.evaluation.engine import Forecast
    from robench.evaluation.outcomes import Outcomes
    from robench.evaluation.threats import Threat


def main() -> None:
    """The entry point: one line and exit code 2 for what the user can mend."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line; the exit code."""
    try:
        result = cli.main(args=list(arguments), prog_name="robench", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; what is finished is kept: run the same command to go on", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (ValueError, OSError) as error:
        from robench.core.errors import RobenchError

        if not isinstance(error, (RobenchError, OSError)):
            raise
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        return 2
    return result if isinstance(result, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="robench")
def cli() -> None:
    """Adversarial robustness of ensembles: train, attack, judge, draw."""


def _shared(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that several commands have."""
    options = {
        "runs": click.option("--runs", default="runs", show_default=True, help="Folder that holds all runs."),
        "data_dir": click.option("--data-dir", default="data", show_default=True, help="Folder of official data sets."),
        "device": click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        "yes": click.option("--yes", is_flag=True, help="Do not ask before ten minutes or more of training."),
    }

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            function = options[name](function)
        return function

    return decorate


@cli.command("list")
@click.argument("what", required=False, type=click.Choice(["defenses", "attacks", "models", "datasets", "runs"]))
@_shared("runs")
def list_(what: str | None, runs: str) -> None:
    """What there is: defenses, attacks, models, datasets, runs."""
    from robench.attacks import ATTACKS
    from robench.core.data import DATASETS
    from robench.core.models import MODELS
    from robench.core.registry import Registry
    from robench.core.runs import Runs
    from robench.defenses import DEFENSES

    registries: dict[str, Registry[Any]] = {
        "defenses": DEFENSES,
        "attacks": ATTACKS,
        "models": MODELS,
        "datasets": DATASETS,
    }
    for kind, registry in registries.items():
        if what not in (None, kind):
            continue
        broken = registry.broken()
        names = [name for name in registry.names() if name not in broken]
        lines = [f"  {name:<16} {_summary(registry.get(name))}".rstrip() for name in names]
        if what:
            for prefix, members in registry.families().items():
                here = f"{len(members)} names: {', '.join(members)}" if members else "none: its package does not import"
                lines.append(f"  {prefix}/<name>   {here}")
        else:
            lines += [f"  {prefix}/<name>   robench list {kind} names them" for prefix in registry.prefixes()]
        if kind == "datasets":
            lines += [
                "  folder:PATH      train/<class>/* and test/<class>/*",
                "  npz:PATH         x_train y_train x_test y_test",
            ]
        click.echo(f"{kind}:\n" + "\n".join(lines))
        for name, reason in broken.items():
            click.echo(f"  {name}: skipped. {reason}", err=True)
    if what in (None, "runs"):
        found = Runs(runs).all()
        click.echo("runs:" if found or what is None else f"runs: none in {runs}; robench train makes one")
        for each in found:
            click.echo(f"  {each.name:<44} {each.role:<9} {each.defense} n={each.n} seed={each.seed}")


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_shared("data_dir")
def check(names: tuple[str, ...], data_dir: str) -> int:
    """Check that attacks, defenses, models or data sets keep their contract; exit code 1 where one does not."""
    from robench.evaluation.conformance import examine, kinds

    violations = 0
    for kind, name in [(kind, each) for each in names for kind in kinds(each)]:
        click.echo(f"{kind} {name}:")
        for finding in examine(kind, name, data_dir):
            click.echo(f"  {finding.verdict} {finding.check}: {finding.evidence}")
            violations += finding.verdict == "FAIL"
    return int(violations > 0)


@cli.command()
@click.argument("defense")
@click.option("--n", default=3, show_default=True, help="Members.")
@click.option("--dataset", default="cifar10", show_default=True, help="Name, folder:PATH or npz:PATH.")
@click.option("--model", help="Architecture; several with commas, one each. By default the recipe's.")
@click.option("--recipe", help="Recipe file; by default the data set's.")
@click.option("--seed", default=0, show_default=True)
@click.option("--epochs", type=int, help="Instead of the recipe's.")
@click.option("--batch-size", type=int, help="Instead of the recipe's.")
@click.option("--lr", type=float, help="Instead of the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any field of the defense or recipe.")
@click.option("--init", help="baseline, scratch or a run to start from. By default the defense's own start.")
@click.option("--role", type=click.Choice(["target", "surrogate"]), default="target", show_default=True)
@click.option("--name", help="Name of the run. By default made from the above.")
@click.option(
    "--track",
    type=click.Choice(["quick", "full"]),
    help="Diversity and transferability into the history: in under 15 % of the time, or the paper's protocol.",
)
@_shared("data_dir", "device", "runs")
def train(
    defense: str,
    n: int,
    dataset: str,
    model: str | None,
    recipe: str | None,
    seed: int,
    settings: tuple[str, ...],
    init: str | None,
    role: Any,
    name: str | None,
    track: str | None,
    data_dir: str,
    device: str,
    runs: str,
    **values: Any,
) -> None:
    """Train DEFENSE; run again, it resumes or says that it is complete. Prints the run's name last."""
    from robench.core.data import load
    from robench.core.runs import Runs
    from robench.evaluation.diversity import Tracking
    from robench.training.loop import ensure
    from robench.training.recipes import recipe_file
    from robench.training.task import resolve

    overrides = {key: value for key, value in values.items() if value is not None} | _pairs(settings)
    place = _device(device)
    data = load(dataset, data_dir)
    models = model.split(",") if model else []
    task = resolve(
        data,
        defense,
        n,
        seed=seed,
        role=role,
        models=models,
        recipe=recipe,
        overrides=overrides,
        init=init,
        name=name,
    )
    trusted = any(":" in each for each in models)
    tracking = None
    if track is not None:
        radius = recipe_file(recipe or data.recipe).evaluation.transfer_eps[0]
        made = Tracking.full(radius) if track == "full" else Tracking(radius)
        tracking = made.on(data, place)
    with _bar() as progress:
        finished = ensure(
            task,
            data,
            Runs(runs),
            device=place,
            trusted=trusted,
            track=tracking,
            track_every=1 if track == "full" else None,
            progress=progress,
            notice=_notice,
        )
    click.echo(finished.name)


@cli.command("import")
@click.argument("weights", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", default="resnet20", show_default=True, help="Name or package.module:factory.")
@click.option("--dataset", default="cifar10", show_default=True, help="Whose classes and normalisation they have.")
@click.option("--defense", default="unknown", show_default=True, help="How they were trained.")
@click.option("--name", help="Name of the run; by default the file's.")
@click.option("--seed", default=0, show_default=True)
@click.option("--role", type=click.Choice(["target", "surrogate"]), default="target", show_default=True)
@click.option("--derived-from", help="The run that these weights were trained from.")
@_shared("data_dir", "runs")
def import_(
    weights: tuple[Path, ...],
    model: str,
    dataset: str,
    defense: str,
    name: str | None,
    seed: int,
    role: Any,
    derived_from: str | None,
    data_dir: str,
    runs: str,
) -> None:
    """Make a run of WEIGHTS that others trained: .pth without code, or safetensors; one file or several members."""
    from robench.core.runs import Runs
    from robench.training.importing import import_weights

    store = Runs(runs)
    run = import_weights(
        weights,
        store,
        model=model,
        dataset=dataset,
        defense=defense,
        seed=seed,
        role=role,
        name=name,
        parent=store.get(derived_from) if derived_from else None,
        data_folder=Path(data_dir),
        trusted=":" in model,
    )
    click.echo(run.name)


@cli.command("eval")
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--threat", type=click.Choice(["whitebox", "blackbox", "transfer"]), required=True)
@click.option("--surrogates", default="3,5,8", show_default=True, help="Sizes to make or reuse, or names of runs.")
@click.option("--surrogate-defense", default="baseline", show_default=True, help="`same`: each target's own.")
@click.option("--allow-related", is_flag=True, help="Judge on surrogates that are no hold-outs; labelled.")
@click.option("--eps", help="0.01:0.07:0.01, 8/255, or several with commas. By default the data set's.")
@click.option("--attacks", help="With commas; fields as pgd:momentum=1. By default the protocol's.")
@click.option("--losses", help="ce, cw. By default the protocol's.")
@click.option("--steps", type=int, help="Gradient steps. By default the protocol's: 50, black-box 100.")
@click.option("--restarts", type=int, help="Random starts. By default the protocol's: 5, black-box 3.")
@click.option("--samples", default=1000, show_default=True)
@click.option("--subset", type=click.Choice(["first", "random", "paper"]), default="first", show_default=True)
@click.option("--dataset", help="By default the one that the runs were trained on, else cifar10.")
@click.option("--model", multiple=True, help="package.module:factory that a run needs: allows to import it.")
@click.option("--seed", default=0, show_default=True, help="Of the attacks' draws.")
@click.option("--batch-size", default=250, show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float64"]),
    default="float32",
    show_default=True,
    help="Of crafting; verdicts are taken in float32 on the original weights.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, what is done, and what it would take.")
@click.option("--no-cache", is_flag=True, help="Craft again; keep no adversarial images.")
@click.option("--no-train", is_flag=True, help="Missing surrogates are an error.")
@click.option("--probe", is_flag=True, help="Attack up to 200 survivors again, far harder; white-box.")
@click.option("--strict", is_flag=True, help="Exit code 1 where a check of validity fails.")
@click.option("--format", "style", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@_shared("data_dir", "device", "runs", "yes")
def eval_(
    names: tuple[str, ...],
    threat: str,
    surrogates: str,
    surrogate_defense: str,
    allow_related: bool,
    eps: str | None,
    attacks: str | None,
    losses: str | None,
    steps: int | None,
    restarts: int | None,
    samples: int,
    subset: str,
    dataset: str | None,
    model: tuple[str, ...],
    seed: int,
    batch_size: int,
    precision: Precision,
    dry_run: bool,
    no_cache: bool,
    no_train: bool,
    probe: bool,
    strict: bool,
    style: str,
    data_dir: str,
    device: str,
    runs: str,
    yes: bool,
) -> int:
    """Judge RUNs, or every target run of the data set, under a threat; says what speaks against the result."""
    from robench.core.data import load
    from robench.core.errors import RobenchError
    from robench.core.runs import Runs
    from robench.evaluation import checks, words
    from robench.evaluation.engine import Settings
    from robench.evaluation.outcomes import Outcomes
    from robench.evaluation.probe import probe as attacked_again
    from robench.evaluation.threats import Transfer, Whitebox
    from robench.studies.workbench import Workbench, stored
    from robench.training.recipes import recipe_file

    blackbox_only = {"surrogates", "surrogate_defense", "allow_related", "no_train", "yes", "no_cache"}
    if threat != "blackbox":
        _refuse_given(blackbox_only, f"has no effect under --threat {threat}")
    if threat != "whitebox":
        _refuse_given({"probe"}, f"has no effect under --threat {threat}")
    store = Runs(runs)
    chosen = [store.get(name) for name in names]
    if not chosen and not any(run.role == "target" for run in store.all()):
        raise RobenchError(f"{runs} holds no target run; robench train or robench import makes one")
    data = load(dataset or _dataset_of(chosen), data_dir)
    chosen = chosen or _targets(store, data)
    if samples > len(data.test):
        _notice(f"{data.label} has {len(data.test)} test images: all of them are taken instead of {samples}")
    grid = recipe_file(data.recipe).evaluation
    options: dict[str, Any] = {
        "eps": words.radii(eps) if eps else (grid.transfer_eps if threat == "transfer" else grid.eps),
        "attacks": words.attacks(threat, _split(attacks), _split(losses), steps),
    }
    if restarts is not None:
        options["restarts"] = restarts
    bench = Workbench(
        store,
        data,
        Settings(_device(device), precision, batch_size, seed),
        samples,
        subset,
        frozenset(model),
        bar=_bar,
        notice=_notice,
        confirm=_confirm(yes),
    )
    found: list[checks.Check] = []
    plans: list[tuple[list[Run], Threat]] = []
    if threat != "blackbox":
        plans.append((chosen, (Whitebox if threat == "whitebox" else Transfer)(**options)))
    else:
        for defense in sorted({run.defense if surrogate_defense == "same" else surrogate_defense for run in chosen}):
            group = [run for run in chosen if surrogate_defense != "same" or run.defense == defense]
            sizes, others = _surrogates(surrogates)
            tasks = bench.surrogate_tasks(sizes, defense)
            if dry_run and (missing := [task.name for task in tasks if task.name not in store.names()]):
                click.echo(f"missing surrogates, trained first: {', '.join(missing)}, {bench.estimate(tasks)}")
                continue
            hold_outs = bench.train(tasks, allowed=not no_train, ask_beyond=600) + list(map(store.get, others))
            plans.append((group, bench.hold_out(hold_outs, allow_related=allow_related, **options)))
            found.append(checks.kin(map(bench.subject, group), [*map(bench.subject, hold_outs)]))
    if dry_run:
        for group, made in plans:
            click.echo(_bill(bench.forecast(group, made, cache=not no_cache)))
        return 0
    outcomes = Outcomes.concat(bench.judge(group, made, cache=not no_cache) for group, made in plans)
    click.echo(_formatted(outcomes, threat, style))
    found += checks.check(outcomes, stored(chosen, _notice))
    if probe:
        for run in chosen:
            with _bar() as progress:
                found += attacked_again(
                    bench.subject(run),
                    outcomes,
                    data,
                    options["attacks"],
                    restarts,
                    bench.settings,
                    progress=progress,
                    notice=_notice,
                )
    for each in found:
        click.echo(each, err=style != "table")
    return int(strict and checks.failed(found))


@cli.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--threat", type=click.Choice(["whitebox", "blackbox", "clean"]), required=True)
@click.option("--eps", help="0.01:0.07:0.01, 8/255, or several with commas. By default all that both have.")
@click.option("--defenses", is_flag=True, help="A and B are defenses: over at least 3 seeds of each.")
@click.option("--n", type=int, help="Members, for --defenses; needed where there are several sizes.")
@click.option("--format", "style", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@_shared("runs")
def compare(
    first: str, second: str, threat: str, eps: str | None, defenses: bool, n: int | None, style: str, runs: str
) -> None:
    """Whether run A differs from run B, on the images and under the attacks that both were judged on."""
    from robench.core.runs import Runs
    from robench.evaluation import comparison, words
    from robench.studies.workbench import OUTCOMES

    if threat == "clean":
        _refuse_given({"eps"}, "has no effect under --threat clean")
    if not defenses:
        _refuse_given({"n"}, "has no effect without --defenses")
    store = Runs(runs)
    radii = words.radii(eps) if eps else ()

    def measured(run: Run) -> comparison.Measured:
        return comparison.Measured.of_folder(run.name, run.folder / OUTCOMES, _notice)

    if defenses:
        sides = [(each, [*map(measured, comparison.of_defense(store.all(), each, n))]) for each in (first, second)]
        rows = comparison.compare_defenses(sides[0], sides[1], threat, radii, _notice)
    else:
        one, other = measured(store.get(first)), measured(store.get(second))
        rows = comparison.compare(one, other, threat, radii, _notice)
    click.echo(_as_text(rows, style) or _compared(rows))


@cli.command()
@click.argument("what", metavar="RUN|MODEL")
@click.option("--dataset", help="By default the one that the run was trained on; needed for a MODEL.")
@click.option("--model", multiple=True, help="package.module:factory that a run needs: allows to import it.")
@_shared("data_dir", "device", "runs")
def doctor(what: str, dataset: str | None, model: tuple[str, ...], data_dir: str, device: str, runs: str) -> int:
    """What is wrong with a RUN, or with the MODEL that package.module:factory makes, and the fix of each."""
    from robench.core.data import load
    from robench.core.ensemble import Ensemble
    from robench.core.errors import RobenchError
    from robench.core.models import build
    from robench.core.runs import Runs
    from robench.evaluation.doctor import diagnose

    if ":" in what:
        _refuse_given({"model", "runs"}, "has no effect for a MODEL")
        if dataset is None:
            raise RobenchError("a MODEL is examined on data: add --dataset")
        data = load(dataset, data_dir)
        ensemble = Ensemble([build(data.model(what), 0, trusted=True)]).eval()
    else:
        run = Runs(runs).get(what)
        data = load(dataset or _dataset_of([run]), data_dir)
        code = {spec.name for spec in run.specs if ":" in spec.name}
        ensemble = run.load(trusted=bool(code) and code <= set(model))
    findings = diagnose(ensemble.to(_device(device)), data)
    for finding in findings:
        click.echo(finding)
    if not findings:
        click.echo(f"{what}: nothing found")
    return int(any(finding.status == "fail" for finding in findings))


@cli.command()
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--out", default="figures", show_default=True, type=click.Path(path_type=Path))
@click.option("--against", type=click.Choice(["dverge2020"]), help="Published numbers to set beside ours.")
@click.option("--regions", type=int, help="Points along each axis of Figure 1; needs a surrogate run and --dataset.")
@click.option("--dataset", help="For --regions; by default the one that the runs were trained on.")
@_shared("data_dir", "device", "runs")
def report(
    names: tuple[str, ...],
    out: Path,
    against: str | None,
    regions: int | None,
    dataset: str | None,
    data_dir: str,
    device: str,
    runs: str,
) -> None:
    """Draw what was measured on RUNs, or on all: figures as PDF and PNG, their values, tables, report.html."""
    from robench.core.data import load
    from robench.core.errors import RobenchError
    from robench.core.runs import Runs
    from robench.evaluation.engine import Settings
    from robench.studies.drawing import draw
    from robench.studies.plane import decision_regions
    from robench.studies.workbench import Workbench, stored

    store = Runs(runs)
    chosen = [store.get(name) for name in names] or store.all()
    outcomes = stored(chosen, _notice)
    chosen = [run for run in chosen if run.name in set(outcomes.frame["target"])]
    plane = None
    if regions is None:
        _refuse_given({"dataset", "data_dir", "device"}, "has an effect only with --regions")
    else:
        data = load(dataset or _dataset_of(chosen), data_dir)
        hold_outs = [run for run in store.all() if run.role == "surrogate"]
        if not hold_outs or not chosen:
            raise RobenchError(
                "--regions needs a surrogate run, and outcomes; robench eval --threat blackbox makes both"
            )
        bench = Workbench(store, data, Settings(_device(device)), notice=_notice)
        plane = decision_regions(bench, chosen, hold_outs[0], resolution=regions)
    for path in draw(outcomes, chosen, out, regions=plane, paper=against, notice=_notice):
        click.echo(path)


@cli.command()
@click.argument("action", type=click.Choice(["list", "verify", "clear"]))
@_shared("runs")
def cache(action: str, runs: str) -> int:
    """The adversarial images that are kept: list them, verify every file, or clear all."""
    from robench.evaluation.images import Images
    from robench.studies.workbench import CRAFTED

    images = Images(Path(runs) / CRAFTED, _notice)
    if action == "clear":
        click.echo(f"freed {images.clear() / 1e6:.1f} MB")
        return 0
    crafts = list(images.crafts(verify=action == "verify"))
    for craft in crafts:
        what = " ".join(str(craft.manifest.get(name, "?")) for name in ("surrogate", "attack", "loss", "eps"))
        damaged = f"  {craft.damaged} damaged" if craft.damaged else ""
        click.echo(f"{craft.key}  {craft.images:>6} images  {craft.size / 1e6:8.1f} MB  {what}{damaged}")
    click.echo(f"{len(crafts)} crafts, {sum(craft.size for craft in crafts) / 1e6:.1f} MB")
    return int(any(craft.damaged for craft in crafts))


@cli.command()
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path))
def demo(out: Path) -> None:
    """Baseline/3 and DVERGE/3 on handwritten digits, under three threats, with figures: minutes on two cores."""
    from robench.studies.demo import demonstrate

    found, files = demonstrate(out, bar=_bar, notice=_notice)
    for threat, outcomes in found.items():
        click.echo(_formatted(outcomes, threat, "table"))
    for path in files:
        click.echo(path)


def _bill(parts: Sequence[Forecast]) -> str:
    """What every attack takes, and the sum."""
    from robench.studies.workbench import duration

    lines = [
        f"{part.title}: {part.cells} cells, {part.done} done, {part.passes} passes, {part.disk / 1e6:.0f} MB, "
        f"{duration(part.seconds)}"
        for part in parts
    ]
    cells, done, passes = (sum(getattr(part, name) for part in parts) for name in ("cells", "done", "passes"))
    disk, seconds = sum(part.disk for part in parts), sum(part.seconds for part in parts)
    return "\n".join(
        [
            *lines,
            f"in all at most {cells - done} of {cells} cells, {passes} forward and backward passes of one image, "
            f"{disk / 1e6:.0f} MB, {duration(seconds)}",
        ]
    )


def _formatted(outcomes: Outcomes, threat: str, style: str) -> str:
    from robench.studies.summary import objects

    rows = [row for row in objects(outcomes) if (threat == "transfer") == ("success" in row)]
    return _as_text(rows, style) or _table(rows, threat)


def _as_text(rows: list[dict[str, Any]], style: str) -> str:
    """JSON or CSV; nothing for a table."""
    import json

    import pandas as pd

    if style == "json":
        return json.dumps(rows, indent=2)
    return pd.DataFrame(rows).to_csv(index=False).rstrip() if style == "csv" else ""


def _compared(rows: list[dict[str, Any]]) -> str:
    """Accuracies and their difference in percent, a line per ε."""
    import io

    from rich.console import Console
    from rich.table import Table

    def cell(row: dict[str, Any], value: str, ends: str = "") -> str:
        return f"{100 * row[value]:.1f} [{100 * row[f'low{ends}']:.1f}, {100 * row[f'high{ends}']:.1f}]"

    a, b, threat = (rows[0][name] for name in ("a", "b", "threat"))
    over = "; ± sd over seeds" if "sd_a" in rows[0] else ""
    table = Table(title=f"{threat}: accuracy in % [95 % interval], on the same images{over}", title_justify="left")
    for heading in ("ε", "images", "versions", a, b, "difference", "p", "p, Holm", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        spread = [f" ± {100 * row[f'sd_{which}']:.1f}" if over else "" for which in "ab"]
        table.add_row(
            f"{row['eps']:g}",
            str(row["samples"]),
            str(row["versions"]),
            *(cell(row, f"accuracy_{which}", f"_{which}") + sd for which, sd in zip("ab", spread, strict=True)),
            cell(row, "difference"),
            f"{row['p']:.3g}",
            f"{row['p_adjusted']:.3g}",
            row["verdict"],
        )
    text = io.StringIO()
    Console(file=text, width=400, highlight=False).print(table)
    return text.getvalue().rstrip()


def _table(rows: list[dict[str, Any]], threat: str) -> str:
    """Percentages with their intervals, ε across; for transfer one matrix per ensemble and ε."""
    import io

    from rich.console import Console
    from rich.table import Table

    tables = []
    if threat == "transfer":
        groups = sorted({(row["run"], row["eps"]) for row in rows})
        for run, eps in groups:
            own = {(row["source"], row["target"]): row for row in rows if (row["run"], row["eps"]) == (run, eps)}
            sources, targets = list(dict.fromkeys(s for s, _ in own)), list(dict.fromkeys(t for _, t in own))
            count = next(iter(own.values()))["samples"]
            table = Table(title=f"{run}: success in %, ε {eps:g}, {count} images; row = source", title_justify="left")
            for heading in ("source", *map(str, targets)):
                table.add_column(heading, justify="right")
            for source in sources:
                table.add_row(str(source), *(f"{100 * own[source, target]['success']:.1f}" for target in targets))
            tables.append(table)
    else:
        radii = sorted({row["eps"] for row in rows})
        counts = sorted({row["samples"] for row in rows})
        images = " or ".join(map(str, counts))
        table = Table(title=f"{threat}: accuracy in % [95 % interval], {images} images", title_justify="left")
        for heading in ("target", *("clean" if eps == 0 else f"ε {eps:g}" for eps in radii)):
            table.add_column(heading, justify="left" if heading == "target" else "right")
        for target in dict.fromkeys(row["target"] for row in rows):
            own_rows = {row["eps"]: row for row in rows if row["target"] == target}
            cells = [
                f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if row else ""
                for row in map(own_rows.get, radii)
            ]
            table.add_row(target, *cells)
        tables.append(table)
    console = Console(file=io.StringIO(), width=400, highlight=False)
    for table in tables:
        console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]


def _summary(item: Any) -> str:
    """The first line of what a plug-in says of itself."""
    return (getattr(item, "func", item).__doc__ or "").strip().partition("\n")[0]


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def _pairs(settings: Sequence[str]) -> dict[str, Any]:
    from robench.core.errors import RobenchError

    found = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RobenchError(f"expected --set NAME=VALUE, got {text!r}")
        found[name] = value
    return found


def _surrogates(text: str) -> tuple[list[int], list[str]]:
    """Sizes, and names of runs."""
    from robench.core.errors import RobenchError

    parts = _split(text)
    sizes = [int(part) for part in parts if part.lstrip("-").isdigit()]
    if not parts or any(size < 1 for size in sizes):
        raise RobenchError(f"expected --surrogates as sizes such as 3,5,8 or names of runs, got {text!r}")
    return sizes, [part for part in parts if not part.lstrip("-").isdigit()]


def _dataset_of(runs: Sequence[Run]) -> str:
    """The official data set that all runs were made for."""
    from robench.core.data import DATASETS
    from robench.core.errors import RobenchError

    found = {str((run.manifest.get("data") or {}).get("name") or run.manifest.get("dataset")) for run in runs}
    if not found:
        return "cifar10"
    if len(found) > 1 or not found <= set(DATASETS.names()):
        raise RobenchError(f"these runs are of {', '.join(sorted(found))}; say which data to judge on: --dataset")
    return found.pop()


def _targets(store: Runs, data: Data) -> list[Run]:
    """Every target run of a data set."""
    from robench.core.errors import RobenchError

    found = [
        run
        for run in store.all()
        if run.role == "target"
        and data.label in ((run.manifest["data"] or {}).get("name"), run.manifest.get("dataset"))
    ]
    if not found:
        raise RobenchError(f"{store.root} holds no target run of {data.label}; robench train makes one")
    return found


def _device(name: str) -> torch.device:
    import torch

    from robench.core.errors import RobenchError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RobenchError(f"device {name!r} is not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def _refuse_given(names: set[str], reason: str) -> None:
    """A flag that has no effect is an error."""
    from robench.core.errors import RobenchError

    context = click.get_current_context()
    for name in sorted(names):
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise RobenchError(f"--{name.replace('_', '-')} {reason}; leave it away")


def _notice(text: str) -> None:
    click.echo(text, err=True)


def _confirm(yes: bool) -> Callable[[str], bool]:
    return lambda question: yes or (sys.stdin.isatty() and click.confirm(question, err=True))


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """One bar on stderr with the time left; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
