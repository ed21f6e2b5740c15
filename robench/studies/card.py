"""A run to give away: weights, rows, what is needed to verify them, and a card that says what it is."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from robench.core.data import has_name, paper_order
from robench.core.errors import RobenchError
from robench.core.files import file_hash, write_text
from robench.core.models import build, parameter_count
from robench.defenses import DEFENSES
from robench.evaluation import words
from robench.evaluation.cells import Cell
from robench.evaluation.checks import doubts
from robench.evaluation.evaluations import Evaluation
from robench.evaluation.fingerprint import FILE, judged_identity
from robench.evaluation.outcomes import Outcomes
from robench.reports import board, document, style
from robench.reports.document import Table, TableCell
from robench.session import ASIDE, OUTCOMES, rows_of
from robench.store.runs import Run, Runs
from robench.studies.drawing import draw
from robench.studies.intact import ResultFolder
from robench.training import recipes

WEIGHTS = "weights.safetensors"
#: What of a run is given away.
_PARTS = ("manifest.json", WEIGHTS, FILE, OUTCOMES, ASIDE)
FIGURES = "figures"


def publish(run: Run, store: Runs, out: Path) -> list[Path]:
    """A new folder ``out``: a card, figures, the run with its rows, and the surrogates that its images were made on.

    `robench check result`, `robench board` and `robench import` read it.

    Returns:
        The card and the figures.

    Raises:
        RobenchError: ``out`` exists, nothing was measured, or the files of the run do not agree with each other.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RobenchError(f"expected --out as a new folder, {out} exists; name another, or remove it")
    rows = rows_of(run)
    outcomes = rows.outcomes(judged_identity(run))
    if outcomes.frame.empty:
        raise RobenchError(f"nothing was measured on {run.name!r}; robench eval {run.name} --threat whitebox does it")
    _refuse_broken(ResultFolder(run.folder, store, (run.name,)))
    surrogates = list(_surrogates(store, outcomes))
    for each in (run, *surrogates):
        _copy(each.folder, out / "runs" / each.name, with_rows=each.name == run.name)
    figures = draw(outcomes, [run], out / FIGURES)
    write_text(out / "README.md", card(run, outcomes, rows.evaluations(), surrogates, figures))
    return [out / "README.md", *figures]


def take(folder: Path, store: Runs) -> list[Run]:
    """The runs of a folder that `publish` wrote, with their rows, as runs of ``store``; those that were judged first.

    Raises:
        RobenchError: its files do not agree with each other, or another run has the name of one of them.
    """
    result = ResultFolder.at(folder)
    kept = result.rows()
    _refuse_broken(result)
    names = sorted(result.names, key=lambda name: (kept[name].parts().empty, name))
    for name in names:
        if name in store.names() and store.get(name).weights != result.store.get(name).weights:
            raise RobenchError(
                f"run {name!r} exists with other weights; remove {store.folder(name)}, or name another folder: --runs"
            )
    for name in names:
        if name not in store.names():
            _copy(result.store.folder(name), store.folder(name), with_rows=True)
    return [store.get(name) for name in names]


def _refuse_broken(result: ResultFolder) -> None:
    """RobenchError where files of a result do not agree."""
    for _, finding in result.intact(result.rows()):
        if finding.status == "fail":
            raise RobenchError(
                f"{finding.name}: {finding.said}; robench check result {result.folder} --files tells all"
            )


def _surrogates(store: Runs, outcomes: Outcomes) -> Iterator[Run]:
    """Runs on which images were made; one that is gone cannot be given away, and its images cannot be made again."""
    sources = {cell.craft.source for cell in outcomes.cells.values() if cell.craft is not None and cell.surrogate}
    for run in store.all():
        if judged_identity(run) in sources and run.name not in set(outcomes.frame["target"]):
            yield run


def _copy(source: Path, place: Path, *, with_rows: bool) -> None:
    """A run, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.parent, prefix=".") as temporary:
        made = Path(temporary) / place.name
        made.mkdir()
        for name in _PARTS:
            if (source / name).is_dir() and with_rows:
                shutil.copytree(source / name, made / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, made / name)
        made.rename(place)


def card(
    run: Run,
    outcomes: Outcomes,
    evaluations: Iterable[Evaluation],
    surrogates: Iterable[Run],
    figures: Iterable[Path] = (),
) -> str:
    """What the run is, as Markdown with the header that model hubs read."""
    surrogates, checks = list(surrogates), outcomes.checks
    doubted = [f"* {each}" for each in doubts(outcomes)]
    found = ["What speaks against these numbers:", "", *doubted]
    if not doubted:
        found = [f"{len(checks)} checks found nothing that speaks against these numbers." if checks else "Not checked."]
    named = [f"Surrogates, in `runs/`: {', '.join(f'`{each.name}`' for each in surrogates)}.", ""] if surrogates else []
    lines = [
        "---", "library_name: robench", "pipeline_tag: image-classification", "tags: [adversarial-robustness]", "---",
        "",
        f"# {style.label(run.defense)}/{run.n} on {document.escape_markdown(run.data_name or 'data of its own')}", "",
        f"{run.n} members that decide together ({run.rule}): weights, and every verdict that the numbers rest on. "
        "Made with robench; images in [0, 1], ε in the ℓ∞ norm.", "",
        "## Accuracy", "", document.markdown(accuracy(outcomes)), *found, "", *_pictures(figures),
        "## Weights", "", document.markdown(_weights(run)),
        "## How it was trained", "", document.markdown(Table(["what", ""], list(_trained(run)))),
        *_block(train_command(run)),
        "## How it was judged", "", *_block("\n".join(dict.fromkeys(judge_commands(run, evaluations)))), *named,
        "## Verify it, use it", "",
        *_block(
            f"robench check result . --files\nrobench check result . --dataset {_named(run)}\nrobench import .\n"
            f"robench show {run.name}"
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def _named(run: Run) -> str:
    """The data as the command line takes them; a word for those who have them where they have no name."""
    return run.dataset if has_name(run.dataset) else "DATA"


def accuracy(outcomes: Outcomes) -> Table:
    """Clean accuracy, and by threat and ε what is left under all attacks."""
    rows = []
    for data, own in outcomes.by_data().items():
        images = own.where(threat="clean").frame["sample"].nunique()
        first = ["none", 0.0, board.clean(own.frame), images, ""]
        found = [
            [board.threat_label(name), row["eps"], TableCell.measured(row["accuracy"], row["low"], row["high"]),
             row["samples"], row["by"]]
            for name, row in board.by_threat(own.frame)
        ]  # fmt: skip
        for line in ([first] if images else []) + found:
            rows.append(
                [TableCell.of(data), *(each if isinstance(each, TableCell) else TableCell.of(each) for each in line)]
            )
    note = "Accuracy in percent with its 95 percent Wilson interval, under every attack at that ε or a smaller one."
    return Table(["Data", "Threat", "ε", "Accuracy", "Images", "What took how much"], rows, note=note)


def _pictures(figures: Iterable[Path]) -> list[str]:
    shown = [path.name for path in figures if path.suffix == ".png"]
    lines = [f"![{name.removesuffix('.png')}]({FIGURES}/{name})" for name in shown]
    return [*lines, "", f"All figures, tables and checks: [{FIGURES}/report.html]({FIGURES}/report.html).", ""]


def _weights(run: Run) -> Table:
    file = run.folder / WEIGHTS
    numbers = {spec: parameter_count(build(spec, 0)) for spec in set(run.specs)}
    about = [("file", f"runs/{run.name}/{WEIGHTS}"), ("SHA-256 of the file", file_hash(file)),
             ("SHA-256 of the tensors", run.weights)]  # fmt: skip
    for number, (spec, digest) in enumerate(zip(run.specs, run.manifest["member_weights"], strict=True), 1):
        said = f"{spec.name}, {numbers[spec]:,} parameters, {spec.num_classes} classes, tensors {digest[:16]}"
        normal = f"normalises with mean {words.numbers(spec.mean)}, std {words.numbers(spec.std)}"
        about.append((f"member {number}", f"{said}, {normal}"))
    return Table(["what", ""], [[TableCell.of(name), TableCell.of(value)] for name, value in about])


def _trained(run: Run) -> Iterator[list[TableCell]]:
    manifest = run.manifest
    about: dict[str, Any] = {
        "defense": manifest["defense"],
        "recipe": manifest.get("recipe"),
        "seed": run.seed,
        "data": manifest["data"] or {"name": manifest.get("dataset")},
        "started from": [each["run"] for each in manifest["ancestors"]],
        "imported from": manifest.get("sources") or manifest.get("imported"),
        "normalisation": manifest.get("normalisation"),
        "versions": manifest.get("versions"),
    }
    for name, value in about.items():
        if value not in (None, []):
            yield [TableCell.of(name), TableCell.of(style.words(value))]


def train_command(run: Run) -> str:
    """The command that trains these weights again; nothing for weights that were imported."""
    recipe = run.manifest.get("recipe")
    if recipe is None:
        return ""
    told = {**recipe, **run.fields}
    changes = {name: _changes(told, name, run) for name in recipes.names()}
    name = min(changes, key=lambda each: (len(changes[each]), each))
    models = list(dict.fromkeys(spec.name for spec in run.specs))
    usual = DEFENSES.get(run.defense).start
    start = next((each["run"] for each in run.manifest["ancestors"]), "" if usual == "scratch" else "scratch")
    line = [
        "robench", "train", run.defense, "--n", run.n, "--seed", run.seed, "--dataset", _named(run),
        "--recipe", name,
        "--model", ",".join(models if len(models) == 1 else [spec.name for spec in run.specs]),
        *(word for key, value in changes[name].items() for word in ("--set", f"{key}={_text(value)}")),
        *(["--init", start] if start else []),
        *(["--role", run.role] if run.role != "target" else []),
        "--name", run.name,
    ]  # fmt: skip
    return shlex.join(map(str, line))


def _changes(told: Mapping[str, Any], recipe: str, run: Run) -> dict[str, Any]:
    """Fields that are otherwise than a recipe file says."""
    settings, defense = recipes.recipe_file(recipe).resolve(run.defense, run.n, {})
    assert is_dataclass(defense)
    usual = {**settings.model_dump(mode="json"), **asdict(defense)}
    return {name: value for name, value in told.items() if usual.get(name) != value}


def judge_commands(run: Run, evaluations: Iterable[Evaluation]) -> Iterator[str]:
    """A command for each evaluation."""
    for each in evaluations:
        cells = [Cell.read(run.folder / OUTCOMES, key) for key in each.cells]
        made = [cell for cell in cells if cell.craft is not None]
        if each.part or not made:
            continue
        crafts = [cell.craft for cell in made if cell.craft is not None]
        draws = max(*(cell.draws for cell in made), *(craft.draws for craft in crafts))
        radii = sorted({cell.eps for cell in made})
        surrogates = sorted({cell.surrogate for cell in made if cell.surrogate and not cell.surrogate.isdigit()})
        line = [
            "robench", "eval", run.name, "--threat", each.threat, "--dataset", _judged_on(run, made[0].data),
            "--eps", ",".join(map(repr, radii)),
            "--attacks", ",".join(sorted({cell.attack for cell in made})),
            "--losses", ",".join(sorted({cell.loss for cell in made})),
            "--restarts", max(len({number for craft in crafts for number in craft.restarts}), 1),
            "--samples", len(each.samples), *_subset(each), "--seed", crafts[0].seed,
            *(["--draws", draws] if draws > 1 else []),
            *(["--precision", crafts[0].precision] if crafts[0].precision != "float32" else []),
            *(["--surrogates", ",".join(surrogates)] if surrogates else []),
        ]  # fmt: skip
        yield shlex.join(map(str, line))


def _judged_on(run: Run, data: str) -> str:
    """The data of a cell as `_named` has those of the run: others only where they have a name."""
    own = str((run.manifest["data"] or {}).get("fingerprint")).startswith(data)
    return data if has_name(data) else _named(run) if own else "DATA"


def _subset(evaluation: Evaluation) -> list[str]:
    """Which test images, where they are not the first ones; under transfer these are chosen by being right too."""
    samples = evaluation.samples
    if evaluation.threat == "transfer" or samples == tuple(range(len(samples))):
        return []
    return ["--subset", "paper" if samples == tuple(sorted(paper_order()[: len(samples)])) else "random"]


def _block(text: str) -> list[str]:
    return ["```bash", text, "```", ""] if text else []


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)
