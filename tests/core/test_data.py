"""Data sets, from the folders that people really have; and what is not a data set."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import robench
from robench.attacks import ATTACKS
from robench.core import corrupted, decoded
from robench.core.data import DATASETS, MAX_CLASSES, Data, improbability, load, make, to_images
from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.store.runs import Runs
from robench.training.loop import ensure
from robench.training.task import resolve

RANDOM = np.random.default_rng(0)


def pixels(count: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return RANDOM.integers(0, 256, size=(count, *shape), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one_line(error: pytest.ExceptionInfo[RobenchError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- digits


def test_digits_never_change() -> None:
    digits = load("digits")
    assert digits.fingerprint == "e0ce8426cc3922ba61130d425e63bdc81adba1d848f11a59faffcf3df5094cb8"
    assert digits.train.images.shape == (1297, 1, 8, 8)
    assert len(digits.test) == 500
    assert digits.train.images.dtype == torch.uint8
    assert int(digits.train.images.max()) == 255
    assert digits.train.labels[:10].tolist() == [6, 2, 6, 5, 4, 2, 0, 2, 4, 0]
    assert (digits.mean, digits.std) == ((0.3051,), (0.376,))
    assert (digits.identity, digits.label, digits.recipe, digits.num_classes) == ("digits", "digits", "digits", 10)


def test_images_are_scaled_to_one() -> None:
    assert to_images(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)).flatten().tolist() == [
        0,
        1,
        pytest.approx(0.2),
    ]


# --- make


def tiny(**changes: Any) -> dict[str, Any]:
    arrays = {"x_train": pixels(6, 3, 4, 4), "y_train": np.arange(6) % 3, "x_test": pixels(4, 3, 4, 4)}
    return {**arrays, "y_test": np.arange(4) % 3, **changes}


def made(name: str = "npz:tiny", **changes: Any) -> Data:
    values = tiny(**changes)
    return make(name, (values["x_train"], values["y_train"]), (values["x_test"], values["y_test"]))


def test_arrays_become_a_data_set() -> None:
    values = tiny()
    data = made(**values)
    assert np.array_equal(data.train.images.numpy(), values["x_train"])
    assert data.test.labels.dtype == torch.int64
    assert data.classes == ("0", "1", "2")
    scaled = values["x_train"].astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert data.mean == pytest.approx(scaled.mean(axis=1), abs=1e-4)
    assert data.std == pytest.approx(scaled.std(axis=1, ddof=1), abs=1e-4)
    spec = data.model("resnet8")
    assert (spec.num_classes, spec.in_channels, spec.mean, spec.std) == (3, 3, data.mean, data.std)


def test_grey_images_need_no_channel() -> None:
    data = made(x_train=pixels(6, 4, 4), x_test=pixels(4, 4, 4))
    assert data.train.images.shape == (6, 1, 4, 4)


def test_constant_images_are_not_divided_by_zero() -> None:
    assert made(x_train=np.full((6, 3, 4, 4), 9, dtype=np.uint8)).std == (1.0, 1.0, 1.0)


def test_the_fingerprint_knows_every_pixel_and_label() -> None:
    values = tiny()
    fingerprints = {made(**values).fingerprint, made("other", **values).fingerprint}
    assert len(fingerprints) == 1
    for name, value in values.items():
        changed = value.copy()
        changed.flat[0] = changed.flat[0] % 2 + 1
        fingerprints.add(made(**{**values, name: changed}).fingerprint)
    assert len(fingerprints) == 5


def test_a_path_is_in_no_key_and_no_label() -> None:
    data = made("npz:/home/me/x.npz")
    assert data.identity == data.fingerprint[:16]
    assert data.label == f"npz-{data.fingerprint[:8]}"


def test_data_of_a_package_are_known_by_their_content_too() -> None:
    """A registered name says nothing of images that were changed under it: rows of the old ones are not of these."""
    pixels, labels = np.zeros((4, 1, 4, 4), np.uint8), np.array([0, 1, 0, 1])
    before, after = (make("mine", (pixels, labels), (pixels, own), classes="ab") for own in (labels, 1 - labels))
    assert before.identity != after.identity
    assert (before.label, after.label) == ("mine", "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((6, 3, 4, 4))}, r"train images as uint8 \(M,C,H,W\).* got float64 \(6, 3, 4, 4\)"),
        ({"x_test": pixels(4, 4, 4, 3)}, r"test images as uint8 .* got uint8 \(4, 4, 4, 3\)"),
        ({"x_test": pixels(4, 3, 5, 5)}, "train and test images differ in shape"),
        ({"x_train": pixels(6, 16)}, "train images as uint8"),
        ({"x_train": pixels(6, 3, 0, 4), "x_test": pixels(4, 3, 0, 4)}, "train images as uint8"),
        ({"x_train": pixels(0, 3, 4, 4), "y_train": np.arange(0)}, "train images as uint8"),
        ({"x_train": [[1], [2, 3]]}, "expected arrays as train images"),
        ({"x_train": None}, "train images as uint8"),
        ({"y_train": np.arange(5)}, r"6 integer train labels, got int64 \(5,\)"),
        ({"y_test": np.zeros(4)}, "4 integer test labels, got float64"),
        ({"y_test": np.zeros((4, 1), dtype=int)}, "4 integer test labels"),
        ({"y_test": np.array([True, False] * 2)}, "4 integer test labels, got bool"),
        ({"y_test": np.array([0, 1, -1, 0])}, "expected test labels in 0"),
        ({"y_test": np.array([0, 1, 2**63, 0], dtype=np.uint64)}, "expected test labels in 0"),
        ({"y_test": np.array([0, 1, 10**15, 0])}, "expected test labels in 0"),
        ({"y_train": np.zeros(6, int), "y_test": np.zeros(4, int)}, "at least 2 classes"),
        ({"y_train": np.arange(6) % 3 + 1, "y_test": np.arange(4) % 3 + 1}, "labels from 0 without gaps, got 1..3, of"),
        ({"y_train": np.array([0, 1, 2, 255, 0, 1])}, r"labels from 0 without gaps, got 0..255, of which \d occur"),
    ],
)
def test_what_is_not_a_data_set(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RobenchError, match=message) as error:
        made(**changes)
    assert one_line(error).startswith("npz:tiny: expected" if "differ" not in message else "npz:tiny: train")


def test_a_label_beyond_the_named_classes_is_an_error() -> None:
    values = tiny()
    with pytest.raises(RobenchError, match=r"labels in 0\.\.1 .* got 2"):
        make("x", (values["x_train"], values["y_train"]), (values["x_test"], values["y_test"]), classes=("a", "b"))


shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
kinds = st.sampled_from([np.uint8, np.int8, np.int64, np.uint64, np.float32, np.bool_, np.complex64, np.str_, object])
arrays = st.builds(lambda shape, kind, value: np.full(shape, value).astype(kind), shapes, kinds, st.integers(0, 100))
whatever = arrays | st.none() | st.text(max_size=3) | st.lists(st.integers(-1, 3), max_size=4) | st.floats()


@settings(max_examples=80, deadline=None)
@given(whatever, whatever, st.booleans())
def test_any_arrays_give_a_data_set_or_our_error(images: Any, labels: Any, first: bool) -> None:
    good = (pixels(4, 1, 2, 2), np.arange(4) % 2)
    try:
        data = make("npz:x", *([(images, labels), good] if first else [good, (images, labels)]))
    except RobenchError:
        return
    assert 2 <= data.num_classes <= MAX_CLASSES
    assert len(data.train.images) == len(data.train.labels) > 0


# --- subsets


def numbered(count: int) -> Data:
    return made(x_test=pixels(count, 3, 4, 4), y_test=np.arange(count) % 3)


def test_the_papers_subset_is_the_authors() -> None:
    data = made(x_test=np.zeros((10000, 3, 4, 4), np.uint8), y_test=np.zeros(10000, int))
    state = random.getstate()
    try:
        random.seed(0)
        wanted = random.sample(range(10000), 1000)
    finally:
        random.setstate(state)
    assert data.subset(1000, "paper").tolist() == sorted(wanted)
    assert data.subset(50, "paper").tolist() == sorted(wanted[:50])
    assert len(data.subset(2000, "paper")) == 1000
    assert random.getstate() == state


def test_the_papers_subset_needs_10000_images() -> None:
    with pytest.raises(RobenchError, match=r"10000 test images, npz-.* has 20"):
        numbered(20).subset(5, "paper")


def test_first_and_random_subsets() -> None:
    data = numbered(20)
    assert data.subset(5).tolist() == [0, 1, 2, 3, 4]
    assert len(data.subset(99)) == 20
    drawn = data.subset(8, "random", 1)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert drawn.tolist() == data.subset(8, "random", 1).tolist() != data.subset(8, "random", 2).tolist()
    # A larger subset keeps what a smaller one has.
    assert set(drawn.tolist()) < set(data.subset(12, "random", 1).tolist())
    assert load("digits").subset(5, "random", 0).tolist() == [13, 237, 260, 303, 340]


def sorted_by_class(count: int, classes: int) -> Data:
    return made(
        x_test=pixels(count, 3, 4, 4), y_test=np.arange(count) * classes // count, y_train=np.arange(6) % classes
    )


def test_of_data_ordered_by_class_random_images_are_taken() -> None:
    data = sorted_by_class(400, 4)
    assert data.resolved("auto", 100) == "random"
    assert data.subset(100).tolist() == data.subset(100, "random").tolist()
    assert data.subset(100, "first").tolist() == list(range(100))
    assert data.resolved("auto", 400) == "first", "all of them are all of them"
    assert load("digits").resolved("auto", 100) == "first"


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("samples", [10, 100, 900])
def test_a_random_order_is_seldom_taken_for_an_ordered_one(classes: int, samples: int) -> None:
    labels = torch.arange(1000) % classes
    found = [improbability(labels, labels[Stream(("test", seed)).permutation(1000)[:samples]]) for seed in range(40)]
    assert min(found) > 1e-3
    assert improbability(labels.sort().values, labels.sort().values[:samples]) < 1e-6 or (classes, samples) == (2, 10)
    interleaved = torch.arange(samples) % classes
    assert improbability(labels, interleaved) > 0.5


def test_hidden_files_and_folders_are_left_out_and_told(folder: Path, told: list[str]) -> None:
    plain = load(f"folder:{folder}")
    (folder / "train/.ipynb_checkpoints").mkdir()
    (folder / "__MACOSX").mkdir()
    (folder / "test/ant/.DS_Store").write_text("x")
    told.clear()
    data = load(f"folder:{folder}")
    assert data.classes == plain.classes
    assert data.fingerprint == plain.fingerprint
    (line,) = told
    assert line.endswith("2 hidden files or folders left out, such as train/.ipynb_checkpoints")


@pytest.mark.parametrize(("samples", "kind"), [(0, "first"), (-3, "random"), (5, "last"), (5, "")])
def test_other_subsets_are_errors(samples: int, kind: str) -> None:
    with pytest.raises(RobenchError, match=r"expected `(subset|samples)`"):
        numbered(20).subset(samples, kind)


# --- npz


def write_npz(path: Path, **changes: Any) -> str:
    np.savez(path, **{name: value for name, value in tiny(**changes).items() if value is not None})
    return f"npz:{path}"


def test_an_npz_makes_the_round_trip(tmp_path: Path) -> None:
    values = tiny()
    data = load(write_npz(tmp_path / "x.npz", **values))
    assert np.array_equal(data.test.images.numpy(), values["x_test"])
    assert data.test.labels.tolist() == values["y_test"].tolist()
    assert data.fingerprint == made(**values).fingerprint
    assert data.recipe == "generic"


def test_an_npz_that_lacks_an_array(tmp_path: Path) -> None:
    with pytest.raises(RobenchError, match="lacks x_test, y_test; expected arrays"):
        load(write_npz(tmp_path / "x.npz", x_test=None, y_test=None))


def test_an_npz_with_wrong_arrays(tmp_path: Path) -> None:
    with pytest.raises(RobenchError, match="train images as uint8"):
        load(write_npz(tmp_path / "x.npz", x_train=np.zeros((6, 3, 4, 4))))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(os.environ["ROBENCH_CACHE"]).parent / "evil",))


def test_an_npz_with_pickle_is_never_unpickled(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "x.npz", y_test=np.array([Evil()] * 4, dtype=object))
    with pytest.raises(RobenchError, match="without pickle"):
        load(name)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"text", pickle.dumps([1, 2])])
def test_what_is_not_an_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(RobenchError, match=r"cannot be read as \.npz"):
        load(f"npz:{tmp_path / 'x.npz'}")


def test_a_cut_npz_an_npy_and_nothing(tmp_path: Path) -> None:
    name = write_npz(tmp_path / "x.npz")
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "x.npy", np.zeros(3))
    for wrong, message in [
        (name, "cannot be read"),
        (f"npz:{tmp_path / 'x.npy'}", "cannot be read"),
        (f"npz:{tmp_path}", "cannot be read"),
        (f"npz:{tmp_path / 'none.npz'}", "does not exist"),
    ]:
        with pytest.raises(RobenchError, match=message) as error:
            load(wrong)
        one_line(error)


# --- folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three images of 5x4 pixels each to train, one each to test, colours that tell them apart."""
    Image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(count):
                picture = np.zeros((5, 4, 3), np.uint8)
                picture[..., label] = 100 + index
                Image.fromarray(picture).save(tmp_path / "images" / part / name / f"{index}.png")
    return tmp_path / "images"


def caches(own_cache: Path) -> list[Path]:
    return sorted(own_cache.rglob("folder-*"))


def test_a_folder_makes_the_round_trip(folder: Path) -> None:
    data = load(f"folder:{folder}")
    assert data.classes == ("ant", "bee")
    assert data.train.images.shape == (6, 3, 5, 4)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images[:, :, 0, 0].tolist() == [[100 + i, 0, 0] for i in range(3)] + [
        [0, 100 + i, 0] for i in range(3)
    ]
    assert data.test.labels.tolist() == [0, 1]


def test_grey_images_stay_grey_and_palettes_become_colours(folder: Path, tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    for mode, channels in (("L", 1), ("P", 3), ("RGBA", 3)):
        other = tmp_path / mode
        shutil.copytree(folder, other)
        for file in other.rglob("*.png"):
            with Image.open(file) as image:
                image.convert(mode).save(file)
        assert load(f"folder:{other}").train.images.shape == (6, channels, 5, 4)


def test_images_are_decoded_once(folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(f"folder:{folder}")
    assert len(caches(own_cache)) == 1

    def forbidden(entry: decoded.Encoded) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(decoded, "_pixels", forbidden)
        assert load(f"folder:{folder}").fingerprint == first.fingerprint
    (folder / "train/ant/0.png").write_bytes((folder / "train/bee/2.png").read_bytes())
    assert load(f"folder:{folder}").fingerprint != first.fingerprint


@pytest.mark.filterwarnings("ignore::robench.DoubtWarning")
def test_a_folder_gives_the_weights_and_rows_that_its_arrays_give(folder: Path, tmp_path: Path) -> None:
    mapped = load(f"folder:{folder}")
    parts = [(split.images.numpy().copy(), split.labels.numpy().copy()) for split in (mapped.train, mapped.test)]
    data = make(mapped.name, *parts, classes=mapped.classes)
    assert (data.fingerprint, data.mean, data.std) == (mapped.fingerprint, mapped.mean, mapped.std)
    rows, weights = [], []
    for number, each in enumerate((mapped, data)):
        task = resolve(each, "baseline", 2, models=["resnet8"], overrides={"epochs": 1, "batch_size": 2})
        made = ensure(task, each, Runs(tmp_path / str(number)), device=torch.device("cpu"))
        weights.append(made.weights)
        threat = robench.Whitebox(eps=(0.1,), restarts=2, attacks=(ATTACKS.get("pgd")(steps=2),))
        rows.append(robench.evaluate(made.load(), each, threat, probe=False).frame)
    assert weights[0] == weights[1]
    pd.testing.assert_frame_equal(*rows)


MEMORY = """
import re, sys, threading
from pathlib import Path
from robench.core.data import load, to_images

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load(f"folder:{sys.argv[1]}")  # what is imported on first use counts for nothing
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

threading.Thread(target=watch).start()
for _ in ("decoded", "mapped"):
    data = load(f"folder:{sys.argv[2]}")
    to_images(data.train.images[::100])
done.set()
print((peak[0] - before) / data.train.images.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read there")
def test_a_folder_need_not_fit_memory(folder: Path, tmp_path: Path) -> None:
    """It took fifteen times as much as its pixels; now what is read at a time."""
    large = tmp_path / "large"
    for name in ("train/ant", "train/bee", "test/ant"):
        (large / name).mkdir(parents=True)
    for number in range(6000):
        picture = Image.fromarray(np.full((64, 64, 3), number % 251, np.uint8))
        picture.save(large / "train" / ("ant", "bee")[number % 2] / f"{number}.bmp")
    picture.save(large / "test/ant/0.bmp")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), str(large)], capture_output=True, text=True, check=True
    )
    assert 0 < float(done.stdout) < 0.5


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_damaged_cache_is_made_again(folder: Path, own_cache: Path, where: float) -> None:
    first = load(f"folder:{folder}")
    (cache,) = caches(own_cache)
    content = bytearray(cache.read_bytes())
    content[int(where * len(content))] ^= 4
    cache.write_bytes(content)
    assert load(f"folder:{folder}").fingerprint == first.fingerprint
    assert cache.read_bytes() != bytes(content)


def test_another_folder_of_equal_sizes_and_times_is_another_data_set(folder: Path, tmp_path: Path) -> None:
    """An unpacked archive gives every file one time, and equal pictures have equal sizes."""
    Image = pytest.importorskip("PIL.Image")
    fingerprints = []
    for shade in (1, 2):
        other = tmp_path / f"shade{shade}"
        shutil.copytree(folder, other)
        for file in other.rglob("*.png"):
            Image.fromarray(np.full((5, 4, 3), shade, np.uint8)).save(file, format="BMP")
            os.utime(file, ns=(0, 0))
        fingerprints.append(load(f"folder:{other}").fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_a_new_empty_class_moves_the_labels(folder: Path) -> None:
    load(f"folder:{folder}")
    (folder / "train/aardvark").mkdir()
    data = load(f"folder:{folder}")
    assert data.classes == ("aardvark", "ant", "bee")
    assert data.test.labels.tolist() == [1, 2]


def test_a_name_that_is_not_utf8(folder: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    try:
        (folder / "train/ant" / name).write_bytes((folder / "train/ant/0.png").read_bytes())
    except OSError as error:
        pytest.skip(f"the file system takes no such name ({error})")
    assert len(load(f"folder:{folder}").train) == 7


def test_what_is_wrong_with_a_folder(folder: Path, tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    no_test = copy("no_test")
    shutil.rmtree(no_test / "test")
    extra = copy("extra")
    (extra / "test/cow").mkdir()
    empty = copy("empty")
    for file in (empty / "test").rglob("*.png"):
        file.unlink()
    text = copy("text")
    (text / "train/ant/note.txt").write_text("hello")
    cut = copy("cut")
    (cut / "train/bee/1.png").write_bytes((folder / "train/bee/1.png").read_bytes()[:50])
    sizes = copy("sizes")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(sizes / "train/bee/1.png")
    nested = copy("nested")
    (nested / "train/ant/more").mkdir()
    deep = copy("deep")
    Image.fromarray(np.full((5, 4), 40_000, np.uint16)).save(deep / "train/ant/0.png")
    for path, message in [
        (deep, "holds pixels of more than 8 bits"),
        (no_test, "no_test/test does not exist; expected"),
        (extra, "classes that train has not: cow"),
        (empty, "holds no images"),
        (text, "note.txt cannot be decoded as an image"),
        (cut, r"bee/1.png cannot be decoded"),
        (sizes, r"bee/1.png has shape \(3, 4, 4\), .* has \(3, 5, 4\)"),
        (nested, "ant/more cannot be read"),
        (tmp_path / "none", "none/train does not exist"),
    ]:
        with pytest.raises(RobenchError, match=message) as error:
            load(f"folder:{path}")
        one_line(error)


# --- official data sets, as their authors' servers give them


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def dump(path: Path, value: dict[str, Any]) -> tuple[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
    return path.name, md5(path)


def cifar10(root: Path, patch: pytest.MonkeyPatch, datasets: Any) -> tuple[Any, Any]:
    base = root / "cifar10" / datasets.CIFAR10.base_folder
    images, labels = pixels(12, 3, 32, 32), np.arange(12) % 10
    lists = [
        dump(base / name, {"data": images[at].reshape(2, -1), "labels": labels[at].tolist()})
        for name, at in [(f"data_batch_{i + 1}", slice(2 * i, 2 * i + 2)) for i in range(5)]
        + [("test_batch", slice(10, 12))]
    ]
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    name, digest = dump(base / "batches.meta", {"label_names": names})
    patch.setattr(datasets.CIFAR10, "train_list", lists[:5])
    patch.setattr(datasets.CIFAR10, "test_list", lists[5:])
    patch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return (images[:10], labels[:10]), (images[10:], labels[10:])


def cifar100(root: Path, patch: pytest.MonkeyPatch, datasets: Any) -> tuple[Any, Any]:
    base = root / "cifar100" / datasets.CIFAR100.base_folder
    images, labels = pixels(7, 3, 32, 32), np.array([0, 99, 5, 6, 7, 8, 9])
    train, test = (
        dump(base / name, {"data": images[at].reshape(-1, 3072), "fine_labels": labels[at].tolist()})
        for name, at in (("train", slice(0, 5)), ("test", slice(5, 7)))
    )
    name, digest = dump(base / "meta", {"fine_label_names": [f"c{i}" for i in range(100)]})
    patch.setattr(datasets.CIFAR100, "train_list", [train])
    patch.setattr(datasets.CIFAR100, "test_list", [test])
    patch.setattr(datasets.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": digest})
    return (images[:5], labels[:5]), (images[5:], labels[5:])


def svhn(root: Path, patch: pytest.MonkeyPatch, datasets: Any) -> tuple[Any, Any]:
    savemat = pytest.importorskip("scipy.io").savemat
    (root / "svhn").mkdir(parents=True)
    images, labels = pixels(7, 3, 32, 32), np.array([0, 9, 5, 6, 7, 0, 9])
    lists = {}
    for part, at in (("train", slice(0, 5)), ("test", slice(5, 7))):
        path = root / "svhn" / f"{part}_32x32.mat"
        # The files are (H,W,C,M), and write the digit 0 as 10.
        savemat(path, {"X": images[at].transpose(2, 3, 1, 0), "y": np.where(labels[at] == 0, 10, labels[at])[:, None]})
        lists[part] = ["", path.name, md5(path)]
    patch.setattr(datasets.SVHN, "split_list", lists)
    return (images[:5], labels[:5]), (images[5:], labels[5:])


def idx(name: str, class_name: str) -> Any:
    def write(root: Path, patch: pytest.MonkeyPatch, datasets: Any) -> tuple[Any, Any]:
        base = root / name / class_name / "raw"
        base.mkdir(parents=True)
        images, labels = pixels(7, 28, 28), np.array([0, 9, 5, 6, 7, 0, 9])
        for part, at in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
            count = len(labels[at])
            pictures = struct.pack(">4i", 0x803, count, 28, 28) + images[at].tobytes()
            (base / f"{part}-images-idx3-ubyte").write_bytes(pictures)
            (base / f"{part}-labels-idx1-ubyte").write_bytes(
                struct.pack(">2i", 0x801, count) + labels[at].astype(np.uint8).tobytes()
            )
        return (images[:5, None], labels[:5]), (images[5:, None], labels[5:])

    return write


WRITERS = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "mnist": idx("mnist", "MNIST"),
    "fashion-mnist": idx("fashion-mnist", "FashionMNIST"),
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision's data sets, without a network."""
    datasets = pytest.importorskip("torchvision.datasets")

    def closed(*_: Any, **__: Any) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr("urllib.request.urlopen", closed)
    return datasets


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_official_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: Any) -> None:
    parts = WRITERS[name](tmp_path, monkeypatch, offline)
    data = load(name, tmp_path)
    for split, (images, labels) in zip((data.train, data.test), parts, strict=True):
        assert np.array_equal(split.images.numpy(), images)
        assert split.labels.tolist() == labels.tolist()
    assert data.num_classes == (100 if name == "cifar100" else 10)
    assert (data.identity, data.label) == (name, name)
    assert len(data.mean) == len(data.std) == data.train.images.shape[1]
    if name == "cifar10":
        assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        assert data.classes[3] == "cat"
        assert data.recipe == "cifar10"


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_without_files_or_network_one_line_says_what_to_do(name: str, tmp_path: Path, offline: Any) -> None:
    with pytest.raises(RobenchError, match=f"data set '{name}' is not complete in .* put the official files") as error:
        load(name, tmp_path)
    assert "name resolution" in one_line(error)


def test_damaged_official_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: Any) -> None:
    cifar10(tmp_path, monkeypatch, offline)
    path = tmp_path / "cifar10" / offline.CIFAR10.base_folder / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    with pytest.raises(RobenchError, match="not complete"):
        load("cifar10", tmp_path)


def test_torchvision_may_fail_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RobenchError, match="needs torchvision, which does not import here") as error:
        load("mnist", tmp_path)
    assert "pip install torch torchvision" in one_line(error)


def test_torchvision_may_not_fit_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms\\ndoes not exist')\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RobenchError, match="nms does not exist") as error:
        load("mnist", tmp_path)
    one_line(error)


# --- names


def test_every_data_set_is_registered() -> None:
    assert set(DATASETS.names()) >= {"digits", *WRITERS}


@pytest.mark.parametrize("name", ["digit", "cifar-10", "zip:x", "", ":", "npz:", "folder:/no/such/place"])
def test_unknown_names_are_errors(name: str) -> None:
    with pytest.raises(RobenchError) as error:
        load(name)
    one_line(error)


def test_unknown_names_have_neighbours() -> None:
    with pytest.raises(RobenchError, match="unknown dataset 'cifar-10'; did you mean cifar10"):
        load("cifar-10")


# --- corruptions, as they are published


@pytest.fixture
def cifar10_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published layout with 4 images of each severity; their first pixel says which severity it is."""
    monkeypatch.setattr(corrupted, "IMAGES", 4)
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    for name in ("fog", "gaussian_noise"):
        images = pixels(20, 32, 32, 3)
        images[:, 0, 0, 0] = np.repeat(np.arange(1, 6), 4)
        images[:, 0, 0, 2] = 7
        np.save(folder / f"{name}.npy", images)
    np.save(folder / "labels.npy", np.tile(np.array([3, 8, 8, 0], dtype=np.uint8), 5))
    return tmp_path / "data"


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_a_severity_is_a_slice(cifar10_c: Path, severity: int) -> None:
    data = load(f"cifar10-c:fog/{severity}", cifar10_c)
    assert data.test.images.shape == (4, 3, 32, 32)
    assert data.test.images[:, 0, 0, 0].tolist() == [severity] * 4
    assert data.test.images[:, 2, 0, 0].tolist() == [7] * 4
    assert data.test.labels.tolist() == [3, 8, 8, 0]
    assert (data.classes[3], data.classes[8], data.num_classes, data.recipe) == ("cat", "ship", 10, "cifar10")
    others = {load(f"cifar10-c:{name}", cifar10_c).identity for name in ("fog/1", "fog/2", "gaussian_noise/1")}
    assert len(others) == 3
    assert data.summary.startswith("0 + 4 images to train and test; classes 0 airplane: 0 + 1, 1 automobile: 0 + 0")


def test_corrupted_images_are_to_judge_on(cifar10_c: Path) -> None:
    with pytest.raises(RobenchError, match="has no images to train on; train on the clean ones"):
        resolve(load("cifar10-c:fog/1", cifar10_c), "baseline", 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar10-c:fgo/1", "unknown corruption of cifar10-c 'fgo'; did you mean fog"),
        ("cifar10-c:fog", "expected a severity of 1 to 5, cifar10-c:fog/3"),
        ("cifar10-c:fog/6", "expected a severity of 1 to 5"),
        ("cifar10-c:fog/0", "expected a severity of 1 to 5"),
        ("cifar10-c:labels/1", "unknown corruption"),
        ("cifar10-c:../CIFAR-10-C/fog/1", "unknown corruption"),
        ("cifar10-c:", "unknown corruption"),
        ("cifar100-c:fog/1", "CIFAR-100-C does not exist; unpack CIFAR-100-C.tar"),
        ("cifar10c:fog/1", "expected `dataset` to be a name"),
    ],
)
def test_what_is_no_corruption_is_one_line(cifar10_c: Path, name: str, said: str) -> None:
    with pytest.raises(RobenchError, match=said) as error:
        load(name, cifar10_c)
    one_line(error)


def test_arrays_that_are_not_the_published_ones_are_refused(cifar10_c: Path) -> None:
    folder = cifar10_c / "CIFAR-10-C"
    good = np.load(folder / "fog.npy")
    for bad in (good[:19], good.astype(np.float32), good[:, :, :, 0], np.array([{}] * 20)):
        np.save(folder / "fog.npy", bad)
        with pytest.raises(RobenchError, match=r"fog\.npy"):
            load("cifar10-c:fog/1", cifar10_c)
    np.save(folder / "fog.npy", good)
    np.save(folder / "labels.npy", np.full(20, 10))
    with pytest.raises(RobenchError, match=r"expected labels in 0\.\.9"):
        load("cifar10-c:fog/1", cifar10_c)
    (folder / "labels.npy").unlink()
    with pytest.raises(RobenchError, match=r"labels\.npy cannot be read"):
        load("cifar10-c:fog/1", cifar10_c)


# --- Tiny-ImageNet, as it is published


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    for wnid, level in (("n02", 200), ("n01", 90)):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("n02_0.JPEG\t0\t0\t62\t62\n")
        for number in range(3):
            image = np.full((6, 6, 3), level + number, dtype=np.uint8)
            Image.fromarray(image).save(root / "train" / wnid / "images" / f"{wnid}_{number}.png")
    (root / "val" / "images").mkdir(parents=True)
    for number, level in enumerate((90, 200, 91)):
        Image.fromarray(np.full((6, 6, 3), level, dtype=np.uint8)).save(root / "val" / "images" / f"val_{number}.png")
    lines = [f"val_{number}.png\t{wnid}\t0\t32\t44\t62" for number, wnid in enumerate(("n01", "n02", "n01"))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "test" / "images").mkdir(parents=True)  # without labels
    return root


def test_tiny_imagenet_is_read_as_published(tiny_imagenet: Path) -> None:
    data = load(f"folder:{tiny_imagenet}")
    assert data.classes == ("n01", "n02")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images[:, 0, 0, 0].tolist() == [90, 91, 92, 200, 201, 202]
    assert data.test.images[:, 0, 0, 0].tolist() == [90, 200, 91]
    assert data.test.labels.tolist() == [0, 1, 0]
    assert data.summary == "6 + 3 images to train and test; classes 0 n01: 3 + 2, 1 n02: 3 + 1"
    first = data.fingerprint
    annotations = tiny_imagenet / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("val_2.png\tn01", "val_2.png\tn02"))
    assert load(f"folder:{tiny_imagenet}").fingerprint != first


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("val_0.png\tn03\t0\t0", "line 4: expected file and class of train/"),
        ("val_0.png", "line 4: expected file and class"),
        ("../train/n01/images/n01_0.png\tn01", "line 4: expected file and class"),
        ("val_9.png\tn01", "val_9.png cannot be read"),
    ],
)
def test_annotations_that_lie_are_one_line(tiny_imagenet: Path, line: str, said: str) -> None:
    annotations = tiny_imagenet / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + line + "\n")
    with pytest.raises(RobenchError, match=said) as error:
        load(f"folder:{tiny_imagenet}")
    one_line(error)


def test_a_summary_of_many_classes_names_some() -> None:
    labels = np.arange(40) % 20
    data = make("npz:many", (pixels(40, 1, 4, 4), labels), (pixels(40, 1, 4, 4), labels))
    assert data.summary.count(",") == 9
    assert data.summary.endswith("7: 2 + 2, …, 19: 2 + 2")


def test_a_model_is_judged_on_corrupted_images(cifar10_c: Path) -> None:
    data = load("cifar10-c:gaussian_noise/2", cifar10_c)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
    threat = robench.Whitebox(eps=(0.01,), restarts=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that knows nothing
        table = robench.evaluate(model, data, threat, samples=4).accuracy()
    right = float((model(to_images(data.test.images)).argmax(dim=1) == data.test.labels).double().mean())
    assert table.loc[table["threat"] == "clean", "accuracy"].item() == right
    assert set(table["samples"]) == {4}


def test_a_path_as_a_name_is_told_its_prefix(tmp_path: Path) -> None:
    (tmp_path / "my.npz").touch()
    for path, kind in ((tmp_path / "my.npz", "npz"), (tmp_path, "folder")):
        with pytest.raises(RobenchError, match=f"is a path and no name; try {kind}:{path}$"):
            load(str(path))


@pytest.mark.parametrize(
    ("brightest", "told_of"), [(1, "multiply the images by 255"), (16, "by 15"), (64, ""), (255, "")]
)
def test_pixels_of_another_unit_are_told(brightest: int, told_of: str, told: list[str]) -> None:
    """Digits of 0 to 16, masks of 0 and 1: ε .1 of 255 is more than all of their range."""
    pixels = np.full((4, 2, 2), brightest, dtype=np.uint8)
    make("npz:x", (pixels, np.arange(4) % 2), (pixels, np.arange(4) % 2))
    assert [line for line in told if told_of and told_of in line] == [line for line in told if "brightest" in line]
    assert bool(told_of) == any(f"the brightest pixel is {brightest} of 255" in line for line in told)
