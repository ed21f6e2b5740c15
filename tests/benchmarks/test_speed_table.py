"""The bench's table and figure, of hand-made rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.speed import table


def row(part: str, variant: str, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    usual = {"layer": None, "seconds": ratio and 2 / ratio, "per_second": ratio and 150 * ratio, "roof": None}
    return {"part": part, "variant": variant, "ratio": ratio, "accuracy": {}, "note": "", **usual, **more}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "what": "dverge-3", "members": 3, "data": "cifar10", "machine": "CPU (AVX512)", "clock": "processor time",
        "eps": 0.03, "images": 100, "batch_size": 128, "rounds": 3, "versions": {"torch": "2"},
        "rows": [
            row("roof", "copy", note="20 GB/s"),
            row("pgd", "authors' way", 1.0, accuracy={"0.03": 0.34}, roof=0.5),
            row("pgd", "robench bfloat16", 4.0, accuracy={"0.03": 0.35}),
            row("pgd", "foolbox LinfPGD", note="not installed"),
            row("dverge", "authors' way", 1.0, layer=1),
            row("dverge", "robench bfloat16", 2.0, layer=1),
            row("dverge", "authors' way", 1.0, layer=2),
            row("dverge", "robench bfloat16", 2.5, layer=2),
            row("dverge", "authors' way", 1.0, layer=0),
            row("dverge", "robench bfloat16", 2.2, layer=0),
        ],
    }  # fmt: skip


def test_the_table_says_what_was_measured(report: dict[str, Any]) -> None:
    text = table.markdown(report)
    assert text.startswith(
        "dverge-3 (3 members), cifar10, CPU (AVX512), processor time; a step on 100 images at ε 0.03"
    )
    lines = text.splitlines()[2:]
    assert len(lines) == 2 + len(report["rows"])
    assert all(line.count("|") == len(table.HEADINGS) + 1 for line in lines)
    assert lines[3] == "| pgd | authors' way | 2.00 | 150 | 1.00 | 50 | 34.0 |  |"
    assert lines[5] == "| pgd | foolbox LinfPGD |  |  |  |  |  | not installed |"
    assert lines[6].startswith("| dverge, layer 1 |")
    assert lines[-1].startswith("| dverge, mean | robench bfloat16 | 0.909 | 330 | 2.20 |")


def test_bars_are_the_ratios_that_there_are(report: dict[str, Any]) -> None:
    ax = table.speedups(report, Figure().subplots())
    assert [bar.get_width() for bar in ax.patches] == [1.0, 4.0, 1.0, 2.2]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["PGD step, authors' way", "robench bfloat16", "DVERGE step, authors' way", "robench bfloat16"]
    assert [text.get_text() for text in ax.texts] == ["1.0", "4.0", "1.0", "2.2"]


def test_a_line_per_variant_over_the_layers(report: dict[str, Any]) -> None:
    ax = table.layers(report, Figure().subplots())
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    assert lines == {"authors' way": ([1, 2], [2.0, 2.0]), "robench bfloat16": ([1, 2], [1.0, 0.8])}


def test_same_rows_same_bytes_and_none_without_times(report: dict[str, Any], tmp_path: Path) -> None:
    paths = table.write(report, tmp_path / "a")
    again = table.write(report, tmp_path / "b")
    assert [path.name for path in paths] == ["bench.pdf", "bench.png"]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert table.write({**report, "rows": report["rows"][:1]}, tmp_path / "c") == []
