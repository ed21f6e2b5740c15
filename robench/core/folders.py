"""Folders of images as data sets: a folder per class, or Tiny-ImageNet as it is published."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from robench.core.data import Data, DataFolder, make
from robench.core.decoded import Encoded, decoded
from robench.core.errors import RobenchError

log = logging.getLogger(__name__)

#: By part, ``train`` and ``test``: each file with its label.
_Listing = dict[str, list[tuple[Path, int]]]

#: In ``val/`` of Tiny-ImageNet: file and class of each image, and a box, by tabs.
ANNOTATIONS = "val_annotations.txt"


def folder(path: Path, place: DataFolder) -> Data:
    """``train/<class>/*`` and ``test/<class>/*``, images of one size, decoded once; hidden ones are left out.

    Tiny-ImageNet is known by its annotations: ``train/<class>/images/*`` and, to test, ``val/images/*``. Classes are in
    the order of their names.

    Raises:
        RobenchError: no such folder, files that are no images, images of several sizes.
    """
    classes, listing = (_annotated if (path / "val" / ANNOTATIONS).is_file() else _by_class)(path)
    # Contents, and not names, sizes and times, which may be those of other images: an archive gives all files one time.
    digest = hashlib.sha256(repr(classes).encode(errors="backslashreplace"))
    for part, files in listing.items():
        for file, label in files:
            try:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError as error:
                raise RobenchError(f"{file} cannot be read ({error.strerror}); remove or replace it") from error
            digest.update(f"{part}/{label}:{content};".encode())
    encoded = {part: (Encoded(str(file), file, label) for file, label in files) for part, files in listing.items()}
    tensors, fingerprint = decoded(place.cache / f"folder-{digest.hexdigest()[:24]}.safetensors", encoded)
    return make(
        f"folder:{path}",
        (tensors["train.images"], tensors["train.labels"]),
        (tensors["test.images"], tensors["test.labels"]),
        classes=classes,
        fingerprint=fingerprint,
    )


def _by_class(path: Path) -> tuple[list[str], _Listing]:
    """A folder per class."""
    listing: _Listing = {}
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise RobenchError(f"{path / part} does not exist; expected {path}/train/<class>/* and test/<class>/*")
    classes = sorted(_visible(path / "train"))
    for part in ("train", "test"):
        extra = _visible(path / part) - set(classes)
        if extra:
            raise RobenchError(f"{path / part} has classes that train has not: {', '.join(sorted(extra))}")
        listing[part] = [(file, label) for label, name in enumerate(classes) for file in _files(path / part / name)]
        if not listing[part]:
            raise RobenchError(f"{path / part} holds no images; expected {path / part}/<class>/*")
    hidden = [each for part in listing for depth in ("*", "*/*") for each in sorted((path / part).glob(depth))]
    hidden = [each for each in hidden if _hidden(each.name)]
    if hidden:
        log.warning(f"{path}: {len(hidden)} hidden files or folders left out, such as {hidden[0].relative_to(path)}")
    return classes, listing


def _annotated(path: Path) -> tuple[list[str], _Listing]:
    """Tiny-ImageNet."""
    annotations = path / "val" / ANNOTATIONS
    if not (path / "train").is_dir():
        raise RobenchError(
            f"{path / 'train'} does not exist; expected {path}/train/<class>/images/*, as in Tiny-ImageNet"
        )
    classes = sorted(_visible(path / "train"))
    train = [(file, label) for label, name in enumerate(classes) for file in _files(path / "train" / name / "images")]
    if not train:
        raise RobenchError(f"{path / 'train'} holds no images; expected {path}/train/<class>/images/*")
    test, places = [], {name: label for label, name in enumerate(classes)}
    for number, line in enumerate(annotations.read_text("utf-8").splitlines(), 1):
        name, *fields = line.split("\t")
        if not fields or fields[0] not in places or Path(name).name != name:
            raise RobenchError(f"{annotations}, line {number}: expected file and class of train/, got {line[:80]!r}")
        test.append((path / "val" / "images" / name, places[fields[0]]))
    if not test:
        raise RobenchError(f"{annotations} names no images; unpack the archive again")
    return classes, {"train": train, "test": sorted(test)}


def _hidden(name: str) -> bool:
    """What editors, notebooks and archives leave among images."""
    return name.startswith((".", "__"))


def _files(folder: Path) -> list[Path]:
    """What is not hidden in ``folder``, in order."""
    return sorted(each for each in folder.glob("*") if not _hidden(each.name))


def _visible(folder: Path) -> set[str]:
    """Names of the folders in ``folder`` that are classes."""
    return {entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name)}
