"""Whatever can be made again is read under one policy: named where it is damaged, set aside, and made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from robench.attacks import Crafted
from robench.core import decoded
from robench.core.errors import RobenchError
from robench.core.files import Absent, read_frame, tensors_hash, write_frame, write_hashed
from robench.core.parts import read_intact, read_parts
from robench.evaluation import diversity
from robench.evaluation.cells import Cell, Craft
from robench.evaluation.images import Images
from robench.evaluation.rows import FolderRows
from robench.training.checkpoint import Checkpoint, State
from tests.small import ensemble as networks
from tests.small import noise
from tests.training.test_checkpoint import made

ROWS = pd.DataFrame(
    {
        "cell": ["c", "c"],
        "member": ["ensemble"] * 2,
        "sample": [0, 1],
        "label": [0, 1],
        "prediction": [0, 2],
        "correct": [True, False],
        "restart": [0, 1],
        "linf": [0.1, 0.1],
        "zero_gradient": [False] * 2,
        "margin": [0.5, -0.5],
    }
)
CELL = Cell(
    target="t",
    defense="adp",
    n=2,
    seed=0,
    threat="blackbox",
    identity="i",
    data="d",
    eps=0.1,
    craft=Craft("d", "s", {"name": "pgd"}, (0,), 0, "float32", 0.1),
)


class Kind(NamedTuple):
    """Something that is kept in files.

    Attributes:
        make: writes it into a folder; read: what is found there, None where it has to be made again.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    pattern: str
    told: str


def rows(folder: Path) -> list[int] | None:
    return sorted(FolderRows(folder).samples("c")) or None


def keep_images(folder: Path) -> None:
    grey, none = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.bool)
    crafted = Crafted(grey, torch.zeros(2), none, torch.empty(2, 0), torch.full((2,), -1))
    Images(folder).save({CELL.eps: CELL}, np.array([3, 4]), np.full(2, CELL.eps), crafted)


def images(folder: Path) -> list[int] | None:
    return sorted(Images(folder).kept(CELL.attacked)) or None


def values(folder: Path) -> list[float] | None:
    """Diversities; what is kept is not computed again."""
    right = torch.arange(4)
    target = diversity.EvaluatedModel.of_model(networks(0), torch.device("cpu"), name="x")
    computed: list[int] = []
    found = diversity.measure(
        *(target, noise(), right, folder),
        eps=0.1,
        steps=1,
        device=torch.device("cpu"),
        progress=lambda done, *_: computed.append(done),
    )
    assert len(found) == 4
    return None if computed else found["diversity"].tolist()


def keep_checkpoint(folder: Path) -> None:
    Checkpoint(folder / "checkpoint.safetensors", "key").save(*made(), State(1, 7))


def checkpoint(folder: Path) -> int | None:
    return Checkpoint(folder / "checkpoint.safetensors", "key").load(*made()).step or None


def keep_cache(folder: Path) -> None:
    write_hashed(folder / "folder-x.safetensors", {name: torch.zeros(2) for name in decoded._TENSORS})


def cache(folder: Path) -> list[str] | None:
    found = decoded._kept(folder / "folder-x.safetensors")
    return None if found is None else sorted(found[0])


KINDS = {
    "rows": Kind(lambda folder: FolderRows(folder).append(ROWS), rows, "part-*.parquet", "its rows are judged"),
    "images": Kind(keep_images, images, "*/part-*.safetensors", "its images are crafted"),
    "diversity": Kind(values, values, "part-*.parquet", "its values are computed"),
    "checkpoint": Kind(keep_checkpoint, checkpoint, "checkpoint.safetensors", "the training starts over"),
    "data": Kind(keep_cache, cache, "folder-x.safetensors", "the images are read"),
}


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-3])
    return path


def emptied(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    return path


def foreign(path: Path) -> Path:
    """A file that is whole, under a name that fits, of something else."""
    path.unlink()
    if path.suffix == ".parquet":
        return write_frame(path.parent, pd.DataFrame({"sample": [1], "else": [2]}))
    tensors = {"x": torch.ones(3)}
    path = path.with_name(f"part-{tensors_hash(tensors)[:24]}.safetensors") if "part-" in path.name else path
    write_hashed(path, tensors)
    return path


def no_parquet(path: Path) -> Path:
    """Bytes whose name says that they are what was written, and that are nothing."""
    path.unlink()
    made = path.with_name("part-e3b0c44298fc1c149afbf4c8.parquet")  # SHA-256 of nothing
    made.write_bytes(b"")
    return made


CASES = [(kind, damage) for kind in KINDS for damage in (cut_short, emptied, flipped, foreign)]
CASES += [("rows", no_parquet), ("diversity", no_parquet)]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_named_set_aside_and_made_again(
    name: str, damage: Callable[[Path], Path], tmp_path: Path, told: list[str]
) -> None:
    kind = KINDS[name]
    kind.make(tmp_path)
    before = kind.read(tmp_path)
    assert before is not None
    (path,) = tmp_path.glob(kind.pattern)
    path = damage(path)
    told.clear()
    assert kind.read(tmp_path) is None, "what is damaged is not used"
    (line,) = told
    assert line.startswith(f"{path} is damaged: it is set aside and {kind.told}")
    assert path.with_name(f"{path.name}.damaged").exists()
    told.clear()
    kind.make(tmp_path)
    assert kind.read(tmp_path) == before
    assert told == []


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_is_an_error(name: str, tmp_path: Path) -> None:
    """It cannot have been written by us, and is not ours to rename."""
    kind = KINDS[name]
    kind.make(tmp_path)
    (path,) = tmp_path.glob(kind.pattern)
    path.unlink()
    path.mkdir()
    with pytest.raises(RobenchError, match="is no file; restore or remove it"):
        kind.read(tmp_path)
    assert path.is_dir()


def test_images_that_are_made_again_under_the_same_name_are_used(tmp_path: Path, told: list[str]) -> None:
    kept = Images(tmp_path)
    keep_images(tmp_path)
    (path,) = tmp_path.glob("*/part-*")
    cut_short(path)
    assert not kept.kept(CELL.attacked)
    keep_images(tmp_path)
    told.clear()
    assert sorted(kept.kept(CELL.attacked)) == [3, 4]
    assert told == []


def test_rows_that_are_made_again_under_the_same_name_are_used(tmp_path: Path, told: list[str]) -> None:
    FolderRows(tmp_path).append(ROWS)
    (path,) = tmp_path.glob("part-*")
    cut_short(path)
    kept = FolderRows(tmp_path)
    assert len(told) == 1
    FolderRows(tmp_path).append(ROWS)  # by another process
    kept.refresh()
    assert sorted(kept.samples("c")) == [0, 1]


def test_whoever_only_reads_leaves_it_and_tells_once(tmp_path: Path, told: list[str]) -> None:
    path = cut_short(write_frame(tmp_path, ROWS))
    kept = FolderRows(tmp_path, repair=False)
    kept.refresh()
    assert told == [f"{path} is damaged: its rows do not count here"]
    assert kept.damaged == [path]
    assert path.exists()


def test_what_another_process_has_merged_is_found_under_its_new_name(tmp_path: Path) -> None:
    first, second = (write_frame(tmp_path, ROWS.assign(sample=[start, start + 1])) for start in (0, 2))

    def read(path: Path) -> pd.DataFrame:
        if first.exists():  # compacted between listing and reading
            whole = pd.concat([read_frame(first), read_frame(second)])
            write_frame(tmp_path, whole)
            first.unlink()
            second.unlink()
        return read_frame(path)

    found = [rows for _, rows in read_parts(tmp_path, "part-*.parquet", read, "its rows", "are judged again")]
    assert [len(rows) for rows in found if rows is not None] == [4]


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "part-x.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RobenchError, match="is a link to nothing"):
        list(read_parts(tmp_path, "part-*.parquet", read_frame, "its rows", "are judged again"))


def test_what_is_absent_is_the_caller_s_to_judge(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="does not exist"):
        read_intact(tmp_path / "part-x.parquet", read_frame, "its rows", "are judged again")
