"""Which restarts a threat makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor, nn

from robench.attacks import Attack
from robench.attacks.fgsm import FGSM
from robench.attacks.mdi2 import MDI2
from robench.attacks.pgd import PGD
from robench.attacks.sgm import SGM
from robench.attacks.square import Square
from robench.core.errors import RobenchError
from robench.core.rng import Draws
from robench.evaluation.threats import RESTARTS, Queries, starts, versions


@dataclass(frozen=True, kw_only=True)
class Drawing(Attack):
    """Draws, and has no field that says so."""

    name: ClassVar[str] = "drawing"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        return images


@pytest.mark.parametrize(
    ("attack", "made", "survived"),
    [
        (PGD(), 3, 3),
        (PGD(random_start=False), 1, 1),
        (FGSM(), 1, 1),
        (SGM(), 1, 1),
        # The study's three starts are of PGD alone.
        (MDI2(), 3, 1),
        (MDI2(random_start=True), 3, 3),
        (Square(), 3, 3),
        (Drawing(), 3, 3),
    ],
)
def test_restarts_and_versions(attack: Attack, made: int, survived: int) -> None:
    assert (len(starts(attack, 3)), len(versions(attack, 3))) == (made, survived)


def test_passes_are_the_field_that_there_is() -> None:
    assert (PGD(steps=7).passes, Square(queries=9).passes, FGSM().passes, Drawing().passes) == (7, 9, 1, 1)


def test_starts_of_the_protocol() -> None:
    assert RESTARTS == {"whitebox": 5, "convergence": 1, "queries": 1, "transfer": 5, "blackbox": 3}


def test_queries_are_of_outputs_alone() -> None:
    asked = Queries(eps=(0.1,))
    assert [attack.passes for attack in asked.attacks] == [100, 1000, 10_000]
    with pytest.raises(RobenchError, match="'pgd' follows gradients, and threat 'queries' gives outputs alone"):
        Queries(eps=(0.1,), attacks=(Square(), PGD()))
