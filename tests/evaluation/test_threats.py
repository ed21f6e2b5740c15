"""Which restarts a threat makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
from robench.evaluation.schema import PROTOCOL
from robench.evaluation.threats import THREATS, Queries, Whitebox, starts, versions


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
    usual = {name: kind.model_fields["restarts"].default for name, kind in THREATS.items()}
    assert usual == {"whitebox": 5, "convergence": 1, "queries": 1, "transfer": 5, "blackbox": 3}
    assert usual == {name: protocol.restarts for name, protocol in PROTOCOL.items()}


def test_queries_are_of_outputs_alone() -> None:
    asked = Queries(eps=(0.1,))
    assert [attack.passes for attack in asked.attacks] == [100, 1000, 10_000]
    with pytest.raises(RobenchError, match="'pgd' follows gradients, and threat 'queries' gives outputs alone"):
        Queries(eps=(0.1,), attacks=(Square(), PGD()))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "'eps' of threat 'whitebox': field required; radii in units of a pixel"),
        ({"eps": 0.1}, "'eps' of threat 'whitebox': input should be a valid tuple, got 0.1; radii .* such as"),
        ({"eps": ()}, "'eps' of threat 'whitebox': tuple should have at least 1 item"),
        ({"eps": (0.1, 2.0)}, "'eps' of threat 'whitebox': input should be less than or equal to 1, got 2.0"),
        ({"eps": (-0.1,)}, "'eps' of threat 'whitebox': input should be greater than 0, got -0.1; .*8 / 255"),
        ({"eps": (0.0,)}, "'eps' of threat 'whitebox': input should be greater than 0, got 0.0"),
        ({"eps": (float("nan"),)}, "'eps' of threat 'whitebox': input should be a finite number, got nan"),
        ({"eps": (0.1,), "restarts": 0}, "'restarts' of threat 'whitebox'.* got 0; Random starts of each attack"),
        ({"eps": (0.1,), "restarts": 2.5}, "'restarts' of threat 'whitebox'.* got 2.5"),
        (
            {"eps": (0.1,), "restarts": True},
            "'restarts' of threat 'whitebox': a number is expected, no truth value, got True",
        ),
        ({"eps": (True,)}, "'eps' of threat 'whitebox': a number is expected, no truth value, got True"),
        ({"eps": (0.1,), "restart": 2}, "unknown field of threat 'whitebox' 'restart'; did you mean restarts"),
        ({"eps": (0.1,), "attacks": ("pgd",)}, "'attacks' of threat 'whitebox': .*, got 'pgd'"),
        ({"eps": (0.1,), "surrogates": ()}, "unknown field of threat 'whitebox' 'surrogates'"),
    ],
)
def test_wrong_fields_of_a_threat_give_one_line(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(RobenchError, match=match) as caught:
        Whitebox(**fields)
    assert "\n" not in str(caught.value)


def test_radii_are_ascending_and_differ() -> None:
    assert Whitebox(eps=(0.2, 0.1, 0.2)).eps == (0.1, 0.2)
