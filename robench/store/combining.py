"""One ensemble of the members of several: a pool of surrogates of any architectures and trainings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rules import USUAL, Rule
from robench.store.runs import Role, Run, Runs, lineage


def combine(
    name: str,
    parts: Sequence[Run],
    store: Runs,
    *,
    role: Role = "surrogate",
    rule: Rule = USUAL,
    key: str | None = None,
) -> Run:
    """A run ``name`` whose members are those of ``parts``, in their order. It descends from every one of them, so that
    it is no hold-out of whatever they are related to.

    Args:
        parts: at least two runs, of the same classes and channels.
        rule: how the members decide together.
        key: of a study's pool, by which its run is known again.

    Raises:
        RobenchError: fewer than two runs, a member that is there twice, other classes or channels, or another run of
            that name.
    """
    if len(parts) < 2:
        named = ", ".join(run.name for run in parts) or "none"
        raise RobenchError(f"expected at least two runs to combine, got {named}")
    _alike(parts)
    _apart(parts)
    made = Ensemble((member for run in parts for member in run.load().members), rule).eval()
    members = [spec for run in parts for spec in run.specs]
    return store.save(
        store.unused(name),
        made,
        members=members,
        defense={"name": _same(run.defense for run in parts) or "mixed"},
        seed=parts[0].seed,
        role=role,
        data=_same(run.manifest["data"] for run in parts),
        ancestors={entry["weights"]: entry for run in parts for entry in lineage(run)}.values(),
        key=key,
        more={"combined": [run.name for run in parts], "dataset": _same(run.manifest.get("dataset") for run in parts)},
    )


def _alike(parts: Sequence[Run]) -> None:
    first = parts[0]
    for run in parts[1:]:
        for what, name in (("classes", "num_classes"), ("channels", "in_channels")):
            own, other = (getattr(each.specs[0], name) for each in (run, first))
            if own != other:
                raise RobenchError(
                    f"run {run.name!r} has {own} {what}, and {first.name!r} {other}: they cannot decide together"
                )


def _apart(parts: Sequence[Run]) -> None:
    seen: dict[str, str] = {}
    for run in parts:
        for number, weights in enumerate(run.manifest["member_weights"], 1):
            who = f"member {number} of {run.name}"
            if weights in seen:
                raise RobenchError(f"{who} is {seen[weights]} once more: a member that counts twice decides twice")
            seen[weights] = who


def _same(values: Iterable[Any]) -> Any:
    """The value, where all are the same; else None."""
    first, *others = values
    return first if all(other == first for other in others) else None
