"""The whole report: same rows, same bytes; what lacks data is named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from robench.core.errors import RobenchError
from robench.reports import build, html, regions
from tests.reports.frames import history, rows, share, study

PROVENANCE = {"robench": "0.1.0", "note": "a < b & </script>"}
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def small() -> pd.DataFrame:
    return study(defenses=("baseline", "dverge", "advt"), sizes=(2,), radii=(0.01, 0.03), samples=20)


def planes() -> regions.Regions:
    grid = np.zeros((9, 9), dtype=np.int64)
    grid[:, 6:] = 2
    return regions.Regions({"Baseline/3": grid, "DVERGE/3": np.zeros((9, 9), dtype=np.int64)}, 0.1, 0)


def test_same_rows_same_bytes(small: pd.DataFrame, tmp_path: Path) -> None:
    made = []
    for folder in ("a", "b"):
        files, notices = build.write(
            small, tmp_path / folder, PROVENANCE, history=history(5), images=planes(), formats=build.FORMATS
        )
        made.append({path.name: path.read_bytes() for path in files})
    assert made[0] == made[1]
    assert notices == []
    figures = ("fig1_regions", "fig2_trend", "fig3_transferability", "fig4_accuracy", "fig5_adversarial_training")
    assert {f"{name}.{kind}" for name in (*figures, "figA_convergence") for kind in build.FORMATS} <= made[0].keys()
    assert {"table4_blackbox.md", "table5_whitebox.tex", "fig4_accuracy.provenance.json"} <= made[0].keys()
    pdf = made[0]["fig4_accuracy.pdf"]
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    assert json.loads(made[0]["fig4_accuracy.provenance.json"]) == PROVENANCE
    assert str(tmp_path).encode() not in b"".join(made[0].values())
    values = pd.read_csv(tmp_path / "a" / "fig4_accuracy.csv")
    assert {"panel", "threat", "defense", "n", "eps", "accuracy", "low", "high"} <= set(values.columns)
    assert not list((tmp_path / "a").glob("*.tmp"))
    # Figures are made without pyplot, whose figures would stay in memory.
    plt = getattr(matplotlib, "pyplot", None)
    assert plt is None or not plt.get_fignums()


def test_what_lacks_data_is_named(tmp_path: Path) -> None:
    files, notices = build.write(rows(share(40)), tmp_path, {}, formats=["pdf"])
    assert {path.name for path in files if path.suffix == ".pdf"} == {"fig4_accuracy.pdf"}
    for name in ("fig1", "fig2", "fig3", "fig5", "table4"):
        assert any(notice.startswith(name) and "skipped" in notice for notice in notices)


@pytest.mark.parametrize(
    "frame",
    [
        study(defenses=("mine",), sizes=(8,), radii=(0.03,), samples=5),
        study(defenses=("advt", "dverge-advt"), sizes=(2,), seeds=(0, 1), radii=(0.01,), samples=5),
        rows(share(3, 5), threat="clean"),
    ],
    ids=["unknown defense, N = 8, one ε", "adversarial training, two seeds", "clean only"],
)
def test_odd_outcomes_are_drawn(frame: pd.DataFrame, tmp_path: Path) -> None:
    files, _ = build.write(frame, tmp_path, {}, formats=["pdf"])
    assert all(path.stat().st_size for path in files)


def test_uneven_points_are_told(small: pd.DataFrame) -> None:
    uneven = small[~((small["defense"] == "dverge") & (small["surrogate"] == "surrogate-5"))]
    assert any("1 to 2 attacks per image" in text for text in build.cautions(uneven))


def test_bad_requests(small: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(RobenchError, match="no outcomes"):
        build.write(small.iloc[:0], tmp_path, {})
    with pytest.raises(RobenchError, match="pdf, png, svg"):
        build.write(small, tmp_path, {}, formats=["gif"])
    with pytest.raises(RobenchError, match="JSON"):
        build.write(small, tmp_path, {"path": tmp_path}, formats=["pdf"])
    with pytest.raises(RobenchError, match="no outcomes"):
        html.write(small.iloc[:0], tmp_path / "report.html", {})


@pytest.fixture(scope="module")
def report(small: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "report.html"
    hostile = rows(share(10, 20), defense="<script>alert(1)</script>$_&\"'", target="-->x", threat="clean")
    attacked = rows(share(5, 20), defense="<script>alert(1)</script>$_&\"'", target="-->x")
    clean = np.full((4, 4, 3), 100, dtype=np.uint8)
    return html.write(
        pd.concat([small, hostile, attacked]), path, PROVENANCE, paper="dverge2020", different_data=True,
        checks=[{"name": "order", "status": "pass", "evidence": "<img src=x onerror=alert(1)>"}],
        pictures={19: (clean, clean + 2)}, history=history(3),
    )  # fmt: skip


def test_html_is_one_safe_file(report: Path) -> None:
    text = report.read_text()
    assert len(text) < html.LIMIT
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert text.count("<script") == 2
    assert r"a \u003c b \u0026 \u003c/script\u003e" in text
    assert not re.search(r'(src|href|xlink:href)="(?!#|data:)', text)
    assert "url(http" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'href="#([^"]+)"', text))
    assert targets <= set(ids)


def test_html_tells_what_fell(report: Path) -> None:
    text = report.read_text()
    drill = re.search(
        r'<h3 id="drill-\d+-title">&lt;script&gt;.*?, white-box, ε = 0.01</h3>(.*?)</div>', text, re.DOTALL
    )
    assert drill
    assert "15 of 20 images fell." in drill[1]
    assert '<td class="text">pgd</td><td class="text">ce</td><td>0</td><td>15</td>' in drill[1]
    assert '5 6 7 8 9 10 11 12 13 14 15 16 17 18 <a href="#sample-19">19</a>' in drill[1]
    assert 'alt="Sample 19, adversarial"' in text
    assert re.search(r'<svg role="img" aria-label="Accuracy against ε', text)


def test_html_same_rows_same_bytes(tmp_path: Path) -> None:
    frame = study(defenses=("dverge",), sizes=(2,), radii=(0.03,), samples=5)
    first = html.write(frame, tmp_path / "a.html", {}).read_bytes()
    assert first == html.write(frame, tmp_path / "b.html", {}).read_bytes()


def test_bad_pictures(small: pd.DataFrame, tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(RobenchError, match="sample 3"):
        html.write(small, tmp_path / "a.html", {}, pictures={3: (picture, picture[:2])})


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium (apt-get install chromium)")
def test_sorting_and_drilling_in_a_browser(report: Path, tmp_path: Path) -> None:
    text = report.read_text()
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", text)
    assert policy
    # The page's own policy would not admit the probe, as it should not.
    probe = """<script>
      const table = document.querySelector("#accuracy ~ .scroll table");
      const column = () => [...table.tBodies[0].rows].map((row) => row.cells[3].dataset.sort).join(",");
      const button = table.tHead.rows[0].cells[3].querySelector("button");
      const seen = {};
      button.click(); seen.up = column(); seen.sort = table.tHead.rows[0].cells[3].ariaSort;
      button.click(); seen.down = column();
      const link = document.querySelector("figure svg a");
      const drill = document.querySelector(link.getAttribute("xlink:href"));
      seen.before = getComputedStyle(drill).display;
      location.hash = link.getAttribute("xlink:href");
      seen.after = getComputedStyle(drill).display;
      document.body.dataset.seen = JSON.stringify(seen);
    </script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(text.replace(policy[0], "").replace("</body>", probe))
    seen = json.loads(_dom(page, tmp_path).split('data-seen="')[1].split('"')[0].replace("&quot;", '"'))
    up, down = ([float(value) for value in seen[way].split(",")] for way in ("up", "down"))
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert (seen["sort"], seen["before"], seen["after"]) == ("ascending", "none", "block")
    # Under the policy, our own script runs all the same.
    assert '<button type="button">' in _dom(report, tmp_path)


def _dom(page: Path, folder: Path) -> str:
    command = [
        shutil.which("chromium") or str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
