"""docs/walk.md names the code as it is."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

WALK = Path(__file__).parents[1] / "docs" / "walk.md"
NAMES = sorted(set(re.findall(r"`(robench(?:\.\w+)+)`", WALK.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_walk_names_exists(name: str) -> None:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} is no module")
