"""Files that are whole or absent: atomic writes, safetensors, Parquet, hashes."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robench.core.errors import RobenchError

if TYPE_CHECKING:
    import pandas as pd
    from pydantic import BaseModel
    from torch import Tensor


class Absent(RobenchError, FileNotFoundError):
    """There is no such file."""


class Damaged(RobenchError):
    """A file is not what was written.

    Attributes:
        seen: what is wrong with it, without what its owner can do: for whoever was given it to read.
    """

    def __init__(self, seen: str, remedy: str = "restore it, or remove it and run the command that made it again"):
        super().__init__(seen, remedy)
        self.seen = seen

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


#: Seconds without a change after which a temporary file is nobody's: no write takes so long.
ABANDONED = 86_400.0

#: Where a record keeps the hash of the rest.
CHECKSUM = "checksum"

_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")


def checked_name(name: str, what: str = "run") -> str:
    """``name``, if it can be the name of a folder that stays where it belongs.

    Raises:
        RobenchError: otherwise.
    """
    if not _NAME.fullmatch(name) or name.strip(".") == "" or len(name) > 200:
        raise RobenchError(f"expected the name of a {what} to match [A-Za-z0-9._][A-Za-z0-9._-]*, got {name!r}")
    return name


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, which vanishes when the block ends.

    Raises:
        RobenchError: the folder cannot be written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:40]}."
        _forget_abandoned(path.parent, prefix)
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
    except OSError as error:
        raise RobenchError(f"cannot write {path} ({error.strerror or error}); free or choose another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        RobenchError: the folder cannot be written, or the disk is full.
    """
    with scratch(path) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes a private file; give it what the user's umask says.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)


def _forget_abandoned(folder: Path, prefix: str) -> None:
    """Removes what processes left there that were killed while they wrote."""
    for left in folder.glob(f"{glob.escape(prefix)}????????.tmp"):
        with suppress(OSError):  # another process may be as quick
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """What JSON a file holds.

    Raises:
        Damaged: it is no JSON.
        RobenchError: it is absent, or no file.
    """
    if path.exists() and not path.is_file():
        raise RobenchError(f"{path} is no file; restore or remove it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RobenchError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """JSON that holds the hash of what it says, so that `read_record` notices an edit and a flipped bit."""
    write_json(path, {**value, CHECKSUM: _checksum(value)})


def read_record(path: Path, schema: type[BaseModel] | None = None) -> dict[str, Any]:
    """What `write_record` wrote, or an older file that has no hash yet.

    Args:
        schema: what the values must be.

    Raises:
        Damaged: it was changed since it was written, or is of another shape.
        RobenchError: it is absent, or no file.
    """
    from pydantic import ValidationError

    found = read_json(path)
    if not isinstance(found, dict):
        raise Damaged(f"{path} is damaged (no JSON object)")
    checksum = found.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(found):
        raise Damaged(f"{path} was changed after it was written")
    if schema is not None:
        try:
            schema.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise Damaged(f"{path} is damaged: {field}: {first['msg']}") from error
    return found


def _checksum(value: Mapping[str, Any]) -> str:
    # As it will be read: JSON has no tuples and no keys but strings.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; empty where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """safetensors with string metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata=dict(metadata or {}),
            )
        except SafetensorError as error:  # a full disk arrives as one of these
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        Absent: there is none.
        Damaged: it is no safetensors file, or a part of one.
        RobenchError: it is no file, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise Absent(f"{path} does not exist") from error
    except SafetensorError as error:
        raise Damaged(f"{path} is damaged ({error})") from error
    except OSError as error:
        raise _unreadable(path, error) from error


#: The hash of what a file of tensors holds, from its tensors and metadata.
Hashed = Callable[[Mapping[str, "Tensor"], Mapping[str, str]], str]


def of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The hash of the tensors alone."""
    return tensors_hash(tensors)


def write_hashed(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, hashed: Hashed = of_tensors
) -> None:
    """safetensors that hold their own hash: damage shows on reading."""
    about = dict(metadata or {})
    write_tensors(path, tensors, {**about, "hash": hashed(tensors, about)})


def read_hashed(path: Path, hashed: Hashed = of_tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_hashed` wrote.

    Raises:
        Absent: there is none.
        Damaged: it holds anything else.
        RobenchError: it is no file, or cannot be read.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("hash") != hashed(tensors, metadata):
        raise Damaged(f"{path} is damaged (it is not what was written)")
    return tensors, metadata


def write_frame(folder: Path, frame: pd.DataFrame) -> Path:
    """Writes ``frame`` as Parquet under a name that holds the hash of its bytes: damage shows on reading."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, compression="zstd")
    path = folder / f"part-{hashlib.sha256(buffer.getvalue()).hexdigest()[:24]}.parquet"
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def read_frame(path: Path, columns: Collection[str] = ()) -> pd.DataFrame:
    """The rows of a file that `write_frame` made.

    Raises:
        Absent: there is none.
        Damaged: the bytes are not those that were written, or are no rows with all of ``columns``.
        RobenchError: it is no file, or cannot be read.
    """
    import pandas as pd

    _check_file(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise Absent(f"{path} does not exist") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if path.name == f"part-{hashlib.sha256(content).hexdigest()[:24]}.parquet":
            found = pd.read_parquet(io.BytesIO(content))
            if set(columns) <= set(found):
                return found
    except (ValueError, OSError):  # pyarrow's errors are both
        pass
    raise Damaged(f"{path} is damaged (it is not what was written)")


def _check_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise RobenchError(f"{path} is no file; restore or remove it")


def _unreadable(path: Path, error: OSError) -> RobenchError:
    return RobenchError(f"{path} cannot be read ({error.strerror or error}); restore or remove it")


def content_key(value: Any) -> str:
    """The hash of a JSON value, 16 hex digits: the key of a task or a cell."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The hash of named tensors by content, whatever file they are in."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)  # no copy: it may be larger than memory
    return digest.hexdigest()
