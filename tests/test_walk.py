"""docs/walk.md names the code as it is, and its numbered rows are the road that an image takes."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

from robench.attacks.ascent import follow
from robench.cli import run
from robench.core.data import Data
from robench.store.runs import Runs
from tests.small import SPEC, ensemble

ROOT = Path(__file__).parents[1]
WALK = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(robench(?:\.\w+)+)`", WALK)))
NUMBERED = re.findall(r"^\| (\d+) \| `(robench(?:\.\w+)+)` \|", WALK, re.MULTILINE)
ROAD = [name for _, name in NUMBERED]


def named(name: str) -> Any:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_walk_names_exists(name: str) -> None:
    named(name)


class Walk:
    """Who was at work when ``last`` was first called, and which of ``others`` were called from then on, in order."""

    def __init__(self, last: Callable[..., Any], others: list[CodeType]) -> None:
        self.stack: list[CodeType] = []
        self.after: list[CodeType] = []
        self._last, self._others = last.__code__, others

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code, at = frame.f_code, frame
        if event == "call" and code is self._last and not self.stack:
            while at is not None:
                self.stack.insert(0, at.f_code)
                at = at.f_back  # type: ignore[assignment]
        elif event == "call" and self.stack and code in self._others and code not in self.after:
            self.after.append(code)


def ours(code: CodeType) -> bool:
    """Whether it is a function of the package; no comprehension within one."""
    folders = tuple(str(ROOT / folder) for folder in ("robench", "attacks"))
    return code.co_filename.startswith(folders) and not code.co_name.startswith("<")


def test_the_road_of_an_image_is_the_one_in_the_walk(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [int(number) for number, _ in NUMBERED] == list(range(1, len(NUMBERED) + 1))
    monkeypatch.chdir(tmp_path)
    images, labels = data.test.images.numpy(), data.test.labels.numpy()
    np.savez("noise.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for key, role in enumerate(("target", "surrogate")):
        about: dict[str, Any] = {"members": [SPEC, SPEC], "defense": {"name": "gal"}, "seed": 0, "data": None}
        Runs().save(role, ensemble(key), role=role, **about)
    codes = [getattr(function, "callback", function).__code__ for function in map(named, ROAD)]
    until = codes.index(follow.__code__) + 1
    walk = Walk(follow, codes[until:])
    arguments = "eval target --threat blackbox --surrogates surrogate --dataset npz:noise.npz --samples 4 --eps 0.1"
    sys.setprofile(walk)
    try:
        assert run([*arguments.split(), "--attacks", "pgd:steps=2", "--restarts", "1", "--device", "cpu"]) == 0
    finally:
        sys.setprofile(None)
    stack = [code for code in walk.stack if ours(code)]
    begin = stack.index(codes[0])
    # `Outcomes.concat` is given a generator.
    assert [code.co_qualname for code in stack[begin:] if code.co_name != "concat"] == [
        code.co_qualname for code in codes[:until]
    ]
    assert walk.after == codes[until:]
