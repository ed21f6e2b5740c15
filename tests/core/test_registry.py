"""Names are unique, found with a hint, and a broken plug-in harms nobody but itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import click
import pytest

from robench.commands.list import command
from robench.core.errors import RobenchError
from robench.core.logbook import LOGS
from robench.core.losses import LOSSES
from robench.core.registry import Registry
from robench.reports.sheet import FIGURES
from robench.validity.conformance import REGISTRIES

GROUP = "robench.tests"
Install = Callable[..., None]


class Own:
    """What a third-party package brings."""

    name = ""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretends that packages are installed: names to ``module:attribute``; a list of pairs allows a name twice."""

    def fake(points: dict[str, str] | list[tuple[str, str]], **modules: dict[str, Any]) -> None:
        pairs = points.items() if isinstance(points, dict) else points
        found = [EntryPoint(name, value, GROUP) for name, value in pairs]
        monkeypatch.setattr(
            "robench.core.registry.entry_points", lambda *, group: [point for point in found if point.group == group]
        )
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)

    return fake


@pytest.fixture
def registry(install: Install) -> Registry[type[Own]]:
    install({})
    things: Registry[type[Own]] = Registry("thing", group=GROUP)
    for name in ("pgd", "pgd-fast", "square"):
        things.register(name)(type("Thing", (Own,), {}))
    return things


def test_a_registered_class_is_found_and_learns_its_name(registry: Registry[type[Own]]) -> None:
    assert registry.get("pgd-fast").name == "pgd-fast"
    assert registry.names() == ["pgd", "pgd-fast", "square"]


def test_the_decorator_returns_what_it_decorates(registry: Registry[type[Own]]) -> None:
    assert registry.register("own")(Own) is Own


def test_a_duplicate_raises_and_changes_nothing(registry: Registry[type[Own]]) -> None:
    first = registry.get("pgd")
    with pytest.raises(RobenchError, match="thing 'pgd' is registered twice"):
        registry.register("pgd")(Own)
    assert registry.get("pgd") is first


def test_an_unknown_name_lists_its_neighbours(registry: Registry[type[Own]]) -> None:
    with pytest.raises(RobenchError, match="unknown thing 'pdg'; did you mean pgd") as caught:
        registry.get("pdg")
    assert "square" not in str(caught.value)
    assert "robench list things" in str(caught.value)


def test_a_name_like_no_other_lists_all(registry: Registry[type[Own]]) -> None:
    with pytest.raises(RobenchError, match="known: pgd, pgd-fast, square"):
        registry.get("zzzzzzzz")


def test_a_family_resolves_what_follows_the_slash(registry: Registry[Any]) -> None:
    registry.family("zoo", lambda rest: ("zoo", rest), lambda: ["b", "a"])
    assert registry.get("zoo/any/thing") == ("zoo", "any/thing")
    assert registry.families() == {"zoo": ["a", "b"]}
    assert "zoo" not in registry.names()
    with pytest.raises(RobenchError, match="family 'zoo' is registered twice"):
        registry.family("zoo", lambda rest: rest, list)


def test_prefixes_ask_no_family_for_its_names(registry: Registry[Any]) -> None:
    registry.family("zoo", lambda rest: rest, lambda: pytest.fail("imports the zoo"))
    assert registry.prefixes() == ["zoo"]


@pytest.mark.parametrize("name", ["zoo/", "zoo", "other/a"])
def test_half_a_family_name_is_unknown(registry: Registry[Any], name: str) -> None:
    registry.family("zoo", lambda rest: rest, list)
    with pytest.raises(RobenchError, match="unknown thing"):
        registry.get(name)


def test_an_entry_point_is_found(registry: Registry[type[Own]], install: Install) -> None:
    install({"own": "other_package:Own"}, other_package={"Own": Own})
    assert "own" in registry.names()
    assert registry.get("own") is Own
    assert registry.get("own").name == "own"
    assert registry.broken() == {}


def test_an_entry_point_whose_module_registers_itself_is_added_once(
    registry: Registry[type[Own]], install: Install
) -> None:
    def late(name: str) -> type[Own]:
        if name == "__path__":
            raise AttributeError(name)
        return registry.register("late")(Own)

    install({"late": "registering:Own"}, registering={"__getattr__": late})
    assert registry.get("late") is Own
    assert registry.get("late") is Own
    assert registry.broken() == {}


def test_a_broken_entry_point_is_named_and_the_others_work(registry: Registry[type[Own]], install: Install) -> None:
    install({"bad": "no_such_package_xyz:Thing", "own": "good:Own"}, good={"Own": Own})
    assert registry.names() == ["bad", "own", "pgd", "pgd-fast", "square"]
    assert registry.get("own") is Own
    with pytest.raises(RobenchError, match="thing 'bad' of package 'no_such_package_xyz:Thing' fails to load"):
        registry.get("bad")
    assert list(registry.broken()) == ["bad"]
    assert "ModuleNotFoundError" in registry.broken()["bad"]


def test_an_entry_point_cannot_take_the_name_of_another(registry: Registry[type[Own]], install: Install) -> None:
    before = registry.get("pgd")
    install({"pgd": "intruder:Own"}, intruder={"Own": Own})
    assert registry.get("pgd") is before
    assert "name that is taken" in registry.broken()["pgd"]


def test_two_packages_with_one_name_are_both_named(registry: Registry[type[Own]], install: Install) -> None:
    install([("same", "first:Own"), ("same", "second:Own")], first={"Own": Own}, second={"Own": Own})
    with pytest.raises(RobenchError, match="'same' is registered by first:Own and by second:Own"):
        registry.get("same")


def test_every_public_module_of_the_package_is_imported(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    install({})
    things: Registry[Any] = Registry("thing", group=GROUP, package="plugged_package")
    package = tmp_path / "plugged_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_private.py").write_text("raise SystemError('imported')\n")
    (package / "mine.py").write_text("from robench_test_registry import things\nthings.register('mine')(1)\n")
    host = ModuleType("robench_test_registry")
    host.things = things  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robench_test_registry", host)
    monkeypatch.syspath_prepend(tmp_path)
    assert things.names() == ["mine"]
    for name in [name for name in sys.modules if name.startswith("plugged_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_file_that_fails_fails_every_time(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    install({})
    things: Registry[Any] = Registry("thing", group=GROUP, package="failing_package")
    package = tmp_path / "failing_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            things.names()
    monkeypatch.delitem(sys.modules, "failing_package")


def test_a_kind_that_an_error_sends_to_robench_list_is_listed() -> None:
    listed = command.params[0].type
    assert isinstance(listed, click.Choice)
    for registry in (*REGISTRIES.values(), LOGS, LOSSES, FIGURES):
        with pytest.raises(RobenchError, match=f"`robench list {registry.plural}` shows all"):
            registry.get("zzz")
        assert registry.plural in listed.choices
