"""Speed, beside the formulas as published, torchattacks and foolbox: the same work on the same weights, in turns, and
how near the limit of the machine it comes."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib import import_module
from statistics import mean, median
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks import Attack
from robench.attacks.base import Taken, images_of
from robench.attacks.mdi2 import MDI2, diversify
from robench.attacks.pgd import PGD
from robench.attacks.sgm import SGM, skip_gradient
from robench.core.data import Data, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, unknown
from robench.core.fast import Precision, attackable, has_bfloat16, widen_heads
from robench.core.features import depth, features
from robench.core.frozen import full_float32, hooked
from robench.core.models import build
from robench.core.rng import Draws, Stream
from robench.core.threads import fitting_threads
from robench.defenses import Batch
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Whitebox
from robench.store.provenance import versions
from robench.training.batches import batches
from robench.training.loop import make_optimizer, train_step
from robench.training.recipes import recipe_file
from robench.training.task import Task, resolve

from . import published

log = logging.getLogger("robench.benchmarks.speed")

AUTHORS = "authors' way"
WHOLE = "no early exit"
OURS: dict[str, Precision] = {"robench float32": "float32", "robench bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Row:
    """One variant of one part.

    Attributes:
        layer: of a DVERGE step; 0 for the mean over the layers that were measured.
        seconds: per step; of the white-box protocol, in all. The median over rounds: of processor time on the CPU, of
            wall time on a GPU. None where nothing was timed; ``note`` says why.
        per_second: images.
        ratio: how many times faster than the authors' way, the median over rounds.
        roof: the least time that the needed work takes on this machine (`Roof`), over the time taken.
        accuracy: by ε in [0, 1], of the images that were made, judged in float32 on the original weights.
    """

    part: str
    variant: str
    layer: int | None = None
    seconds: float | None = None
    per_second: float | None = None
    ratio: float | None = None
    roof: float | None = None
    accuracy: Mapping[float, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without: FLOP of convolutions and linear layers, and numbers they read and write."""

    flop: float = 0.0
    numbers: float = 0.0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        return Work(self.flop + times * other.flop, self.numbers + times * other.numbers)


@dataclass(frozen=True)
class Roof:
    """What the machine can do, measured: by precision FLOP/s of a product or a convolution, and bytes/s of a copy."""

    flops: Mapping[Precision, float]
    bandwidth: float

    def seconds(self, work: Work, precision: Precision) -> float:
        """The least time for ``work``: the later of the two limits (Williams et al. 2009)."""
        size: int = getattr(torch, precision).itemsize
        return max(work.flop / self.flops[precision], size * work.numbers / self.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how much of it.

    Attributes:
        ensemble: in eval mode, on ``device``.
        images: of the test set, in a step of an attack; batch_size: of the training set, in a DVERGE step.
        steps: in a turn of an attack.
        rounds: turns of every variant; the white-box protocol has one.
        layers: of the DVERGE step; all by default.
    """

    ensemble: Ensemble
    data: Data
    device: torch.device
    images: int = 100
    batch_size: int = 128
    steps: int = 10
    rounds: int = 3
    whitebox_images: int = 50
    whitebox_steps: int = 50
    restarts: int = 5
    layers: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "steps", "rounds", "whitebox_images", "whitebox_steps", "restarts"):
            if getattr(self, name) < 1:
                raise RobenchError(f"expected `{name}` of the bench to be at least 1, got {getattr(self, name)}")
        for layer in self.layers:
            if not 1 <= layer <= self.depth:
                raise RobenchError(f"expected `layers` of the bench in 1..{self.depth}, got {layer}")

    @property
    def depth(self) -> int:
        """Feature layers that all members have."""
        return min(depth(member, self.batch(1)[0]) for member in self.ensemble.members)

    @property
    def radii(self) -> tuple[float, ...]:
        """ε of the white-box protocol."""
        return recipe_file(self.data.recipe).evaluation.eps

    @property
    def eps(self) -> float:
        """ε of a step."""
        return recipe_file(self.data.recipe).evaluation.transfer_eps[0]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """The first test images, float32 (B,C,H,W), and labels."""
        test = self.data.test
        return to_images(test.images[:size]).to(self.device), test.labels[:size].to(self.device)


def native(device: torch.device) -> dict[str, Precision]:
    """What of `OURS` ``device`` computes itself: imitated, bfloat16 takes minutes a step."""
    return {name: kind for name, kind in OURS.items() if kind != "bfloat16" or has_bfloat16(device)}


def classifier(data: Data, device: torch.device, epochs: int = 3) -> Ensemble:
    """A Baseline/3 of the data's own network after a few epochs: what is measured where no run is named."""
    task = resolve(data, "baseline", 3, overrides={"epochs": epochs})
    ensemble = Ensemble(build(spec, i) for i, spec in enumerate(task.members)).to(device).train()
    optimizer, train = make_optimizer(task.recipe, ensemble), data.train.to(device)
    for epoch in range(epochs):
        for batch in batches(train, task.recipe, Stream(("bench",)), epoch, paired=False):
            train_step(ensemble, optimizer, task, batch)
    return ensemble.eval()


def bench(plan: Plan, parts: Sequence[str] = ()) -> list[Row]:
    """The machine's limit, then ``parts``, all by default; on one thread of the CPU, or on the GPU.

    Raises:
        RobenchError: an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown("part of the bench", part, PARTS)
    with fitting_threads(plan.device, 0), full_float32():
        log.info("roof")
        roof = measure_roof(plan.device)
        rows = [
            Row("roof", f"arithmetic, {kind}", note=f"{rate / 1e9:.0f} GFLOP/s") for kind, rate in roof.flops.items()
        ]
        rows.append(Row("roof", "copy", note=f"{roof.bandwidth / 1e9:.0f} GB/s"))
        for part in parts or PARTS:
            log.info(part)
            rows += PARTS[part](plan, roof)
            missing = OURS.keys() - native(plan.device).keys()
            rows += [Row(part, name, note="no instructions for it here") for name in sorted(missing)]
    return rows


def measure_roof(device: torch.device) -> Roof:
    """The best of a few turns of a large matrix product, a convolution and a copy.

    Both, as they come from different libraries: on an AMD core float32 convolutions were 2.5 times faster.
    """
    side, images, numbers = (8192, 512, 1 << 28) if device.type == "cuda" else (2048, 32, 1 << 25)
    width, pixels = 256, 16
    flops: dict[Precision, float] = {}
    for precision in native(device).values():
        dtype = getattr(torch, precision)
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        maps = torch.ones(images, width, pixels, pixels, dtype=dtype, device=device)
        kernel = torch.ones(width, width, 3, 3, dtype=dtype, device=device)
        maps, kernel = (each.contiguous(memory_format=torch.channels_last) for each in (maps, kernel))
        needed = {"product": 2 * side**3, "convolution": 2 * 9 * maps.numel() * width}
        convolution = partial(F.conv2d, maps, kernel, padding=1)
        times = in_turns({"product": partial(torch.mm, matrix, matrix), "convolution": convolution}, 3, device)
        flops[precision] = max(flop / min(times[name]) for name, flop in needed.items())
    source = torch.ones(numbers, device=device)
    copying = in_turns({"": partial(torch.empty_like(source).copy_, source)}, 3, device)[""]
    return Roof(flops, 2 * source.nbytes / min(copying))


def in_turns(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after one turn each to warm up.

    In turns, so that what else the machine does meets all alike: their ratios hold where their times do not.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            began = _clock(device)
            call()
            if turn:
                found[name].append(_clock(device) - began)
    return found


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    # Without what the machine did for others meanwhile; of one thread that has a core to itself, it is wall time.
    return time.process_time()


def _work(model: nn.Module, forward: Callable[[], object]) -> Work:
    """Of one forward pass through ``model``; the input gradient takes as much again, that of the weights too."""
    found = Work()

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal found
        weight = module.weight
        assert isinstance(weight, Tensor)
        found = found.plus(Work(2 * output.numel() * weight[0].numel(), args[0].numel() + output.numel()))

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with hooked(layer.register_forward_hook(count) for layer in layers), torch.no_grad():
        forward()
    return found


def _rows(
    part: str, times: Mapping[str, Sequence[float]], needed: Work, images: int, roof: Roof, layer: int | None = None
) -> list[Row]:
    """Seconds per round made rows; ``needed`` is all that a round cannot do without."""
    reference = times[AUTHORS]
    rows = []
    for name, own in times.items():
        seconds = median(own)
        ratio = median(theirs / ours for theirs, ours in zip(reference, own, strict=True))
        share = roof.seconds(needed, OURS.get(name, "float32")) / seconds
        rows.append(Row(part, name, layer, seconds, images / seconds, ratio, share))
    return rows


Authors = Callable[..., Tensor]
Peer = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _steps(
    part: str, attack: Attack, authors: Authors, peers: Mapping[str, Peer | None], plan: Plan, roof: Roof
) -> list[Row]:
    """Steps of ``attack`` and of what others have for it."""
    images, labels = plan.batch(plan.images)
    averaged = published.Averaged(plan.ensemble)
    calls: dict[str, Callable[[], Tensor | Taken]] = {
        AUTHORS: partial(authors, averaged, images, labels, plan.eps, steps=plan.steps, step_ratio=0.2)
    }
    calls |= {name: partial(peer, averaged, images, labels) for name, peer in peers.items() if peer}
    near, draws = images.contiguous(memory_format=torch.channels_last), Draws.of(range(len(images)))
    radius = torch.full((len(images),), plan.eps, device=plan.device)
    for name, precision in native(plan.device).items():
        fast = attackable(plan.ensemble, images, precision)
        calls[name] = partial(attack.perturb, fast, near, labels, radius, draws)
    crafted: dict[str, Tensor] = {}

    def kept(name: str) -> None:
        crafted[name] = images_of(calls[name]())

    times = in_turns({name: partial(kept, name) for name in calls}, plan.rounds, plan.device)
    per_step = {name: [seconds / plan.steps for seconds in own] for name, own in times.items()}
    forward = _work(plan.ensemble, lambda: plan.ensemble(images[:1]))
    rows = _rows(part, per_step, Work().plus(forward, 2 * len(images)), len(images), roof)
    with torch.no_grad():
        right = {name: plan.ensemble(made).argmax(dim=1) == labels for name, made in crafted.items()}
    rows = [replace(row, accuracy={plan.eps: float(right[row.variant].float().mean())}) for row in rows]
    return [*rows, *(Row(part, name, note="not installed") for name, peer in peers.items() if not peer)]


def _pgd(plan: Plan, roof: Roof) -> list[Row]:
    """From the image itself, so that all make the same images up to rounding."""
    attack = PGD(steps=plan.steps, random_start=False)
    peers = {"torchattacks PGD": _torchattacks("PGD", plan), "foolbox LinfPGD": _foolbox(plan)}
    return _steps("pgd", attack, published.ascend, peers, plan, roof)


def _mdi2(plan: Plan, roof: Roof) -> list[Row]:
    """torchattacks resizes a batch alike, and bilinearly."""
    attack = MDI2(steps=plan.steps)
    images, _ = plan.batch(plan.images)
    unit = Draws.of(range(len(images))).uniform("diversity", (plan.steps, 4), images)

    def view(z: Tensor, step: int) -> Tensor:
        return diversify(z, unit[:, step], attack.probability, attack.smallest)

    authors = partial(published.ascend, momentum=attack.momentum, view=view)
    fields = {"decay": attack.momentum, "resize_rate": attack.smallest, "diversity_prob": attack.probability}
    return _steps("mdi2", attack, authors, {"torchattacks DIFGSM": _torchattacks("DIFGSM", plan, **fields)}, plan, roof)


def _sgm(plan: Plan, roof: Roof) -> list[Row]:
    attack = SGM(steps=plan.steps)

    def authors(model: nn.Module, *args: Any, **more: Any) -> Tensor:
        with skip_gradient(model, attack.gamma, attack.blocks):
            return published.ascend(model, *args, **more, momentum=attack.momentum)

    return _steps("sgm", attack, authors, {}, plan, roof)


def _package(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def _torchattacks(name: str, plan: Plan, **fields: float) -> Peer | None:
    package = _package("torchattacks")

    def peer(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        made = getattr(package, name)
        attack = made(model, eps=plan.eps, alpha=plan.eps / 5, steps=plan.steps, random_start=False, **fields)
        with torch.random.fork_rng():
            return attack(images, labels)  # type: ignore[no-any-return]

    return peer if package else None


def _foolbox(plan: Plan) -> Peer | None:
    package = _package("foolbox")

    def peer(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        assert package is not None
        attack = package.attacks.LinfPGD(abs_stepsize=plan.eps / 5, steps=plan.steps, random_start=False)
        wrapped = package.PyTorchModel(model, bounds=(0, 1), device=plan.device)
        right = package.criteria.Misclassification(labels)
        return attack.run(wrapped, images, right, epsilon=plan.eps)  # type: ignore[no-any-return]

    return peer if package else None


def _whitebox(plan: Plan, roof: Roof) -> list[Row]:
    """Every start on every image, beside survivors only on the faster model."""
    images, labels = plan.batch(plan.whitebox_images)
    averaged = published.Averaged(plan.ensemble)

    def authors() -> dict[float, float]:
        fields = {"steps": plan.whitebox_steps, "restarts": plan.restarts}
        return published.whitebox(averaged, images, labels, plan.radii, **fields)

    def own(precision: Precision) -> dict[float, float]:
        attacks = (PGD(steps=plan.whitebox_steps),)
        threat = Whitebox(eps=plan.radii, restarts=plan.restarts, attacks=attacks)
        evaluator = Evaluator(plan.data, Settings(plan.device, precision))
        outcomes = evaluator.run(
            [EvaluatedModel.of_model(plan.ensemble, plan.device)], threat, torch.arange(len(images))
        )
        found = outcomes.where(threat="whitebox").accuracy(["eps"])
        return dict(zip(found["eps"].tolist(), found["accuracy"].tolist(), strict=True))

    note = f"{len(images)} images, {len(plan.radii)} ε, {plan.restarts} starts, {plan.whitebox_steps} steps"
    calls = {AUTHORS: authors} | {name: partial(own, precision) for name, precision in native(plan.device).items()}
    seconds: dict[str, float] = {}
    rows = []
    for name, call in calls.items():
        log.info(f"whitebox, {name}: {note}")
        began = _clock(plan.device)
        accuracy = call()
        seconds[name] = _clock(plan.device) - began
        ratio = seconds[AUTHORS] / seconds[name]
        rows.append(
            Row("whitebox", name, None, seconds[name], len(images) / seconds[name], ratio, None, accuracy, note=note)
        )
    return rows


def _dverge(plan: Plan, roof: Roof) -> list[Row]:
    """Distillation on every member, then one update of all, at each layer; each variant trains weights of its own."""
    layers = list(plan.layers) or list(range(1, plan.depth + 1))
    rows: list[Row] = []
    kinds = native(plan.device)
    trained = {name: copy.deepcopy(plan.ensemble).train() for name in (AUTHORS, WHOLE, *kinds)}
    for layer in layers:
        log.info(f"dverge: layer {layer} of {plan.depth}")
        calls: dict[str, Callable[[], object]] = {AUTHORS: _plain_step(trained[AUTHORS], plan, layer, early=True)}
        calls[WHOLE] = _plain_step(trained[WHOLE], plan, layer, early=False)
        calls |= {name: _own_step(trained[name], plan, layer, precision) for name, precision in kinds.items()}
        times = in_turns(calls, plan.rounds, plan.device)
        rows += _rows("dverge", times, _dverge_work(plan, layer), plan.batch_size, roof, layer)
    return [*rows, *_over_layers(rows, plan.batch_size)]


def _dverge_task(plan: Plan, layer: int, precision: Precision = "float32") -> Task:
    fixed = {"layer": layer, "layer_per": "epoch", "batch_size": plan.batch_size, "precision": precision}
    return resolve(plan.data, "dverge", len(plan.ensemble), overrides=fixed)


def _paired_batch(plan: Plan, task: Task) -> Batch:
    return next(batches(plan.data.train.to(plan.device), task.recipe, Stream(("bench",)), 0, paired=True))


def _plain_step(ensemble: Ensemble, plan: Plan, layer: int, *, early: bool) -> Callable[[], None]:
    task = _dverge_task(plan, layer)
    defense: Any = task.defense
    batch = _paired_batch(plan, task)
    assert batch.paired is not None
    source, target = batch.images.contiguous(), batch.paired.contiguous()
    members = list(ensemble.members)
    optimizers = [make_optimizer(task.recipe, Ensemble([member])) for member in members]
    fixed = {"layer": layer, "eps": defense.eps, "steps": defense.steps, "early": early}
    return partial(published.dverge_step, members, optimizers, source, batch.labels, target, **fixed)


def _own_step(ensemble: Ensemble, plan: Plan, layer: int, precision: Precision) -> Callable[[], object]:
    task = _dverge_task(plan, layer, precision)
    ensemble.to(memory_format=torch.channels_last)
    if precision == "bfloat16":
        widen_heads(ensemble, task.members[0].num_classes)
    return partial(train_step, ensemble, make_optimizer(task.recipe, ensemble), task, _paired_batch(plan, task))


def _dverge_work(plan: Plan, layer: int) -> Work:
    """Of one step: per member f^l(x) once, steps of f^l(z) and its input gradient, N − 1 passes with all gradients."""
    defense: Any = _dverge_task(plan, layer).defense
    image, _ = plan.batch(1)
    found = Work()
    for member in plan.ensemble.members:
        crafting = _work(member, partial(features, member, image, layer))
        found = found.plus(crafting, plan.batch_size * (2 * defense.steps + 1))
        training = _work(member, partial(member, image))
        found = found.plus(training, plan.batch_size * 3 * (len(plan.ensemble) - 1))
    return found


def _over_layers(rows: Sequence[Row], images: int) -> list[Row]:
    """The mean step of each variant; the ratio is that of the means, so that it holds for a whole training."""
    found: list[Row] = []
    for name in dict.fromkeys(row.variant for row in rows):
        own = [(row.seconds or 0.0, row.roof or 0.0) for row in rows if row.variant == name]
        seconds = mean(taken for taken, _ in own)
        share = mean(taken * roof for taken, roof in own) / seconds
        ratio = (found[0].seconds or seconds) / seconds if found else 1.0
        found.append(Row("dverge", name, 0, seconds, images / seconds, ratio, share))
    return found


PARTS: dict[str, Callable[[Plan, Roof], list[Row]]] = {
    "pgd": _pgd,
    "mdi2": _mdi2,
    "sgm": _sgm,
    "whitebox": _whitebox,
    "dverge": _dverge,
}


def report(plan: Plan, rows: Sequence[Row], what: str) -> dict[str, Any]:
    """JSON values: what was measured where, and the rows."""
    cpu = plan.device.type == "cpu"
    machine = f"CPU ({torch.backends.cpu.get_cpu_capability()})" if cpu else torch.cuda.get_device_name(plan.device)
    amounts = {item.name: getattr(plan, item.name) for item in fields(plan) if item.type == "int"}
    return {
        "what": what,
        "members": len(plan.ensemble),
        "data": plan.data.label,
        "machine": machine,
        "clock": "processor time of one thread" if cpu else "wall time",
        "eps": plan.eps,
        **amounts,
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
