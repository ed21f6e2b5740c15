"""`robench eval`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from robench.commands import _gate
from robench.commands._help import Group, Grouped
from robench.commands._options import fields_of, group_of, taken
from robench.commands._shared import (
    confirm,
    dataset_of,
    device_of,
    import_models,
    log_results,
    refuse_given,
    require_models,
    shared,
)
from robench.commands._tables import diversity, formatted
from robench.core.errors import RobenchError
from robench.core.progress import bar
from robench.evaluation import schema
from robench.store.names import RunNames

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from robench.commands._helpers import Part
    from robench.core.data import Data
    from robench.core.fast import Precision
    from robench.evaluation.cost import Forecast
    from robench.evaluation.findings import Finding
    from robench.evaluation.outcomes import Outcomes
    from robench.evaluation.threats import Threat
    from robench.session import Session
    from robench.store.runs import Run, Runs


_GROUPS = (
    group_of(schema.Strength),
    group_of(schema.Attacks),
    group_of(schema.HoldOuts),
    Group("Surrogates", ("no_train", "yes", "no_cache"), ("blackbox",)),
    group_of(schema.Samples),
    Group("Work", ("batch_size", "precision", "compiling", "workers", "dry_run", "log_to"), schema.ATTACKED),
    Group("Checks", ("strict",), schema.ATTACKED),
    Group("Checks", ("probe",), ("whitebox",)),
    Group("Checks", ("require", "lower_bound"), ("whitebox", "blackbox")),
)
_EXAMPLES = (
    "robench eval my-dverge --threat whitebox --eps 0.1 --samples 100",
    "robench eval --threat blackbox --dataset digits --surrogates 3,5,8 --dry-run",
)


@click.command("eval", cls=Grouped, groups=_GROUPS, examples=_EXAMPLES)
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--threat", type=click.Choice(schema.NAMES), required=True, help="What the attacker knows.")
@fields_of(schema.Strength, schema.Attacks, schema.HoldOuts, schema.Samples)
@click.option("--dataset", help="By default the one that the runs were trained on.")
@click.option("--model", multiple=True, help="package.module:factory that a run needs: allows to import it.")
@click.option("--seed", default=0, show_default=True, help="Of the attacks' draws.")
@click.option("--batch-size", type=int, help="Images per pass at most. By default 250, on a GPU what fills it.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float64"]),
    default="float32",
    show_default=True,
    help="Of crafting; verdicts are taken in float32 on the original weights.",
)
@click.option("--compile", "compiling", is_flag=True, help="Craft through torch.compile; first a minute of compiling.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that share the work. By default one per GPU.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, what is done, and what it would take.")
@click.option("--no-cache", is_flag=True, help="Craft again; keep no adversarial images.")
@click.option("--no-train", is_flag=True, help="Missing surrogates are an error.")
@click.option(
    "--probe/--no-probe",
    default=None,
    help="Attack up to 200 survivors of a white-box result again, far harder; or not even the few that always are.",
)
@click.option("--strict", is_flag=True, help="Exit code 1 where a check of validity fails.")
@_gate.gated
@shared("style", "log_to", "data_dir", "device", "runs", "yes")
def command(**given: Any) -> int:
    """Judge RUNs, or every target run of the data set, under a threat; says what speaks against the result."""
    asked = _Asked.of(given)
    if asked.dry_run:
        refuse_given({"workers", "require", "log_to"}, "has no effect with --dry-run")
    for name in asked.names:
        RunNames(asked.runs).manifest(name)
    from robench.commands._helpers import Part, helpers
    from robench.core.logbook import require
    from robench.core.pool import visible_gpus
    from robench.evaluation import checks, words
    from robench.evaluation.findings import brief, failed
    from robench.evaluation.outcomes import Outcomes
    from robench.evaluation.threats import THREATS
    from robench.session import stored
    from robench.studies.summary import objects

    require(asked.log_to)
    gpus = visible_gpus(asked.device)
    alone = asked.dry_run or asked.threat == "diversity"
    workers = 1 if alone else asked.workers or max(1, len(gpus))
    chosen, session = _session(asked, workers)
    if asked.threat == "diversity":
        return _diversity(asked, session, chosen)
    options = words.options(asked.threat, asked.attacked, _usual_eps(asked, session))
    wanted = _gate.requirements(asked.require)
    _gate.refuse_unmeasured(wanted, _points(asked, options["eps"]), "this evaluation")
    found: list[Finding] = []
    trained: list[Forecast] = []
    if asked.threat == "blackbox":
        plans, found, trained = _blackbox(asked, session, chosen, options)
    else:
        plans = [(chosen, THREATS[asked.threat](**options))]
    cache, again = not asked.no_cache, asked.probe is not False
    if asked.dry_run:
        bills = [bill for group, made in plans for bill in session.forecast(group, made, cache=cache, probe=again)]
        click.echo(_bill([*trained, *bills]))
        return 0
    parts = [Part.of(group, made) for group, made in plans]
    with helpers(workers - 1, gpus[1:] + gpus[:1], _assist, asked, workers, parts):
        outcomes = Outcomes.concat(session.judge(group, made, cache=cache, probe=again) for group, made in plans)
    log_results(chosen, asked.log_to, objects(outcomes), asked.threat)
    verdicts = _gate.judge(wanted, objects(outcomes), "this evaluation", by_low=asked.lower_bound)
    click.echo(formatted(outcomes, asked.threat, asked.style, _gate.plain(verdicts)))
    found += checks.check(outcomes, stored(chosen))
    if asked.probe:
        found += _probed(asked, session, chosen, outcomes, options)
    for each in [*brief(found), *verdicts]:
        click.echo(each, err=asked.style != "table")
    return int((asked.strict and failed(found)) or not all(verdict.met for verdict in verdicts))


def _points(asked: _Asked, radii: Sequence[float]) -> list[tuple[str, float]]:
    """Threats and ε of the accuracies that may come of it."""
    from robench.evaluation.threats import BLACKBOX

    threats = BLACKBOX if asked.threat == "blackbox" else (asked.threat,)
    return [("clean", 0.0), *((threat, eps) for threat in threats for eps in radii)]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the user typed."""

    names: tuple[str, ...]
    threat: str
    attacked: schema.Asked
    hold_outs: schema.HoldOuts
    images: schema.Samples
    dataset: str | None
    model: tuple[str, ...]
    seed: int
    batch_size: int | None
    precision: Precision
    compiling: bool
    workers: int | None
    dry_run: bool
    no_cache: bool
    no_train: bool
    probe: bool | None
    strict: bool
    require: tuple[str, ...]
    lower_bound: bool
    style: str
    log_to: tuple[str, ...]
    data_dir: str
    device: str
    runs: str
    yes: bool

    @classmethod
    def of(cls, given: dict[str, Any]) -> _Asked:
        owner = f"--threat {given['threat']}"
        command.refuse_others(given["threat"])
        return cls(
            attacked=taken(schema.Asked, given, owner),
            hold_outs=taken(schema.HoldOuts, given, owner),
            images=taken(schema.Samples, given, owner),
            **given,
        )


def _session(asked: _Asked, workers: int) -> tuple[list[Run], Session]:
    """The runs that are judged, and what judges them."""
    from robench.evaluation.settings import Settings
    from robench.session import Session
    from robench.store.runs import Runs

    store = Runs(asked.runs)
    chosen, data = _judged(asked.names, store, asked.dataset, asked.data_dir)
    import_models(asked.model, chosen if asked.threat != "blackbox" else store.all())
    pools = asked.hold_outs.surrogates if asked.threat == "blackbox" else ()
    require_models([*chosen, *(store.get(name) for name in pools if isinstance(name, str))])
    _tell(chosen, data)
    samples, subset = asked.images.samples, _subset(data, asked.images)
    how = device_of(asked.device), asked.precision, asked.batch_size, asked.seed, asked.compiling, workers
    session = Session(store, data, Settings(*how), samples, subset, bar=bar, confirm=confirm(asked.yes))
    return chosen, session


def _assist(asked: _Asked, workers: int, parts: Sequence[Part]) -> None:
    """What a helper does: its share of the rows."""
    from robench.commands._helpers import silent

    with silent():
        _, session = _session(asked, workers)
        for part in parts:
            part.judge(session, cache=not asked.no_cache)


def _usual_eps(asked: _Asked, session: Session) -> tuple[float, ...]:
    from robench.training.recipes import recipe_file

    return recipe_file(session.data.recipe).evaluation.radii(asked.threat)


def _diversity(asked: _Asked, session: Session, chosen: Sequence[Run]) -> int:
    from robench.evaluation import words

    wanted = asked.attacked
    radii = words.radii(wanted.eps) if isinstance(wanted.eps, str) else _usual_eps(asked, session)
    if len(radii) > 1:
        raise RobenchError(f"expected one --eps under --threat diversity, got {wanted.eps}")
    steps = {} if wanted.steps is None else {"steps": wanted.steps}
    click.echo(diversity(session.diversity(chosen, eps=radii[0], **steps), asked.style))
    return 0


def _probed(
    asked: _Asked, session: Session, chosen: Sequence[Run], outcomes: Outcomes, options: dict[str, Any]
) -> list[Finding]:
    """What `robench.validity.probe` finds."""
    from robench.validity.probe import probe

    found, alone = [], replace(session.settings, workers=1)
    for run in chosen:
        with bar() as progress:
            target, attacks = session.load(run), options["attacks"]
            found += probe(target, outcomes, session.data, attacks, asked.attacked.restarts, alone, progress=progress)
    return found


def _judged(names: Sequence[str], store: Runs, dataset: str | None, data_dir: str) -> tuple[list[Run], Data]:
    """The runs that are judged, and the data."""
    from robench.core.data import load

    chosen = [store.get(name) for name in names]
    there = chosen or [run for run in store.all() if run.role == "target"]
    if not there:
        raise RobenchError(f"{store.root} holds no target run; robench train or robench import makes one")
    data = load(dataset or dataset_of(there), data_dir)
    if not chosen:
        chosen = _targets(there, data, str(store.root))
        _tell_starts(chosen)
    return chosen, data


def _tell_starts(chosen: Sequence[Run]) -> None:
    """Which of the runs that nobody named others started from: a training makes the Baseline that it needs."""
    for run in chosen:
        own = [
            each.name for each in chosen if run.weights in {start["weights"] for start in each.manifest["ancestors"]}
        ]
        if own:
            log.info(
                f"{run.name}, which {', '.join(own)} started from, is a target too: it is what robench train "
                f"{run.defense} makes; name runs to judge these alone"
            )


def _tell(chosen: Sequence[Run], data: Data) -> None:
    """What the data are, and what is special about these runs on them."""
    log.info(f"{data.label}: {data.summary}")
    for run in chosen:
        if said := run.manifest.get("normalisation"):
            log.info(f"{run.name}: normalisation {said}")
        if run.data_name not in ("", data.label, data.name):
            log.warning(
                f"{run.name} was made for {run.data_name} and is judged on {data.label}: whether classes and "
                f"normalisation are the same, only you know"
            )


def _subset(data: Data, asked: schema.Samples) -> str:
    """Which images ``auto`` means here; what is not as it was asked for is told."""
    samples, subset = asked.samples, asked.subset
    if samples > len(data.test):
        log.info(f"{data.label} has {len(data.test)} test images: all of them are taken instead of {samples}")
    resolved = data.resolved(subset, samples)
    if resolved == "random" != subset:
        log.info(f"{data.label} is ordered by class: random test images are taken (--subset first takes the first)")
    return resolved


def _blackbox(
    asked: _Asked, session: Session, chosen: Sequence[Run], options: dict[str, Any]
) -> tuple[list[tuple[list[Run], Threat]], list[Finding], list[Forecast]]:
    """Who is judged on which hold-out surrogates, which are trained first where they are missing; with --dry-run these
    are untrained, and what their training takes is given instead."""
    from robench.evaluation import checks

    plans: list[tuple[list[Run], Threat]] = []
    found, trained = [], []
    hold_outs, same = asked.hold_outs, asked.hold_outs.surrogate_defense == "same"
    related = {name: getattr(hold_outs, name) for name in schema.Relation.model_fields}
    sizes = [value for value in hold_outs.surrogates if isinstance(value, int)]
    others = [value for value in hold_outs.surrogates if isinstance(value, str)]
    for defense in sorted({run.defense if same else hold_outs.surrogate_defense for run in chosen}):
        group = [run for run in chosen if not same or run.defense == defense]
        if not sizes:
            refuse_given({"surrogate_defense"}, "is of surrogates that --surrogates gives by size")
        tasks = session.surrogate_tasks(sizes, defense)
        there = session.store.names()
        missing = [task for task in tasks if task.name not in there] if asked.dry_run and not asked.no_train else []
        trained += session.trainings(missing)
        ready = [task for task in tasks if task not in missing]
        runs = session.train(ready, allowed=not asked.no_train, ask_beyond=600) + list(map(session.store.get, others))
        plans.append((group, session.hold_out(runs, missing=missing, **related, **options)))
        found.append(checks.kin(map(session.load, group), [*map(session.load, runs)]))
    return plans, found, trained


def _bill(parts: Sequence[Forecast]) -> str:
    """What every attack takes, and the sum."""
    from robench.core.progress import duration

    lines = [
        f"{part.title}: {f'{part.cells} cells, {part.done} done, ' if part.cells else ''}{part.passes:.4g} passes, "
        f"{part.disk / 1e6:.0f} MB, {duration(part.seconds)}"
        for part in parts
        if part.cells or part.passes
    ]
    cells, done, passes = (sum(getattr(part, name) for part in parts) for name in ("cells", "done", "passes"))
    disk, seconds = sum(part.disk for part in parts), sum(part.seconds for part in parts)
    return "\n".join(
        [
            *lines,
            f"in all at most {cells - done} of {cells} cells, {passes:.4g} forward and backward passes of one image "
            f"through one member, {disk / 1e6:.0f} MB, {duration(seconds)}",
        ]
    )


def _targets(runs: Sequence[Run], data: Data, folder: str) -> list[Run]:
    """Those of a data set."""
    found = [run for run in runs if run.data_name == data.label]
    if not found:
        raise RobenchError(f"{folder} holds no target run of {data.label}; robench train makes one")
    return found
