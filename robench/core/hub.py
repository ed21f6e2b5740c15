"""Hugging Face: its client, and data sets that lie there as Parquet files."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robench.core.data import Data, DataFolder, make
from robench.core.decoded import Encoded, decoded
from robench.core.errors import RobenchError, in_a_line
from robench.core.files import content_key, file_hash

log = logging.getLogger(__name__)

#: Splits that file names tell; the first two are trained and tested on unless others are named.
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
#: What may be said after the name, as of an attack's fields.
OPTIONS = ("config", "train", "test", "image", "label")
#: Rows of a Parquet file that are in memory at a time.
ROWS = 256


def client() -> Any:
    """The package huggingface_hub; RobenchError where it is missing."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise RobenchError("Hugging Face needs its client; pip install robench[hub]") from error


def endpoint() -> str | None:
    """Another hub's address, where the user names one."""
    return os.environ.get("HF_ENDPOINT")


def api() -> Any:
    return client().HfApi(endpoint=endpoint())


@contextmanager
def asking(text: str) -> Iterator[None]:
    """Whatever a client raises becomes one line about ``text``."""
    try:
        yield
    except RobenchError:
        raise
    except Exception as error:
        raise RobenchError(
            f"{text} cannot be downloaded ({in_a_line(error)}); check the name and the network, and "
            f"for a private repository log in (hf auth login)"
        ) from error


@dataclass(frozen=True)
class _Asked:
    """``hf:OWNER/NAME[@REVISION][:OPTION=VALUE]...``, understood."""

    text: str
    repository: str
    revision: str
    options: Mapping[str, str]

    @classmethod
    def of(cls, text: str) -> _Asked:
        named, *rest = text.removeprefix("hf:").split(":")
        repository, _, revision = named.partition("@")
        pairs = [each.partition("=") for each in rest]
        good = re.fullmatch(r"[\w.-]+/[\w.-]+", repository) and "@" not in revision
        if not good or not all(name in OPTIONS and value for name, _, value in pairs):
            raise RobenchError(
                f"expected hf:OWNER/NAME, where needed with @REVISION and then :NAME=VALUE, of {', '.join(OPTIONS)}, "
                f"got {text!r}"
            )
        return cls(text, repository, revision, {name: value for name, _, value in pairs})

    def refuse(self, what: str, option: str, there: Sequence[str]) -> RobenchError:
        """An error that says what to type: ``option`` with one of ``there``."""
        if not there:
            return RobenchError(f"{self.text}: {what}; choose another set, or save its arrays for npz:PATH")
        said = {name: value for name, value in self.options.items() if name != option}
        begun = ":".join([self.text.split(":")[1], *(f"{name}={each}" for name, each in said.items())])
        choices = [f"hf:{begun}:{option}={each}" for each in there[:4]]
        return RobenchError(f"{self.text}: {what}; say which: {' or '.join(choices)}")


def dataset(text: str, place: DataFolder) -> Data:
    """The images and labels of ``hf:OWNER/NAME[@REVISION][:config=…][:train=…][:test=…][:image=…][:label=…]``.

    Its Parquet files are downloaded into the client's cache, and decoded once. No code of the repository runs.

    Raises:
        RobenchError: nothing there, no Parquet files, splits or columns that are missing or of which several fit.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    asked = _Asked.of(text)
    revision, files = _listed(asked)
    parts = _parts(asked, files)
    paths: dict[str, list[Path]] = {}
    for part, names in parts.items():
        with asking(text):
            get, where = client().hf_hub_download, {"revision": revision, "endpoint": endpoint()}
            paths[part] = [Path(get(asked.repository, name, repo_type="dataset", **where)) for name in names]
    with asking(text):
        schema = pq.read_schema(paths["train"][0])
    image, label, classes = _columns(asked, schema)
    source = f"hf:{asked.repository}@{revision}" + "".join(f":{name}={each}" for name, each in asked.options.items())
    key = content_key([image, label, {part: [file_hash(path) for path in each] for part, each in paths.items()}])
    encoded = {part: _rows(asked, each, image, label) for part, each in paths.items()}
    tensors, fingerprint = decoded(place.cache / f"hf-{key}.safetensors", encoded)
    return make(
        source,
        (tensors["train.images"], tensors["train.labels"]),
        (tensors["test.images"], tensors["test.labels"]),
        classes=classes,
        fingerprint=fingerprint,
    )


def _listed(asked: _Asked) -> tuple[str, list[str]]:
    """The revision and its files; where the hub cannot be asked, as on many a cluster, those that were downloaded of
    the revision that is named."""
    try:
        with asking(asked.text):
            info = api().dataset_info(asked.repository, revision=asked.revision or None)
        return str(info.sha), [str(each.rfilename) for each in info.siblings or ()]
    except RobenchError as error:
        try:
            kept = client().snapshot_download(
                asked.repository, repo_type="dataset", revision=asked.revision or None, local_files_only=True
            )
        except Exception:  # nothing was downloaded, in the words of this client
            raise error from None
        log.warning(f"{error}: revision {Path(kept).name}, which was downloaded before, is taken")
        return Path(kept).name, [path.relative_to(kept).as_posix() for path in Path(kept).rglob("*.parquet")]


def _parts(asked: _Asked, files: Sequence[str]) -> dict[str, list[str]]:
    """The Parquet files to train on and to test on."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(name for name in files if name.endswith(".parquet")):
        config, split = _place(file, _names(asked))
        found.setdefault(config, {}).setdefault(split, []).append(file)
    if not found:
        shown = ", ".join(sorted(files)[:8]) or "no files"
        raise RobenchError(
            f"{asked.text}: there are no Parquet files, but {shown}; the hub makes them of many sets: "
            f"hf:{asked.repository}@refs/convert/parquet"
        )
    config = asked.options.get("config", next(iter(found)) if len(found) == 1 else "")
    if config not in found:
        raise asked.refuse(f"its parts are {', '.join(sorted(found)[:8])}", "config", sorted(found))
    splits = found[config]
    names = {part: asked.options.get(part, part) for part in ("train", "test")}
    for part, name in names.items():
        if name not in splits:
            others = [each for each in splits if each and each not in names.values()]
            there = ", ".join(filter(None, splits)) or "none"
            raise asked.refuse(f"no split {name!r} to {part} on; there are {there}", part, others)
    return {part: splits[name] for part, name in names.items()}


def _names(asked: _Asked) -> set[str]:
    return {*SPLITS, *(asked.options[part] for part in ("train", "test") if part in asked.options)}


def _place(file: str, names: Collection[str]) -> tuple[str, str]:
    """Which part of a repository a file is of, and which split: the last of ``names`` in its path, between marks."""
    found = [
        (match.start(), name)
        for name in names
        for match in re.finditer(rf"(?<![^/._-]){re.escape(name)}(?![^/._-])", file)
    ]
    if not found:
        return file.rpartition("/")[0], ""
    _, split = max(found)
    return file[: min(start for start, name in found if name == split)].strip("/._-"), split


def _columns(asked: _Asked, schema: Any) -> tuple[str, str, list[str] | None]:
    """The columns of images and labels, and the names of the classes where the file has them."""
    import pyarrow as pa

    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {field.name: (told.get(field.name) or {}).get("_type") for field in schema}
    pictures = [name for name, kind in kinds.items() if kind == "Image"] or [
        field.name for field in schema if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"] or [
        field.name for field in schema if pa.types.is_integer(field.type)
    ]
    image = _one(asked, "image", pictures, schema.names)
    label = _one(asked, "label", labels, schema.names)
    if not pa.types.is_integer(schema.field(label).type):
        raise asked.refuse(f"column {label!r} holds {schema.field(label).type}, no numbers of classes", "label", labels)
    return image, label, (told.get(label) or {}).get("names")


def _one(asked: _Asked, option: str, found: Sequence[str], columns: Sequence[str]) -> str:
    """The column that is named, or the only one that can be meant."""
    name = asked.options.get(option)
    if name is not None and name not in columns:
        raise asked.refuse(f"it has no column {name!r}, but {', '.join(columns)}", option, found)
    if name is None and len(found) != 1:
        what = f"several columns of {option}s, {', '.join(found)}" if found else f"no column of {option}s"
        raise asked.refuse(f"it has {what} (all columns: {', '.join(columns)})", option, found)
    return name or found[0]


def _rows(asked: _Asked, files: Sequence[Path], image: str, label: str) -> Iterator[Encoded]:
    """The images of some files, in their order."""
    import pyarrow.parquet as pq

    for file in files:
        number = 0
        with asking(asked.text):
            batches = pq.ParquetFile(file).iter_batches(ROWS, columns=[image, label])
        for batch in batches:
            for picture, value in zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True):
                name, number = f"{asked.text}: row {number} of {file.name}", number + 1
                content = picture.get("bytes") if isinstance(picture, dict) else picture
                if not isinstance(content, bytes) or value is None:
                    raise RobenchError(
                        f"{name} has no {'label' if value is None else 'image in it'}; choose another set"
                    )
                yield Encoded(name, content, value)
