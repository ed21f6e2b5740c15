"""The one training loop: data on the device, keyed draws, exact resume."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from robench.core.data import Data, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line, within
from robench.core.fast import channels_last, slow_precision, widen_heads
from robench.core.frozen import full_float32
from robench.core.logbook import opened, require
from robench.core.models import build
from robench.core.progress import Progress, bar, silent
from robench.core.rng import Stream
from robench.core.threads import fitting_threads
from robench.defenses import Batch, Terms
from robench.store.runs import Run, Runs, lineage, load_state
from robench.training import parallel
from robench.training.batches import batches
from robench.training.checkpoint import Checkpoint, State
from robench.training.compiling import COMPARED, begin_step, compiled_if_same, differs
from robench.training.recipes import Recipe
from robench.training.recording import Gradients, Recorded, cuda_record, or_plain
from robench.training.task import Task

log = logging.getLogger(__name__)

#: Seconds between checkpoints: what a kill costs at most, beyond one step.
CHECKPOINT_SECONDS = 30.0
CHECKPOINT = "checkpoint.safetensors"

#: Share of the training time that tracking may take.
TRACK_SHARE = 0.15

Track = Callable[[Ensemble], dict[str, float]]


def ensure(
    task: Task,
    data: Data,
    runs: Runs,
    *,
    device: torch.device,
    compile: bool = False,
    track: Track | None = None,
    track_every: int | None = None,
    logs: Sequence[str] = (),
    progress: Progress | None = None,
) -> Run:
    """The finished run of ``task``: reused where it is complete, resumed where it was cut off, else trained.

    The Baseline that a defense starts from is made the same way, first. What another process on the same runs trains
    is waited for, but not by torchrun's.

    Args:
        compile: through torch.compile, see `robench.training.compiling`; where that is not the same, as usual.
        track: measured after epochs, into the history; the weights do not depend on it.
        track_every: epochs between two measurements; by default as many as keep them within 15 % of the time.
        logs: of `robench.core.logbook.LOGS`, what gets every epoch's numbers; of a finished run those that it lacks.
        progress: by default a bar, in notebooks alone.

    Raises:
        RobenchError: the name is taken by another task, or the loss is no longer finite.
    """
    if task.name in runs.names():
        return _logged(_finished(task, runs), logs)
    require(logs)
    parallel.join(device)
    how: dict[str, Any] = {"device": device, "compile": compile, "logs": logs}
    if progress is None:
        with bar(terminal=False) as shown:
            return ensure(task, data, runs, track=track, track_every=track_every, progress=shown, **how)
    told: list[str] = []

    def waiting(terms: str) -> None:
        if not told:
            told.append(f"another process trains {task.name}: waiting for it ({terms})")
            log.info(told[0])
        progress(0, 1, f"waiting for {task.name}")

    # Processes of torchrun would not wait as long for each other as a training takes.
    with runs.claims().hold(f"train-{task.name}", waiting) if parallel.place()[1] == 1 else nullcontext():
        if task.name in runs.names():
            return _logged(_finished(task, runs), logs)
        parent = None
        if task.start is not None:
            if task.start.name not in runs.names():
                _rehearse(task, data, device)
            parent = ensure(task.start, data, runs, progress=progress, **how)
        elif task.init != "scratch":
            parent = runs.get(task.init)
        with fitting_threads(device, task.recipe.batch_size * data.numel):
            return _train(task, data, runs, parent, device, compile, track, track_every, logs, progress)


def _logged(run: Run, logs: Sequence[str]) -> Run:
    """The finished run, whose epochs the logs have."""
    if parallel.place()[0] == 0:
        with opened(logs, run.folder, "train", run.manifest["recipe"]) as book:
            book.history(run.manifest.get("history", ()))
    return run


def _finished(task: Task, runs: Runs) -> Run:
    """The run of that name; RobenchError where it is another task's."""
    run = runs.get(task.name)
    if run.manifest["key"] != task.key:
        raise RobenchError(
            f"run {task.name!r} exists with other settings; give this one --name, or remove {run.folder}"
        )
    if task.start is None and task.init in runs.names():
        # The key holds the name of a run that was given, not its weights.
        started_from = [entry["weights"] for entry in run.manifest["ancestors"][:1]]
        if started_from != [runs.get(task.init).weights]:
            raise RobenchError(
                f"run {task.name!r} started from other weights than {task.init!r} has now; give this one --name, "
                f"or remove {run.folder}"
            )
    # A kill between the manifest and this leaves one; one that was damaged lies beside it.
    for left in run.folder.glob(f"{CHECKPOINT}*"):
        left.unlink(missing_ok=True)
    log.info(f"{task.name} is complete")
    return run


def _rehearse(task: Task, data: Data, device: torch.device) -> None:
    """One step on a few images with weights that are thrown away: what it refuses is not found hours later, when the
    Baseline is trained.
    """
    stream = Stream((task.key, "rehearsal"))
    ensemble = Ensemble((build(spec, stream.key("weights", i)) for i, spec in enumerate(task.members)), task.rule)
    ensemble.to(device)
    check_networks(ensemble, task, data)
    ensemble.train()
    few = task.recipe.model_copy(update={"batch_size": min(max(4, 2 * parallel.place()[1]), task.recipe.batch_size)})
    batch = next(batches(data.train.near(device), few, stream, 0, task.defense.paired, device=device))
    with fitting_threads(device, batch.images.numel()):
        train_step(ensemble, make_optimizer(few, ensemble), task, batch)


def check_networks(ensemble: Ensemble, task: Task, data: Data) -> None:
    """Puts members into eval mode, and channels-last where they take it.

    Raises:
        RobenchError: a network does not take the data's images, such as one made for 224 pixels alone, or these are
            too few for a batch.
    """
    if task.recipe.batch_size > len(data.train):
        raise RobenchError(
            f"expected `batch_size` of at most {len(data.train)} training images, got {task.recipe.batch_size}"
        )
    device = next((weight.device for weight in ensemble.parameters()), torch.device("cpu"))
    images = to_images(data.train.images[:2]).to(device)
    ensemble.eval()
    one_of_each = dict(zip(task.members, ensemble.members, strict=True))
    for spec, member in one_of_each.items():
        try:
            with torch.no_grad():
                logits = member(images)
        except Exception as error:  # whatever other people's networks may raise
            raise RobenchError(
                f"model {spec.name!r} does not take images of {'x'.join(map(str, images.shape[1:]))} "
                f"({in_a_line(error)}); choose another --model"
            ) from error
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape != (len(images), spec.num_classes):
            raise RobenchError(
                f"expected logits of shape {(len(images), spec.num_classes)} from model {spec.name!r}, got {shape}; "
                f"choose another --model"
            )
    for member in ensemble.members:
        channels_last(member, images)


def _train(
    task: Task,
    data: Data,
    runs: Runs,
    parent: Run | None,
    device: torch.device,
    compile: bool,
    track: Track | None,
    track_every: int | None,
    logs: Sequence[str],
    progress: Progress,
) -> Run:
    stream = Stream((task.role, task.defense.name, task.n, task.seed))
    ensemble = _initial(task, data, stream, parent, device).train()
    writes = parallel.place()[0] == 0
    progress = progress if writes else silent
    train, paired = data.train.near(device), task.defense.paired
    optimizer = make_optimizer(task.recipe, ensemble)
    checkpoint = Checkpoint(runs.folder(task.name) / CHECKPOINT, task.key)
    state = checkpoint.load(ensemble, optimizer)
    if state.step:
        log.info(f"{task.name} resumes at epoch {state.epoch + 1} of {task.epochs}")
    steps = len(train) // task.recipe.batch_size
    saved = time.monotonic()
    with ExitStack() as stack:
        config = {**task.manifest(), **task.recipe.model_dump(mode="json")}
        book = stack.enter_context(opened(logs if writes else (), runs.folder(task.name), "train", config))
        fast, gradients = False, plain_gradients(task)
        if state.epoch < task.epochs and (compile or device.type == "cuda"):
            few = list(islice(batches(train, task.recipe, stream, state.epoch, paired, device=device), COMPARED))
            if compile:
                fast = stack.enter_context(_through_compiler(ensemble, task, few, device))
            if not fast:
                gradients = recorded_if_same(ensemble, task, few, device)
        while state.epoch < task.epochs:
            began, first = time.monotonic(), state.step
            for batch in batches(train, task.recipe, stream, state.epoch, paired, state.step, device):
                batch = replace(batch, state=state.kept)
                # In the middle of the step, so that the first of a warm-up learns and the last of a cosine does too.
                set_rate(optimizer, task.recipe.rate(state.epoch % task.recipe.epochs + (state.step + 0.5) / steps))
                if fast:
                    begin_step(device)
                state.add(train_step(ensemble, optimizer, task, batch, gradients))
                _keep_snapshot(task.recipe, state, ensemble, steps)
                progress(state.epoch * steps + state.step, task.epochs * steps, task.name)
                if writes and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    checkpoint.save(ensemble, optimizer, state)
                    saved = time.monotonic()
            state.close(task.recipe.rate(state.epoch % task.recipe.epochs))
            _refuse_not_finite(task, ensemble, state, checkpoint)
            # Of an epoch that was resumed, only a part was timed, if any: then its measurement is left out.
            if track is not None and writes and first < steps:
                took = (time.monotonic() - began) * steps / (steps - first)
                _track(track, track_every, ensemble, state.history, took)
            book.history(state.history)
    if writes:
        _save(task, data, runs, parent, _of_snapshots(ensemble, state.snapshots), state.history, fast)
        checkpoint.path.unlink(missing_ok=True)
    parallel.wait()
    return runs.get(task.name)


def _keep_snapshot(recipe: Recipe, state: State, ensemble: Ensemble, steps: int) -> None:
    """Adds the ensemble's weights to ``state`` where the recipe asks for them after a step; an epoch has ``steps``."""
    if recipe.snapshot_after(state.step, steps):
        state.snapshots.append({name: value.cpu().clone() for name, value in ensemble.state_dict().items()})


def _of_snapshots(ensemble: Ensemble, snapshots: Sequence[dict[str, Tensor]]) -> Ensemble:
    """One ensemble of the members of all snapshots; where there are none, ``ensemble`` itself."""
    if not snapshots:
        return ensemble
    members = []
    for snapshot in snapshots:
        each = copy.deepcopy(ensemble).to("cpu")
        each.load_state_dict(snapshot)
        members += list(each.members)
    return Ensemble(members, ensemble.rule)


def _save(
    task: Task,
    data: Data,
    runs: Runs,
    parent: Run | None,
    ensemble: Ensemble,
    history: list[dict[str, Any]],
    fast: bool,
) -> None:
    """Makes the finished run."""
    compiled = {"compiled": True} if fast else {}
    runs.save(
        task.name,
        ensemble.eval().to("cpu").to(memory_format=torch.contiguous_format),
        members=task.members * (len(ensemble) // task.n),
        defense=task.defense.manifest(),
        seed=task.seed,
        role=task.role,
        data=data.told,
        ancestors=lineage(parent) if parent else (),
        key=task.key,
        more={"recipe": task.recipe.model_dump(mode="json"), "history": history, **compiled},
    )


def _initial(task: Task, data: Data, stream: Stream, parent: Run | None, device: torch.device) -> Ensemble:
    """The ensemble that training starts from, on the device, in the precision of the recipe."""
    ensemble = Ensemble((build(spec, stream.key("weights", i)) for i, spec in enumerate(task.members)), task.rule)
    if parent is not None:
        load_state(ensemble, parent.load().state_dict(), parent.name)
    ensemble.to(device)
    check_networks(ensemble, task, data)
    if task.recipe.precision == "bfloat16":
        widen_heads(ensemble, task.members[0].num_classes)
    if slow := slow_precision(task.recipe.precision, device):
        log.warning(slow)
    parallel.share_batchnorm(ensemble)
    return ensemble


def _refuse_not_finite(task: Task, ensemble: Ensemble, state: State, checkpoint: Checkpoint) -> None:
    """Ends a training whose last epoch made a loss or a weight that is not finite."""
    terms = state.history[-1]["terms"].values()
    weights = ensemble.state_dict().values()
    if not (all(map(math.isfinite, terms)) and all(bool(torch.isfinite(value).all()) for value in weights)):
        # Going on from here would only fail again.
        checkpoint.path.unlink(missing_ok=True)
        raise RobenchError(
            f"the loss or a weight of {task.name!r} is not finite after epoch {state.epoch}; try a smaller --lr"
        )


@contextmanager
def _through_compiler(ensemble: Ensemble, task: Task, few: Sequence[Batch], device: torch.device) -> Iterator[bool]:
    """Within, the ensemble's members go through torch.compile, where ``few`` batches show that steps stay the same."""
    if parallel.place()[1] > 1:
        log.warning("training goes on without torch.compile: it is for one process")
        yield False
        return

    def step(each: Ensemble, optimizer: torch.optim.Optimizer, number: int) -> dict[str, Tensor]:
        begin_step(device)
        # Without what the defense keeps, as the step that is compared with this one must not see what this one left.
        return train_step(each, optimizer, task, replace(few[number % len(few)], state={}))

    make = partial(make_optimizer, task.recipe)
    with compiled_if_same(ensemble, make, step, task.recipe.precision) as fast:
        yield fast


def recorded_if_same(ensemble: Ensemble, task: Task, few: Sequence[Batch], device: torch.device) -> Gradients:
    """The task's gradients as CUDA graphs, where ``few`` batches show that steps stay the same; else plain ones."""
    plain = plain_gradients(task)
    if device.type != "cuda" or parallel.place()[1] > 1:
        return plain
    mine = Recorded(plain, cuda_record(device))

    def step(each: Ensemble, optimizer: torch.optim.Optimizer, number: int) -> dict[str, Tensor]:
        batch = replace(few[number % len(few)], state={})
        return train_step(each, optimizer, task, batch, mine if each is ensemble else plain)

    try:
        why = differs(ensemble, partial(make_optimizer, task.recipe), step, task.recipe.precision)
    except RuntimeError as error:  # memory has run out: plain steps need less, as members follow one another
        why = in_a_line(error)
    if why:
        log.info(f"training goes on without CUDA graphs: {why}")
    return plain if why else or_plain(mine, plain)


def _track(track: Track, every: int | None, ensemble: Ensemble, history: list[dict[str, Any]], seconds: float) -> None:
    """Adds a measurement to the last epoch of ``history`` where one is due."""
    earlier = [entry["track"]["every"] for entry in history if "track" in entry]
    every = every or (earlier[-1] if earlier else None)
    if every and (len(history) - 1) % every:
        return
    began = time.monotonic()
    measured = track(ensemble)
    every = every or max(1, math.ceil((time.monotonic() - began) / (TRACK_SHARE * seconds)))
    history[-1]["track"] = {**measured, "every": every}


def make_optimizer(recipe: Recipe, ensemble: Ensemble) -> torch.optim.Optimizer:
    """One optimiser over all members: equal to one each, as no member's gradient holds another's loss."""
    parameters = list(ensemble.parameters())
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, recipe.lr, eps=recipe.adam_eps, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_step(
    ensemble: Ensemble,
    optimizer: torch.optim.Optimizer,
    task: Task,
    batch: Batch,
    gradients: Gradients | None = None,
) -> dict[str, Tensor]:
    """One update; the loss's named terms, each a scalar that stays on the device.

    Among several processes (`parallel`) each takes its part of ``batch``; terms and update are those of the whole.

    Args:
        gradients: what computes them, by default `plain_gradients`.
    """
    batch = parallel.part_of(batch)
    optimizer.zero_grad(set_to_none=True)
    devices = [batch.images.device] if batch.images.is_cuda else []
    # Dropout and stochastic depth draw from torch's generator: keyed here, and left as it was.
    with full_float32(), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(batch.draws.key("torch"))
        if devices:
            # torch.cuda.manual_seed is of the current device, which need not be this one.
            torch.cuda.default_generators[devices[0].index].manual_seed(batch.draws.key("torch"))
        sums = (gradients or plain_gradients(task))(ensemble, batch)
    parallel.average([parameter.grad for parameter in ensemble.parameters()])
    parallel.average(sums.values())
    optimizer.step()
    with torch.no_grad(), full_float32():
        task.defense.finish(ensemble, batch)
    parallel.share_rows(batch)
    return sums


def plain_gradients(task: Task) -> Gradients:
    """The gradients of a task's loss, added to those that the parameters have; and the loss's terms."""

    def gradients(ensemble: Ensemble, batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for terms in _terms(ensemble, task, batch):
            values = list(terms.values())
            sum(values[1:], values[0]).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        return sums

    return gradients


def _terms(ensemble: Ensemble, task: Task, batch: Batch) -> Iterator[Terms]:
    """The loss's terms, computed in the recipe's precision; back-propagated outside of autocast, as torch advises."""
    yields = task.defense.loss(ensemble, batch)
    while True:
        precision = torch.autocast(
            batch.images.device.type, torch.bfloat16, enabled=task.recipe.precision == "bfloat16"
        )
        with precision, within("defense", task.defense.name):
            terms = next(yields, None)
        if terms is None:
            return
        yield terms
