"""Study files: what is understood, and what each mistake is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from robench.core.errors import RobenchError
from robench.defenses import DEFENSES
from robench.studies.plan import expand
from robench.studies.study import find, parse, shipped

GOOD = """
title = "A study"
dataset = "digits"
defenses = ["baseline", "dverge"]
sizes = [3]
[threats.whitebox]
steps = 5
[threats.blackbox]
surrogates = [3]
[axes.lambda]
defense = "dverge-advt"
setting = "weight"
values = [0.5, 1.0]
"""

#: What is changed in `GOOD`, and what the one line must say.
BROKEN = {
    "titel='x'": "did you mean title?",
    "seedz=[0]": "unknown key 'seedz'",
    "sizes=3": "sizes: should be a list, such as [3], got 3",
    "threats.whitebox.eps=2": "threats.whitebox.eps.1: should be less than or equal to 1, got 2",
    "sizes=[0]": "greater than or equal to 1, got 0",
    "sizes=[]": "at least 1 item",
    "sizes=[3,3]": "values should differ",
    "sizes=[1]": "`n` of defense 'dverge' to be at least 2",
    "seeds=[-1]": "greater than or equal to 0, got -1",
    "samples=0": "samples: should be greater than or equal to 1, got 0",
    "samples='many'": 'valid integer, got "many"',
    "samples=true": "a number is expected, no truth value, got true",
    "subset='all'": "'auto', 'first', 'random' or 'paper'",
    "dataset='digts'": "did you mean digits",
    "recipe='cifar'": "did you mean cifar10",
    "model='resnet9'": "did you mean resnet",
    "model='os:system'": "expected a registered name",
    "defenses=['dvrege']": "did you mean dverge",
    "defenses=[1]": "expected names that differ",
    "defenses.dverge.epoch=1": "did you mean epochs",
    "defenses.dverge.eps='wide'": "'eps' of defense 'dverge'",
    "defenses.dverge.eps=[1]": "a number, text, true or false, got [1]",
    "defenses.dverge.init='run'": "expected `init` to be scratch or baseline",
    "threats.whitebx.steps=1": "did you mean whitebox?",
    "threats.whitebox.stepz=1": "did you mean steps",
    "threats.whitebox.eps=[2.0]": "less than or equal to 1, got 2.0",
    "threats.whitebox.eps='8'": "8/255",
    "threats.whitebox.attacks=['pdg']": "did you mean pgn or pgd",
    "threats.whitebox.losses=['cee']": "unknown loss 'cee'",
    "threats.whitebox.sizes=[5]": "unknown name '5'",
    "threats.whitebox.surrogates=[3]": "unknown key 'surrogates'",
    "threats.blackbox.surrogate_defense='same'": "unknown defense 'same'",
    "threats=3": "threats: should be an object",
    "axes.lambda.setting='wieght'": "did you mean weight",
    "axes.lambda.values=[1]": "at least 2 items",
    "axes.lambda.threats=['transfer']": "'whitebox' or 'blackbox'",
    "axes.x.defense='adp'": "axes.x.setting is missing",
    "report.like='dverge2021'": "did you mean dverge2020",
    "track.images=3": "track.transfer_eps is missing",
}


def test_the_good_one_is_understood() -> None:
    study = parse("a", GOOD, ["threats.whitebox.steps=7", "title=Other", "defenses.dverge.epochs=2"])
    assert study.title == "Other"
    assert study.defenses == {"baseline": {}, "dverge": {"epochs": 2}}
    assert study.threats.whitebox is not None
    assert study.threats.whitebox.steps == 7
    assert expand("a", study).steps


@pytest.mark.parametrize("setting", BROKEN)
def test_a_broken_study_gives_one_clear_line(setting: str) -> None:
    with pytest.raises(RobenchError) as caught:
        expand("a.toml", parse("a.toml", GOOD, [setting]))
    line = str(caught.value)
    assert line.startswith("a.toml: ")
    assert BROKEN[setting] in line, line
    assert "\n" not in line


def test_what_is_no_toml_and_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RobenchError, match="not TOML"):
        parse("a.toml", "x = = 3")
    with pytest.raises(RobenchError, match="did you mean dverge2020"):
        find("dverge202")
    with pytest.raises(RobenchError, match="cannot be read"):
        find(str(tmp_path / "absent.toml"))
    for setting in ("samples", "=3", "title.x=3"):
        with pytest.raises(RobenchError, match="--set"):
            parse("a.toml", GOOD, [setting])


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_are_good(name: str) -> None:
    assert parse(*find(name)).sizes


def test_the_small_study_keeps_what_the_large_one_has() -> None:
    """Six defenses, the surrogates and attacks of the 30 versions, every threat, two values of every axis."""
    small, large = (parse(*find(name)) for name in ("dverge2020-digits", "dverge2020"))
    assert list(small.defenses) == list(large.defenses)
    assert small.threats.given().keys() == large.threats.given().keys()
    assert small.axes.keys() == large.axes.keys()
    assert len(small.sizes) >= 2
    black = small.threats.blackbox
    assert black is not None
    assert (black.surrogates, black.attacks, black.losses, black.restarts) == ((3, 5, 8), None, None, None)


def test_the_study_of_the_field_has_every_defense_that_ships() -> None:
    study = parse(*find("defenses-digits"))
    names = [name for name in DEFENSES.names() if DEFENSES.get(name).__module__.startswith("robench.")]
    assert sorted(study.defenses) == names
    assert not any(study.defenses.values()), "settings belong to the recipe"
    assert len(study.seeds) == 3


def test_a_recipe_takes_the_place_of_the_data_sets_own() -> None:
    found = expand("a", parse("a", GOOD, ["recipe='generic'"]))
    usual = expand("a", parse("a", GOOD))
    assert {step.key for step in found.steps.values()}.isdisjoint(step.key for step in usual.steps.values())


def test_a_misspelt_key_is_named_before_the_one_that_it_should_be() -> None:
    with pytest.raises(RobenchError, match="unknown key 'size'; did you mean sizes"):
        parse("a", GOOD.replace("\nsizes =", "\nsize ="))


def test_one_radius_needs_no_list() -> None:
    study = parse("a", GOOD, ["threats.whitebox.eps=0.1"])
    assert study.threats.whitebox is not None
    assert study.threats.whitebox.eps == (0.1,)
