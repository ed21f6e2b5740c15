"""Checks of validity: what in the rows says that an accuracy is too high to be true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from torch import Tensor

from robench.attacks import ATTACKS
from robench.core.data import ORDERED, Data, improbability
from robench.core.errors import RobenchError
from robench.evaluation import words
from robench.evaluation.evaluated import EvaluatedModel, kinship
from robench.evaluation.findings import Finding, Status
from robench.evaluation.outcomes import ENSEMBLE, PROBE, SURROGATE, Outcomes, counted, robust, survived, wilson
from robench.evaluation.statistics import LEVEL, mcnemar
from robench.evaluation.threats import BLACKBOX

#: Difference of two accuracies, and share of samples, that is worth a warning.
POINT = 0.01
#: Share of samples still right beyond which an attack that did nothing to them is a failure.
MANY = 0.1
#: An image moved by less than this part of ε has not been attacked in earnest.
MOVED = 0.5
#: Points of accuracy that survivors' attacks take at least: worth a warning, as one loss seldom takes all that two do,
#: and a failure.
SOME, TAKEN = 0.025, 0.05
#: Name of the check of survivors, which a result that was not probed lacks.
SURVIVORS = "survivors attacked again"
#: A surrogate that is so much less accurate than the target is worth a warning.
FAR = 0.2
#: Class shares of a sample that are less likely in a random draw are worth a warning.
UNLIKELY = 1e-4
#: Images on which an accuracy at chance may be chance.
FEW = 30
ROUNDING = 1e-6

_STATUSES: tuple[Status, ...] = ("pass", "warn", "fail")


def check(outcomes: Outcomes, known: Outcomes | None = None) -> list[Finding]:
    """What was found while a result was measured, and checks from its rows alone.

    Args:
        outcomes: the result, of one or several targets and threats.
        known: other rows of the same targets: a white-box result is held against their black-box rows, and the
            other way round. Rows on other data do not count.
    """
    both = outcomes
    if known is not None:
        data = {cell.data for cell in outcomes.cells.values()}
        known = known.of_cells(lambda cell: cell.data in data) if data else known
        missing = sorted({"whitebox", *BLACKBOX} - set(outcomes.frame["threat"]))
        both = Outcomes.concat([outcomes, known.where(threat=missing)])
    checks = [
        impossible(outcomes),
        above_chance(outcomes),
        moved(outcomes),
        zero_gradients(outcomes),
        ties(outcomes),
        falls(outcomes),
        whitebox_is_strongest(both),
        converged(outcomes),
        strongest_counts(outcomes, known),
    ]
    return list(dict.fromkeys([*outcomes.checks, *(each for each in checks if each is not None)]))


def doubts(outcomes: Outcomes) -> list[Finding]:
    """What speaks against the numbers of rows that are kept: what `check` finds on each data set and does not pass."""
    found = [each for part in outcomes.by_data().values() for each in check(part)]
    return [each for each in dict.fromkeys(found) if each.status != "pass"]


def impossible(outcomes: Outcomes) -> Finding:
    """Rows that no attack and no model can have made."""
    frame = outcomes.frame
    counts = {
        "beyond ε": int((frame["linf"] > frame["eps"] + ROUNDING).sum()),
        "NaN": int(frame[["linf", "margin"]].isna().any(axis=1).sum()),
        "correct against prediction and label": int(
            (frame["correct"] != (frame["prediction"] == frame["label"])).sum()
        ),
        "margin against the verdict": int(
            (
                (frame["correct"] & (frame["margin"] < -ROUNDING)) | (~frame["correct"] & (frame["margin"] > ROUNDING))
            ).sum()
        ),
        "of a sample with two labels": int((frame.groupby("sample")["label"].transform("nunique") > 1).sum()),
    }
    found = [f"{count} {what}" for what, count in counts.items() if count]
    if found:
        return Finding("rows possible", "fail", f"of {len(frame)} rows {', '.join(found)}", "evaluate again")
    return Finding("rows possible", "pass", f"{len(frame)} rows within ε, finite and consistent")


def above_chance(outcomes: Outcomes) -> Finding | None:
    """Clean accuracy must beat guessing among the classes there are: else model, data or preprocessing is another's."""
    clean = outcomes.where(threat="clean", member=ENSEMBLE)
    classes = clean.frame["label"].nunique()
    if classes < 2:
        return None
    table = clean.accuracy(["target"])
    low = table[table["low"] <= 1 / classes]
    if low.empty:
        return Finding("clean above chance", "pass", f"at least {table['accuracy'].min():.1%}")
    worst = low.iloc[0]
    evidence = f"{worst['accuracy']:.1%} of {worst['samples']} images by {worst['target']}, {classes} classes"
    return Finding("clean above chance", "warn", evidence, "robench check model looks for the reason")


def moved(outcomes: Outcomes) -> Finding | None:
    """Samples still right whose image the attack hardly moved.

    Of attacks that give the clean image back where they fail (`Attack.keeps_clean`) this is no more than a warning,
    unless their images were to fool another model. CW leaves an image alone that its source gets wrong as it
    is: on a surrogate, that is its design.
    """
    frame = _attacked(outcomes)
    keeps = [label for label in frame["attack"].unique() if _keeps_clean(label)]
    tolerated = frame["attack"].isin(keeps) & (frame["threat"] == "whitebox")
    fooled = frame["threat"].isin(BLACKBOX) & (frame["loss"] != "ce") & frame["zero_gradient"]
    still = (frame["linf"] < MOVED * frame["eps"]) & ~fooled
    fix = "the attack did nothing to them; look at its step size and its start"
    return _shares("images moved", frame, still, f"less than {MOVED:g} ε away", fix, tolerated=tolerated)


def _keeps_clean(label: str) -> bool:
    """Whether the attack of that label keeps clean images; one of a package that is not here is given the benefit."""
    name = label.partition(":")[0]
    try:
        return ATTACKS.get(name).keeps_clean
    except RobenchError:
        return "/" in name


def zero_gradients(outcomes: Outcomes) -> Finding | None:
    """Samples still right at whose adversarial image the attack had no gradient to follow.

    Where the source is not the model that is judged, CW alone is left out: on a source that is fooled its gradient
    is zero by design.
    """
    frame = _attacked(outcomes)
    frame = frame[~frame["threat"].isin(BLACKBOX) | (frame["loss"] == "ce")]
    fix = "gradients are masked: try --losses cw, --precision float64, --probe, or --attacks square"
    return _shares(
        "gradients there", frame, frame["zero_gradient"], "with a gradient of exactly zero or not finite", fix
    )


def ties(outcomes: Outcomes) -> Finding | None:
    """Attacked images that are right because another class is exactly as high and has a higher number: outputs are
    clipped or rounded, and where two classes are at the bound no loss tells an attack how to go on. None where such are
    few."""
    frame = _attacked(outcomes)
    what = "with another class exactly as high: outputs are clipped or rounded, and the class of the lower number wins"
    fix = "judge the model on what it returns before it clips or rounds"
    found = _shares("one class highest", frame, frame["margin"] == 0, what, fix)
    return found if found and found.status != "pass" else None


def falls(outcomes: Outcomes) -> Finding | None:
    """Accuracy must fall with ε, and under a white-box attack must fall at all."""
    found, curves = _Comparisons(), 0
    clean = outcomes.where(threat="clean", member=ENSEMBLE).verdicts(["target"]).assign(eps=0.0)
    attacked = outcomes.where(threat=["whitebox", *BLACKBOX], member=ENSEMBLE).verdicts(["threat", "target", "eps"])
    for (threat, target), rows in attacked.groupby(["threat", "target"], sort=True):
        table = pd.concat([clean.loc[clean["target"] == target, rows.columns.drop("threat")], rows])
        points = table.pivot(index="sample", columns="eps", values="correct").dropna().astype(bool)
        if points.empty or points.shape[1] < 2:
            continue
        curves += 1
        for smaller, larger in pairwise(points.columns):
            one, other = points[larger], points[smaller]
            rises = f"{other.mean():.1%} at ε {smaller:g} to {one.mean():.1%} at {larger:g}"
            found.add(one, other, f"{threat} of {target} rises from {rises}")
        if threat == "whitebox" and points.iloc[:, 0].any() and (points.nunique(axis=1) == 1).all():
            found.note(
                "warn",
                f"{threat} of {target} is {points.iloc[:, 0].mean():.1%} at every ε up to {points.columns[-1]:g}: "
                f"the attack changes nothing",
            )
    if not curves:
        return None
    evidence = "; ".join(found.notes) or f"{curves} curve{'s' * (curves > 1)}"
    return Finding("accuracy falls with ε", found.status, evidence)


def whitebox_is_strongest(outcomes: Outcomes) -> Finding | None:
    """On the same images, white-box accuracy must not exceed black-box accuracy: else its attack is too weak."""
    wide = outcomes.where(threat=["whitebox", *BLACKBOX], member=ENSEMBLE).frame.replace(
        {"threat": dict.fromkeys(BLACKBOX, "blackbox")}
    )
    # Where a run was judged on two data sets, an index is two images: labels tell most of them apart.
    labelled = wide.groupby(["target", "eps", "sample"])["label"].transform("nunique") == 1
    verdicts = Outcomes(wide[labelled]).verdicts(["target", "eps", "threat"])
    points = verdicts.pivot(index=["target", "eps", "sample"], columns="threat", values="correct")
    if points.shape[1] < 2 or (points := points.dropna().astype(bool)).empty:
        return None
    found = _Comparisons()
    for (target, eps), rows in points.groupby(["target", "eps"]):
        white, black = rows["whitebox"], rows["blackbox"]
        shares = f"white-box {white.mean():.1%} > black-box {black.mean():.1%}"
        found.add(white, black, f"{target} at ε {eps:g}: {shares} on {len(rows)} images")
    radii = ", ".join(f"{eps:g}" for eps in points.index.unique("eps").sort_values())
    return Finding("white-box at most black-box", found.status, "; ".join(found.notes) or f"at ε {radii}")


def converged(outcomes: Outcomes) -> Finding | None:
    """In a convergence check, the strongest attack must not take more than the first of 50 steps or so does."""
    verdicts = outcomes.where(threat="convergence", member=ENSEMBLE).verdicts(["target", "eps", "attack"])
    effort = {attack: words.steps(attack) for attack in verdicts["attack"].unique()}
    found = _Comparisons()
    for (target, eps), rows in verdicts.groupby(["target", "eps"]):
        points = rows.pivot(index="sample", columns="attack", values="correct").dropna().astype(bool)
        ranked = sorted((attack for attack in map(str, points) if effort[attack] > 1), key=effort.__getitem__)
        if len(ranked) < 2 or points.empty:
            continue
        usual, strongest = ranked[0], str(points[ranked[1:]].mean().idxmin())
        before, after = points[usual], points[strongest]
        shares = f"{usual} {before.mean():.1%}, {strongest} {after.mean():.1%}"
        found.add(before, after, f"{target} at ε {eps:g}: {shares}")
    return found.finding("attack converged")


def strongest_counts(outcomes: Outcomes, known: Outcomes | None = None) -> Finding | None:
    """An attack that was tried and does not count in a number must not take what the number leaves: one on too few
    images, or, under the white-box threat, one that is ``known`` and not of this result."""
    both = outcomes if known is None else Outcomes.concat([outcomes, known])
    attacked = both.where(threat=["whitebox", *BLACKBOX], member=ENSEMBLE).frame
    labelled = attacked.groupby(["target", "eps", "sample"])["label"].transform("nunique") == 1
    rows = attacked[labelled]
    point = ["target", "threat", "eps"]
    counts = counted(rows, point)
    own = rows["cell"].isin(outcomes.frame["cell"].unique())
    said = (counts & own).groupby([rows[name] for name in point], observed=True).transform("any")
    counts &= own | ~said | (rows["threat"] != "whitebox")
    if counts.all():
        return None
    reported = robust(rows[counts], point).set_index([*point, "sample"])["correct"]
    found = _Comparisons()
    for (target, threat, eps, attack, loss), trial in rows[~counts].groupby([*point, "attack", "loss"], observed=True):
        tried = robust(trial, point).set_index([*point, "sample"])["correct"]
        before = reported.reindex(tried.index).dropna().astype(bool)
        after = before & tried.reindex(before.index)
        if before.empty:
            continue
        tried_on = f"{attack} {loss} on {len(before)} images of {target} at ε {eps:g}"
        left = f"{after.mean():.1%} left of the {before.mean():.1%} that {threat} says"
        found.add(before, after, f"{tried_on}: {left}")
    fix = "judge all images with it: --attacks with several names, separated by commas, or more --restarts"
    return found.finding("strongest attack counts", fix)


def stands_for(data: Data, samples: Tensor) -> Finding:
    """Whether the classes of the test images that are judged are those of the data set, in shares of a random draw, and
    each image is there once and no training image.

    Args:
        samples: indices of test images.
    """
    labels = data.test.labels
    chosen = labels[samples]
    there, judged = labels.unique().numel(), chosen.unique().numel()  # type: ignore[no-untyped-call]
    evidence = f"{len(chosen)} of {len(labels)} test images, {judged} of {data.num_classes} classes"
    status: Status = "pass"
    fix = ""
    likely = improbability(labels, chosen)
    if likely < UNLIKELY:
        status, fix = "fail" if judged < there and likely < ORDERED else "warn", "omit --subset, or --subset random"
        evidence += (
            f": a random draw has such shares in one of {1 / max(likely, 1e-12):.0e} cases, so that accuracy and "
            f"interval are of these classes and not of {data.label}"
        )
    again = len(samples) - len({image.tobytes() for image in data.test.images[samples].numpy()})
    if again > POINT * len(samples):
        status, fix = _worst(status, "warn"), fix or "leave each image in the data once"
        evidence += f"; {again} of them are there before, and intervals take each for an image of its own"
    seen = len(samples) - len(data.unseen(samples))
    if seen > POINT * len(samples):
        status, fix = _worst(status, "warn"), fix or "judge on images that no training has seen"
        evidence += f"; {seen} of them are training images too, of which accuracy is that of what was learnt by heart"
    return Finding("sample stands for the data", status, evidence, fix)


def kin(targets: Iterable[EvaluatedModel], surrogates: Sequence[EvaluatedModel]) -> Finding:
    """Whether surrogates are hold-outs for the targets; a relation that was allowed labels the result."""
    pairs = [(surrogate, target) for target in targets for surrogate in surrogates]
    reasons = list(dict.fromkeys(filter(None, (kinship(surrogate, target) for surrogate, target in pairs))))
    if reasons:
        return Finding("surrogates unrelated", "warn", f"no black-box result, for {'; '.join(reasons)}")
    names = ", ".join(dict.fromkeys(surrogate.name for surrogate in surrogates))
    return Finding("surrogates unrelated", "pass", f"{names}: no weights, ancestor or similarity shared")


def surrogates_work(outcomes: Outcomes, sources: Outcomes, classes: int) -> list[Finding]:
    """Whether each surrogate knows the data and falls to what was crafted on it, beside what that took of the target.

    Args:
        outcomes: black-box rows of one target, and its clean ones.
        sources: rows of the surrogates: clean, and of threat ``surrogate``.
        classes: of the data set.
    """
    frame = outcomes.where(threat=list(BLACKBOX), member=ENSEMBLE).frame
    clean = outcomes.where(threat="clean", member=ENSEMBLE).frame
    checks = []
    for name, rows in frame.groupby("surrogate", sort=False):
        eps = rows["eps"].max()
        versions = rows[rows["eps"] == eps]
        own = sources.where(target=name, member=ENSEMBLE).frame
        own = own[own["sample"].isin(versions["sample"])]
        right = own[own["threat"] == "clean"].set_index("sample")["correct"]
        if right.empty:
            continue
        keys = ["attack", "loss", "eps", "restart"]
        on_itself = own[own["threat"] == SURROGATE].merge(versions[keys].drop_duplicates(), on=keys)
        fooled = ~survived(on_itself)["correct"]
        took = 1 - survived(versions)["correct"].mean()
        low, high = wilson(int(right.sum()), len(right))
        evidence = (
            f"{name} gets {right.mean():.1%} of {len(right)} images right; what was crafted on it at ε {eps:g} fools "
            f"itself on {fooled.mean():.1%} and {versions['target'].iloc[0]} on {took:.1%}"
        )
        target, fix = clean["correct"].mean() if len(clean) else float("nan"), ""
        if low <= 1 / classes:
            status: Status = "fail" if len(right) >= FEW else "warn"
            evidence += (
                f": it knows no more of the data than chance, {1 / classes:.1%}, so that this is no black-box result"
            )
            fix = f"robench check model {name} looks for the reason"
        elif high < target - FAR:
            status = "warn"
            evidence += f": a weak attacker makes a target look robust, whose own clean accuracy is {target:.1%}"
        else:
            status = "pass"
        checks.append(Finding(f"surrogate {name}", status, evidence, fix))
    return checks


def probed(outcomes: Outcomes, again: Outcomes) -> Finding:
    """Whether survivors of a white-box result fall to attacks that were not part of it.

    Args:
        outcomes: white-box rows of one target.
        again: rows of threat ``probe``, of some images that are right in every row of ``outcomes`` at their ε.
    """
    verdicts = again.where(threat=PROBE, member=ENSEMBLE).verdicts(["target", "eps"])
    (target,), (eps,) = verdicts["target"].unique(), verdicts["eps"].unique()
    white = outcomes.where(threat="whitebox", member=ENSEMBLE, eps=eps).verdicts(["target"])["correct"].mean()
    fallen, total = int((~verdicts["correct"]).sum()), len(verdicts)
    # Points of accuracy of the whole result, not of the survivors: at least so many.
    least = float(white) * wilson(fallen, total)[0]
    names = sorted({f"{attack} {loss}" for attack, loss in again.frame[["attack", "loss"]].itertuples(index=False)})
    evidence = f"{' and '.join(names)} take {fallen} of {total} survivors of {target} at ε {eps:g}"
    status: Status = "fail" if least > TAKEN else "warn" if least > SOME else "pass"
    if status != "pass":
        best = (
            again.where(threat=PROBE, member=ENSEMBLE).frame.groupby("attack", observed=True)["correct"].mean().idxmin()
        )
        evidence += (
            f": the accuracy there, {white:.1%}, is too high by {100 * least:.1f} points at least; evaluate with "
            f"--losses ce,cw, or with more of --attacks pgd,square,strongest or what takes most here, {best}"
        )
    return Finding(SURVIVORS, status, evidence)


def _attacked(outcomes: Outcomes) -> pd.DataFrame:
    """Rows of who was attacked, or meant: the ensemble, or for transfer the source itself."""
    frame = outcomes.frame
    judged = np.where(frame["threat"] == "transfer", frame["member"] == frame["surrogate"], frame["member"] == ENSEMBLE)
    return frame[judged & (frame["threat"] != "clean")]


def _shares(
    name: str, frame: pd.DataFrame, bad: pd.Series, what: str, fix: str, tolerated: pd.Series | None = None
) -> Finding | None:
    """The worst share of bad rows among those still right, over attacks and ε.

    It fails where it is large and more than a point of accuracy hangs on it; ``tolerated`` rows only warn.
    """
    columns = ["threat", "target", "surrogate", "attack", "loss", "eps"]
    table = frame[columns].assign(
        right=frame["correct"], bad=bad & frame["correct"], tolerated=False if tolerated is None else tolerated
    )
    groups = table.groupby(columns, as_index=False).agg(
        bad=("bad", "sum"), right=("right", "sum"), size=("bad", "size"), tolerated=("tolerated", "all")
    )
    groups = groups[groups["right"] > 0]
    if groups.empty:
        return None
    share = groups["bad"] / groups["right"]
    failing = (share > MANY) & (groups["bad"] > POINT * groups["size"]) & ~groups["tolerated"]
    rank = (share > POINT).astype(int) + failing
    status = _STATUSES[rank.max()]
    worst = groups.iloc[int(np.argmax(rank + share))]
    place = f"{worst['threat']} of {worst['target']}, {worst['attack']} {worst['loss']}, ε {worst['eps']:g}"
    evidence = f"{worst['bad']} of {worst['right']} samples still right {what} ({place})"
    return Finding(name, status, f"at most {evidence}") if status == "pass" else Finding(name, status, evidence, fix)


class _Comparisons:
    """Pairs of accuracies, of which the first must not be the higher one.

    Attributes:
        status: the worst of all; notes: evidence of pairs that do not pass; passed: of those that do.
    """

    def __init__(self) -> None:
        self.status: Status = "pass"
        self.notes: list[str] = []
        self.passed: list[str] = []

    def add(self, first: pd.Series, second: pd.Series, evidence: str) -> None:
        """Compares verdicts on the same images."""
        difference = float(first.mean() - second.mean())
        if difference <= 0:
            self.passed.append(evidence)
            return
        self.note(_STATUSES[(difference > POINT) + (mcnemar(first, second) <= LEVEL)], evidence)

    def note(self, status: Status, evidence: str) -> None:
        (self.passed if status == "pass" else self.notes).append(evidence)
        self.status = _worst(self.status, status)

    def finding(self, name: str, fix: str = "") -> Finding | None:
        """What does not pass, else what does; None where nothing was compared."""
        if not self.notes and not self.passed:
            return None
        return Finding(name, self.status, "; ".join(self.notes or self.passed), fix if self.notes else "")


def _worst(*statuses: Status) -> Status:
    return max(statuses, key=_STATUSES.index)
