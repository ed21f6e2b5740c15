"""One training loop: deterministic, and the same whatever interrupts it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robench.core.data import Data, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.files import read_record, read_tensors, tensors_hash
from robench.core.models import build
from robench.core.rng import Stream
from robench.defenses import Batch
from robench.evaluation import cost
from robench.store import claims
from robench.store.runs import Run, Runs
from robench.training import loop, parallel
from robench.training.batches import augment, batches, noisy
from robench.training.loop import make_optimizer, train_step
from robench.training.recipes import Recipe
from robench.training.task import Task
from tests import forged

Small = Callable[..., Task]
Train = Callable[..., Run]


class Stop(Exception):
    """Interrupts a training."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    """A progress that interrupts after so many steps, before that step's checkpoint."""

    def progress(done: int, total: int, what: str) -> None:
        if done == step:
            raise Stop

    return progress


# --- training


def test_training_is_deterministic_and_leaves_torch_alone(small: Small, train: Train, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    threads, mode = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    one = train(small())
    torch.rand(5)
    other = train(small(), Runs(tmp_path / "other"))
    torch.set_rng_state(before)
    assert one.weights == other.weights
    assert one.manifest["history"] == other.manifest["history"]
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, mode)


def test_training_draws_nothing_from_the_global_generators(small: Small, train: Train) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    train(small("dverge"))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]  # noqa: NPY002


def test_an_error_in_the_loss_says_whose_it_is(small: Small, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small()

    def broken(*_: object) -> Iterator[dict[str, Tensor]]:
        yield {"ratio": torch.tensor(1 // 0)}

    monkeypatch.setattr(type(task.defense), "loss", broken)
    with pytest.raises(ZeroDivisionError) as found:
        train(task)
    assert "defense 'baseline'" in found.value.__notes__[0]


def test_training_learns(small: Small, train: Train, tiny: Data) -> None:
    run = train(small(overrides={"epochs": 15, "lr": 0.1}))
    losses = [epoch["terms"]["ce"] for epoch in run.manifest["history"]]
    assert losses[0] > 4  # two members at ln 10 each
    assert losses[-1] < 0.5 * losses[0]
    ensemble = run.load()
    predicted = ensemble(tiny.train.images / 255).argmax(dim=1)
    assert float((predicted == tiny.train.labels).float().mean()) > 0.6


def test_a_finished_run_says_how_it_was_made(small: Small, train: Train, tiny: Data) -> None:
    task = small("dverge", seed=3, role="surrogate")
    run = train(task)
    manifest = run.manifest
    assert (run.name, run.defense, run.n, run.seed, run.role) == (task.name, "dverge", 2, 3, "surrogate")
    assert manifest["key"] == task.key
    assert manifest["data"] == {"name": tiny.label, "fingerprint": tiny.fingerprint}
    assert manifest["recipe"] == json.loads(task.recipe.model_dump_json())
    assert [epoch["epoch"] for epoch in manifest["history"]] == [1, 2]
    assert [epoch["lr"] for epoch in manifest["history"]] == pytest.approx([0.02, 0.002])
    assert sorted(path.name for path in run.folder.iterdir()) == ["manifest.json", "weights.safetensors"]


def test_a_finished_run_is_not_trained_again(
    small: Small, train: Train, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    first = train(small())
    monkeypatch.setattr(loop, "_train", lambda *_: pytest.fail("trained again"))
    told.clear()
    assert train(small()).weights == first.weights
    assert told == [f"{first.name} is complete"]


def test_a_name_that_is_taken_is_an_error(small: Small, train: Train) -> None:
    train(small(name="mine"))
    with pytest.raises(RobenchError, match="run 'mine' exists with other settings; give this one --name, or remove"):
        train(small(name="mine", seed=1))


def test_progress_counts_every_step(small: Small, train: Train) -> None:
    seen: list[tuple[int, int, str]] = []
    run = train(small(), progress=lambda *each: seen.append(each))
    assert seen == [(step, 10, run.name) for step in range(1, 11)]


def test_more_than_all_images_in_a_batch_is_an_error(small: Small, train: Train) -> None:
    with pytest.raises(RobenchError, match="expected `batch_size` of at most 40 training images, got 41"):
        train(small(overrides={"batch_size": 41}))


class _Fixed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 224, "Input height\ndoesn't match"
        return images


class _View(nn.Module):
    """The last layers of many small networks: `view`, which wants one memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Linear(4 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(images)).view(-1, 4 * 64))  # type: ignore[no-any-return]


@pytest.mark.parametrize("defense", ["baseline", "dverge"])
def test_a_network_with_a_view_trains(
    small: Small, train: Train, monkeypatch: pytest.MonkeyPatch, defense: str
) -> None:
    monkeypatch.setattr(loop, "build", lambda *arguments, **options: _View())
    assert train(small(defense, overrides={"layer": 1, "layer_per": "epoch"} if defense == "dverge" else {})).n == 2


class _Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (
            _Fixed,
            r"model 'resnet8' does not take images of 1x8x8 \(AssertionError: Input height doesn't match",
        ),
        (_Pair, r"expected logits of shape \(2, 10\) from model 'resnet8', got tuple; choose another --model"),
        (nn.Flatten, r"expected logits of shape \(2, 10\) from model 'resnet8', got \(2, 64\)"),
    ],
)
@pytest.mark.parametrize("defense", ["baseline", "dverge"])
def test_a_network_that_refuses_the_images_is_named(
    small: Small, train: Train, monkeypatch: pytest.MonkeyPatch, network: type[nn.Module], told: str, defense: str
) -> None:
    monkeypatch.setattr(loop, "build", lambda *arguments, **options: network())
    with pytest.raises(RobenchError, match=told):
        train(small(defense))


@pytest.mark.parametrize("defense", ["baseline", "dverge"])
def test_a_loss_that_is_not_finite_ends_the_training(small: Small, train: Train, runs: Runs, defense: str) -> None:
    with pytest.raises(RobenchError, match=r"not finite after epoch [12]; try a smaller --lr"):
        train(small(defense, overrides={"lr": 1e30, "epochs": 3}))
    assert runs.names() == []


# --- initial weights


@pytest.fixture
def initial(monkeypatch: pytest.MonkeyPatch, train: Train) -> Callable[[Task], dict[str, Any]]:
    """The weights of each member before the first step."""

    def capture(task: Task) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def keep(recipe: Recipe, ensemble: Ensemble) -> None:
            found.update({str(i): tensors_hash(m.state_dict()) for i, m in enumerate(ensemble.members)})
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(loop, "make_optimizer", keep)
            with pytest.raises(Stop):
                train(task)
        return found

    return capture


def test_no_two_ensembles_share_a_member(small: Small, initial: Callable[[Task], dict[str, Any]]) -> None:
    tasks = [
        small(n=3),
        small(n=5),
        small(n=3, seed=1),
        small(n=3, role="surrogate"),
        small("dverge", n=3),
    ]
    hashes = [value for task in tasks for value in initial(task).values()]
    assert len(hashes) == 17
    assert len(set(hashes)) == 17


def test_settings_of_the_loss_leave_initial_weights(small: Small, initial: Callable[[Task], dict[str, Any]]) -> None:
    assert initial(small(overrides={"lr": 0.5, "epochs": 7})) == initial(small())


def test_what_the_defense_refuses_is_found_before_its_baseline_is_trained(
    small: Small, train: Train, runs: Runs
) -> None:
    with pytest.raises(RobenchError, match=r"`layer` of defense 'dverge' in 0..8 for this model, got 99"):
        train(small("dverge", overrides={"layer": 99, "layer_per": "epoch"}))
    assert runs.names() == []


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_the_rehearsal_has_images_for_every_process(
    small: Small, tiny: Data, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    task = small("dverge", overrides={"batch_size": 24})
    monkeypatch.setattr(parallel, "place", lambda: (processes - 1, processes))
    averaged: list[int] = []
    monkeypatch.setattr(parallel, "average", lambda tensors: averaged.append(len(list(tensors))))
    loop._rehearse(task, tiny, torch.device("cpu"))
    assert averaged[0] > 0


def test_what_another_process_trains_is_waited_for(
    small: Small, train: Train, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small()
    theirs = train(task, Runs(tmp_path / "theirs"))
    monkeypatch.setattr(loop, "_train", None)  # nobody trains it twice
    waited, told, found = threading.Event(), [], []

    def info(text: str) -> None:
        told.append(text)
        waited.set()

    monkeypatch.setattr(loop.log, "info", info)
    thread = threading.Thread(target=lambda: found.append(train(task)))
    with runs.claims().take(f"train-{task.name}"):
        thread.start()
        assert waited.wait(30)
        shutil.copytree(theirs.folder, runs.folder(task.name))
    thread.join(30)
    assert [run.weights for run in found] == [theirs.weights]
    terms = f"{runs.root / '.claims'} says who; of a machine that is gone, a claim ends after 2 minutes"
    assert told == [f"another process trains {task.name}: waiting for it ({terms})", f"{task.name} is complete"]


def test_a_training_keeps_its_claim_however_long_it_takes(
    small: Small, train: Train, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it waits for nothing but one long step."""
    monkeypatch.setattr(claims, "LEASE", 1.0)
    task, other = small(), runs.claims()
    granted: list[bool] = []

    def progress(done: int, total: int, what: str) -> None:
        until = time.monotonic() + (0 if granted else 3)
        while time.monotonic() < until:
            with other.take(f"train-{task.name}") as answer:
                granted.append(answer)
            time.sleep(0.1)

    train(task, progress=progress)
    assert len(granted) > 1
    assert not any(granted)
    with other.take(f"train-{task.name}") as answer:
        assert answer


def test_a_run_is_not_named_like_the_baseline_it_starts_from(small: Small) -> None:
    start = small("dverge", init=None).start
    assert start is not None
    with pytest.raises(RobenchError, match="is the Baseline that 'dverge' starts from; choose another --name"):
        small("dverge", init=None, name=start.name)


def test_dverge_starts_from_the_baselines_weights(
    small: Small, train: Train, initial: Callable[[Task], dict[str, Any]], runs: Runs
) -> None:
    baseline = train(small(name="theirs"))
    child = small("dverge", init="theirs")
    assert list(initial(child).values()) == baseline.manifest["member_weights"]
    run = train(child)
    assert [ancestor["run"] for ancestor in run.manifest["ancestors"]] == ["theirs"]
    assert run.manifest["ancestors"][0]["weights"] == baseline.weights
    with pytest.raises(RobenchError, match="unknown run 'thiers'; did you mean theirs"):
        train(small("dverge", init="thiers"))
    with pytest.raises(RobenchError, match="weights of 'theirs' do not fit the model"):
        train(small("dverge", n=3, init="theirs"))


# --- interruption


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs that nothing interrupted, by task key."""
    return {}


def reference(whole: dict[str, Run], task: Task, train: Train, tmp_path: Path) -> Run:
    if task.key not in whole:
        whole[task.key] = train(task, Runs(tmp_path / "whole"))
    return whole[task.key]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(1, 10), min_size=1, max_size=3), st.sampled_from(["baseline", "dverge"]))
def test_a_training_interrupted_anywhere_ends_the_same(
    small: Small,
    train: Train,
    whole: dict[str, Run],
    tmp_path_factory: pytest.TempPathFactory,
    steps: set[int],
    defense: str,
) -> None:
    folder = tmp_path_factory.mktemp("interrupted")
    task = small(defense)
    uninterrupted = reference(whole, task, train, folder)
    into = Runs(folder / "runs")
    for step in sorted(steps):
        with pytest.raises(Stop):
            train(task, into, progress=stop_at(step))
        assert into.names() == []
    run = train(task, into)
    assert run.weights == uninterrupted.weights
    assert run.manifest["history"] == uninterrupted.manifest["history"]


def test_adam_with_noise_and_slope_resumes_too(small: Small, train: Train, tmp_path: Path) -> None:
    words = {"optimizer": "adam", "lr": 1e-3, "noise": 0.05, "noise_probability": 0.5, "negative_slope": 0.1}
    task = small(overrides=words)
    with pytest.raises(Stop):
        train(task, progress=stop_at(7))
    assert train(task).weights == train(task, Runs(tmp_path / "whole")).weights


@pytest.mark.parametrize(("defense", "words"), [("fasten", {}), ("lotos", {"iterations": 2, "weight": 0.5})])
def test_what_a_defense_keeps_between_steps_is_resumed(
    defense: str, words: dict[str, Any], small: Small, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small(defense, overrides={"epochs": 3, **words})
    whole = train(task, Runs(tmp_path / "whole"))
    for step in (3, 8):
        with pytest.raises(Stop):
            train(task, progress=stop_at(step))
    run = train(task)
    assert run.weights == whole.weights
    assert run.manifest["history"] == whole.manifest["history"]

    forgets = Runs(tmp_path / "forgets")
    with pytest.raises(Stop):
        train(task, forgets, progress=stop_at(8))
    load = loop.Checkpoint.load
    monkeypatch.setattr(loop.Checkpoint, "load", lambda *given: replace(load(*given), kept={}))
    assert train(task, forgets).weights != whole.weights


def test_it_resumes_in_the_middle_of_an_epoch(small: Small, train: Train, runs: Runs, told: list[str]) -> None:
    task = small()
    with pytest.raises(Stop):
        train(task, progress=stop_at(8))
    _, metadata = read_tensors(runs.folder(task.name) / "checkpoint.safetensors")
    progress = json.loads(metadata["progress"])
    assert (progress["epoch"], progress["step"]) == (1, 2)
    seen: list[int] = []
    told.clear()
    run = train(task, progress=lambda done, total, what: seen.append(done))
    assert seen == [8, 9, 10]
    assert told == [f"{task.name} resumes at epoch 2 of 2"]
    assert not (run.folder / "checkpoint.safetensors").exists()


def test_a_parents_manifest_names_no_code(small: Small, train: Train, runs: Runs) -> None:
    """Even where the user typed code of his own for the new run."""
    path = train(small(name="theirs")).folder / "manifest.json"
    members = [{**member, "name": "that.is.not:there"} for member in read_record(path)["members"]]
    forged.record(path, members=members)
    with pytest.raises(RobenchError, match=r"that\.is\.not:there.*--model"):
        train(small(init="theirs"))


def test_tracking_goes_on_after_the_last_step_of_an_epoch(small: Small, train: Train) -> None:
    """A checkpoint between the last step and the end of an epoch: what is left of the epoch takes no time."""
    task = small(overrides={"epochs": 3})
    with pytest.raises(Stop):
        train(task, track=lambda ensemble: {"x": 1.0}, progress=stop_at(6))
    run = train(task, track=lambda ensemble: {"x": 1.0})
    assert [entry.get("track", {}).get("x") for entry in run.manifest["history"]][1:] == [1.0, 1.0]


def test_a_damaged_checkpoint_means_starting_over(
    small: Small, train: Train, runs: Runs, tmp_path: Path, told: list[str]
) -> None:
    task = small()
    with pytest.raises(Stop):
        train(task, progress=stop_at(4))
    path = runs.folder(task.name) / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    told.clear()
    seen: list[int] = []
    run = train(task, progress=lambda done, total, what: seen.append(done))
    assert seen[0] == 1
    assert told == [f"{path} is damaged: it is set aside and the training starts over"]
    assert run.weights == train(task, Runs(tmp_path / "whole")).weights


def test_a_checkpoint_of_other_settings_is_an_error(small: Small, train: Train) -> None:
    with pytest.raises(Stop):
        train(small(name="mine"), progress=stop_at(4))
    with pytest.raises(RobenchError, match="training with other settings"):
        train(small(name="mine", seed=1))


DRIVER = '''
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch._dynamo  # the first optimiser would import it, once more in every process
torch.set_num_threads(1)
from robench.core.data import load
from robench.store.runs import Runs
from robench.training import loop
from robench.training.task import resolve

loop.CHECKPOINT_SECONDS = -1.0
folder = Path(sys.argv[1])
data = load(f"npz:{folder / 'tiny.npz'}")
task = resolve(data, "dverge", 2, recipe="digits", overrides={"epochs": 2, "batch_size": 8, "steps": 2})
short = resolve(data, "baseline", 2, recipe="digits", overrides={"epochs": 2, "batch_size": 8})
task = replace(task, start=short)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def train(name, patch):
    """In a process of its own, so that it can be killed; the signal that ended it."""
    child = os.fork()
    if child == 0:
        progress = patch()
        loop.ensure(task, data, Runs(folder / name), device=torch.device("cpu"), progress=progress)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def nothing():
    return lambda *_: None

def after(defense, step):
    return lambda: lambda done, total, what: kill() if defense in what and done == step else None

def at(method, count):
    """Kills before the so-many-th call of a method of Path."""
    def patch():
        original, calls = getattr(Path, method), []
        def counted(self, *arguments, **options):
            calls.append(1)
            if len(calls) == count:
                kill()
            return original(self, *arguments, **options)
        setattr(Path, method, counted)
        return lambda *_: None
    return patch

# Renames: 10 checkpoints, weights, manifest of the Baseline; then as many of DVERGE.
SCENARIOS = {
    "whole": [],
    "baseline": [after("baseline", 3)],
    "dverge twice": [after("dverge", 4), after("dverge", 8)],
    "last step": [after("dverge", 10)],
    "before a checkpoint's rename": [at("replace", 4)],
    "between weights and manifest": [at("replace", 24)],
}
for name, kills in SCENARIOS.items():
    signals = [train(name, patch) for patch in kills]
    code = train(name, nothing)
    runs = Runs(folder / name)
    results = {run.defense: [run.weights, run.manifest["history"], run.manifest["ancestors"]] for run in runs.all()}
    print(json.dumps([name, signals, code, results]))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_minus_nine_changes_nothing(tiny: Data, tmp_path: Path) -> None:
    arrays = {
        f"{axis}_{part}": getattr(split, field).numpy()
        for part, split in (("train", tiny.train), ("test", tiny.test))
        for axis, field in (("x", "images"), ("y", "labels"))
    }
    np.savez(tmp_path / "tiny.npz", **arrays)
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "driver.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert len(results) == 6
    _, _, wanted = results["whole"]
    assert sorted(wanted) == ["baseline", "dverge"]
    for name, (signals, code, found) in results.items():
        assert all(number == -signal.SIGKILL for number in signals), (name, signals, done.stderr)
        assert code == 0, (name, done.stderr)
        assert found == wanted, name


# --- batches


def recipe(**changes: Any) -> Recipe:
    values = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}
    return Recipe(**{**values, **changes})


STREAM = Stream(("target", "baseline", 3, 0))


def test_an_epoch_takes_every_image_at_most_once(tiny: Data) -> None:
    split = tiny.train
    for size, steps in ((8, 5), (12, 3)):
        made = list(batches(split, recipe(batch_size=size), STREAM, 0, False))
        assert [len(batch.images) for batch in made] == [size] * steps
        assert all(batch.paired is None for batch in made)
        images = torch.cat([batch.images for batch in made])
        labels = torch.cat([batch.labels for batch in made])
        at = [(split.images / 255 == image).flatten(1).all(dim=1).nonzero().item() for image in images]
        assert len(set(at)) == size * steps
        assert labels.tolist() == split.labels[at].tolist()


def test_an_epoch_can_be_entered_anywhere(tiny: Data) -> None:
    settings_ = recipe(pad=1, flip=True, noise=0.1)
    every = list(batches(tiny.train, settings_, STREAM, 1, True))
    for first in range(6):
        for one, other in zip(every[first:], batches(tiny.train, settings_, STREAM, 1, True, first), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.paired, other.paired)  # type: ignore[arg-type]
            assert torch.equal(one.labels, other.labels)
            assert one.draws == other.draws
            assert one.epoch_draws == other.epoch_draws


def test_a_batch_says_which_images_it_holds_and_how_far_training_is(tiny: Data) -> None:
    plain = recipe(batch_size=8, epochs=2)
    for epoch in (0, 1):
        for step, batch in enumerate(batches(tiny.train, plain, STREAM, epoch, False)):
            assert batch.samples is not None
            assert torch.equal(batch.images, to_images(tiny.train.images[batch.samples]))
            assert batch.train_size == len(tiny.train)
            assert batch.progress == (epoch + step / 5) / 2
            assert batch.state == {}


def test_the_hook_after_the_step_sees_the_new_weights_and_may_change_them(small: Small, tiny: Data) -> None:
    seen = []

    class Finishes(type(small().defense)):  # type: ignore[misc]
        def finish(self, ensemble: Ensemble, batch: Batch) -> None:
            assert not torch.is_grad_enabled()
            seen.append(copy.deepcopy(ensemble.state_dict()))
            next(ensemble.parameters()).zero_()

    task = replace(small(), defense=Finishes())
    ensemble, twin = (Ensemble(build(spec, i) for i, spec in enumerate(task.members)).train() for _ in range(2))
    batch = next(batches(tiny.train, task.recipe, STREAM, 0, False))
    train_step(ensemble, make_optimizer(task.recipe, ensemble), task, batch)
    train_step(twin, make_optimizer(task.recipe, twin), small(), batch)
    assert tensors_hash(seen[0]) == tensors_hash(twin.state_dict())
    assert not next(ensemble.parameters()).any()


def test_every_epoch_and_shuffle_has_its_own_order(tiny: Data) -> None:
    def order(epoch: int, stream: Stream = STREAM, paired: bool = False) -> tuple[int, ...]:
        made = list(batches(tiny.train, recipe(), stream, epoch, True))
        images = torch.cat([batch.paired if paired else batch.images for batch in made])  # type: ignore[misc]
        return tuple((tiny.train.images / 255 == image).flatten(1).all(dim=1).nonzero().item() for image in images)  # type: ignore[misc]

    orders = {order(0), order(1), order(0, paired=True), order(0, Stream(("surrogate", "baseline", 3, 0)))}
    assert len(orders) == 4
    # A pair comes from two independent shuffles: equal positions about once in 40.
    assert sum(a == b for a, b in zip(order(0), order(0, paired=True), strict=True)) < 8


def test_draws_differ_by_step_and_are_shared_by_epoch(tiny: Data) -> None:
    made = list(batches(tiny.train, recipe(), STREAM, 0, False))
    assert len({batch.draws.key("x") for batch in made}) == 5
    assert len({batch.epoch_draws.key("layer") for batch in made}) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3),
    st.booleans(),
    st.integers(1, 3),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 2**32 - 1),
)
def test_crops_and_flips_equal_a_numpy_loop(
    pad: int, flip: bool, channels: int, size: tuple[int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    images = random.random((6, channels, *size), dtype=np.float32)
    draws = random.random((6, 3), dtype=np.float32)
    height, width = size
    wanted = np.empty_like(images)
    for index, (image, (row, column, mirror)) in enumerate(zip(images, draws, strict=True)):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        top, left = int(row * np.float32(2 * pad + 1)), int(column * np.float32(2 * pad + 1))
        crop = padded[:, top : top + height, left : left + width]
        wanted[index] = crop[:, :, ::-1] if flip and mirror < 0.5 else crop
    found = augment(torch.from_numpy(images), torch.from_numpy(draws), recipe(pad=pad, flip=flip))
    assert np.array_equal(found.numpy(), wanted)


def test_the_largest_draw_stays_inside() -> None:
    for pad in range(1, 9):
        largest = torch.full((1, 3), 1 - 2**-24)
        image = torch.zeros(1, 1, 4, 4)
        image[..., 0, 0] = 1
        # Row and column 2·pad: the crop that ends at the padding's end.
        found = augment(image, largest, recipe(pad=pad))
        assert float(found.sum()) == 0
        assert found.shape == image.shape


def test_noise_is_gaussian_not_clamped_and_comes_as_often_as_told() -> None:
    images = torch.full((50, 3, 8, 8), 0.01)
    settings_ = recipe(noise=0.045, noise_probability=0.5)
    added = [noisy(images, settings_, Stream(("x", step))) - images for step in range(200)]
    some = [noise for noise in added if bool((noise != 0).any())]
    assert 70 < len(some) < 130  # 100 ± 4 standard errors
    noise = torch.stack(some[:10]).double()
    assert float(noise.mean()) == pytest.approx(0, abs=5 * 0.045 / len(noise.flatten()) ** 0.5)
    assert float(noise.std()) == pytest.approx(0.045, rel=0.01)
    scaled = noise / noise.std()
    assert float(scaled.pow(4).mean()) == pytest.approx(3, abs=0.1)
    assert bool((images + some[0] < 0).any())
    assert torch.equal(noisy(images, settings_, Stream(("x", 3))) - images, added[3])
    assert bool(torch.isfinite(noise).all())


def test_noise_always_and_never() -> None:
    images = torch.rand(2, 1, 4, 4)
    for step in range(20):
        assert noisy(images, recipe(), Stream(("x", step))) is images
        assert not torch.equal(noisy(images, recipe(noise=0.1), Stream(("x", step))), images)
        assert noisy(images, recipe(noise=0.1, noise_probability=0.0), Stream(("x", step))) is images


def test_one_optimiser_holds_every_member() -> None:
    ensemble = Ensemble([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    sgd = make_optimizer(recipe(momentum=0.8, weight_decay=0.01), ensemble)
    adam = make_optimizer(recipe(optimizer="adam", lr=1e-3, adam_eps=1e-7, weight_decay=0.02), ensemble)
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adam, torch.optim.Adam)
    for optimizer in (sgd, adam):
        (group,) = optimizer.param_groups
        assert [id(value) for value in group["params"]] == [id(value) for value in ensemble.parameters()]
    assert {name: sgd.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.1,
        "momentum": 0.8,
        "weight_decay": 0.01,
    }
    assert adam.param_groups[0]["eps"] == 1e-7
    assert adam.param_groups[0]["weight_decay"] == 0.02


# --- logs


def logged(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "log/jsonl/train/log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("after", [3, 5, 6, 10])
def test_a_log_has_every_epoch_once_whatever_interrupts(small: Small, train: Train, after: int) -> None:
    with pytest.raises(Stop):
        train(small(), progress=stop_at(after), logs=["jsonl"])
    run = train(small(), logs=["jsonl"])
    history = run.manifest["history"]
    wanted = [{"step": n + 1, "epoch": n + 1, "lr": each["lr"], "terms/ce": each["terms"]["ce"]}
              for n, each in enumerate(history)]  # fmt: skip
    assert logged(run) == wanted
    assert logged(train(small(), logs=["jsonl"])) == wanted


def test_a_log_that_is_asked_for_later_gets_all(small: Small, train: Train) -> None:
    train(small())
    assert [line["step"] for line in logged(train(small(), logs=["jsonl"]))] == [1, 2]


def test_weights_do_not_depend_on_logs(small: Small, train: Train, tmp_path: Path) -> None:
    alone = train(small(), Runs(tmp_path / "alone"))
    assert train(small(), logs=["jsonl"]).weights == alone.weights
    assert alone.manifest["history"] == train(small()).manifest["history"]


def test_other_processes_log_nothing(small: Small, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(small())
    monkeypatch.setattr(loop.parallel, "place", lambda: (1, 2))
    train(small(), logs=["jsonl"])
    assert not (run.folder / "log").exists()


def test_an_unknown_log_is_refused_before_the_training(small: Small, train: Train, runs: Runs) -> None:
    with pytest.raises(RobenchError, match="unknown log 'tensorbord'"):
        train(small(), logs=["tensorbord"])
    assert runs.names() == []


# Surrogates: stopped early, and snapshots


def test_a_training_that_stops_early_is_the_beginning_of_the_usual_one(small: Small, train: Train) -> None:
    overrides = {"epochs": 4, "schedule": "cosine"}
    whole, early = small(overrides=overrides), small(overrides={**overrides, "stop_after": 2})
    assert early.key != whole.key
    assert early.name != whole.name
    assert early.epochs == 2
    run, full = train(early), train(whole)
    assert [entry["lr"] for entry in run.manifest["history"]] == [entry["lr"] for entry in full.manifest["history"][:2]]
    assert run.manifest["history"][-1]["terms"] == full.manifest["history"][1]["terms"]
    assert cost.trained(run) == cost.trained(full) / 2
    assert run.manifest["member_weights"] != full.manifest["member_weights"]


def test_snapshots_of_a_constant_rate_are_the_weights_on_the_way(small: Small, train: Train) -> None:
    """LGV: every member once after each part of an epoch, from a trained Baseline, which is an ancestor."""
    start = train(small()).name
    overrides = {"epochs": 3, "lr": 0.05, "milestones": (), "snapshots": 2}
    task = small(overrides=overrides, init=start)
    run = train(task)
    assert run.n == task.count == 3 * 2 * 2
    assert len(run.manifest["member_weights"]) == 12
    assert len(set(run.manifest["member_weights"])) == 12
    assert run.manifest["ancestors"][0]["run"] == start
    assert {entry["lr"] for entry in run.manifest["history"]} == {0.05}
    # Those after an epoch are what a training that stops there ends with.
    for epochs in (1, 2, 3):
        ends = {**overrides, "snapshots": 0, **({"stop_after": epochs} if epochs < 3 else {})}
        until = train(small(overrides=ends, init=start))
        assert run.manifest["member_weights"][4 * epochs - 2 : 4 * epochs] == until.manifest["member_weights"]
    assert cost.trained(run) == cost.trained(until)
    plain = small(overrides={**overrides, "snapshots": 0}, init=start)
    assert task.key != plain.key


def test_snapshots_are_resumed_after_a_kill(small: Small, train: Train, tmp_path: Path) -> None:
    task = small(overrides={"epochs": 2, "milestones": (), "snapshots": 3})
    whole = train(task)

    other = Runs(tmp_path / "other")
    for step in (2, 3, 5, 7, 10):
        with pytest.raises(Stop):
            train(task, other, progress=stop_at(step))
    assert train(task, other).manifest["member_weights"] == whole.manifest["member_weights"]


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_snapshots_are_spread_evenly_over_an_epoch(small: Small, steps: int, count: int) -> None:
    recipe = small(overrides={"snapshots": count}).recipe
    kept = [step for step in range(1, steps + 1) if recipe.snapshot_after(step, steps)]
    assert len(kept) == min(count, steps)
    assert kept[-1] == steps
    gaps = [later - earlier for earlier, later in pairwise([0, *kept])]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("defense", "overrides", "says"),
    [
        ("baseline", {"stop_after": 3}, "`stop_after` of the recipe to be at most its 2 epochs, got 3"),
        ("baseline", {"stop_after": -1}, "stop_after"),
        ("baseline", {"stop_after": 1.5}, "stop_after"),
        ("baseline", {"stop_after": "early"}, "stop_after"),
        ("baseline", {"snapshots": -2}, "snapshots"),
        ("baseline", {"snapshots": 0.5}, "snapshots"),
        ("baseline", {"snapshots": 5000}, "snapshots"),
        ("baseline", {"snapshot": 2}, "did you mean snapshots"),
        ("mrboost", {"snapshots": 2}, "`snapshots` of the recipe is not for defense 'mrboost'"),
        ("mrboost", {"stop_after": 1}, "`stop_after` of the recipe is not for defense 'mrboost'"),
        ("baseline", {"snapshots": 6}, "`snapshots` of the recipe, 6, is more than the 5 steps of an epoch"),
    ],
)
def test_what_cannot_be_stopped_or_kept_is_refused(
    small: Small, defense: str, overrides: dict[str, Any], says: str
) -> None:
    with pytest.raises(RobenchError, match=re.escape(says)) as error:
        small(defense, overrides=overrides)
    assert "\n" not in str(error.value)
