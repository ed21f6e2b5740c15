"""Diversity against a direct computation, and tracking along training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from robench.attacks.distill import distill
from robench.core.data import Data, to_images
from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.evaluation.diversity import Tracking, diversity, measure, transfer_rate
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.predict import classes
from robench.store.runs import Runs
from robench.training.loop import ensure
from robench.training.task import resolve

MakeModel = Callable[[int], EvaluatedModel]


def test_diversity_equals_a_direct_computation(make_model: MakeModel, data: Data) -> None:
    ensemble = make_model(0).ensemble
    images, labels = to_images(data.test.images[:4]), data.test.labels[:4]
    found = diversity(ensemble, images, labels, eps=0.1, steps=3)
    order = Stream(("diversity", 0)).permutation(4).tolist()
    following = {order[i]: order[(i + 1) % 4] for i in range(4)}
    layer = 1 + int(float(Stream(("diversity", 0)).uniform((1,), "layer", 0)) * 8)
    expected = torch.zeros(4)
    for i, j in ((0, 1), (1, 0)):
        sources = torch.stack([images[following[k]] for k in range(4)])
        crafted = distill(ensemble.members[i], sources, images, layer, eps=0.1, steps=3, step_ratio=1 / 3)
        with torch.no_grad():
            log_p = ensemble.members[j](crafted).log_softmax(dim=1)
        expected -= log_p[torch.arange(4), labels] / 2
    torch.testing.assert_close(found, expected)


def test_measured_on_a_run_it_is_kept_resumed_and_repaired(
    make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    target = make_model(0)
    options: dict[str, Any] = {"eps": 0.1, "steps": 2, "device": torch.device("cpu")}
    monkeypatch.setattr("robench.evaluation.diversity.GROUP", 2)
    samples = torch.arange(30).flip(0)
    whole = measure(target, data, samples, tmp_path / "whole", **options)
    expected = diversity(
        target.ensemble, to_images(data.test.images[samples]), data.test.labels[samples], eps=0.1, steps=2
    )
    assert whole["sample"].tolist() == list(range(30))
    torch.testing.assert_close(torch.tensor(whole["diversity"].to_numpy()).flip(0), expected)

    def interrupted(done: int, total: int, what: str) -> None:
        if done > 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(target, data, samples, tmp_path / "cut", progress=interrupted, **options)
    counted: list[int] = []
    again = measure(target, data, samples, tmp_path / "cut", progress=lambda done, *_: counted.append(done), **options)
    pd.testing.assert_frame_equal(again, whole)
    assert counted == [22, 24, 26, 28, 30]
    (part, *_) = sorted((tmp_path / "cut").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    told.clear()
    mended = measure(target, data, samples, tmp_path / "cut", **options)
    pd.testing.assert_frame_equal(mended, whole)
    assert told == [f"{part} is damaged: it is set aside and its values are computed again"]
    assert part.with_name(f"{part.name}.damaged").exists()
    counted.clear()
    other = measure(
        target, data, samples[:6], tmp_path / "cut", progress=lambda done, *_: counted.append(done), **options
    )
    assert counted == [2, 4, 6]
    assert len(other) == 6


def test_one_member_has_no_diversity(make_model: MakeModel, data: Data) -> None:
    from robench.core.ensemble import Ensemble

    alone = Ensemble([make_model(0).ensemble.members[0]])
    with pytest.raises(RobenchError, match="at least 2 members"):
        diversity(alone, to_images(data.test.images[:4]), data.test.labels[:4])


def test_identical_members_fall_together(make_model: MakeModel, data: Data) -> None:
    from robench.core.ensemble import Ensemble

    member = make_model(0).ensemble.members[0]
    images = to_images(data.test.images[:16])
    with torch.no_grad():
        labels = member(images).argmax(dim=1)
        fallen = transfer_rate(Ensemble([member, member]), images, labels, eps=0.3, steps=5, restarts=1)
    assert fallen > 0.9


def test_tracking_is_recorded_and_changes_no_weight(data: Data, tmp_path: Path) -> None:
    overrides = {"epochs": 3, "batch_size": 20}
    task = resolve(data, "baseline", 2, models=["resnet8"], overrides=overrides)
    track = Tracking(0.1, 0.2, images=10, steps=2).on(data, torch.device("cpu"))
    cpu = torch.device("cpu")
    plain = ensure(task, data, Runs(tmp_path / "plain"), device=cpu)
    tracked = ensure(task, data, Runs(tmp_path / "tracked"), device=cpu, track=track, track_every=2)
    assert tracked.weights == plain.weights
    history = tracked.manifest["history"]
    assert ["track" in entry for entry in history] == [True, False, True]
    assert history[0]["track"]["every"] == 2
    chosen = data.order(data.resolved("auto", 20))[:20]
    right = classes(tracked.load(), to_images(data.test.images[chosen])) == data.test.labels[chosen]
    assert history[-1]["track"]["clean"] == pytest.approx(float(right.float().mean()))
    assert history[-1]["track"]["clean_images"] == 20
    measured = ensure(task, data, Runs(tmp_path / "spaced"), device=cpu, track=track).manifest["history"]
    assert measured[0]["track"]["every"] >= 1
    assert "track" not in plain.manifest["history"][0]
