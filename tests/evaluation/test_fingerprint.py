"""A run whose code has changed is not the run that was judged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robench.core.data import Data
from robench.core.ensemble import Ensemble
from robench.core.logs import Lines, logged
from robench.core.models import ModelSpec, build, import_model
from robench.evaluation.fingerprint import FILE, fixed_images, judged_identity, recognise
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Whitebox
from robench.session import Session, stored
from robench.store.runs import Run, Runs

CPU = torch.device("cpu")
SHAPE = torch.Size((1, 8, 8))
WHITE = Whitebox(eps=(0.1,), restarts=1)
CODE = """
from torch import nn
from robench.core.models import MODELS

class Wrap(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return 10 * self.net({argument})  # which has learnt nothing, and is as sure as if it had

def make(num_classes, in_channels):
    return Wrap(MODELS.get("resnet8")(num_classes=num_classes, in_channels=in_channels))
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the code of a run's model."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(argument: str) -> None:
        (tmp_path / "fingerprinted.py").write_text(CODE.format(argument=argument))
        sys.modules.pop("fingerprinted", None)

    write("images")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


@pytest.fixture
def run(tmp_path: Path, written: Callable[[str], None]) -> Run:
    spec = ModelSpec(name="fingerprinted:make", num_classes=4, in_channels=1, mean=(0.5,), std=(0.25,))
    import_model(spec.name)
    ensemble = Ensemble([build(spec, 1)])
    return Runs(tmp_path / "runs").save(
        "changing", ensemble, members=[spec], defense={"name": "baseline"}, seed=0, role="target", data=None
    )


def judged(run: Run, data: Data) -> tuple[list[float], list[str]]:
    lines: list[str] = []
    session = Session(Runs(run.folder.parent), data, Settings(CPU), 16)
    import_model("fingerprinted:make")
    with logged(Lines(lines)):
        found = session.judge([run], WHITE, probe=False)
    return found.where(threat="clean").frame["margin"].tolist(), lines


def test_rows_of_code_that_has_changed_are_not_reused(run: Run, data: Data, written: Callable[[str], None]) -> None:
    before, lines = judged(run, data)
    assert lines == []
    assert judged(run, data) == (before, [])
    first = judged_identity(run)
    assert first == run.identity
    written("1 - images")
    after, (line,) = judged(run, data)
    assert after != before
    assert line.startswith("run 'changing' is another function than the one that was judged: for the same images")
    assert judged_identity(run) != first
    assert stored([run]).where(threat="clean").frame["margin"].tolist() == after, "readers show what was judged last"
    written("images")
    again, (line,) = judged(run, data)
    assert again == before
    assert judged_identity(run) == first
    assert stored([run]).where(threat="clean").frame["margin"].tolist() == before


def test_rounding_and_another_size_are_no_change(run: Run, data: Data) -> None:
    ensemble = run.load()
    recognise(run, ensemble, SHAPE, CPU).keep()
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.mul_(1 + 1e-6)
    assert recognise(run, ensemble, SHAPE, CPU).identity == run.identity
    larger = recognise(run, ensemble, torch.Size((1, 12, 12)), CPU)
    assert (larger.identity, larger.changed) == (run.identity, 0.0)
    halved = recognise(run, ensemble.to(torch.bfloat16).float(), SHAPE, CPU)
    assert halved.identity != run.identity
    assert halved.changed > 1e-3


def test_looking_writes_nothing_and_what_fails_is_left_to_the_evaluator(run: Run) -> None:
    class Refuses(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ValueError("never")

    assert recognise(run, Ensemble([Refuses()]), SHAPE, CPU).identity == run.identity
    recognise(run, run.load(), SHAPE, CPU)
    assert not (run.folder / FILE).exists()


def test_images_are_the_same_everywhere() -> None:
    images = fixed_images(SHAPE, CPU)
    assert images.shape == (16, 1, 8, 8)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    torch.testing.assert_close(images, fixed_images(SHAPE, CPU), rtol=0, atol=0)
    fine, coarse = (part.diff(dim=-1).abs().mean() for part in images.split(8))
    assert float(fine) > 2 * float(coarse)
