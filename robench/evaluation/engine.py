"""The evaluator: examines models, judges what is crafted in float32, keeps rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from robench.core.data import Data, to_images
from robench.core.errors import RobenchError
from robench.core.fast import slow_precision
from robench.core.progress import Progress, silent
from robench.core.threads import chunks, fitting_threads, judging_batch
from robench.evaluation import sharing
from robench.evaluation.cells import Cell
from robench.evaluation.checks import stands_for, surrogates_work
from robench.evaluation.cost import Forecast
from robench.evaluation.crafter import Crafter
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.evaluations import Evaluation
from robench.evaluation.findings import Finding
from robench.evaluation.forecasting import forecast
from robench.evaluation.images import Images
from robench.evaluation.judging import Judge
from robench.evaluation.outcomes import SURROGATE, Outcomes
from robench.evaluation.planning import Planner, Request, all_samples
from robench.evaluation.predict import Indices, correct
from robench.evaluation.rows import OpenRows, Rows
from robench.evaluation.settings import Settings
from robench.evaluation.soundness import FLAT, GRADIENT, REPEAT, changed, examine
from robench.evaluation.threats import Threat, surrogates_of
from robench.store.claims import Claims

log = logging.getLogger(__name__)


def _with_cw(threat: Threat) -> Threat:
    twins = []
    for attack in threat.attacks:
        with suppress(RobenchError):  # an attack with a loss of its own
            twins.append(replace(attack, loss="cw"))
    return threat.model_copy(update={"attacks": tuple(dict.fromkeys((*threat.attacks, *twins)))})


def correct_for_all(
    target: EvaluatedModel, data: Data, order: Tensor, samples: int, device: torch.device, batch_size: int | None = None
) -> Tensor:
    """The first ``samples`` test images, in ``order``, that every member classifies correctly: indices, ascending.

    The transferability matrix and the diversity are measured on these (protocol §3); RobenchError where there is none.
    """
    chosen = order[:0]
    for at in chunks(len(order), judging_batch(data.numel, batch_size)):
        if len(chosen) >= samples:
            break
        chunk = order[at]
        images = to_images(data.test.images[chunk].to(device))
        right = correct(target.ensemble, images, data.test.labels[chunk], members=True)[:-1].cpu()
        chosen = torch.cat([chosen, chunk[right.all(dim=0)]])
    chosen = chosen[:samples]
    if not len(chosen):
        raise RobenchError(
            f"no image of {data.name} is classified right by every member of {target.name!r}, and these alone are "
            f"attacked here; robench check model looks at what is wrong with it"
        )
    return chosen.sort().values


class Evaluator:
    """Runs threats on targets.

    Args:
        rows: where the rows of a target are kept; by default in memory.
        aside: where those are that serve checks and no number: of a surrogate on itself, of survivors attacked again.
        images: the cache of adversarial images; None crafts again for every call.
        claims: through which processes on the same store share the work.
        drawing: identities of models that are known to draw at inference; targets and surrogates are examined.
    """

    def __init__(
        self,
        data: Data,
        settings: Settings | None = None,
        *,
        rows: Callable[[EvaluatedModel], Rows] = lambda model: Rows(),
        aside: Callable[[EvaluatedModel], Rows] = lambda model: Rows(),
        images: Images | None = None,
        claims: Claims | None = None,
        progress: Progress = silent,
        drawing: Collection[str] = (),
    ) -> None:
        self.data = data
        self.settings = settings or Settings()
        self._rows = OpenRows(rows, aside)
        self._images = images
        self._claims = claims or Claims(None)
        self._tally = sharing.Tally(progress)
        self._planner = Planner(data, self.settings, self._rows, set(drawing))
        self._crafter = Crafter(data, self.settings, images)
        self._judge = Judge(self._planner, self._crafter, self._tally)
        self._blind: set[str] = set()
        if slow := slow_precision(self.settings.precision, self.settings.device):
            log.warning(slow)

    def run(
        self,
        targets: Sequence[EvaluatedModel],
        threat: Threat,
        samples: Tensor | Callable[[EvaluatedModel], Tensor],
        *,
        part: bool = False,
    ) -> Outcomes:
        """Rows of every target under ``threat``, and its clean rows; only what is missing is computed.

        Args:
            samples: indices of test images, or per target.
            part: see `robench.evaluation.evaluations.Evaluation`.

        Under a black-box threat the surrogates are judged too, clean and on what was crafted on them. Rows of these are
        kept aside, see `checks.surrogates_work`.

        Raises:
            RobenchError: a surrogate that is no hold-out, a model or an attack that breaks its contract.
        """
        requests, found = self._examined(targets, threat, _indices(targets, threat, samples))
        for surrogate in surrogates_of(threat):
            self._judge.clean(surrogate, all_samples(requests), SURROGATE, threat.draws)
        evaluations = {each.target.name: self._evaluation(each, part) for each in requests}
        for each in requests if threat.clean else ():
            self._judge.clean(each.target, each.samples, threat.name, threat.draws)
        for attack in dict.fromkeys(attack for each in requests for attack in each.threat.attacks):
            if attack.batch_dependent:
                log.warning(
                    f"{attack.label}: an image depends on the others in its batch, so other samples, another "
                    f"--batch-size or an interruption give other rows"
                )
        units = sharing.units(self._planner, requests, self._claims, self._tally)
        numel = self.data.numel
        # Closed, it gives back the claim of a unit that failed.
        with fitting_threads(self.settings.device, self.settings.images_per_pass(numel) * numel), closing(units):
            for unit in units:
                judged = self._judge.pooled if unit.job.pooled else self._judge.version
                judged(unit)
        self._crafter.release()
        for rows in self._rows:
            rows.compact()
        self._again(targets, threat, found)
        return Outcomes.concat(
            self._judged(target, threat, evaluations[target.name], found[target.name]) for target in targets
        )

    def _evaluation(self, request: Request, part: bool) -> Evaluation:
        """What is asked of a target; kept before the first row, so that one that is cut off is known as such."""
        target, threat = request.target, request.threat
        cells = [cell for job in threat.jobs(target) for cell in self._planner.cells(job, target, threat)]
        if threat.clean:
            cells.append(self._planner.clean_cell(target, threat.draws))
        keys, chosen = sorted({cell.key for cell in cells}), sorted(set(request.samples.tolist()))
        evaluation = Evaluation(threat.name, target.identity, tuple(keys), tuple(chosen), part)
        rows = self._rows.of(target, threat.name)
        for cell in cells:
            rows.declare(cell)
        rows.begin(evaluation)
        return evaluation

    def _judged(
        self, target: EvaluatedModel, threat: Threat, evaluation: Evaluation, found: Sequence[Finding]
    ) -> Outcomes:
        """The rows of an evaluation, and what is to be known of them."""
        own = self._rows.of(target, threat.name).of([evaluation]).called(target.name)
        said = [*found, *self._surrogates_work(own, threat)]
        kept = list(said)
        if threat.clean:
            rows = self._rows.of(target, threat.name)
            # Reports count what other evaluations judged of these cells too.
            everything = tuple(sorted(set[int]().union(*map(rows.samples, evaluation.cells))))
            of_samples = {each: stands_for(self.data, torch.tensor(each)) for each in {evaluation.samples, everything}}
            said.append(of_samples[evaluation.samples])
            kept.append(of_samples[everything])
        self._rows.of(target).remember(target.identity, threat.name, kept)
        return own.with_checks(said)

    def remember(self, target: EvaluatedModel, threat: str, checks: Sequence[Finding]) -> None:
        """Keeps beside the rows of ``target`` what was found since `run`."""
        self._rows.of(target).remember(target.identity, threat, checks)

    def _examined(
        self, targets: Sequence[EvaluatedModel], threat: Threat, indices: Mapping[str, Indices]
    ) -> tuple[list[Request], dict[str, list[Finding]]]:
        """What is asked of every target, with CW beside cross-entropy where that has no gradient on what is attacked;
        what was found of the target and of the surrogates that attack it."""
        device = self.settings.device
        follows = not all(attack.gradient_free for attack in threat.attacks)
        found: dict[str, list[Finding]] = {}
        threats: dict[str, Threat] = {}
        for target in targets:
            own = found.setdefault(target.name, [])
            threats[target.name] = threat
            for model in (target, *(each for each in surrogates_of(threat) if each.trained)):
                sound = examine(model, self.data, device)
                if not sound.differentiable and model in (surrogates_of(threat) or (target,)):
                    _refuse_to_follow(model, threat)
                followed = follows and sound.differentiable
                own += [
                    check
                    for check in sound.checks
                    if (check.status != "pass" or model is target) and (followed or check.name not in (GRADIENT, FLAT))
                ]
                if sound.draws:
                    self._planner.drawing.add(model.identity)
                    if threat.draws > 1:
                        own[:] = [_over_draws(check, model, threat) for check in own]
                if sound.blind and model in (surrogates_of(threat) or (target,)):
                    why = sound.blind.evidence
                    own.append(replace(sound.blind, evidence=f"{why}; every attack is made with CW too"))
                    threats[target.name] = _with_cw(threat)
                    if why not in self._blind:
                        log.warning(f"{why}: attacking with CW too")
                    self._blind.add(why)
        return [Request(target, threats[target.name], indices[target.name]) for target in targets], found

    def _again(self, targets: Sequence[EvaluatedModel], threat: Threat, found: dict[str, list[Finding]]) -> None:
        """Adds to what was found of every target that it, or a surrogate of it, is no longer who it was."""
        late = [check for each in surrogates_of(threat) if (check := changed(each, self.data, self.settings.device))]
        for target in targets:
            own = changed(target, self.data, self.settings.device)
            if own or late:
                kept = [check for check in found[target.name] if check.name != REPEAT]
                found[target.name] = [*kept, *([own] if own else []), *late]

    def _surrogates_work(self, outcomes: Outcomes, threat: Threat) -> list[Finding]:
        surrogates = surrogates_of(threat)
        if not surrogates:
            return []
        # What lies there of other data, or of weights that were replaced, says nothing of these.
        sources = Outcomes.concat(
            self._rows.of(each, SURROGATE)
            .everything()
            .of_cells(partial(_is_of, each.identity, self.data.identity))
            .called(each.name)
            for each in surrogates
        )
        return surrogates_work(outcomes, sources, self.data.num_classes)

    def forecast(
        self,
        targets: Sequence[EvaluatedModel],
        threat: Threat,
        samples: Tensor | Callable[[EvaluatedModel], Tensor],
        *,
        again: bool = False,
        timed: bool = True,
    ) -> list[Forecast]:
        """What `run` would do of each attack on each source, and for how long at most; writes nothing.

        Args:
            again: survivors of a white-box result are attacked again, as by `robench.validity.probe.attack_again`.
            timed: False measures nothing and leaves the seconds at 0.
        """
        requests, _ = self._examined(targets, threat, _indices(targets, threat, samples))
        return forecast(self._planner, self._images, requests, threat, again=again, timed=timed)


def _indices(
    targets: Sequence[EvaluatedModel], threat: Threat, samples: Tensor | Callable[[EvaluatedModel], Tensor]
) -> dict[str, Indices]:
    """The samples of each target by its name; RobenchError where two models share a name."""
    indices = {
        target.name: (samples(target) if callable(samples) else samples).numpy().astype(np.int64) for target in targets
    }
    if len(indices) != len(targets):
        raise RobenchError(f"expected targets of different names, got {', '.join(t.name for t in targets)}")
    known: dict[str, str] = {}
    for model in (*targets, *surrogates_of(threat)):
        if known.setdefault(model.name, model.identity) != model.identity:
            raise RobenchError(f"two models are called {model.name!r}; give every target and surrogate its own name")
    return indices


def _is_of(identity: str, data: str, cell: Cell) -> bool:
    return (cell.identity, cell.data) == (identity, data)


def _over_draws(check: Finding, model: EvaluatedModel, threat: Threat) -> Finding:
    """What is to be known of the draws of ``model`` in place of `REPEAT`'s failure, where several are asked for; any
    other check as it is.

    Raises:
        RobenchError: an attack on it whose gradients are no means over draws.
    """
    if check.name != REPEAT or check.status != "fail":
        return check
    attacked = model in (surrogates_of(threat) or (model,))
    if others := [attack.label for attack in threat.attacks if attacked and not attack.over_draws]:
        raise RobenchError(
            f"{model.name} draws at inference, and `draws` does not reach attack {others[0]!r}, which takes gradients "
            f"of its own; omit it, or choose one of robench's, such as pgd"
        )
    drawn = "its gradients are means over, and its verdicts over" if attacked else "its verdicts are over"
    return Finding(REPEAT, "pass", f"{model.name} draws at inference: {drawn} {threat.draws} draws")


def _refuse_to_follow(model: EvaluatedModel, threat: Threat) -> None:
    """RobenchError where an attack of ``threat`` follows gradients and ``model``, which it attacks, gives none."""
    if followers := [attack.label for attack in threat.attacks if not attack.gradient_free]:
        judged = (
            "choose another surrogate"
            if surrogates_of(threat)
            else (
                "judge it on what surrogates give (--threat blackbox), by queries (--threat queries), or with "
                "--attacks square"
            )
        )
        raise RobenchError(
            f"attack {followers[0]!r} of threat {threat.name!r} follows gradients, and {model.name} gives none: its "
            f"outputs do not depend differentiably on its input, as of a vote or of remote predictions; {judged}. If "
            f"it should have gradients, remove `no_grad`, `detach` and argmax from its forward pass"
        )
