"""What a training and an evaluation cost: the one place that counts passes and bytes, and measures what a pass takes.

A pass is a forward and a backward pass of one image through one member. Passes of an evaluation are exact where no
image falls before its last restart, else an upper bound. Left out are the 16 images on which every model is examined,
and what `--track` measures along a training.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from robench.attacks import Attack
from robench.attacks.ascent import ascend
from robench.attacks.mef import MEF
from robench.attacks.mora import MORA
from robench.attacks.pgd import PGD
from robench.attacks.square import Square
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line, out_of_memory
from robench.core.fast import Precision, attackable, crafting_dtype
from robench.core.frozen import full_float32
from robench.core.losses import LOSSES
from robench.core.models import ModelSpec, build, parameter_count
from robench.core.threads import SMALL, fitting_batch, fitting_threads
from robench.defenses import DEFENSES, Defense
from robench.evaluation.threats import starts
from robench.store.runs import Run, Runs

#: A forward pass alone, in passes.
FORWARD = 1 / 3

#: Survivors of a white-box result that are always attacked again, see `robench.validity.probe.attack_again`: share of
#: the result's gradient steps that it may take, and steps that it may take anyhow; survivors at most; queries of each;
#: what a query costs in gradient steps, measured on a few images; steps of each run of MORA.
SHARE, FLOOR, MOST = 0.07, 2900, 100
FEW_QUERIES, QUERY, FEW_STEPS = 200, 0.5, 20
#: PGD with momentum whose gradient is taken at a random point within ε of the iterate, not cut to the box: a pixel that
#: a clamp or a threshold makes flat where the iterate is has a gradient at some of them.
AROUND = MEF(steps=25, neighbours=1, radius=1.0, inner_ratio=0.0)


@dataclass(frozen=True)
class Forecast:
    """What is still to be done of one part of a job.

    Attributes:
        passes, seconds: at most; disk: bytes that are left.
        cells: how many in all; done: how many of them need nothing.
    """

    title: str
    passes: float
    disk: int = 0
    seconds: float = 0.0
    cells: int = 0
    done: int = 0


@dataclass(frozen=True)
class Pace:
    """Seconds of a pass.

    Attributes:
        training: backward to the weights, in batches of the recipe's size.
        attacking: backward to the image, on a copy for attacks.
    """

    training: float
    attacking: float


def training(defense: Defense, members: int, images: int, epochs: int, batch_size: int) -> float:
    """Passes of a training on ``images``, of which the last, incomplete batch of every epoch is left out."""
    return epochs * (images // batch_size) * batch_size * members * defense.passes(members)


def trained(run: Run) -> float:
    """Passes that a training took per image of its data; NaN where its manifest does not say."""
    manifest = run.manifest
    try:
        defense = DEFENSES.get(run.defense)(**run.fields)
        if defense.version != manifest["defense"]["version"]:
            return math.nan
        recipe = manifest["recipe"]
        epochs = recipe.get("stop_after") or recipe["epochs"]
        members = run.n // (epochs * recipe.get("snapshots", 0) or 1)  # of which there are snapshots
        return float(epochs * (members if defense.in_turn else 1) * members * defense.passes(members))
    except (KeyError, TypeError, RobenchError):  # imported, or a defense that is not installed or has other fields
        return math.nan


def trainings(run: Run, store: Runs) -> list[tuple[Run | None, float]]:
    """A run, and those that its weights come from, each with its `trained`; None and NaN where one is not in
    ``store``."""
    runs = [run, *map(store.ancestor, run.manifest["ancestors"])]
    return [(each, math.nan if each is None else trained(each)) for each in runs]


def decision(members: Sequence[ModelSpec], shape: torch.Size) -> float:
    """Floating-point operations of an ensemble's forward pass of one image (C,H,W), two for each multiplication with
    its addition; those of normalisation and activation are left out."""
    return float(sum(_forward(spec, shape) for spec in members))


@cache
def _forward(spec: ModelSpec, shape: torch.Size) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which takes long and nothing else needs

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        build(spec, 0).eval()(torch.zeros(1, *shape))
    return int(counter.get_total_flops())


def weights(members: Sequence[ModelSpec]) -> int:
    """Bytes of a run."""
    return 4 * sum(map(_parameters, members))


@cache
def _parameters(spec: ModelSpec) -> int:
    return parameter_count(build(spec, 0))


def crafted(attack: Attack, members: int, draws: int = 0) -> float:
    """Passes of one adversarial image on a source of ``members``: the attack's own; its contract's, which looks at the
    clean image and at the gradient where the attack ended; and the proof that the copy returns what the original does,
    which there is not of a model that draws.

    Args:
        draws: of a source that draws at inference, over how many gradients are means; 0 where it draws nothing.
    """
    step = FORWARD if attack.gradient_free else 1.0
    return members * (max(draws, 1) * (attack.passes + 1) * step + FORWARD * (1 if draws else 2))


def judged(members: float) -> float:
    """Passes of the verdict of ``members`` on an image."""
    return members * FORWARD


def attacked(attack: Attack, restarts: int, source: int, images: int, judges: int, draws: int = 0) -> float:
    """Passes of an attack's restarts.

    Args:
        source: members that are attacked; images: how many are crafted, one for each ε.
        judges: members that say what they see, summed over all images, and over draws.
        draws: see `crafted`.
    """
    return restarts * (images * crafted(attack, source, draws) + judged(judges))


def on_target(
    threat: str, attacks: Sequence[Attack], restarts: int, members: int, images: int, radii: int, test_images: int
) -> float:
    """Passes of a threat that attacks its target: ``whitebox``, ``convergence`` or ``transfer``.

    Args:
        test_images: among which ``transfer`` looks for those that all members get right.
    """
    sources, source = (members, 1) if threat == "transfer" else (1, members)
    cells = images * radii
    passes = sum(
        sources * attacked(attack, len(starts(attack, restarts)), source, cells, cells * members) for attack in attacks
    )
    if threat == "whitebox":
        passes += survivors(attacks, restarts, members, images, radii)
    return passes + judged(members * (test_images if threat == "transfer" else images))


def harder(tried: Sequence[Attack], members: int) -> tuple[Attack, ...]:
    """What survivors of a white-box result of these attacks are attacked with: PGD with the loss that was not tried,
    `AROUND`, `Square`, and, where there are several ``members`` and none of ``tried`` looks at them one by one,
    `MORA`."""
    losses = {attack.loss for attack in tried if isinstance(attack, PGD)}
    found: list[Attack] = [PGD(loss=loss) for loss in [loss for loss in ("ce", "cw") if loss not in losses][:1]]
    found.append(AROUND)
    if members > 1 and not any(attack.by_member for attack in tried):
        found.append(MORA(targets=0, steps=FEW_STEPS))
    return (*found, Square(queries=FEW_QUERIES))


def affordable(attacks: Sequence[Attack], steps: float) -> int:
    """How many survivors are attacked by `harder` at most, where the result took so many gradient steps."""
    each = sum(QUERY * FEW_QUERIES if attack.gradient_free else attack.passes for attack in attacks)
    return min(MOST, int(max(SHARE * steps, FLOOR) / each))


def survivors(attacks: Sequence[Attack], restarts: int, members: int, images: int, radii: int) -> float:
    """Passes of attacking survivors of a white-box result again."""
    again = harder(attacks, members)
    steps = images * radii * sum(len(starts(attack, restarts)) * attack.passes for attack in attacks)
    chosen = min(images, affordable(again, steps))
    return sum(attacked(attack, 1, members, chosen, chosen * members) for attack in again)


def diversity(members: int, images: int, steps: int, test_images: int) -> float:
    """Passes of the diversity: distillation on every member, up to a layer that is drawn, each seen by all others.

    Args:
        test_images: among which it looks for those that all members get right.
    """
    return images * members * (steps + FORWARD + judged(members - 1)) + judged(members * test_images)


def adversarial(images: int, numel: int, precision: Precision) -> int:
    """Bytes of adversarial images, each of ``numel`` elements."""
    return images * numel * crafting_dtype(precision).itemsize


def training_pace(
    members: Sequence[ModelSpec], shape: torch.Size, device: torch.device, batch_size: int, precision: str
) -> float:
    """Seconds of a training's pass through a member, measured here: the mean over all.

    Args:
        shape: of an image, (C,H,W).

    Raises:
        RobenchError: a network does not take such images.
    """
    found = {spec: _trained(spec, shape, device, batch_size, precision) for spec in set(members)}
    return sum(found[spec] for spec in members) / len(members)


def _trained(spec: ModelSpec, shape: torch.Size, device: torch.device, batch_size: int, precision: str) -> float:
    model = build(spec, 0).to(device).train()

    def step(images: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(images).float().logsumexp(dim=1).sum()
        loss.backward()

    try:
        return _seconds(step, shape, device, batch_size)
    except Exception as error:  # whatever other people's networks may raise
        if out_of_memory(error):
            raise
        raise RobenchError(
            f"model {spec.name!r} does not take images of {'x'.join(map(str, shape))} ({in_a_line(error)}); "
            f"choose another --model"
        ) from error


def attacking_pace(
    member: nn.Module, shape: torch.Size, device: torch.device, batch_size: int | None, precision: Precision
) -> float:
    """Seconds of an attack's pass through a network, measured here by a step of PGD.

    Args:
        member: on the device.
        shape: of an image, (C,H,W); batch_size: images per pass at most, by default what suits the device.
    """
    loss = LOSSES.get("ce")
    copy = attackable(Ensemble([member]), torch.rand(1, *shape, device=device), precision)

    def step(images: Tensor) -> None:
        images = images.to(crafting_dtype(precision), memory_format=torch.channels_last)
        labels = torch.zeros(len(images), dtype=torch.int64, device=device)
        ascend(lambda z, _: loss(copy(z), labels), images, images.new_full((len(images),), 0.1), steps=1, step_ratio=1)

    return _seconds(step, shape, device, fitting_batch(device, shape.numel(), batch_size))


def _seconds(step: Callable[[Tensor], None], shape: torch.Size, device: torch.device, batch: int) -> float:
    """Seconds of ``step`` by the image, the median after one to warm up; in smaller batches where memory runs out."""
    times: list[float] = []
    if device.type == "cpu":  # an image takes as long in a larger batch
        batch = min(batch, 1 + SMALL // shape.numel())
    with fitting_threads(device, batch * shape.numel()), full_float32():
        # A dry run waits for it: four of them, or two where these take long.
        while len(times) < 2 or (len(times) < 4 and sum(times) < 0.25):
            began = time.perf_counter()
            try:
                step(torch.rand(batch, *shape, device=device))
            except RuntimeError as error:
                if not out_of_memory(error) or batch == 1:
                    raise
                batch //= 2
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) / batch
