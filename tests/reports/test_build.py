"""The whole report: same rows, same bytes; what lacks data is named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from robench.core import registry
from robench.core.errors import RobenchError
from robench.evaluation.findings import Finding
from robench.reports import build, html, regions, style
from robench.reports.pictures import Picture
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped
from tests.reports.frames import history, rows, share, study

pytestmark = pytest.mark.slow

PROVENANCE = {"robench": "0.1.0", "note": "a < b & </script>"}
CHROMIUM = shutil.which("chromium")


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
        drawn = build.draw(small, history=history(5), regions=planes())
        files = build.write(drawn, tmp_path / folder, PROVENANCE, formats=build.FORMATS, paper="dverge2020")
        made.append({path.name: path.read_bytes() for path in files})
    assert made[0] == made[1]
    assert drawn.notices == ()
    figures = ("fig1_regions", "fig2_trend", "fig3_transferability", "fig4_accuracy", "fig5_adversarial_training")
    assert {f"{name}.{kind}" for name in (*figures, "figA_convergence") for kind in build.FORMATS} <= made[0].keys()
    assert {"table4_blackbox.md", "table5_whitebox.tex", "fig4_accuracy.provenance.json"} <= made[0].keys()
    assert {"against_dverge2020.md", "against_dverge2020.csv"} <= made[0].keys()
    pdf = made[0]["fig4_accuracy.pdf"]
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    for name in ("fig4_accuracy", "table4_blackbox", "against_dverge2020"):
        assert json.loads(made[0][f"{name}.provenance.json"]) == PROVENANCE
    assert b"a < b & </script>" in pdf
    assert str(tmp_path).encode() not in b"".join(made[0].values())
    values = pd.read_csv(tmp_path / "a" / "fig4_accuracy.csv")
    assert {"panel", "threat", "defense", "n", "eps", "accuracy", "low", "high"} <= set(values.columns)
    assert not list((tmp_path / "a").glob("*.tmp"))
    # Figures are made without pyplot, whose figures would stay in memory.
    plt = getattr(matplotlib, "pyplot", None)
    assert plt is None or not plt.get_fignums()


def test_what_lacks_data_is_named(tmp_path: Path) -> None:
    drawn = build.draw(rows(share(40)))
    files = build.write(drawn, tmp_path, {}, formats=["pdf"])
    assert {path.name for path in files if path.suffix == ".pdf"} == {"fig4_accuracy.pdf"}
    for name in ("fig1", "fig2", "fig3", "fig5", "table4"):
        assert any(line.startswith(name) and "skipped" in line for line in drawn.notices)


@pytest.mark.parametrize(
    "frame",
    [
        study(defenses=("mine",), sizes=(8,), radii=(0.03,), samples=5),
        study(defenses=("advt", "dverge-advt"), sizes=(2,), seeds=(0, 1), radii=(0.01,), samples=5),
        rows(share(3, 5), threat="clean"),
        study(defenses=("baseline", "dverge"), sizes=(3, 8), radii=(0.01, 0.03), samples=5).query(
            "not (defense == 'dverge' and n == 8 and threat != 'clean')"
        ),
    ],
    ids=["unknown defense, N = 8, one ε", "adversarial training, two seeds", "clean only", "one ensemble unattacked"],
)
def test_odd_outcomes_are_drawn(frame: pd.DataFrame, tmp_path: Path) -> None:
    drawn = build.draw(frame)
    assert all(path.stat().st_size for path in build.write(drawn, tmp_path, {}, formats=["pdf"]))
    assert html.write(drawn, tmp_path / "report.html", {}).stat().st_size


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("own", "black-box from surrogates of its own defense"),
        ("related", "from related networks, no black-box result"),
    ],
)
def test_surrogates_of_another_kind_are_a_figure_and_a_table_of_their_own(
    kind: str, words: str, tmp_path: Path
) -> None:
    frame = pd.concat([rows(share(40), threat=f"blackbox-{kind}", surrogate="a"), rows(share(90), threat="clean")])
    drawn = build.draw(frame)
    names = {path.name for path in build.write(drawn, tmp_path, {}, formats=["pdf"])}
    assert {f"figA_blackbox_{kind}.pdf", f"tableA_blackbox_{kind}.md"} <= names
    assert not any(name.startswith(("table4", "fig4")) for name in names)
    assert pd.read_csv(tmp_path / f"figA_blackbox_{kind}.csv")["accuracy"].tolist() == [0.9, 0.4]
    page = html.write(drawn, tmp_path / "report.html", {}).read_text(encoding="utf-8")
    assert f"DVERGE/3, {words}, ε = 0.01" in page


def test_files_have_no_links_and_the_page_has(tmp_path: Path) -> None:
    drawn = build.draw(study(defenses=("dverge",), sizes=(2,), radii=(0.03,), samples=5))
    build.write(drawn, tmp_path, {}, formats=["svg", "pdf"])
    assert not any(b"drill-" in path.read_bytes() for path in tmp_path.iterdir())
    page = html.write(drawn, tmp_path / "report.html", {}).read_text(encoding="utf-8")
    assert '<a tabindex="-1" xlink:href="#drill-1"' in page


def test_rivals_are_told(small: pd.DataFrame) -> None:
    other = small[small["target"] == "dverge-2-s0"].assign(target="again")
    told = build.draw(pd.concat([small, other.assign(cell=other["cell"].astype(str) + "b")], ignore_index=True)).notices
    assert any("share defense, size and seed" in text for text in told)


def test_adversarial_training_is_told_by_the_defense_even_of_rivals_and_beside_a_broken_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = EntryPoint("broken", "no_such_module:Defense", "robench.defenses")
    found = registry.entry_points
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [broken] if group == "robench.defenses" else found(group=group)
    )
    own = [
        rows(share(40), defense=defense, n=3, target=target)
        for target, defense in (("a", "advt"), ("b", "advt"), ("c", "dverge"), ("d", "broken"), ("e", "imported"))
    ]
    sheets = {sheet.name: sheet for sheet in build.draw(pd.concat(own, ignore_index=True)).sheets}
    assert set(sheets["fig5_adversarial_training"].values["defense"]) == {"a", "b"}
    assert set(sheets["fig4_accuracy"].values["defense"]) == {"dverge", "broken", "imported"}


def test_a_figure_of_others_that_fails_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(inputs: Inputs) -> Iterator[Sheet | Skipped]:
        raise KeyError("no_such_column")
        yield

    def odd(inputs: Inputs) -> Iterator[Sheet | Skipped]:
        """Columns like those of ours, visible points with links, and one artist that is not shown."""
        assert inputs.links is not None
        figure = style.figure()
        ax = figure.subplots()
        ax.scatter([0.5], [0.5], urls=[inputs.links.point("whitebox", "dverge", 3, 0.01)])
        ax.scatter([0.2], [0.2], urls=["#drill-1"], visible=False)
        yield Sheet("figA_odd", "Odd", figure, pd.DataFrame({"panel": ["x"], "accuracy": [0.5]}), "Odd.")

    def taken(inputs: Inputs) -> Iterator[Sheet | Skipped]:
        yield Sheet("fig4_accuracy", "Mine", style.figure(), pd.DataFrame(), "")

    FIGURES.names()
    monkeypatch.setattr(FIGURES, "_items", {**FIGURES._items, "figB": broken, "figA_odd": odd})
    drawn = build.draw(rows(share(40)))
    assert "figB skipped: KeyError: 'no_such_column'" in drawn.notices
    (sheet,) = (each for each in drawn.sheets if each.name == "figA_odd")
    points: list[Any] = list(sheet.figure.axes[0].collections)
    links = points[0].get_urls()
    assert links[0].startswith("#drill-")
    build.write(drawn, tmp_path, {}, formats=["svg"])
    assert [each.get_visible() for each in points] == [True, False]
    assert points[0].get_urls() == links
    assert b"drill-" not in (tmp_path / "figA_odd.svg").read_bytes()
    assert "Values of: Odd" in html.write(drawn, tmp_path / "report.html", {}).read_text("utf-8")
    monkeypatch.setattr(FIGURES, "_items", {**FIGURES._items, "taken": taken})
    with pytest.raises(RobenchError, match="two figures are called 'fig4_accuracy'"):
        build.draw(rows(share(40)))


def test_uneven_points_are_told(small: pd.DataFrame) -> None:
    uneven = small[~((small["defense"] == "dverge") & (small["surrogate"] == "surrogate-5"))]
    assert any("1 to 2 attacks per image" in text for text in build.cautions(uneven))
    trial = rows([True] * 3, n=2, eps=float(small["eps"].max()), attack="trial")
    told = build.cautions(pd.concat([small, trial], ignore_index=True))
    assert any("cells of dverge-2-s0, whitebox, are left out: they judged 3 images or fewer" in text for text in told)


def test_other_images_are_told_where_as_many_were_judged(small: pd.DataFrame) -> None:
    moved = small["defense"].eq("dverge") & small["threat"].eq("whitebox")
    told = build.cautions(small.assign(sample=small["sample"] + 1000 * moved))
    assert [text for text in told if "not on the same ones" in text]
    assert all(text.startswith("whitebox points at ε ") for text in told)
    assert build.cautions(small) == []


def test_trainings_that_are_not_judged_at_every_radius_are_told() -> None:
    frame = pd.concat([rows(share(90)), rows(share(10), seed=1), rows(share(80), eps=0.02)], ignore_index=True)
    assert build.cautions(frame) == ["whitebox points of DVERGE/3 rest on 1 to 2 trainings: not all are comparable"]


def test_seeds_under_other_versions_are_told_though_their_mean_is_one_point() -> None:
    own = {"threat": "blackbox", "surrogate": "s3"}
    frame = pd.concat([rows(share(9), **own), rows(share(9), **own, loss="cw"), rows(share(9), **own, seed=1)])
    assert build.cautions(frame) == ["blackbox points rest on 1 to 2 attacks per image: not all are comparable"]


def test_images_that_no_attack_has_in_common_are_told() -> None:
    frame = pd.concat([rows(share(50), loss="ce"), rows(share(50), loss="cw", first=100)], ignore_index=True)
    (line,) = build.cautions(frame)
    assert "are of 2 cells, and no image was judged in more than 1 of them" in line


def test_bad_requests(small: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(RobenchError, match="no outcomes"):
        build.draw(small.iloc[:0])
    drawn = build.draw(rows(share(40)))
    with pytest.raises(RobenchError, match="JSON"):
        build.write(drawn, tmp_path, {"path": tmp_path}, formats=["pdf"])
    with pytest.raises(RobenchError, match="JSON"):
        html.write(drawn, tmp_path / "report.html", {"path": tmp_path})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def report(small: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "report.html"
    hostile = rows(share(10, 20), defense="<script>alert(1)</script>$_&\"'", target="-->x", threat="clean")
    attacked = rows(share(5, 20), defense="<script>alert(1)</script>$_&\"'", target="-->x")
    return html.write(
        build.draw(pd.concat([small, hostile, attacked]), history=history(3)), path, PROVENANCE, paper="dverge2020",
        checks=[Finding("order", "pass", "<img src=x onerror=alert(1)>")],
        pictures=[picture(attacked, 19), picture(small[small["threat"] == "transfer"], 0)],
    )  # fmt: skip


def picture(frame: pd.DataFrame, sample: int) -> Picture:
    """Of the first row of ``frame`` on ``sample`` that fell."""
    row = frame[(frame["sample"] == sample) & ~frame["correct"]].iloc[0]
    clean = np.full((3, 4, 4), 0.4, dtype=np.float32)
    return Picture(row["cell"], row["member"], sample, clean, clean + np.float32(0.01), f"sample {sample}: <b> → c")


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
        r'<h3 id="drill-\d+-title">&lt;script&gt;.*?, white-box, ε = 0.01</h3>(.*?)<div class="drill"', text, re.DOTALL
    )
    assert drill
    assert "15 of 20 images fell." in drill[1]
    assert '<td class="text">pgd</td><td class="text">ce</td><td>0</td><td>15</td>' in drill[1]
    assert '<td class="long">5 6 7 8 9 10 11 12 13 14 15 16 17 18 19</td>' in drill[1]
    # The picture belongs to this row of this point, and to nothing else.
    assert 'alt="adversarial, sample 19: &lt;b&gt; → c"' in drill[1]
    assert drill[1].count("<img") == text.count("sample 19: &lt;b&gt; → c</figcaption>") * 3 == 3
    crafted = text.split("crafted on member 1, judged on member 1</h3>")[1].split("</h3>")[0]
    assert crafted.count('alt="difference × 10, sample 0:') == 1
    assert re.search(r'<svg role="img" aria-label="Accuracy against ε', text)


def test_html_same_rows_same_bytes(tmp_path: Path) -> None:
    frame = study(defenses=("dverge",), sizes=(2,), radii=(0.03,), samples=5)
    first = html.write(build.draw(frame), tmp_path / "a.html", {}).read_bytes()
    assert first == html.write(build.draw(frame), tmp_path / "b.html", {}).read_bytes()


def test_pictures_beyond_the_limit_are_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = rows(share(0, 5))
    drawn = build.draw(frame)
    pictures = [picture(frame, sample) for sample in range(5)]
    size = len(html.write(drawn, tmp_path / "a.html", {}, pictures=pictures[:1]).read_text().split("base64,")[1])
    monkeypatch.setattr(html, "_IMAGE_LIMIT", 3 * 3 * size)
    text = html.write(drawn, tmp_path / "b.html", {}, pictures=pictures).read_text()
    shown = text.count("<figcaption>")
    assert 1 <= shown < 5
    assert f"{5 - shown} pictures left out" in text


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt-get install chromium)")
def test_sorting_and_drilling_in_a_browser(report: Path, tmp_path: Path) -> None:
    text = report.read_text()
    probe = """
      const failed = [];
      addEventListener("securitypolicyviolation", (event) => failed.push(event.blockedURI));
      addEventListener("load", () => {
        const seen = {};
        const table = document.querySelector("#accuracy ~ .scroll table");
        const column = () => [...table.tBodies[0].rows].map((row) => row.cells[3].dataset.sort).join(",");
        const button = table.tHead.rows[0].cells[3].querySelector("button");
        button.click(); seen.up = column(); seen.sort = table.tHead.rows[0].cells[3].ariaSort;
        button.click(); seen.down = column();
        const link = document.querySelector("figure svg a");
        const drill = document.querySelector(link.getAttribute("xlink:href"));
        seen.before = getComputedStyle(drill).display;
        link.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true, view: window}));
        setTimeout(() => {
          seen.after = getComputedStyle(drill).display;
          seen.images = [...drill.querySelectorAll("img")].map((image) => [image.naturalWidth, image.offsetWidth > 0]);
          seen.focusable = [...document.querySelectorAll("figure svg a")].filter((each) => each.tabIndex >= 0).length;
          seen.hit = ["fig3_transferability", "fig4_accuracy"].map((name) => {
            const mark = document.querySelector(`#${name} + figure svg a`);
            mark.scrollIntoView({block: "center"});
            const box = mark.getBoundingClientRect();
            return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).closest("a") !== null;
          });
          seen.requests = performance.getEntriesByType("resource").map((each) => each.name);
          seen.failed = failed;
          document.body.dataset.seen = JSON.stringify(seen);
        }, 200);
      });
    """
    page = tmp_path / "probe.html"
    # The probe is let in beside our own script; the rest of the policy stays.
    policy = "script-src '"
    assert text.count(policy) == 1
    admitted = text.replace(policy, f"script-src '{html.csp(probe)}' '")
    page.write_text(admitted.replace("</body>", f"<script>{probe}</script></body>"))
    dom, console = browse(page, tmp_path)
    seen = json.loads(unescape(dom.split('data-seen="')[1].split('"')[0]))
    up, down = ([float(value) for value in seen[way].split(",")] for way in ("up", "down"))
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert (seen["sort"], seen["before"], seen["after"]) == ("ascending", "none", "block")
    assert seen["hit"] == [True, True]
    assert seen["images"] == [[4, True]] * 3
    assert (seen["requests"], seen["failed"], seen["focusable"]) == ([], [], 0)
    assert console == []
    # The checks would find something.
    page.write_text(admitted.replace("</body>", "<img src='http://localhost:9/x.png'></body>"))
    assert any("Content Security Policy" in line for line in browse(page, tmp_path)[1])


def browse(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page's document after its scripts, and what the console says."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
