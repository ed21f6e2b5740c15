"""What the bench compares computes the same thing, and it says so; nothing here is timed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed import measure, published
from benchmarks.speed.__main__ import command
from robench.attacks import ATTACKS
from robench.attacks.mdi2 import diversify
from robench.attacks.sgm import skip_gradient
from robench.cli import run
from robench.core.data import Data, make
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.models import ModelSpec, build
from robench.core.rng import Draws, Stream
from robench.defenses import Batch
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.threats import Whitebox
from robench.training.loop import make_optimizer, train_step
from robench.training.task import resolve

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SPEC = ModelSpec(name="resnet8", num_classes=4, in_channels=1, mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    """Two random networks with an opinion, so that some images fall and some stand."""
    made = Ensemble(build(SPEC, key) for key in range(2)).eval()
    with torch.no_grad():
        for member in made.members:
            member.model.fc.weight.mul_(4)
    return made


@pytest.fixture(scope="module")
def data(ensemble: Ensemble) -> Data:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        labels = ensemble(torch.from_numpy(pixels).float() / 255).argmax(dim=1).numpy()
    return make("npz:noise", (pixels, labels), (pixels, labels), classes=list("abcd"), recipe="digits")


@pytest.fixture
def plan(ensemble: Ensemble, data: Data) -> measure.Plan:
    return measure.Plan(
        ensemble=ensemble, data=data, device=CPU, images=16, batch_size=8, steps=3, rounds=1,
        whitebox_images=16, whitebox_steps=3, restarts=3, layers=(2, 5),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["pgd", "pgd with momentum", "mdi2", "sgm"])
def test_the_plain_attack_makes_the_images_of_ours(name: str, ensemble: Ensemble, plan: measure.Plan) -> None:
    model, (images, labels) = copy.deepcopy(ensemble).double(), plan.batch(12)
    images, draws = images.double(), Draws.of(range(12))
    fields: dict[str, Any] = {"steps": 4} | ({"momentum": 1.0} if "momentum" in name else {})
    attack: Any = ATTACKS.get(name.split()[0])(**fields)
    more: dict[str, Any] = {"momentum": attack.momentum}
    averaged = published.Averaged(model)
    if name.startswith("pgd"):
        more["start"] = images + (2 * draws.uniform("start", images.shape[1:], images) - 1) * 0.2
    if name == "mdi2":
        unit = draws.uniform("diversity", (4, 4), images.new_empty(0, dtype=torch.float32))
        more["view"] = lambda z, step: diversify(z, unit[:, step], attack.probability, attack.smallest)

    def theirs() -> Tensor:
        return published.ascend(averaged, images, labels, 0.2, steps=4, step_ratio=0.2, **more)

    if name == "sgm":
        with skip_gradient(averaged, attack.gamma, attack.blocks):
            wanted = theirs()
    else:
        wanted = theirs()
    torch.testing.assert_close(attack(model, images, labels, 0.2, draws).images, wanted, rtol=0, atol=1e-9)
    assert (wanted - images).abs().amax() > 0.1


def test_the_plain_protocol_gives_the_accuracies_of_ours(ensemble: Ensemble, data: Data, plan: measure.Plan) -> None:
    images, labels = plan.batch(16)
    radii = (0.05, 0.1, 0.2)
    wanted = published.whitebox(published.Averaged(ensemble), images, labels, radii, steps=4, restarts=3)
    threat = Whitebox(eps=radii, restarts=3, attacks=(ATTACKS.get("pgd")(steps=4),))
    found = Evaluator(data).run([EvaluatedModel.of_model(ensemble, CPU)], threat, torch.arange(16))
    assert found.where(threat="whitebox").accuracy(["eps"])["accuracy"].tolist() == list(wanted.values())
    assert 0 < sum(wanted.values()) < 3


@pytest.mark.parametrize(("layer", "early"), [(1, True), (4, True), (4, False), (8, False)])
def test_the_plain_dverge_step_makes_the_weights_of_ours(layer: int, early: bool, data: Data) -> None:
    ours = Ensemble(build(SPEC, key) for key in range(3)).double().train()
    theirs = copy.deepcopy(ours)
    task = resolve(data, "dverge", 3, overrides={"layer": layer, "layer_per": "epoch", "eps": 0.1, "steps": 3})
    stream = Stream(("test",))
    source, target = (stream.uniform((8, 1, 8, 8), name).double() for name in ("source", "target"))
    labels = stream.permutation(8, "labels") % 4
    train_step(ours, make_optimizer(task.recipe, ours), task, Batch(source, labels, stream, stream, target))
    optimizers = [make_optimizer(task.recipe, Ensemble([member])) for member in theirs.members]
    members = list(theirs.members)
    published.dverge_step(members, optimizers, source, labels, target, layer=layer, eps=0.1, steps=3, early=early)
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-9, msg=name)


def test_every_variant_of_a_part_has_its_row(plan: measure.Plan) -> None:
    threads = torch.get_num_threads()
    rows = measure.bench(plan)
    assert torch.get_num_threads() == threads
    assert list(dict.fromkeys(row.part for row in rows)) == ["roof", *measure.PARTS]
    timed = [row for row in rows if row.seconds is not None]
    assert all(row.seconds > 0 and row.per_second > 0 for row in timed)  # type: ignore[operator]
    assert all(row.ratio == 1 for row in timed if row.variant == measure.AUTHORS)
    assert all(row.roof > 0 for row in timed if row.part != "whitebox")  # type: ignore[operator]
    for part in ("pgd", "mdi2", "sgm", "whitebox"):
        own = {row.variant: row for row in timed if row.part == part}
        same = [row for name, row in own.items() if "DIFGSM" not in name and "bfloat16" not in name]
        assert len(same) >= 2
        assert len({tuple(row.accuracy.items()) for row in same}) == 1, part
        assert measure.native(CPU).keys() <= own.keys()
    peers = {"torchattacks PGD": "torchattacks", "foolbox LinfPGD": "foolbox"}
    notes = {row.variant: row.note for row in rows if row.part == "pgd"}
    assert all(notes[name] == ("" if find_spec(package) else "not installed") for name, package in peers.items())


def test_the_mean_over_layers_is_that_of_the_seconds(plan: measure.Plan) -> None:
    rows = [row for row in measure.bench(plan, ["dverge"]) if row.part == "dverge"]
    variants = [measure.AUTHORS, measure.WHOLE, *measure.native(CPU)]
    timed = [row for row in rows if row.seconds is not None]
    assert [(row.layer, row.variant) for row in timed] == [(layer, name) for layer in (2, 5, 0) for name in variants]
    for name in variants:
        second, fifth, mean = (row for row in timed if row.variant == name)
        assert mean.seconds == pytest.approx((second.seconds + fifth.seconds) / 2)  # type: ignore[operator]
        assert mean.per_second == pytest.approx(8 / mean.seconds)  # type: ignore[operator]
        assert min(second.roof, fifth.roof) <= mean.roof <= max(second.roof, fifth.roof)  # type: ignore[type-var]
    ours = next(row for row in timed if (row.layer, row.variant) == (0, "robench float32"))
    theirs = next(row for row in timed if (row.layer, row.variant) == (0, measure.AUTHORS))
    assert ours.ratio == pytest.approx(theirs.seconds / ours.seconds)  # type: ignore[operator]


def test_what_the_processor_would_imitate_is_named_and_not_timed(
    plan: measure.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    rows = measure.bench(plan, ["pgd"])
    (imitated,) = (row for row in rows if "bfloat16" in row.variant)
    assert (imitated.part, imitated.variant, imitated.seconds) == ("pgd", "robench bfloat16", None)
    assert imitated.note == "no instructions for it here"


def test_work_is_counted_where_the_forward_pass_comes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 7))
    image = torch.zeros(1, 3, 5, 5)
    convolution = measure.Work(2 * 4 * 25 * 27, 75 + 100)
    assert measure._work(model, lambda: model[0](image)) == convolution
    assert measure._work(model, lambda: model(image)) == convolution.plus(measure.Work(2 * 7 * 100, 107))
    assert not model[0]._forward_hooks


def test_the_roof_is_the_later_limit() -> None:
    roof = measure.Roof({"float32": 10.0, "bfloat16": 20.0}, bandwidth=4.0)
    assert roof.seconds(measure.Work(100, 1), "float32") == 10
    assert roof.seconds(measure.Work(100, 1), "bfloat16") == 5
    assert roof.seconds(measure.Work(100, 20), "float32") == 20
    assert roof.seconds(measure.Work(100, 20), "bfloat16") == 10


def test_variants_take_turns() -> None:
    calls: list[str] = []
    times = measure.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 2, CPU)  # type: ignore[misc]
    assert calls == list("ababab")
    assert [len(own) for own in times.values()] == [2, 2]


def test_wrong_words(plan: measure.Plan) -> None:
    with pytest.raises(RobenchError, match="part of the bench"):
        measure.bench(plan, ["pdg"])
    with pytest.raises(RobenchError, match=r"`layers` of the bench in 1\.\.8, got 9"):
        replace(plan, layers=(9,))
    with pytest.raises(RobenchError, match="`rounds` of the bench to be at least 1, got 0"):
        replace(plan, rounds=0)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Data) -> None:
    images = np.repeat(data.test.images.numpy(), 6, axis=0)
    labels = np.repeat(data.test.labels.numpy(), 6)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    amounts = ["--images", "8", "--steps", "2", "--rounds", "1", "--device", "cpu", "--parts", "pgd"]
    where = ["--dataset", f"npz:{tmp_path / 'data.npz'}", "--out", str(tmp_path / "out")]
    assert run([*amounts, *where, "--format", "json"], command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert printed["members"] == 3
    assert {row["part"] for row in printed["rows"]} == {"roof", "pgd"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"bench.{kind}" for kind in ("json", "md", "pdf", "png")
    }
    assert str(tmp_path) not in (tmp_path / "out" / "bench.json").read_text()
    assert run([*amounts, *where[:2], "--layers", "x"], command) == 2
    assert "--layers such as 1,10,20" in capsys.readouterr().err
