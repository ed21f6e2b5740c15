"""Recipes are data: every file is valid, and every wrong word has an answer."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.core.data import DATASETS
from robench.core.errors import RobenchError
from robench.core.models import MODELS
from robench.core.plugins import construct
from robench.defenses import DEFENSES
from robench.training.recipes import Recipe, RecipeFile, recipe_file

NAMES = sorted(entry.name[:-5] for entry in files("robench.recipes").iterdir() if entry.name.endswith(".toml"))
CIFAR10 = recipe_file("cifar10")


def settings_of(file: RecipeFile, defense: str, n: int = 3, **overrides: Any) -> Recipe:
    return file.resolve(defense, n, overrides)[0]


def loss_of(file: RecipeFile, defense: str, n: int = 3, **overrides: Any) -> Any:
    return file.resolve(defense, n, overrides)[1]


def test_there_are_recipes() -> None:
    assert set(NAMES) >= {"cifar10", "digits", "generic"}
    assert "cifar10" in DATASETS.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_valid_for_every_defense_and_size(name: str) -> None:
    file = recipe_file(name)
    MODELS.get(file.model)
    for defense in DEFENSES.names():
        for n in range(1, 10):
            recipe, loss = file.resolve(defense, n, {})
            assert recipe.epochs >= 1
            assert loss.name == defense
    assert file.evaluation.eps
    for eps in (*file.evaluation.eps, *file.evaluation.transfer_eps):
        assert 0 < eps <= 1
    assert list(file.evaluation.eps) == sorted(set(file.evaluation.eps))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_names_no_defense_that_is_not_there(name: str) -> None:
    assert set(recipe_file(name).defenses) <= set(DEFENSES.names())


def test_cifar10_is_the_studys_recipe() -> None:
    recipe = settings_of(CIFAR10, "baseline")
    assert CIFAR10.model == "resnet20"
    assert (recipe.epochs, recipe.batch_size, recipe.pad, recipe.flip) == (200, 128, 4, True)
    assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    rates = [recipe.rate(epoch) for epoch in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert CIFAR10.evaluation.eps == (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07)
    assert CIFAR10.evaluation.transfer_eps == (0.03,)
    assert (recipe.noise, recipe.negative_slope) == (0, 0)


@pytest.mark.parametrize(("n", "eps"), [(2, 0.07), (3, 0.07), (4, 0.07), (5, 0.05), (8, 0.05), (9, 0.05)])
def test_dverge_distils_with_the_eps_of_the_size(n: int, eps: float) -> None:
    assert loss_of(CIFAR10, "dverge", n).eps == eps
    assert loss_of(CIFAR10, "dverge", n, eps=0.02).eps == 0.02


def test_the_smallest_size_that_fits_wins() -> None:
    sizes = [{"up_to": 2, "fields": {"eps": 0.2}}, {"up_to": 6, "fields": {"eps": 0.6}}]
    for order in (sizes, sizes[::-1]):
        values = {**CIFAR10.model_dump(), "defenses": {"dverge": {"fields": {"eps": 0.9}, "sizes": order}}}
        file = RecipeFile.model_validate(values)
        assert [loss_of(file, "dverge", n).eps for n in (2, 3, 6, 7)] == [0.2, 0.6, 0.6, 0.9]


def test_a_defenses_own_schedule_wins_and_the_users_wins_over_it() -> None:
    digits = recipe_file("digits")
    assert settings_of(digits, "baseline").epochs == 10
    assert settings_of(digits, "dverge").epochs == 20
    assert settings_of(digits, "dverge", epochs=3).epochs == 3


def test_words_become_values() -> None:
    words = {"epochs": "3", "lr": "1e-2", "flip": "false", "optimizer": "adam", "eps": "0.1", "craft_bn": "eval"}
    recipe, loss = CIFAR10.resolve("dverge", 3, words)
    assert (recipe.epochs, recipe.lr, recipe.flip, recipe.optimizer) == (3, 0.01, False, "adam")
    assert (loss.eps, loss.craft_bn) == (0.1, "eval")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 3}, "unknown setting of defense 'dverge' 'epoch'; did you mean epochs"),
        ({"momentums": 0.9}, "did you mean momentum"),
        ({"epsilon": 0.1}, "unknown setting .* 'epsilon'"),
        ({"epochs": "many"}, "'epochs' of the recipe: .*integer.*, got 'many'"),
        ({"epochs": 0}, "'epochs' of the recipe: .*greater than or equal to 1, got 0"),
        ({"epochs": 2.5}, "'epochs' of the recipe"),
        ({"batch_size": 1}, "'batch_size' of the recipe"),
        ({"lr": "nan"}, "'lr' of the recipe"),
        ({"lr": "inf"}, "'lr' of the recipe"),
        ({"weight_decay": float("inf")}, "'weight_decay' of the recipe"),
        ({"optimizer": "rmsprop"}, "'optimizer' of the recipe: .*'sgd' or 'adam'.*, got 'rmsprop'"),
        ({"momentum": 1}, "'momentum' of the recipe"),
        ({"negative_slope": -0.1}, "'negative_slope' of the recipe"),
        ({"noise_probability": 1.5}, "'noise_probability' of the recipe"),
        ({"momentum": 0.5, "optimizer": "adam"}, "`momentum` of the recipe has no effect with optimizer 'adam'"),
        ({"adam_eps": 1e-3, "optimizer": "sgd"}, "`adam_eps` of the recipe has no effect with optimizer 'sgd'"),
        ({"noise_probability": 0.5}, "`noise_probability` of the recipe has no effect with `noise` 0"),
        ({"milestones": "half"}, "'milestones' of the recipe"),
        ({"eps": "wide"}, "'eps' of defense 'dverge': .*number.*, got 'wide'"),
        ({"eps": "inf"}, "'eps' of defense 'dverge': .*finite.*, got 'inf'"),
        ({"eps": 2}, "`eps` of defense 'dverge'"),
        ({"craft_bn": "off"}, "'craft_bn' of defense 'dverge': .*'train'"),
        ({"steps": None}, "'steps' of defense 'dverge'"),
        ({"layer": []}, "'layer' of defense 'dverge'"),
    ],
)
def test_wrong_words_have_an_answer(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RobenchError, match=message) as error:
        CIFAR10.resolve("dverge", 3, overrides)
    assert "\n" not in str(error.value)


def test_an_unknown_defense_or_recipe_lists_its_neighbours() -> None:
    with pytest.raises(RobenchError, match="unknown defense 'dverg'; did you mean dverge"):
        CIFAR10.resolve("dverg", 3, {})
    with pytest.raises(RobenchError, match="unknown recipe 'cifar'; did you mean cifar10"):
        recipe_file("cifar")


@pytest.mark.parametrize("name", ["../recipes/cifar10", "__init__", ""])
def test_a_recipe_is_a_name_not_a_path(name: str) -> None:
    with pytest.raises(RobenchError, match="unknown recipe"):
        recipe_file(name)


def test_a_file_with_an_unknown_key_is_not_valid() -> None:
    text = (
        (files("robench.recipes") / "digits.toml").read_text().replace("[evaluation]", "[evaluation]\nepsilons = [1]")
    )
    with pytest.raises(ValueError, match="epsilons"):
        RecipeFile.model_validate(tomllib.loads(text))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*Recipe.model_fields, "eps", "steps", "layer", "layer_per", "craft_bn", "zzz"]), st.data())
def test_any_override_gives_a_recipe_or_our_error(name: str, data: st.DataObject) -> None:
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    value = data.draw(scalar | st.lists(scalar, max_size=3))
    try:
        recipe, _ = CIFAR10.resolve("dverge", 3, {name: value})
    except RobenchError:
        return
    assert recipe.epochs >= 1


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """Like an attack or a defense."""

    steps: int = 3
    ratio: float = 0.5
    kind: Literal["a", "b"] = "a"
    on: bool = False


def test_a_plug_in_is_made_of_words() -> None:
    plugin = construct(Plugin, {"steps": "7", "ratio": "2", "kind": "b", "on": "yes"}, "attack 'x'")
    assert plugin == Plugin(steps=7, ratio=2.0, kind="b", on=True)
    assert construct(Plugin, {}, "attack 'x'") == Plugin()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 1}, "unknown field of attack 'x' 'step'; did you mean steps"),
        ({"steps": "1.5"}, "'steps' of attack 'x': .*, got '1.5'"),
        ({"ratio": "nan"}, "'ratio' of attack 'x': .*finite"),
        ({"kind": "c"}, "'kind' of attack 'x': .*'a' or 'b'"),
    ],
)
def test_a_plug_in_is_not_made_of_other_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RobenchError, match=message):
        construct(Plugin, values, "attack 'x'")


def test_milestones_are_fractions_of_the_epochs() -> None:
    recipe = settings_of(CIFAR10, "baseline", epochs=10, milestones=(0.5, 0.75), gamma=0.5, lr=1)
    assert [recipe.rate(epoch) for epoch in range(10)] == [1.0] * 5 + [0.5] * 3 + [0.25] * 2


def test_radii_of_a_threat_that_nobody_names() -> None:
    usual = recipe_file("digits").evaluation
    assert usual.radii("whitebox") == usual.radii("blackbox") == usual.eps
    assert usual.radii("transfer") == (0.2,)
    # The study's convergence check is at the smallest, its diversity at DVERGE's own.
    assert usual.radii("convergence") == (0.05,)
    for name in ("digits", "cifar10", "cifar10-fast", "generic"):
        file = recipe_file(name)
        assert file.evaluation.radii("diversity") == (file.resolve("dverge", 3, {})[1].manifest()["eps"],)


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path) -> None:
    text = (files("robench.recipes") / "generic.toml").read_text("utf-8")
    (tmp_path / "mine.toml").write_text(text.replace("epochs = 60", "epochs = 7"))
    own = recipe_file(str(tmp_path / "mine.toml"))
    assert settings_of(own, "baseline").epochs == 7
    assert settings_of(own, "adp").optimizer == "adam"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("epochs =", "is no TOML"),
        ("", "'model' of recipe .*: field required"),
        ('model = "resnet8"\ntrain = 3', "'train' of recipe"),
        ("nonsense = 3", "of recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / f"{len(said)}.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RobenchError, match=said):
        recipe_file(str(path))


def test_a_radius_is_said_in_grey_levels_too() -> None:
    _, defense = recipe_file("cifar10").resolve("dverge", 3, {"eps": "8/255"})
    assert asdict(defense)["eps"] == 8 / 255
    for wrong in ("8/0", "8/grey"):
        with pytest.raises(RobenchError, match="'eps' of defense 'dverge': input should be a valid number"):
            recipe_file("cifar10").resolve("dverge", 3, {"eps": wrong})
