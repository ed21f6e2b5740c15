"""Files are whole or absent, and damage shows."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.core.errors import RobenchError
from robench.core.files import (
    Damaged,
    atomic,
    checked_name,
    content_key,
    read_frame,
    read_json,
    read_record,
    read_tensors,
    tensors_hash,
    write_frame,
    write_json,
    write_record,
    write_tensors,
    write_text,
)


def test_a_record_makes_the_round_trip_and_notices_every_flip(tmp_path: Path) -> None:
    value = {"eps": 0.1, "threat": "whitebox", "recipe": {"restarts": (0, 1), "none": None, "é": float("inf")}}
    path = tmp_path / "record.json"
    write_record(path, value)
    assert read_record(path) == json.loads(json.dumps(value))
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 4):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            with suppress(RobenchError):  # but for white space, and the name of the checksum itself
                found = read_record(path)
                assert {name: each for name, each in found.items() if name in value} == json.loads(json.dumps(value))


@pytest.mark.parametrize("text", ["[1]", "1", "null", '"a"', "[" * 100_000, "{", ""])
def test_what_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RobenchError, match=r"record\.json"):
        read_record(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for read in (read_json, read_tensors, read_frame):
        with pytest.raises(RobenchError, match=r"pipe\.safetensors is no file"):
            read(tmp_path / "pipe.safetensors")


TENSORS = {"b": torch.arange(3), "a": torch.ones(2, 2)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# --- names


@pytest.mark.parametrize("name", ["a", "cifar10-resnet20-dverge-n3-s0", "A.b_C-1", ".a", "x" * 200])
def test_a_name_that_can_be_a_folder(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "../a", "/a", "a\\b", "a b", "a\n", "ä", "a:b", "a\0", "~", "x" * 201]
)
def test_a_name_that_cannot(name: str) -> None:
    with pytest.raises(RobenchError, match="expected the name of a study to match"):
        checked_name(name, "study")


@settings(max_examples=100)
@given(st.text(alphabet="ab./\\~ \n\0:é", max_size=8))
def test_a_checked_name_stays_in_its_folder(name: str) -> None:
    try:
        path = Path("/runs") / checked_name(name)
    except RobenchError:
        return
    assert Path(os.path.normpath(path)).parent == Path("/runs")
    assert path != Path("/runs")


# --- atomic


def test_folders_are_made_and_the_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a/b/c.txt"
    write_text(path, "one")
    write_text(path, "two é")
    assert path.read_text(encoding="utf-8") == "two é"
    assert files(tmp_path) == ["a", "b", "c.txt"]


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "half"


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    write_text(path, "old")

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert files(tmp_path) == ["x"]


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint[1].safetensors"
    left = [tmp_path / name for name in (f".{path.name}.abcd_123.tmp", f".{path.name}.efgh4567.tmp", ".mine.tmp")]
    for each in left:
        each.write_text("half")
    for each in (left[0], left[2]):
        os.utime(each, (0, 0))
    write_text(path, "whole")
    assert files(tmp_path) == sorted([path.name, left[1].name, left[2].name])


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(RobenchError, match=r"cannot write .*x/y \(.*\); free or choose another place"):
        write_text(tmp_path / "x/y", "")
    (tmp_path / "folder/inside").mkdir(parents=True)
    with pytest.raises(RobenchError, match=r"cannot write .*folder"):
        write_text(tmp_path / "folder", "")
    assert files(tmp_path) == ["folder", "inside", "x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RobenchError, match="Permission denied"):
        write_text(tmp_path / "locked/x", "")


@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace"])
def test_a_full_disk_wherever_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_text(tmp_path / "x", "old")
    where = {"mkstemp": "tempfile.mkstemp", "fsync": "os.fsync", "replace": "pathlib.Path.replace"}
    monkeypatch.setattr(where[call], full)
    with pytest.raises(RobenchError, match=r"cannot write .*x \(No space left on device\); free or choose"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert files(tmp_path) == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, text=True, timeout=20
        )
    except OSError as error:
        pytest.skip(f"there is no mount ({error})")
    if made.returncode:
        pytest.skip(f"a tmpfs may not be mounted here ({made.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


def test_a_disk_that_really_is_full(small_disk: Path) -> None:
    write_tensors(small_disk / "x", TENSORS)
    before = (small_disk / "x").read_bytes()
    big = {"big": torch.zeros(100_000)}
    frame = pd.DataFrame({"value": torch.rand(50_000).numpy()})
    for attempt in (
        lambda: write_tensors(small_disk / "x", big),
        lambda: write_text(small_disk / "x", "y" * 200_000),
        lambda: write_frame(small_disk, frame),
    ):
        with pytest.raises(RobenchError, match="cannot write"):
            attempt()
        assert files(small_disk) == ["x"]
        assert (small_disk / "x").read_bytes() == before


# --- JSON


def test_json_makes_the_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {"x": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text().index('"a"') < (tmp_path / "x.json").read_text().index('"b"')


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RobenchError, match=r"x\.json is damaged .* remove it"):
        read_json(tmp_path / "x.json")


def test_absent_files_are_named(tmp_path: Path) -> None:
    for read in (read_json, read_tensors):
        with pytest.raises(RobenchError, match="none does not exist"):
            read(tmp_path / "none")
        with pytest.raises(RobenchError, match="is no file"):
            read(tmp_path)


# --- tensors


def test_tensors_make_the_round_trip(tmp_path: Path) -> None:
    tensors = {
        **TENSORS,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": torch.rand(3).to(torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "layout": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "gradient": torch.rand(2, requires_grad=True),
    }
    write_tensors(tmp_path / "x", tensors, {"note": "é"})
    found, metadata = read_tensors(tmp_path / "x")
    assert metadata == {"note": "é"}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert tensors_hash(found) == tensors_hash(tensors)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damage_to_tensors_is_an_error_or_changes_the_hash(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x"
    write_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    at = position % len(content)
    if cut:
        del content[at:]
    else:
        content[at] ^= flip
    path.write_bytes(content)
    try:
        found, _ = read_tensors(path)
    except RobenchError:
        return
    # White space in the header is all that may change unseen.
    same = tensors_hash(found) == tensors_hash(TENSORS)
    assert not same or all(torch.equal(found[name], value) for name, value in TENSORS.items())


def test_tensors_are_known_by_name_type_shape_and_content() -> None:
    assert tensors_hash(TENSORS) == "924feb769127b8da35cd74035106d2122dad58441e5fc284e64c1d43c19942b9"
    assert tensors_hash(dict(reversed(TENSORS.items()))) == tensors_hash(TENSORS)
    zeros = torch.zeros(4)
    versions = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.int()},
        {"a": zeros.view(2, 2)},
        {"a": torch.tensor([0, 0, 0, -0.0])},
        {"a": zeros, "b": zeros},
        {},
    ]
    assert len({tensors_hash(version) for version in versions}) == len(versions)
    image = torch.rand(1, 2, 3, 3)
    assert tensors_hash({"a": image}) == tensors_hash({"a": image.contiguous(memory_format=torch.channels_last)})


# --- frames

FRAME = pd.DataFrame(
    {"sample": [0, 1, 2], "correct": [True, False, True], "eps": [0.01, 0.02, 0.03], "name": list("abc")}
)


def test_frames_make_the_round_trip(tmp_path: Path) -> None:
    path = write_frame(tmp_path, FRAME)
    found = read_frame(path)
    pd.testing.assert_frame_equal(found, FRAME)
    assert write_frame(tmp_path, FRAME) == path
    assert write_frame(tmp_path, FRAME.iloc[:2]) != path
    assert len(files(tmp_path)) == 2


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = write_frame(tmp_path, FRAME)
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 50)):
        content = bytearray(whole)
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(Damaged):
            read_frame(path)
    for content in (whole[:-1], b"", b"junk"):
        path.write_bytes(content)
        with pytest.raises(Damaged):
            read_frame(path)
    path.write_bytes(whole)
    pd.testing.assert_frame_equal(read_frame(path), FRAME)


def test_a_frame_of_another_name_is_not_read(tmp_path: Path) -> None:
    path = write_frame(tmp_path, FRAME)
    with pytest.raises(Damaged):
        read_frame(path.rename(tmp_path / "part-0.parquet"))


# --- hashes


def test_a_content_key_is_stable_and_sensitive() -> None:
    assert content_key({"a": [1, 2.5, "x"], "b": None}) == "ebeb83367f9695ff"
    assert content_key({"b": None, "a": (1, 2.5, "x")}) == "ebeb83367f9695ff"
    values: list[Any] = [1, 1.5, "1", [1], {"1": 1}, None, True, {}, []]
    assert len({content_key(value) for value in values}) == len(values)


@pytest.mark.parametrize("value", [float("nan"), {"eps": float("inf")}])
def test_a_content_key_has_no_nan(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_key(value)


def test_text_that_is_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n'
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
