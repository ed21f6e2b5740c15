"""Data sets as uint8 tensors, known by their content."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robench.core.errors import RobenchError, in_a_line
from robench.core.files import tensors_hash
from robench.core.models import ModelSpec
from robench.core.registry import Registry
from robench.core.rng import Stream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images uint8 (M,C,H,W) and labels int64 (M,); an image's index here is its identity."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def near(self, device: torch.device) -> Split:
        """On the device, if it takes at most half of what is free there; else here, to be sent batch by batch."""
        if device.type == "cuda" and 2 * self.images.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return self.to(device)


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: how the user names it (``cifar10``, ``folder:PATH``); of the hub, with the revision that was read.
        mean, std: normalisation per channel, in units of [0, 1]; it lives in the models, not in the images.
        fingerprint: SHA-256 over all images and labels.
        classes: name of each class.
        recipe: the recipe that training takes by default.
    """

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    fingerprint: str
    recipe: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def numel(self) -> int:
        """Elements of an image."""
        return self.test.images[0].numel()

    @property
    def summary(self) -> str:
        """How many images there are of which classes, in their order: what is worth a look before anything long."""
        counts = [np.bincount(split.labels.numpy(), minlength=self.num_classes) for split in (self.train, self.test)]
        lines = zip(range(self.num_classes), self.classes, *counts, strict=True)
        each = [
            f"{place}{'' if name == str(place) else f' {name}'}: {train} + {test}" for place, name, train, test in lines
        ]
        shown = each if len(each) <= SHOWN else [*each[: SHOWN - 2], "…", each[-1]]
        return f"{len(self.train)} + {len(self.test)} images to train and test; classes {', '.join(shown)}"

    @property
    def identity(self) -> str:
        """What keys hold: the name of a data set that robench brings itself, else the content, which may change under
        the name that a package or a path has."""
        return self.name if self.name in ("digits", *_OFFICIAL) else self.fingerprint[:16]

    @property
    def label(self) -> str:
        """A name for files and figures, without a path."""
        return self.name if ":" not in self.name else f"{self.name.partition(':')[0]}-{self.fingerprint[:8]}"

    @property
    def told(self) -> dict[str, str]:
        """For manifests: label and content, and where others find it, if that is no place of this machine."""
        source = {"source": self.name} if self.name.startswith("hf:") else {}
        return {"name": self.label, "fingerprint": self.fingerprint, **source}

    @cached_property
    def known(self) -> frozenset[int]:
        """Hashes of the training images, by which a test image that is one of them is known; of more than `MOST_BYTES`
        of images none."""
        images = self.train.images
        return frozenset() if images.nbytes > MOST_BYTES else frozenset(map(_hash, images.cpu().numpy()))

    def unseen(self, samples: Tensor) -> Tensor:
        """Those of ``samples`` (B,), indices of test images, whose images are no training images."""
        seen = [_hash(image) in self.known for image in self.test.images[samples].cpu().numpy()]
        return samples[~torch.tensor(seen, dtype=torch.bool)]

    def model(self, name: str) -> ModelSpec:
        """The spec of a registered model for this data set."""
        return ModelSpec(
            name=name,
            num_classes=self.num_classes,
            in_channels=self.train.images.shape[1],
            mean=self.mean,
            std=self.std,
        )

    def resolved(self, kind: str, samples: int) -> str:
        """``auto`` as ``first``, or as ``random`` where the first ``samples`` test images have classes in shares that a
        random draw would hardly have, as in a folder; any other kind as it is."""
        if kind != "auto":
            return kind
        return "random" if improbability(self.test.labels, self.test.labels[:samples]) < ORDERED else "first"

    def order(self, kind: str, seed: int = 0) -> Tensor:
        """Indices of test images, int64, in the order in which samples are taken.

        Args:
            kind: ``first``; ``random``, keyed by ``seed``; or ``paper``, the DVERGE authors' white-box subset
                ``random.seed(0); random.sample(range(10000), 1000)``.

        Raises:
            RobenchError: unknown kind, or the paper's subset of a test set that has not 10,000 images.
        """
        total = len(self.test)
        if kind == "first":
            return torch.arange(total)
        if kind == "random":
            return Stream(("subset", seed)).permutation(total)
        if kind == "paper":
            if total != 10000:
                raise RobenchError(f"the paper's subset is of 10000 test images, {self.label} has {total}; use first")
            return torch.tensor(paper_order())
        raise RobenchError(f"expected `subset` to be auto, first, random or paper, got {kind!r}")

    def subset(self, samples: int, kind: str = "auto", seed: int = 0) -> Tensor:
        """The first ``samples`` of `order`, or all where there are fewer, ascending."""
        if samples < 1:
            raise RobenchError(f"expected `samples` to be at least 1, got {samples}")
        return self.order(self.resolved(kind, samples), seed)[:samples].sort().values


def paper_order() -> list[int]:
    """The DVERGE authors' white-box subset of 10,000 test images, in their order."""
    return random.Random(0).sample(range(10000), 1000)


def improbability(labels: Tensor, chosen: Tensor) -> float:
    """How likely a random draw from ``labels`` has some class as often or as seldom as ``chosen`` has: an upper bound,
    over all classes at once (hypergeometric tails, Bonferroni), at most 1."""
    total = np.bincount(labels.numpy())
    if np.count_nonzero(total) == 1:  # as in an outline: a plan waits for no import
        return 1.0
    from scipy.stats import hypergeom

    drawn = np.bincount(chosen.numpy(), minlength=len(total))
    present = total > 0
    law = hypergeom(len(labels), total[present], len(chosen))
    tails = np.minimum(law.cdf(drawn[present]), law.sf(drawn[present] - 1))
    return float(min(1.0, 2 * present.sum() * tails.min()))


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (B,C,H,W) -> float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


@dataclass(frozen=True)
class DataFolder:
    """Where a data set may read, download and keep what it decoded."""

    folder: Path = Path("data")

    @property
    def cache(self) -> Path:
        base = os.environ.get("ROBENCH_CACHE") or os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "robench" / "datasets"


Loader = Callable[[DataFolder], Data]

#: Classes that a summary names.
SHOWN = 10
#: Pixels of 0 to 255 that reach no higher than this are of another unit.
DARK = 64
#: Training images are compared with test images up to this size: two seconds.
MOST_BYTES = 2 << 30
#: Class shares less likely than this in a random draw say that the data are ordered by class.
ORDERED = 1e-6

#: Test images under corruptions, see `robench.core.corrupted`; other modules load what has a colon in its name.
CORRUPTED = ("cifar10-c", "cifar100-c")

#: A label beyond this is a mistake, not a class.
MAX_CLASSES = 1 << 16

DATASETS: Registry[Loader] = Registry("dataset", group="robench.datasets")


def load(name: str, folder: Path | str = "data") -> Data:
    """A registered data set, ``folder:PATH``, ``npz:PATH``, ``hf:OWNER/NAME`` or ``cifar10-c:CORRUPTION/SEVERITY``.

    Args:
        folder: where official data sets are kept and downloaded to.

    Raises:
        RobenchError: unknown name, missing or damaged files, no network.
    """
    kind, colon, path = name.partition(":")
    place = DataFolder(Path(folder))
    if not colon:
        if name not in DATASETS.names() and (there := Path(name)).exists():
            kind = "folder" if there.is_dir() else "npz"
            raise RobenchError(f"`dataset` {name!r} is a path and no name; try {kind}:{name}")
        return DATASETS.get(name)(place)
    if kind == "folder":
        from robench.core.folders import folder as images

        return images(Path(path), place)
    if kind == "npz":
        return _npz(Path(path))
    if kind == "hf":
        from robench.core.hub import dataset

        return dataset(name, place)
    if kind in CORRUPTED:
        from robench.core.corrupted import corrupted

        return corrupted(kind, path, place)
    raise RobenchError(
        f"expected `dataset` to be a name, folder:PATH, npz:PATH, hf:OWNER/NAME or cifar10-c:CORRUPTION/SEVERITY, "
        f"got {name!r}"
    )


def has_name(name: str) -> bool:
    """Whether `load` gives the same images by this name on every machine."""
    return name in DATASETS.names() or name.startswith("hf:")


def at_hand(name: str, folder: Path | str = "data") -> bool:
    """Whether `load` gives a registered data set without a download."""
    return name in DATASETS.names() and (name not in _OFFICIAL or (Path(folder) / name).is_dir())


def make(
    name: str,
    train: tuple[npt.ArrayLike, npt.ArrayLike],
    test: tuple[npt.ArrayLike, npt.ArrayLike],
    *,
    classes: Iterable[str] | None = None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    recipe: str = "generic",
    fingerprint: str | None = None,
) -> Data:
    """Checks arrays and makes a data set of them.

    Args:
        train: images uint8 (M,C,H,W) or (M,H,W), and integer labels (M,).
        test: the same.
        statistics: mean and standard deviation per channel in [0, 1]; by default those of the training images.
        fingerprint: what `Data.fingerprint` says of these arrays, where that is known.

    Raises:
        RobenchError: other types or shapes, labels out of range.
    """
    splits = {part: _split(name, part, *arrays) for part, arrays in (("train", train), ("test", test))}
    if splits["train"].images.shape[1:] != splits["test"].images.shape[1:]:
        raise RobenchError(f"{name}: train and test images differ in shape; make them equal")
    used = np.unique(np.concatenate([split.labels.numpy() for split in splits.values()]))
    count = int(used.max()) + 1
    # Numbered from 1, or with a number that stands for nothing: one class is none.
    if classes is None and ((used[0] == 1 and len(used) == count - 1 > 1) or 2 * len(used) < count):
        raise RobenchError(
            f"{name}: expected labels from 0 without gaps, got {used[0]}..{used[-1]}, of which {len(used)} occur; "
            f"number the classes anew"
        )
    names = tuple(classes) if classes is not None else tuple(str(label) for label in range(count))
    if count > len(names) or len(names) < 2:
        raise RobenchError(f"{name}: expected labels in 0..{len(names) - 1} and at least 2 classes, got {count - 1}")
    brightest = int(max(split.images[:1000].max() for split in splits.values()))
    if 0 < brightest < DARK:
        log.warning(
            f"{name}: the brightest pixel is {brightest} of 255, and ε is a share of 255; if {brightest} is white "
            f"there, multiply the images by {255 // brightest}"
        )
    mean, std = statistics or _statistics(splits["train"].images)
    if fingerprint is None:
        tensors = {f"{part}.{kind}": getattr(s, kind) for part, s in splits.items() for kind in ("images", "labels")}
        fingerprint = tensors_hash(tensors)
    return Data(name, splits["train"], splits["test"], mean, std, names, fingerprint, recipe)


def _hash(image: npt.NDArray[np.uint8]) -> int:
    return hash(image.tobytes())


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in [0, 1], to four digits, some images at a time.

    Args:
        images: uint8 (M,C,H,W).
    """
    values = np.arange(256)
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for some in torch.split(images, max(1, (1 << 20) // images[0].numel())):
        counts += [np.bincount(channel.flatten(), minlength=256) for channel in some.transpose(0, 1).numpy()]
    total = counts[0].sum()
    means = counts @ values / total
    variances = (counts * (values - means[:, None]) ** 2).sum(axis=1) / max(1, total - 1)
    mean = tuple(round(value / 255, 4) for value in means.tolist())
    return mean, tuple(round(value / 255, 4) or 1.0 for value in np.sqrt(variances).tolist())


def outline(name: str, folder: Path | str = "data") -> Data:
    """A data set for plans and imports: an official one is not loaded, its images are blank and take no memory."""
    if name not in _OFFICIAL:
        return load(name, folder)
    official = _OFFICIAL[name]
    blank = torch.zeros(1, dtype=torch.uint8).view(1, 1, 1, 1)
    train, test = (
        Split(
            blank.expand(count, len(official.mean), official.side, official.side), torch.zeros(1).long().expand(count)
        )
        for count in official.counts
    )
    classes = tuple(str(label) for label in range(official.num_classes))
    return Data(name, train, test, official.mean, official.std, classes, "", official.recipe)


def _split(name: str, part: str, images: npt.ArrayLike, labels: npt.ArrayLike) -> Split:
    try:
        pixels, classes = np.asarray(images), np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RobenchError(f"{name}: expected arrays as {part} images and labels ({error})") from error
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.size:
        raise RobenchError(
            f"{name}: expected {part} images as uint8 (M,C,H,W) with 1 or 3 channels, got {pixels.dtype} {pixels.shape}"
        )
    if classes.shape != (len(pixels),) or not np.issubdtype(classes.dtype, np.integer) or not len(classes):
        raise RobenchError(f"{name}: expected {len(pixels)} integer {part} labels, got {classes.dtype} {classes.shape}")
    if int(classes.min()) < 0 or int(classes.max()) >= MAX_CLASSES:
        raise RobenchError(
            f"{name}: expected {part} labels in 0..{MAX_CLASSES - 1}, got {classes.min()}..{classes.max()}"
        )
    return Split(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(classes.astype(np.int64)))


@DATASETS.register("digits")
def _digits(place: DataFolder) -> Data:
    """1,797 handwritten digits of 8x8 pixels, shipped with scikit-learn: 1,297 to train, 500 to test."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)
    order = Stream(("digits",)).permutation(len(images)).numpy()
    train, test = order[:1297], order[1297:]
    return make("digits", (images[train], raw.target[train]), (images[test], raw.target[test]), recipe="digits")


@dataclass(frozen=True)
class _Official:
    """A data set of torchvision: its class there, normalisation."""

    dataset: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: str = "cifar10"
    num_classes: int = 10
    counts: tuple[int, int] = (50_000, 10_000)
    side: int = 32


_OFFICIAL = {
    "cifar10": _Official("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": _Official("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), num_classes=100),
    "svhn": _Official("SVHN", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "generic", counts=(73_257, 26_032)),
    "mnist": _Official("MNIST", (0.1307,), (0.3081,), "generic", counts=(60_000, 10_000), side=28),
    "fashion-mnist": _Official("FashionMNIST", (0.2860,), (0.3530,), "generic", counts=(60_000, 10_000), side=28),
}


def _official(name: str, place: DataFolder) -> Data:
    spec = _OFFICIAL[name]
    try:
        from torchvision import datasets  # type: ignore[import-untyped]
    except (ImportError, RuntimeError) as error:
        raise RobenchError(
            f"data set {name!r} needs torchvision, which does not import here ({in_a_line(error)}); install torch and "
            f"torchvision together, from one index: pip install torch torchvision"
        ) from error
    parts = []
    for split in ("train", "test"):
        arguments: dict[str, Any] = {"split": split} if spec.dataset == "SVHN" else {"train": split == "train"}
        try:
            part = getattr(datasets, spec.dataset)(root=place.folder / name, download=True, **arguments)
        except Exception as error:  # torchvision raises RuntimeError, URLError and OSError alike
            for made in (place.folder / name, place.folder):
                with contextlib.suppress(OSError):  # torchvision makes folders first; those that stay empty go
                    made.rmdir()
            raise RobenchError(
                f"data set {name!r} is not complete in {place.folder / name} and cannot be downloaded "
                f"({in_a_line(error)}); put the official files there, or name your own: --dataset "
                f"npz:PATH or folder:PATH"
            ) from error
        pixels = np.asarray(part.data)
        if pixels.ndim == 4 and pixels.shape[-1] == 3:
            pixels = pixels.transpose(0, 3, 1, 2)
        parts.append((pixels, np.asarray(part.labels if hasattr(part, "labels") else part.targets)))
        classes = getattr(part, "classes", None)
    return make(name, *parts, classes=classes, statistics=(spec.mean, spec.std), recipe=spec.recipe)


for _name in _OFFICIAL:
    DATASETS.register(_name)(partial(_official, _name))


def _npz(path: Path) -> Data:
    """x_train, y_train, x_test, y_test, images uint8 (M,C,H,W)."""
    wanted = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in wanted if name not in file]
            if missing:
                raise RobenchError(f"{path} lacks {', '.join(missing)}; expected arrays {', '.join(wanted)}")
            arrays = [file[name] for name in wanted]
    except FileNotFoundError as error:
        raise RobenchError(f"{path} does not exist; expected an .npz with {', '.join(wanted)}") from error
    except RobenchError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise RobenchError(f"{path} cannot be read as .npz without pickle ({error})") from error
    return make(f"npz:{path}", (arrays[0], arrays[1]), (arrays[2], arrays[3]))
