"""Data sets of Hugging Face, against a stand-in on this machine."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robench.cli import run
from robench.core.data import Data, load
from robench.core.errors import RobenchError
from robench.session import rows_of
from robench.store.runs import Runs
from robench.studies.card import judge_commands, train_command

SHA = "c" * 40  # as the stand-in says of every file
CLASSES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBENCH_CACHE", str(tmp_path / "cache"))
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def picture(shade: int, label: int) -> bytes:
    pixels = np.full((8, 8, 3), shade % 100, np.uint8)
    pixels[..., label] += 120
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def parquet(first: int, count: int, told: bool = True, **columns: Any) -> bytes:
    """Rows as `datasets` writes them; ``told``: with what it says of the columns."""
    labels = [number % 3 for number in range(first, first + count)]
    images = [{"bytes": picture(first + place, label), "path": f"{place}.png"} for place, label in enumerate(labels)]
    table = pa.table({"img": images, "label": pa.array(labels, pa.int64()), **columns})
    if told:
        features = {"img": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
        features |= {name: {"_type": "ClassLabel", "names": ["x", "y"]} for name in columns if name != "note"}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def serve(endpoint: tuple[str, dict[str, bytes]], files: dict[str, bytes], name: str = "o/r") -> None:
    """A repository of these files, at the revision ccc..., which is `main` and `v1`."""
    _, answers = endpoint
    info = {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]}
    for where in ("", "/revision/main", "/revision/v1", f"/revision/{SHA}"):
        answers[f"/api/datasets/{name}{where}"] = json.dumps(info).encode()
    for file, body in files.items():
        answers[f"/datasets/{name}/resolve/{SHA}/{file}"] = body


TRAIN, TEST = "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"
USUAL = {
    "README.md": b"# a set",
    TRAIN: parquet(0, 30),
    "data/train-00001-of-00002.parquet": parquet(30, 12),
    TEST: parquet(50, 9),
}

Endpoint = tuple[str, dict[str, bytes]]


def same(one: Data, other: Data) -> bool:
    return one.fingerprint == other.fingerprint and one.classes == other.classes


def test_rows_become_images_in_their_order(endpoint: Endpoint) -> None:
    serve(endpoint, USUAL)
    data = load("hf:o/r")
    assert (data.name, data.label) == (f"hf:o/r@{SHA}", f"hf-{data.fingerprint[:8]}")
    assert data.classes == tuple(CLASSES)
    assert data.train.images.shape == (42, 3, 8, 8)
    assert data.train.labels.tolist() == [number % 3 for number in range(42)]
    assert data.train.images[4, :, 0, 0].tolist() == [4, 124, 4]
    assert data.train.images[31, :, 0, 0].tolist() == [31, 151, 31], "of the second file"
    assert data.test.images[8, :, 0, 0].tolist() == [58, 178, 58]


def test_files_are_decoded_once(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(endpoint, USUAL)
    first = load("hf:o/r@v1")
    monkeypatch.setattr("robench.core.decoded._pixels", None)
    assert same(load(first.name), first)
    monkeypatch.setenv("ROBENCH_CACHE", "elsewhere")
    with pytest.raises(TypeError, match="not callable"):
        load("hf:o/r")


def test_without_a_network_what_was_downloaded_is_taken(endpoint: Endpoint, told: list[str]) -> None:
    serve(endpoint, USUAL)
    first = load("hf:o/r")
    endpoint[1].clear()
    again = load(first.name)
    assert same(again, first)
    assert again.name == first.name
    assert told[-1].endswith(f"revision {SHA}, which was downloaded before, is taken")
    with pytest.raises(RobenchError, match="hf:o/r cannot be downloaded"):
        load("hf:o/r")


@pytest.mark.parametrize("place", ["{}/{}-0.parquet", "{}.parquet", "a/b/{}/0000.parquet", "{}-00000.parquet"])
def test_splits_are_found_where_people_put_them(place: str, endpoint: Endpoint) -> None:
    serve(endpoint, {place.format(split, split): parquet(count, count) for split, count in (("train", 6), ("test", 3))})
    data = load("hf:o/r")
    assert (len(data.train), len(data.test)) == (6, 3)


def test_what_is_ambiguous_may_be_said(endpoint: Endpoint) -> None:
    coarse = {"coarse": pa.array([0, 1] * 15, pa.int64())}
    files = {f"{config}/{split}.parquet": parquet(shift, 30, **coarse) for config, shift in (("big", 0), ("small", 1))
             for split in ("train", "validation")}  # fmt: skip
    serve(endpoint, files)
    data = load("hf:o/r@v1:config=small:test=validation:label=coarse")
    assert data.classes == ("x", "y")
    assert data.test.labels.tolist() == [0, 1] * 15
    assert data.test.images[0, :, 0, 0].tolist() == [1, 121, 1]
    assert data.name == f"hf:o/r@{SHA}:config=small:test=validation:label=coarse"
    assert same(load(data.name), data)


@pytest.mark.parametrize("told", [True, False])
def test_columns_are_known_by_what_they_hold(told: bool, endpoint: Endpoint) -> None:
    note = {"note": pa.array(["a"] * 6)}
    serve(endpoint, {"train.parquet": parquet(0, 6, told, **note), "test.parquet": parquet(6, 6, told, **note)})
    assert load("hf:o/r").classes == (tuple(CLASSES) if told else ("0", "1", "2"))


OTHER = pa.array([0] * 6, pa.int64())
PAIR = {"train.parquet": parquet(0, 6), "test.parquet": parquet(6, 6)}
NO_IMAGES = io.BytesIO()
pq.write_table(pa.table({"text": ["a"], "label": [0]}), NO_IMAGES)
NULL = io.BytesIO()
pq.write_table(pa.table({"img": [{"bytes": picture(0, 0)}, None], "label": [0, 1]}), NULL)


@pytest.mark.parametrize(
    ("source", "files", "said"),
    [
        ("hf:o", {}, "expected hf:OWNER/NAME"),
        ("hf:o/r/x", {}, "expected hf:OWNER/NAME"),
        ("hf:o/r:labels=x", {}, "of config, train, test, image, label, got 'hf:o/r:labels=x'"),
        ("hf:o/r:label=", PAIR, "expected hf:OWNER/NAME"),
        ("hf:o/none", PAIR, "hf:o/none cannot be downloaded .*check the name and the network"),
        ("hf:o/r@v9", PAIR, "hf:o/r@v9 cannot be downloaded"),
        ("hf:o/r", {"a.csv": b"x"}, "no Parquet files, but a.csv; the hub makes .* hf:o/r@refs/convert/parquet"),
        ("hf:o/r", {"train.parquet": PAIR["train.parquet"]}, "no split 'test' to test on; there are train; choose"),
        (
            "hf:o/r@v1",
            {"train.parquet": b"", "validation.parquet": b""},
            "no split 'test' to test on; there are train, validation; say which: hf:o/r@v1:test=validation$",
        ),
        (
            "hf:o/r:test=valid",
            {"a/train.parquet": b"", "b/train.parquet": b""},
            "its parts are a, b; say which: hf:o/r:test=valid:config=a or hf:o/r:test=valid:config=b$",
        ),
        ("hf:o/r:config=c", PAIR, "its parts are ; say which"),
        (
            "hf:o/r",
            {name: parquet(0, 6, fine=OTHER) for name in PAIR},
            r"several columns of labels, label, fine \(all .*\); say which: hf:o/r:label=label or hf:o/r:label=fine$",
        ),
        ("hf:o/r:label=kind", PAIR, "no column 'kind', but img, label; say which: hf:o/r:label=label$"),
        (
            "hf:o/r:label=img",
            PAIR,
            "column 'img' holds struct.*, no numbers of classes; say which: hf:o/r:label=label$",
        ),
        ("hf:o/r", {name: NO_IMAGES.getvalue() for name in PAIR}, "no column of images .all columns: text, label"),
        ("hf:o/r", {name: NULL.getvalue() for name in PAIR}, "row 1 of train.parquet has no image in it"),
        ("hf:o/r:image=label", PAIR, "row 0 of train.parquet has no image in it"),
        ("hf:o/r", dict.fromkeys(PAIR, b"PAR1 no"), "hf:o/r cannot be "),
    ],
)
def test_what_does_not_fit_is_one_line(source: str, files: dict[str, bytes], said: str, endpoint: Endpoint) -> None:
    serve(endpoint, files)
    with pytest.raises(RobenchError, match=said) as refused:
        load(source)
    assert "\n" not in str(refused.value)


def test_the_revision_stands_in_manifest_card_and_commands(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(endpoint, USUAL)
    store, name = str(tmp_path / "runs"), f"hf:o/r@{SHA}"
    line = ["train", "baseline", "--dataset", "hf:o/r", "--model", "resnet8", "--n", "1", "--epochs", "1"]
    assert run([*line, "--batch-size", "14", "--name", "it", "--runs", store]) == 0
    made = Runs(store).get("it")
    data = load(name)
    assert made.manifest["data"] == {"name": data.label, "fingerprint": data.fingerprint, "source": name}
    assert f"--dataset {name} " in train_command(made)
    # Which data to judge on is known.
    judged = ["eval", "it", "--threat", "whitebox", "--eps", "0.1", "--steps", "1", "--restarts", "1"]
    assert run([*judged, "--no-probe", "--runs", store]) == 0
    assert "42 + 9 images to train and test; classes 0 ant: 14 + 3" in capsys.readouterr().err
    rows = Runs(store).get("it")
    assert all(f"--dataset {name} " in each for each in judge_commands(rows, rows_of(rows).evaluations()))


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RobenchError, match=r"pip install robench\[hub\]"):
        load("hf:o/r")
