"""What users write for radii and attacks."""

from __future__ import annotations

import pytest

from robench.attacks.fgsm import FGSM
from robench.attacks.pgd import PGD
from robench.core.errors import RobenchError
from robench.evaluation.words import attacks, radii, radius, steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.03", (0.03,)),
        ("8/255", (8 / 255,)),
        ("0.01:0.07:0.01", (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07)),
        ("0.2, 0.1,0.1", (0.1, 0.2)),
        ("1/255:3/255:1/255", (1 / 255, 2 / 255, 3 / 255)),
    ],
)
def test_radii(text: str, expected: tuple[float, ...]) -> None:
    assert radii(text) == expected


@pytest.mark.parametrize("text", ["0.03", "8/255", "1/255", "1", "0.5", "0.0314", "0.03137254", "0.0313725"])
def test_a_radius_reads_as_itself_and_as_no_other(text: str) -> None:
    (eps,) = radii(text)
    assert radius(eps) == text
    assert radii(radius(0.1 + 0.2)) == (0.1 + 0.2,)


@pytest.mark.parametrize(
    "text", ["", "a", "0.1:0.2", "0.1:0.3:0", "0.3:0.1:0.1", "-0.1", "0", "2", "1/0", "0:1:1e-9", "nan"]
)
def test_wrong_radii(text: str) -> None:
    with pytest.raises(RobenchError, match="eps"):
        radii(text)


def test_the_protocol_is_the_default() -> None:
    assert attacks("whitebox") == (PGD(),)
    versions = attacks("blackbox")
    assert [(attack.name, attack.loss) for attack in versions] == [
        ("pgd", "ce"),
        ("pgd", "cw"),
        ("mdi2", "ce"),
        ("mdi2", "cw"),
        ("sgm", "ce"),
        ("sgm", "cw"),
    ]
    # 3 surrogates x 2 losses x (3 starts of PGD, M-DI², SGM) = 30 versions.
    assert 3 * sum(3 if attack.name == "pgd" else 1 for attack in versions) == 30
    assert versions[0] == PGD(momentum=1.0, steps=100)
    assert attacks("convergence") == (FGSM(), PGD(), PGD(steps=500), PGD(steps=1000))


def test_an_attack_by_name_keeps_the_protocol_s_fields_where_it_has_it_once() -> None:
    assert attacks("blackbox", ["pgd"], ["ce"]) == (PGD(momentum=1.0, steps=100),)
    assert attacks("convergence", ["pgd"]) == (PGD(),)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("fgsm", 1),
        ("pgd", 50),
        ("pgd:steps=500", 500),
        ("mdi2:steps=7:momentum=0", 7),
        ("square:queries=9", 9),
        ("square", 1000),
        ("nobody/knows", 1),
        ("", 1),
    ],
)
def test_steps_of_a_label(label: str, expected: int) -> None:
    assert steps(label) == expected


def test_fields_are_converted_and_round_trip() -> None:
    (made,) = attacks("whitebox", ["pgd:momentum=1:random_start=false"], ["cw"], steps=7)
    assert made == PGD(momentum=1.0, random_start=False, loss="cw", steps=7)
    assert attacks("whitebox", [made.label], ["cw"]) == (made,)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("whitebox", ["pdg"]), "did you mean pgn or pgd"),
        (("whitebox", ["pgd:momentun=1"]), "did you mean momentum"),
        (("whitebox", ["pgd:momentum=much"]), "momentum"),
        (("whitebox", ["pgd:momentum"]), "FIELD=VALUE"),
        (("whitebox", ["pgd"], ["cv"]), "did you mean"),
        (("whitebox", ["pgd"], [], 0), "steps"),
    ],
)
def test_wrong_words(arguments: tuple[object, ...], match: str) -> None:
    with pytest.raises(RobenchError, match=match):
        attacks(*arguments)  # type: ignore[arg-type]
