"""Several runs as one ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robench.cli import run as robench
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.models import ModelSpec, build
from robench.evaluation.evaluated import EvaluatedModel, kinship
from robench.evaluation.rows import FolderRows
from robench.store.combining import combine
from robench.store.runs import Run, Runs

CPU = torch.device("cpu")
RESNET = ModelSpec(name="resnet8", num_classes=4, in_channels=1, mean=(0.5,), std=(0.25,))
WIDE = replace(RESNET, name="resnet20")


def saved(store: Runs, name: str, seeds: tuple[int, ...], spec: ModelSpec = RESNET, defense: str = "baseline") -> Run:
    ensemble = Ensemble(build(spec, seed) for seed in seeds).eval()
    data = {"name": "npz:noise", "images": "0" * 16}
    return store.save(
        name, ensemble, members=[spec] * len(seeds), defense={"name": defense}, seed=3, role="target", data=data
    )


@pytest.fixture
def store(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def test_members_of_several_architectures_decide_together(store: Runs) -> None:
    parts = [saved(store, "small", (1, 2)), saved(store, "large", (3,), WIDE, "dverge")]
    pool = combine("pool", parts, store)
    assert (pool.n, pool.role, pool.defense, pool.rule) == (3, "surrogate", "mixed", "softmax")
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        own = torch.stack([member(images) for part in parts for member in part.load().members])
        torch.testing.assert_close(pool.load().logits(images), own, rtol=0, atol=0)
        mean = own.softmax(dim=-1).mean(dim=0).log()
        torch.testing.assert_close(pool.load()(images), mean)
    assert pool.manifest["member_weights"] == [w for part in parts for w in part.manifest["member_weights"]]
    assert pool.manifest["data"] == parts[0].manifest["data"]
    assert combine("voting", parts, store, rule="vote", role="target").rule == "vote"


def test_what_was_combined_is_no_hold_out_of_its_parts(store: Runs) -> None:
    first, second, third = (saved(store, name, (seed,)) for seed, name in enumerate(("a", "b", "c")))
    pool = EvaluatedModel.of_run(combine("pool", [first, second], store), CPU)
    for part in (first, second):
        assert kinship(pool, EvaluatedModel.of_run(part, CPU)) is not None
        assert kinship(EvaluatedModel.of_run(part, CPU), pool) is not None
    assert kinship(pool, EvaluatedModel.of_run(third, CPU)) is None
    deeper = combine("deeper", [store.get("pool"), third], store)
    assert {entry["run"] for entry in deeper.manifest["ancestors"]} == {"pool", "a", "b", "c"}


def test_wrong_parts_are_refused(store: Runs) -> None:
    one, two = saved(store, "one", (1,)), saved(store, "two", (2,))
    twin = saved(store, "twin", (5, 1))
    more = saved(store, "more", (6,), replace(RESNET, num_classes=5))
    colour = saved(store, "colour", (7,), replace(RESNET, in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3))
    for parts, message in (
        ([], "at least two runs to combine, got none"),
        ([one], "at least two runs to combine, got one"),
        ([one, one], "member 1 of one is member 1 of one once more"),
        ([one, twin], "member 2 of twin is member 1 of one once more"),
        ([one, more], "'more' has 5 classes, and 'one' 4"),
        ([one, colour], "'colour' has 3 channels, and 'one' 1"),
    ):
        with pytest.raises(RobenchError, match=message):
            combine("pool", parts, store)
    assert "pool" not in store.names()
    with pytest.raises(RobenchError, match="run 'two' exists"):
        combine("two", [one, two], store)


def test_the_command_makes_a_pool_that_others_are_judged_on(
    store: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seeds, spec in (("target", (1,), RESNET), ("r", (2,), RESNET), ("w", (3,), WIDE)):
        saved(store, name, seeds, spec)
    runs = ["--runs", str(store.root)]
    assert robench(["combine", "r", "w", "--name", "pool", *runs]) == 0
    assert capsys.readouterr().out == "pool\n"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "d.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    asked = ["eval", "target", "--threat", "blackbox", "--surrogates", "pool", "--dataset", f"npz:{tmp_path / 'd.npz'}"]
    small = ["--samples", "16", "--steps", "2", "--restarts", "1", "--eps", "0.2", "--attacks", "pgd,mdi2"]
    assert robench([*asked, *small, *runs]) == 0
    rows = FolderRows(store.folder("target") / "outcomes").everything().where(threat="blackbox").frame
    assert set(rows["surrogate"]) == {"pool"}
    assert rows.groupby(["attack", "loss"]).size().eq(16).all()
    assert rows["linf"].max() > 0.1
    assert robench(["combine", "r", "gone", "--name", "other", *runs]) == 2
    assert "unknown run 'gone'" in capsys.readouterr().err
