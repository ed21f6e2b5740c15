"""Images of others: judged as they are, or refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import robench
from robench.attacks import ATTACKS
from robench.attacks.pgd import PGD
from robench.core.data import Data, make
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Draws, Stream
from robench.evaluation.threats import Whitebox

EPS = 0.1


@pytest.fixture
def data(make_ensemble: Callable[..., Ensemble]) -> Data:
    """Images that the ensemble classifies as they are labelled."""
    pixels = (Stream(("given",)).uniform((24, 3, 16, 16), "images") * 255).to(torch.uint8)
    with torch.no_grad():
        labels = make_ensemble(n=2)(pixels.float() / 255).argmax(dim=1)
    arrays = pixels.numpy(), labels.numpy()
    return make("given", arrays, arrays, classes=[str(label) for label in range(5)])


def crafted(ensemble: Ensemble, data: Data, samples: list[int]) -> Tensor:
    images = data.test.images[samples].float() / 255
    return PGD(steps=3)(ensemble, images, data.test.labels[samples].long(), EPS, Draws.of(samples)).images


def save(path: Path, images: Any, samples: Any) -> str:
    np.savez(path, images=np.asarray(images), samples=np.asarray(samples))
    return f"given/{path}"


def judged(ensemble: Ensemble, data: Data, attack: Any, eps: float = EPS) -> Any:
    threat = Whitebox(eps=(eps,), attacks=(attack,), restarts=1)
    found = robench.evaluate(list(ensemble.members), data, threat, samples=24, subset="first", probe=False)
    return found.where(threat="whitebox").frame


@pytest.mark.filterwarnings("ignore::robench.core.errors.DoubtWarning")
def test_images_get_the_verdicts_that_they_got_where_they_were_made(
    make_ensemble: Callable[..., Ensemble], data: Data, tmp_path: Path
) -> None:
    """In any order in the file; the evaluator's own draws make the same images again."""
    ensemble = make_ensemble(n=2)
    order = Stream(("given",)).permutation(24).tolist()
    name = save(tmp_path / "own.npz", crafted(ensemble, data, order), order)
    own, theirs = (judged(ensemble, data, attack) for attack in (PGD(steps=3), ATTACKS.get(name)()))
    assert own["prediction"].tolist() == theirs["prediction"].tolist()
    assert np.allclose(own["margin"], theirs["margin"], atol=1e-5)
    assert theirs["linf"].max() <= EPS + 1e-6
    assert set(theirs["attack"]) == {ATTACKS.get(name).name}


@pytest.mark.filterwarnings("ignore::robench.core.errors.DoubtWarning")
def test_pixels_of_a_byte_are_taken(make_ensemble: Callable[..., Ensemble], data: Data, tmp_path: Path) -> None:
    clean = data.test.images.numpy()
    name = save(tmp_path / "bytes.npz", clean, range(24))
    rows = judged(make_ensemble(n=2), data, ATTACKS.get(name)())
    assert rows["correct"].all()
    assert (rows["linf"] == 0).all()


def test_an_image_outside_the_ball_is_refused_and_not_projected(
    make_ensemble: Callable[..., Ensemble], data: Data, tmp_path: Path
) -> None:
    images = crafted(make_ensemble(n=2), data, list(range(24)))
    attack = ATTACKS.get(save(tmp_path / "far.npz", images, range(24)))()
    with pytest.raises(RobenchError, match=r"sample \d+ is 0\.1 away from the clean one, beyond ε 0\.05; .*--eps"):
        judged(make_ensemble(n=2), data, attack, eps=0.05)


def test_a_sample_without_an_image_is_named(make_ensemble: Callable[..., Ensemble], data: Data, tmp_path: Path) -> None:
    images = crafted(make_ensemble(n=2), data, list(range(20)))
    attack = ATTACKS.get(save(tmp_path / "few.npz", images, range(20)))()
    with pytest.raises(RobenchError, match="images of 20 samples, and none of sample 20 nor of 3 others"):
        judged(make_ensemble(n=2), data, attack)


@pytest.mark.parametrize(
    ("images", "samples", "said"),
    [
        (np.zeros((2, 3, 4)), [0, 1], "got float64 (2, 3, 4)"),
        (np.zeros((2, 3, 4, 4)), [0], "and int64 (1,)"),
        (np.zeros((2, 3, 4, 4)), [0.0, 1.0], "and float64 (2,)"),
        (np.full((2, 3, 4, 4), 1.5), [0, 1], "float in [0, 1]"),
        (np.full((2, 3, 4, 4), np.nan), [0, 1], "float in [0, 1]"),
        (np.zeros((2, 3, 4, 4), dtype=np.int64), [0, 1], "got int64"),
        (np.zeros((2, 3, 4, 4)), [1, 1], "a sample has several images"),
        (np.array([{}, {}]), [0, 1], "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused(images: Any, samples: Any, said: str, tmp_path: Path) -> None:
    name = save(tmp_path / "odd.npz", images, samples)
    with pytest.raises(RobenchError) as refused:
        ATTACKS.get(name)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_is_known_by_what_it_holds_and_where_it_lies_is_nowhere(
    make_ensemble: Callable[..., Ensemble], data: Data, tmp_path: Path
) -> None:
    images = crafted(make_ensemble(n=2), data, list(range(24)))
    names = [save(tmp_path / f"{where}.npz", images, range(24)) for where in ("here", "there")]
    first, second = (ATTACKS.get(name)() for name in names)
    assert first.manifest() == second.manifest()
    assert str(tmp_path) not in str(first.manifest())
    assert ATTACKS.get(first.name)() == second, "its name in the rows finds it again"
    assert pickle.loads(pickle.dumps(first)).manifest() == first.manifest()
    other = ATTACKS.get(save(tmp_path / "other.npz", images[:20], range(20)))()
    assert other.manifest() != first.manifest()
    with pytest.raises(RobenchError, match="'given/0123456789abcdef': there is no such file here"):
        ATTACKS.get("given/0123456789abcdef")
