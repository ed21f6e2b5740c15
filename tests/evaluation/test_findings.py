"""Findings: one line each; those that were kept before they had a fix are read."""

from __future__ import annotations

from pathlib import Path

from robench.core.files import read_record, write_record
from robench.evaluation.findings import Finding, brief, gravest_first
from robench.evaluation.rows import FolderRows


def test_a_finding_is_one_line_with_its_fix_where_there_is_one() -> None:
    assert str(Finding("gradient", "pass", "as finite differences")) == "pass  gradient: as finite differences"
    told = Finding("input range", "fail", "64 % as it is", "multiply by 255")
    assert str(told) == "fail  input range: 64 % as it is; multiply by 255"
    assert told.said == "64 % as it is; multiply by 255"


def test_findings_that_were_kept_without_a_fix_are_read(tmp_path: Path) -> None:
    before = {"a" * 64 + "/whitebox": {"gradient": {"name": "gradient", "status": "warn", "evidence": "3 %; look"}}}
    write_record(tmp_path / "checks.json", before)
    rows = FolderRows(tmp_path)
    assert rows.remembered("a" * 64) == [Finding("gradient", "warn", "3 %; look")]
    added = Finding("repeat", "fail", "differs", "switch dropout off")
    rows.remember("a" * 64, "whitebox", [added])
    assert FolderRows(tmp_path).remembered("a" * 64) == [Finding("gradient", "warn", "3 %; look"), added]
    kept = read_record(tmp_path / "checks.json")["a" * 64 + "/whitebox"]
    assert kept["repeat"]["fix"] == "switch dropout off"


FOUND = [
    Finding("repeat", "fail", "a differs"),
    Finding("gradient", "pass", "a"),
    Finding("survivors", "warn", "a falls"),
    Finding("repeat", "pass", "b"),
    Finding("gradient", "pass", "b"),
    Finding("gradient", "warn", "c"),
]


def test_on_a_terminal_passes_are_a_line_for_each_question_and_doubts_come_last() -> None:
    passed, *others = brief(FOUND)
    assert (passed.name, passed.status, passed.evidence) == ("gradient", "pass", "2 times, such as a")
    assert others == [FOUND[3], FOUND[2], FOUND[5], FOUND[0]]
    assert brief([]) == []


def test_on_a_page_what_fails_comes_first_and_nothing_is_left_out() -> None:
    assert gravest_first(FOUND) == [FOUND[0], FOUND[2], FOUND[5], FOUND[1], FOUND[3], FOUND[4]]
