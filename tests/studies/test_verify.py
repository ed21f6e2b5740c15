"""`robench check result`: confirms what was measured, and nothing that was changed since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robench.cli import run
from robench.core.errors import RobenchError
from robench.core.files import content_key, read_frame, write_frame, write_json
from robench.evaluation.findings import Finding
from robench.session import OUTCOMES, Session
from robench.store.runs import Runs
from robench.studies.intact import SUMMARY
from robench.studies.verify import verify
from tests.studies import small

pytestmark = pytest.mark.slow

#: More cells than the study has.
ALL = 1000


@pytest.fixture
def published(plain: Path) -> Path:
    """One threat is enough to see what was changed: each look makes every cell again."""
    return plain


@pytest.fixture
def result(published: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(published / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def every(whole: Path, tmp_path: Path) -> Path:
    """A copy of a study of every threat."""
    shutil.copytree(whole / "out", tmp_path / "every")
    return tmp_path / "every"


def tried(published: Path, result: Path, **options: int | float) -> list[Finding]:
    return list(verify(result, dataset=f"npz:{published / 'data.npz'}", **{"cells": ALL, **options}))  # type: ignore[arg-type]


def refused(published: Path, result: Path, **options: int | float) -> list[Finding]:
    return [each for each in tried(published, result, **options) if each.status != "pass"]


def outcomes(result: Path) -> Iterator[Path]:
    for found in Runs(result / "runs").all():
        if (found.folder / OUTCOMES).is_dir():
            yield found.folder / OUTCOMES


@pytest.fixture
def one(result: Path) -> Path:
    """A copy in which one run alone was judged."""
    for folder in list(outcomes(result))[1:]:
        shutil.rmtree(folder)
    return result


def changed(result: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Applies ``change`` to the rows of the first run that has any, under a name that fits."""
    folder = next(outcomes(result))
    parts = sorted(folder.glob("part-*.parquet"))
    frames = [read_frame(path) for path in parts]
    for path in parts:
        path.unlink()
    write_frame(folder, change(pd.concat(frames, ignore_index=True)))


def test_every_cell_of_every_threat_is_confirmed_and_nothing_is_written(whole: Path, every: Path) -> None:
    before = {path: path.read_bytes() for path in every.rglob("*") if path.is_file()}
    found = tried(whole, every)
    assert all(each.status == "pass" for each in found), found
    assert len(found) == small.rows(every)["cell"].nunique() + 1
    assert {path: path.read_bytes() for path in every.rglob("*") if path.is_file()} == before


def test_cells_that_depend_on_their_batch_are_left_out_and_told(published: Path, result: Path, told: list[str]) -> None:
    pytest.importorskip("torchattacks")
    store = Runs(result / "runs")
    name = next(each.name for each in store.all() if each.role == "target")
    for other in set(store.names()) - {name}:
        shutil.rmtree(store.folder(other) / OUTCOMES, ignore_errors=True)
    shutil.rmtree(store.folder(name) / OUTCOMES)
    (result / SUMMARY).unlink()
    data = ["--dataset", f"npz:{published / 'data.npz'}", "--device", "cpu", "--samples", "8"]
    judge = ["eval", name, "--threat", "whitebox", "--eps", "0.1,0.3", "--runs", str(result / "runs"), *data]
    assert run([*judge, "--attacks", "torchattacks/PGD", "--steps", "2"]) == 0
    told.clear()
    found = list(verify(result, dataset=data[1]))
    assert [(each.status, " clean " in each.name) for each in found] == [("pass", True)]
    assert told == ["cells of torchattacks/PGD are left out: an image there depends on the others in its batch"]
    cells = store.folder(name) / OUTCOMES
    rows = [read_frame(path) for path in cells.glob("part-*.parquet")]
    manifests = {cell: json.loads((cells / "cells" / f"{cell}.json").read_text()) for cell in rows[0]["cell"].unique()}
    attacked = pd.concat(rows)[lambda frame: frame["cell"].map(lambda cell: manifests[cell]["threat"] != "clean")]
    shutil.rmtree(cells)
    write_frame(cells, attacked)
    for cell in attacked["cell"].unique():
        write_json(cells / "cells" / f"{cell}.json", manifests[cell])
    with pytest.raises(RobenchError, match=r"no cell of .* can be tried again: images of all depend on their batch"):
        list(verify(result, dataset=data[1]))


def test_the_command_says_so(whole: Path, every: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "result", str(every), "--cells", "3", "--dataset", f"npz:{whole / 'data.npz'}"]
    command += ["--device", "cpu"]
    assert run(command) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[-1] == "confirmed: 4 of 4"
    assert run([*command, "--seed", "1"]) == 0
    assert capsys.readouterr().out != first  # other cells
    changed(every, lambda rows: rows.assign(correct=~rows["correct"]))
    assert run(command) == 1
    assert "refused: " in capsys.readouterr().out
    assert run(["check", "result", str(every.parent / "absent")]) == 2


@pytest.mark.parametrize("column", ["correct", "prediction", "margin", "restart", "linf", "zero_gradient", "label"])
def test_one_changed_value_is_refused(published: Path, one: Path, column: str) -> None:
    def spoil(rows: pd.DataFrame) -> pd.DataFrame:
        old = rows.loc[3, column]
        rows.loc[3, column] = not old if column in ("correct", "zero_gradient") else old + 1
        return rows

    changed(one, spoil)
    assert [each.name for each in refused(published, one) if each.name != SUMMARY] != []


def test_a_row_that_is_gone_or_twice_there_is_refused(published: Path, result: Path) -> None:
    changed(result, lambda rows: pd.concat([rows, rows.iloc[[3]].assign(margin=9.0)]))
    assert "rows" in refused(published, result)[0].evidence
    changed(result, lambda rows: rows.drop_duplicates(["cell", "member", "sample"]).iloc[1:])
    # The verdicts that are left stand; the published number does not.
    assert refused(published, result)[-1].name == SUMMARY


def test_changed_bytes_are_refused(published: Path, result: Path) -> None:
    path = next(next(outcomes(result)).glob("part-*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any("not what was written" in each.evidence for each in refused(published, result))
    assert path.exists()


def test_a_changed_manifest_is_refused(published: Path, one: Path) -> None:
    cell = sorted((next(outcomes(one)) / "cells").glob("*.json"))[0]
    good = json.loads(cell.read_text())
    for bad in (
        {**good, "eps": 0.9},
        {**good, "defense": "unbreakable"},
        {**good, "recipe": {**good["recipe"], "target": "0" * 16}},
        {**good, "recipe": {**good["recipe"], "threat": "transfer"}},
        {"recipe": 3},
    ):
        cell.write_text(json.dumps(bad))
        assert any(each.name != SUMMARY for each in refused(published, one)), bad


def test_other_weights_are_refused(published: Path, result: Path) -> None:
    """The rows of one run beside the weights of another, with a manifest that fits them."""
    first, second = (path.parent for path in list(outcomes(result))[:2])
    for name in ("weights.safetensors", "manifest.json"):
        shutil.copy(second / name, first / name)
    assert any("other weights" in each.evidence for each in refused(published, result))


def test_no_code_that_a_file_names_is_imported(published: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = result.parent / "evil_plug_in.py"
    evil.write_text(f"open({str(result.parent / 'was-here')!r}, 'w')")
    monkeypatch.syspath_prepend(result.parent)
    folder = next(outcomes(result))
    for path in (folder / "cells").glob("*.json"):
        manifest = json.loads(path.read_text())
        if "craft" in manifest["recipe"]:
            manifest["recipe"]["craft"]["attack"]["name"] = "evil_plug_in:Attack"
            path.write_text(json.dumps(manifest))
    run_manifest = json.loads((folder.parent / "manifest.json").read_text())
    run_manifest["members"][0]["name"] = "evil_plug_in:model"
    (folder.parent / "manifest.json").write_text(json.dumps(run_manifest))
    assert refused(published, result)
    assert not (result.parent / "was-here").exists()


def test_a_tolerance_forgives_a_share(published: Path, result: Path) -> None:
    cell = content_key([])

    def spoil(rows: pd.DataFrame) -> pd.DataFrame:
        nonlocal cell
        cell = str(rows.loc[3, "cell"])
        rows.loc[3, "margin"] += 1
        return rows

    changed(result, spoil)
    rows = small.rows(result)
    share = 1 / int((rows["cell"] == cell).sum())
    assert len(refused(published, result, tolerance=share * 0.99)) == 1
    assert refused(published, result, tolerance=share) == []


def test_data_that_is_not_registered_has_to_be_named(result: Path) -> None:
    for dataset, told in ((None, "say where it is: --dataset"), ("nope", "unknown dataset 'nope'")):
        with pytest.raises(RobenchError, match=told):
            list(verify(result, dataset=dataset))


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_manifest_is_a_finding(result: Path, published: Path, content: str) -> None:
    folder = next(outcomes(result)).parent
    (folder / "manifest.json").write_text(content)
    found = refused(published, result)
    assert any(each.name.startswith(folder.name) for each in found)


def test_a_study_with_another_setting_is_confirmed_too(published: Path, result: Path) -> None:
    changed_study = ["run", str(published / "small.toml"), "--out", str(result), "--workers", "1", "--device", "cpu"]
    assert run([*changed_study, "--set", "samples=20"]) == 0
    assert {row["samples"] for row in json.loads((result / SUMMARY).read_text()) if "accuracy" in row} == {20}
    assert refused(published, result, cells=0) == []


def test_of_several_data_sets_cells_of_the_one_that_is_named_are_tried(
    judged: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were refused, as judged on other data."""
    noise = np.load(tmp_path / "noise.npz")
    np.savez(tmp_path / "other.npz", **{**noise, "x_test": 255 - noise["x_test"]})
    options = ["--threat", "whitebox", "--eps", "0.1", "--steps", "1", "--restarts", "1", "--no-probe"]
    other = ["--runs", str(judged.store.root), "--dataset", f"npz:{tmp_path / 'other.npz'}"]
    assert run(["eval", "base", *options, *other]) == 0
    line = ["check", "result", str(judged.store.root), "--device", "cpu", "--dataset"]
    assert run([*line, f"npz:{tmp_path / 'noise.npz'}", "--cells", "40"]) == 0
    told = capsys.readouterr()
    assert "cells were judged on other data than npz-" in told.err
    assert "confirmed: " in told.out
    assert run([*line, f"npz:{tmp_path / 'other.npz'}", "--cells", "40"]) == 0
    assert "confirmed: 2 of 2" in capsys.readouterr().out
    assert run([*line, "digits"]) == 2
    assert "was judged on digits; choose another --dataset" in capsys.readouterr().err


def test_a_network_of_ones_own_is_named(
    judged: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownnet.py").write_text(
        "from torch import nn\n\n\ndef make(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))\n"
    )
    data = ["--dataset", "npz:noise.npz"]
    train = ["--n", "1", "--epochs", "1", "--batch-size", "8", "--model", "ownnet:make", "--name", "own"]
    assert run(["train", "baseline", *train, *data, "--runs", "mine"]) == 0
    judge = ["--threat", "whitebox", "--eps", "0.1", "--steps", "1", "--restarts", "1", "--no-probe"]
    assert run(["eval", "own", *judge, *data, "--model", "ownnet:make", "--runs", "mine"]) == 0
    line = ["check", "result", "mine", "--device", "cpu", *data]
    assert run([*line, "--model", "ownnet:make"]) == 0
    assert "confirmed: 2 of 2" in capsys.readouterr().out
    assert run(["check", "result", "mine", "--files", "--model", "ownnet:make"]) == 2
    assert "--model has no effect with --files" in capsys.readouterr().err


def test_a_renamed_run_is_confirmed_by_its_weights(judged: Session) -> None:
    root = judged.store.root
    for now, then in (("mine", "base"), ("hold-out", "sub")):
        (root / then).rename(root / now)
    data = f"npz:{root.parent / 'noise.npz'}"
    found = list(verify(root, dataset=data, cells=ALL))
    assert {each.status for each in found} == {"pass"}, [each for each in found if each.status != "pass"]
    assert all("its target mine was called base then" in each.said for each in found)
    assert any("its surrogate hold-out was called sub then" in each.said for each in found)
    # Another run has the name that the cells give their surrogate.
    shutil.copytree(root / "mine", root / "sub")
    shutil.rmtree(root / "sub" / OUTCOMES)
    refused = [each for each in verify(root, dataset=data, cells=ALL) if each.status == "fail"]
    assert refused
    assert all("its manifest says surrogate 'sub', and it is 'hold-out'" in each.said for each in refused)
