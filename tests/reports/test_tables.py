"""Tables: marks that a test allows, and names that cannot break out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from robench.core.errors import RobenchError
from robench.evaluation.outcomes import wilson
from robench.evaluation.statistics import accuracy_interval
from robench.reports import against, build, document, html, style, tables
from robench.reports._queries import paired
from tests.reports.frames import rows, share, study

PAPER = "dverge2020"

HOSTILE = r"""a<b>&"c'_%$#^~\{}|[*`"""


def test_best_only_where_the_difference_is_significant() -> None:
    frame = pd.concat(
        [
            rows(share(40), defense="gal"),
            rows(share(60), defense="dverge"),
            rows(share(58), defense="gal", eps=0.02),
            rows(share(60), defense="dverge", eps=0.02),
        ]
    )
    table = tables.accuracy(frame, "whitebox")
    assert table.loc[table["best"], ["defense", "eps"]].to_numpy().tolist() == [["dverge", 0.01]]
    assert float(table.loc[table["best"], "p"].iloc[0]) == pytest.approx(binomtest(20, 20).pvalue)


def test_best_is_not_who_is_behind_on_the_images_of_the_test() -> None:
    ahead = [True] * 100 + [False] * 30 + [True] * 70
    frame = pd.concat([rows(ahead), rows(share(100, 200), defense="gal", first=100)], ignore_index=True)
    table = tables.accuracy(frame, "whitebox")
    assert table.set_index("defense")["accuracy"].to_dict() == {"dverge": 0.85, "gal": 0.5}
    assert not table["best"].any()


def test_radii_that_look_alike_have_names_of_their_own() -> None:
    frame = pd.concat([rows(share(90), eps=8 / 255), rows(share(50), eps=0.0313725)])
    described = tables.described(tables.accuracy(frame, "whitebox"))
    assert described.headers == ["Defense", "N", "0.0313725", "0.03137254901960784"]


def test_rates_of_every_figure_are_percent() -> None:
    frame = pd.DataFrame({"clean": [0.5], "least": [0.25], "clean_images": [100.0], "diversity": [1.5]})
    (row,) = document.of_frame(frame).rows
    assert [cell.text for cell in row] == ["50.0", "25.0", "100", "1.5"]


def test_a_tie_has_no_best() -> None:
    table = tables.accuracy(pd.concat([rows(share(60), defense="gal"), rows(share(60))]), "whitebox")
    assert not table["best"].any()


def test_several_seeds_of_one_image_are_one_observation() -> None:
    def both(right: int) -> pd.Series:
        frame = pd.concat([rows(share(right, 10), seed=0), rows(share(right, 10), seed=1)])
        return frame.set_index(["seed", "sample"])["correct"]

    assert paired(both(8), both(2)) == pytest.approx(binomtest(6, 6).pvalue)


def test_holm_by_hand() -> None:
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_claim_is_judged_on_the_images_that_both_sides_have() -> None:
    ahead = [True] * 100 + [False] * 30 + [True] * 70
    frame = pd.concat([rows(ahead, n=3, eps=0.03), rows(share(100, 200), n=5, first=100, eps=0.03)])
    found = against.orderings(frame.assign(threat="blackbox"), PAPER)
    rises = found[found["claim"].str.contains("rises") | (found["left"] == "DVERGE/5, ε = 0.03")]
    assert rises[["difference", "verdict"]].to_numpy().tolist() == [[pytest.approx(0.3), "holds"]]


def test_formats_hold_the_numbers() -> None:
    frame = pd.concat([rows(share(90), threat="clean"), rows(share(40)), rows(share(60), defense="gal")])
    table = tables.accuracy(frame, "whitebox")
    markdown = document.markdown(tables.described(table))
    assert "| DVERGE | 3 | 90.0 [82.6, 94.5] | 40.0 [30.9, 49.8] |" in markdown
    assert "| GAL | 3 | – | **60.0** [50.2, 69.1] |" in markdown
    latex = document.latex(tables.described(table))
    assert r"GAL & 3 & – & \textbf{60.0} \\[-3pt]" in latex
    assert r"& & & {\tiny [50.2, 69.1]} \\[1pt]" in latex
    assert tables.csv(table).splitlines()[0].startswith("defense,n,eps,accuracy,low,high,best")


def test_one_description_gives_every_format() -> None:
    cells = [
        document.TableCell.of("a_b"),
        document.TableCell.measured(0.5, 0.4, 0.6, best=True),
        document.TableCell.of(float("nan")),
    ]
    table = document.Table(["name", "%", "p"], [cells], "Above", "Below.")
    assert document.markdown(table) == (
        "| name | % | p |\n| --- | --: | --: |\n| a\\_b | **50.0** [40.0, 60.0] | – |\n\nBelow.\n"
    )
    latex = document.latex(table)
    assert r"\begin{tabular}{lrr}" in latex
    assert r"name & \% & p \\" in latex
    assert r"a\_b & \textbf{50.0} & – \\[-3pt]" in latex
    grid = html.environment().get_template("table.html.j2").module.grid  # type: ignore[attr-defined]
    assert '<td data-sort="0.5"><strong>50.0</strong>' in grid(table)
    assert '<th scope="col" class="text">name</th><th scope="col">%</th>' in grid(table)
    assert "<caption>Above</caption>" in grid(table)
    assert 'aria-labelledby="title"' in grid(table, "title")
    assert "<caption>" not in grid(table, "title")


def test_values_of_a_frame_are_read_as_what_they_are() -> None:
    frame = pd.DataFrame({"claim": ["x"], "sd_of": [0.25], "p": [0.012345], "samples": [5], "holds": [True]})
    (row,) = document.of_frame(frame).rows
    assert [cell.text for cell in row] == ["x", "25.0", "0.0123", "5", "yes"]
    assert document.of_frame(frame).numeric() == [False, True, True, True, True]
    assert document.of_frame(frame.iloc[:0]).numeric() == [False] * 5


def test_one_order_of_defenses_and_threats() -> None:
    mixed = pd.DataFrame(
        {
            "defense": pd.Categorical(["zz", "dverge-advt", "adp", "baseline", "adp", "baseline"]),
            "threat": ["clean", "clean", "whitebox", "blackbox", "blackbox", "clean"],
        }
    )
    found = style.ordered(mixed, "threat", "defense").to_numpy().tolist()
    assert found == [
        ["baseline", "clean"], ["dverge-advt", "clean"], ["zz", "clean"], ["baseline", "blackbox"],
        ["adp", "blackbox"], ["adp", "whitebox"],
    ]  # fmt: skip
    assert list(build.TABLES) == [name for name, shown in style.THREATS.items() if shown.table]


def test_hostile_names() -> None:
    assert document.escape_latex(HOSTILE) == (
        r"a\textless{}b\textgreater{}\&{\char34}c'\_\%\$\#\textasciicircum{}\textasciitilde{}\textbackslash{}\{\}"
        r"\textbar{}{[}{*}{`}"
    )
    assert document.escape_latex("a\nb\\\\") == r"a b\textbackslash{}\textbackslash{}"
    assert document.escape_markdown(HOSTILE) == (r"""a&lt;b&gt;&amp;"c'\_%\$\#\^\~\\\{\}\|\[\*\`""")
    frame = rows(share(40), defense=HOSTILE, target="x")
    table = tables.described(tables.accuracy(frame, "whitebox"))
    for text in (document.latex(table), document.markdown(table)):
        assert HOSTILE not in text
        assert "<b>" not in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (apt-get install texlive-latex-base)")
def test_latex_compiles_and_fits_the_page(tmp_path: Path) -> None:
    names = (HOSTILE, "[2pt]--?`", "*-_ü“x”")
    frames = {
        "study": study(samples=20, radii=(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07)),  # as many as the paper
        "names": pd.concat([rows(share(9, 20), defense=each, target=f"t{at}") for at, each in enumerate(names)]),
    }
    for name, frame in frames.items():
        (tmp_path / f"{name}.tex").write_text(
            document.latex(tables.described(tables.accuracy(frame, "whitebox"))), encoding="utf-8"
        )
    (tmp_path / "page.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\textwidth=5.5in\\textheight=9in\\begin{document}"
        "\\noindent\\input{study}\n\n\\noindent\\input{names}\\end{document}"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=100, check=False)
    log = (tmp_path / "page.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-2000:]
    assert "Overfull" not in log
    assert "Missing character" not in log


def test_table_without_its_threat() -> None:
    with pytest.raises(RobenchError, match="--threat blackbox"):
        tables.accuracy(rows(share(40)), "blackbox")


def test_published_numbers_are_the_papers() -> None:
    table = against.published(PAPER).set_index(["threat", "defense", "n", "eps"])["published"]
    assert table["blackbox", "dverge", 3, 0.03] == pytest.approx(0.532)
    assert table["whitebox", "dverge-advt", 8, 0.02] == pytest.approx(0.583)
    assert table["clean", "gal", 5, 0.0] == pytest.approx(0.910)
    assert len(table) == 18 * (7 + 7 + 1)
    with pytest.raises(RobenchError, match="did you mean dverge2020"):
        against.published("dverge2002")


def test_inside_outside_and_different_data() -> None:
    frame = pd.concat(
        [rows(share(right, 1000), eps=eps, restart=4) for right, eps in ((400, 0.01), (300, 0.02), (0, 0.03))]
    )
    found = against.against(frame, PAPER, data="same")
    assert found["verdict"].tolist() == ["inside", "outside", "outside"]
    assert found["difference"].tolist() == pytest.approx([0.0, 0.178, -0.03])
    vouched = against.against(frame, PAPER, data="vouched")["verdict"].tolist()
    assert vouched == ["inside (data vouched for)", *["outside (data vouched for)"] * 2]
    assert against.against(frame, PAPER, data="different")["verdict"].unique().tolist() == ["different data"]
    assert against.against(rows(share(40), attack="autoattack"), PAPER, data="same").empty


def test_other_networks_are_not_judged_by_the_papers() -> None:
    frame = pd.concat(
        [rows(share(400, 1000), restart=4), rows(share(400, 1000), restart=4, n=5, target="wide")], ignore_index=True
    )
    found = against.against(frame, PAPER, data="same", others=["wide"]).set_index("n")["verdict"]
    assert found.to_dict() == {3: "inside", 5: "different network"}
    unlike = against.against(frame, PAPER, data="different", others=["wide"]).set_index("n")["verdict"]
    assert unlike.to_dict() == {3: "different data", 5: "different data and network"}


def test_an_attack_weaker_than_the_papers_is_no_verdict() -> None:
    def verdict(*frames: pd.DataFrame) -> str:
        (found,) = against.against(pd.concat(frames), PAPER, data="same")["verdict"]
        return str(found)

    assert verdict(rows(share(40), restart=4)) == "inside"
    assert verdict(rows(share(40), restart=3)) == "weaker attack"
    assert verdict(rows(share(40), restart=4, attack="pgd:steps=49")) == "weaker attack"
    assert verdict(rows(share(0), eps=0.03, restart=0, attack="pgd:steps=10")) == "inside"

    def versions(count: int, attack: str = "mdi2") -> list[pd.DataFrame]:
        return [
            rows(share(84), threat="blackbox", surrogate=str(place), attack=attack) for place in range(count)
        ]  # fmt: skip

    assert verdict(*versions(30)) == "inside"
    assert verdict(*versions(29)) == "weaker attack"
    assert verdict(*versions(29), *versions(2, "sgm:steps=99")) == "weaker attack"


def test_orderings_of_the_paper() -> None:
    held = {"dverge": (30, 50, 80), "gal": (80, 50, 30), "baseline": (0, 0, 0)}
    frame = pd.concat(
        [
            rows(share(right * 10, 1000), defense=defense, n=n, threat="blackbox", surrogate="a", eps=0.03)
            for defense, rights in held.items()
            for n, right in zip((3, 5, 8), rights, strict=True)
        ]
    )
    assert set(against.orderings(frame, PAPER)["verdict"]) == {"holds"}
    swapped = frame.assign(defense=frame["defense"].map({"dverge": "gal", "gal": "dverge", "baseline": "adp"}))
    swapped = swapped.assign(target=swapped["defense"] + swapped["n"].astype(str))
    verdicts = against.orderings(swapped, PAPER).groupby("claim")["verdict"].agg(set).to_dict()
    assert verdicts == {
        "black-box DVERGE rises with N": {"reversed"},
        "black-box GAL falls with N": {"reversed"},
        "black-box ADP has fallen": {"holds"},
    }
    for count, verdict in ((29, "weaker attack"), (30, "reversed")):
        standing = [
            rows(share(100), defense="adp", threat="blackbox", surrogate=str(place), attack="mdi2", eps=0.03)
            for place in range(count)
        ]
        assert against.orderings(pd.concat(standing), PAPER)["verdict"].tolist() == [verdict]
    assert len(against.orderings(study(samples=20), PAPER)) == 26
    assert against.orderings(rows(share(4)), PAPER).empty
    assert "DVERGE/5" in document.markdown(document.of_frame(against.orderings(frame, PAPER)))


def test_radii_that_differ_in_the_fourth_digit_are_not_shown_as_one() -> None:
    frame = pd.concat([rows(share(90), eps=8 / 255), rows(share(80), eps=0.0314), rows(share(70), eps=0.5)])
    shown = tables.worst_described(tables.worst(frame))
    place = shown.headers.index("ε")
    assert [row[place].text for row in shown.rows] == ["8/255", "0.0314", "0.5"]
    assert [row[place].sort for row in shown.rows] == [8 / 255, 0.0314, 0.5]
    values = document.of_frame(pd.DataFrame({"eps": [8 / 255, 0.0314], "p": [0.03137, 0.0314]}))
    assert [[cell.text for cell in row] for row in values.rows] == [["8/255", "0.0314"], ["0.0314", "0.0314"]]


def test_of_several_seeds_the_interval_holds_what_other_trainings_would_change() -> None:
    """Two trainings of 40 and 80 % say little of a third; Wilson's of their mean said [50, 69]."""
    frame = pd.concat([rows(share(40), seed=0), rows(share(80), seed=1)])
    (row,) = tables.accuracy(frame, "whitebox").to_dict("records")
    verdicts = np.array([share(40), share(80)])
    assert (row["low"], row["high"]) == accuracy_interval(verdicts)
    assert row["high"] - row["low"] > 0.5
    assert (
        "other images and, of several training runs, others"
        in tables.described(tables.accuracy(frame, "whitebox")).note
    )
    compared = pd.concat([rows(share(60), seed=0), rows(share(60), seed=1)])
    low, high = wilson(60, 100)
    assert tables.accuracy(compared, "whitebox")[["low", "high"]].to_numpy().tolist() == [
        [pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01)]
    ]


def test_bold_is_not_given_against_the_sign_of_most_images_nor_for_one_lucky_training() -> None:
    def by_seed(counts: list[list[bool]], defense: str) -> pd.DataFrame:
        return pd.concat([rows(right, defense=defense, seed=seed) for seed, right in enumerate(counts)])

    # Ahead on 25 images in each training, behind on 60 in one of three: 5 points ahead, and the sign test's p is .0002.
    ahead = [[True] * 25 + [False] * 60 + [True] * 15] + [[True] * 100] * 2
    behind = [[False] * 25 + [True] * 75] * 3
    few = pd.concat([by_seed(ahead, "dverge"), by_seed(behind, "gal")])
    assert not tables.accuracy(few, "whitebox")["best"].any()
    # 30 points ahead by one training of two alone.
    lucky = pd.concat([by_seed([share(100), share(40)], "dverge"), by_seed([share(40), share(40)], "gal")])
    assert not tables.accuracy(lucky, "whitebox")["best"].any()
    sure = pd.concat([by_seed([share(81), share(80), share(82)], "dverge"), by_seed([share(40)] * 3, "gal")])
    assert tables.accuracy(sure, "whitebox").set_index("defense")["best"].to_dict() == {"dverge": True, "gal": False}
