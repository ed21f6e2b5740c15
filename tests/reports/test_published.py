"""Published numbers as data files: every paper is read by the same code, and none is named in it."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest

from robench.core.errors import RobenchError
from robench.defenses import DEFENSES
from robench.reports import against, published
from robench.studies.study import parse
from tests.reports.frames import rows, share

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("paper", published.names())
def test_a_paper_is_whole(paper: str) -> None:
    source = published.read(paper)
    table = against.published(paper)
    assert source.source
    assert set(source.defenses.values()) <= set(DEFENSES.names())
    assert not table.isna().any().any(), "a method of the table that `defenses` does not name"
    assert table["published"].between(0, 1).all()
    assert table["published"].max() > 0.05, "percent, not shares"
    assert not table.duplicated(["threat", "defense", "n", "eps"]).any()
    assert len({each.title for each in source.tables}) == len(source.tables)
    titles = {"clean", *(each.title for each in source.tables)}
    for claim in source.claims:
        assert claim.threat in titles, claim
        assert {claim.defense, claim.over or claim.defense} <= set(DEFENSES.names()), claim
        assert bool(claim.over) == (claim.kind == "above"), claim


def test_every_number_is_the_sources() -> None:
    """Some cells of each table, typed again from the sources."""
    wanted = {
        "dverge2020": [("blackbox", "dverge", 3, 0.01, 0.839), ("whitebox", "baseline", 3, 0.01, 0.015)],
        "fasten2023": [
            ("whitebox, PGD-50", "fasten", 8, 0.03, 0.177), ("whitebox, PGD-50", "trs", 5, 0.02, 0.203),
            ("whitebox, PGD-50", "adp-advt", 5, 0.07, 0.012), ("whitebox, AutoAttack", "dverge-advt", 3, 0.04, 0.287),
            ("whitebox, AutoAttack", "dverge", 3, 0.01, 0.373),
        ],
        "advoap2025": [("whitebox", "advoap", 8, 0.031373, 0.483)],
        "lotos2025": [("whitebox, MORA", "lotos", 3, 0.04, 0.324), ("whitebox, PGD-50", "baseline", 3, 0.04, 0.215)],
        "mora2022": [("clean", "adp", 3, 0.0, 0.9288), ("whitebox", "adp", 3, 0.01, 0.0087)],
    }  # fmt: skip
    assert set(wanted) == set(published.names())
    for paper, cells in wanted.items():
        table = against.published(paper).set_index(["threat", "defense", "n", "eps"])["published"]
        for *key, value in cells:
            assert table[tuple(key)] == pytest.approx(value), (paper, key)


def test_defenses_are_in_the_order_of_the_papers() -> None:
    assert published.order()[:6] == ("baseline", "adp", "gal", "dverge", "advt", "dverge-advt")
    assert published.order().index("fasten") < published.order().index("lotos")
    assert all(re.search(r"\d{4}$", name) for name in published.names())


def test_no_paper_is_named_in_code() -> None:
    words = [word for name in published.names() for word in (name, re.sub(r"\d+$", "", name))]
    for path in [
        *(ROOT / "reports").glob("*.py"),
        ROOT / "robench/commands/report.py",
        ROOT / "robench/studies/study.py",
    ]:
        text = path.read_text(encoding="utf-8")
        for shown in ("such as ``dverge2020``", '"robench report --against dverge2020"'):  # what help says
            text = text.replace(shown, "")
        assert not [name for name in published.names() if name in text], path
    code = (ROOT / "reports/against.py").read_text(encoding="utf-8")
    assert not [word for word in words if word in code.lower()]


def test_a_table_is_compared_with_its_attack_alone() -> None:
    frame = pd.concat(
        [
            rows(share(95), defense="lotos", threat="clean"),
            rows(share(40), defense="lotos", eps=0.04),
            rows(share(30), defense="lotos", eps=0.04, attack="mora"),
            rows(share(20), defense="lotos", eps=0.04, attack="autoattack"),
        ]
    )
    found = against.against(frame, "lotos2025", data="same").set_index("threat")
    assert found["ours"].to_dict() == {
        "whitebox, PGD-50": 0.4, "whitebox, AutoAttack": 0.2, "whitebox, MORA": 0.3,
    }  # fmt: skip
    assert found["verdict"].to_dict() == {
        "whitebox, PGD-50": "inside", "whitebox, AutoAttack": "outside", "whitebox, MORA": "inside",
    }  # fmt: skip


def test_fewer_steps_than_the_tables_are_a_weaker_attack() -> None:
    frame = rows(share(50), defense="advoap", n=8, eps=8 / 255, attack="pgd:steps=10")
    assert against.against(frame, "advoap2025", data="same")["verdict"].tolist() == ["weaker attack"]
    frame = rows(share(50), defense="advoap", n=8, eps=8 / 255, attack="pgd:steps=20")
    assert against.against(frame, "advoap2025", data="same")["verdict"].tolist() == ["inside"]


def test_claims_of_another_paper() -> None:
    frame = pd.concat(
        [
            rows(share(30, 400), defense="fasten"), rows(share(10, 400), defense="dverge"),
            rows(share(90, 400), defense="fasten", n=5, eps=0.03), rows(share(30, 400), defense="fasten", eps=0.03),
        ]
    )  # fmt: skip
    found = against.orderings(frame, "fasten2023").set_index("claim")["verdict"].to_dict()
    assert found == {"white-box FASTEN above DVERGE": "holds", "white-box FASTEN rises with N": "holds"}


def test_without_a_number_of_images_a_published_number_has_no_interval() -> None:
    table = against.published("fasten2023")
    assert (table["published_low"] == table["published"]).all()
    assert (table["published_high"] == table["published"]).all()


def test_what_is_no_paper_is_refused() -> None:
    with pytest.raises(RobenchError, match=r"paper 'fasten2024'.*fasten2023"):
        published.read("fasten2024")
    text = 'title = "x"\ndataset = "digits"\ndefenses = ["baseline"]\nsizes = [3]\n[report]\nagainst = "{}"\n'
    assert parse("mine", text.format("lotos2025")).report.against == "lotos2025"
    with pytest.raises(RobenchError, match=r"mine: report.against: should be one of advoap2025.*got \"lotos\""):
        parse("mine", text.format("lotos"))


def test_a_file_that_says_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = files("robench.reports.published") / "mora2022.toml"
    raw = shipped.read_text(encoding="utf-8")
    assert tomllib.loads(raw)["title"]
    (tmp_path / "mine2030.toml").write_text(raw.replace('threat = "whitebox"', 'threat = "greybox"'), encoding="utf-8")
    monkeypatch.setattr(published, "files", lambda name: tmp_path)
    published.names.cache_clear()
    try:
        with pytest.raises(RobenchError, match=r"mine2030.toml: tables.0.threat: .*got 'greybox'"):
            published.read("mine2030")
    finally:
        monkeypatch.undo()
        published.names.cache_clear()
