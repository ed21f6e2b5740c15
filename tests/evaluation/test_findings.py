"""Findings: one line each; those that were kept before they had a fix are read."""

from __future__ import annotations

from pathlib import Path

from robench.core.files import read_record, write_record
from robench.evaluation.findings import Finding
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
