"""What an evaluation would still compute, and for how long: by the plan that would be carried out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from robench.core.ensemble import Ensemble
from robench.core.threads import USUAL
from robench.evaluation import cost
from robench.evaluation.cost import Forecast
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.images import Images
from robench.evaluation.outcomes import ASIDE, SURROGATE
from robench.evaluation.planning import Planner, Request, Work, all_samples
from robench.evaluation.threats import Job, Threat, surrogates_of


def forecast(
    planner: Planner,
    images: Images | None,
    requests: Sequence[Request],
    threat: Threat,
    *,
    again: bool = False,
    timed: bool = True,
) -> list[Forecast]:
    """What is left to do of each attack on each source, and for how long at most.

    Args:
        images: the cache of adversarial images.
        threat: as it was asked for.
        again: survivors of a white-box result are attacked again, as by `robench.validity.probe.attack_again`.
        timed: False measures nothing and leaves the seconds at 0.
    """
    works = planner.plan(requests)
    found = [
        (requests[0].target.ensemble, _clean(planner, requests)),
        *_attacks(planner, images, requests, works),
    ]
    if again and threat.name == "whitebox":
        lacking = {work.parts[0].target.name for work in works}
        for target, count in ((each.target, len(each.samples)) for each in requests if each.target.name in lacking):
            passes = cost.survivors(threat.attacks, threat.restarts, target.n, count, len(threat.eps))
            title = f"whitebox: survivors again on {target.name}"
            found.append((target.ensemble, Forecast(title, planner.anew(target, threat.draws) * passes)))
    if not timed:
        return [part for _, part in found]
    paces: dict[str, float] = {}
    most = planner.settings.images_per_pass(planner.data.numel)
    at_once = min(most, max((len(work.pairs[0]) for work in works), default=USUAL))
    return [
        replace(part, seconds=part.passes * _pace(planner, source, at_once, paces)) if part.passes else part
        for source, part in found
    ]


def _clean(planner: Planner, requests: Sequence[Request]) -> Forecast:
    """Verdicts on clean images: of all models, or to find the images that all members of a target get right."""
    threat, everything = requests[0].threat, all_samples(requests)
    draws = threat.draws
    left = [
        len(planner.not_judged(each, everything, SURROGATE, draws)) * each.n * planner.anew(each, draws)
        for each in surrogates_of(threat)
    ]
    for target, samples in ((each.target, each.samples) for each in requests):
        if threat.clean:
            own = planner.not_judged(target, samples, threat.name, draws)
            left.append(len(own) * target.n * planner.anew(target, draws))
        else:
            left.append(len(planner.data.test) * target.n)
    return Forecast("clean images", cost.judged(sum(left)))


def _attacks(
    planner: Planner, images: Images | None, requests: Sequence[Request], works: Sequence[Work]
) -> Iterator[tuple[Ensemble, Forecast]]:
    """Per attack and source, which is given too."""
    jobs: dict[str, list[Job]] = {}
    for each in requests:
        for job in each.threat.jobs(each.target):
            jobs.setdefault(_title(job, each.target), []).append(job)
    todo: dict[str, list[Work]] = {title: [] for title in jobs}
    for work in works:
        todo.setdefault(_title(work.job, work.parts[0].target), []).append(work)
    for title, own in todo.items():
        job = (jobs.get(title) or [work.job for work in own])[0]
        cache = None if job.pooled else images
        missing = [_uncrafted(work, cache) for work in own]
        pending = sum(part.cell.threat not in ASIDE for work in own for part in work.parts)
        cells = len(jobs.get(title, ())) * len(requests[0].threat.eps)
        yield (
            job.source,
            Forecast(
                title,
                sum(work.passes(count) for work, count in zip(own, missing, strict=True)),
                0 if cache is None else cost.adversarial(sum(missing), planner.data.numel, planner.settings.precision),
                cells=cells,
                done=cells - pending,
            ),
        )


def _title(job: Job, target: EvaluatedModel) -> str:
    return f"{job.threat}: {job.attack.label} {job.attack.loss} on {job.source_name if not job.pooled else target.name}"


def _uncrafted(work: Work, cache: Images | None) -> int:
    """How many images of ``work`` are in no cache."""
    samples, eps = work.pairs
    if cache is None:
        return len(samples)
    there = sum(
        int(np.isin(samples[eps == radius], cache.samples(cell.attacked)).sum()) for radius, cell in work.cells.items()
    )
    return len(samples) - there


def _pace(planner: Planner, source: Ensemble, batch: int, known: dict[str, float]) -> float:
    """Seconds of a pass through a member of ``source``, on average; each architecture is measured once."""
    shape, how = planner.data.test.images.shape[1:], planner.settings
    drawings = [repr(member) for member in source.members]
    for drawing, member in zip(drawings, source.members, strict=True):
        if drawing not in known:
            known[drawing] = cost.attacking_pace(member, shape, how.device, batch, how.precision)
    return sum(known[drawing] for drawing in drawings) / len(drawings)
