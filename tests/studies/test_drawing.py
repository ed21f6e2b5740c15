"""What a report says of the runs that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robench.store.runs import Run
from robench.studies.drawing import trainings


def run(name: str, defense: dict[str, Any], **recipe: Any) -> Run:
    manifest: dict[str, Any] = {"defense": defense, "seed": 0, "members": [{"name": "resnet8"}] * 2, "ancestors": []}
    told = {"recipe": recipe, "data": {"fingerprint": "f" * 64}} if recipe else {"data": None}
    return Run(Path(name), {**manifest, **told})


def test_it_shows_what_sets_trainings_apart_and_what_they_share() -> None:
    mine = run("mine", {"name": "adp", "version": 1, "alpha": 2.0}, epochs=10, lr=0.1)
    short = run("short", {"name": "baseline", "version": 1}, epochs=5, lr=0.1)
    table = trainings([short, mine])
    assert table.headers == ["run", "defense", "epochs"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["mine", "adp, alpha 2.0", "10"],
        ["short", "baseline", "5"],
    ]
    assert "members 2 x resnet8" in table.caption
    assert "lr 0.1" in table.caption
    assert "epochs" not in table.caption


def test_what_is_not_known_of_imported_weights_is_said() -> None:
    table = trainings([run("mine", {"name": "adp"}, epochs=10), run("theirs", {"name": "unknown"})])
    (column,) = (place for place, header in enumerate(table.headers) if header == "epochs")
    assert [row[column].text for row in table.rows] == ["10", "not known"]
