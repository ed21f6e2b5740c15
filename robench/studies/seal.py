"""Nothing to do, said quickly: a complete study's files and code, as they were when it was complete. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

NAME = "complete.json"
_GROUPS = ("robench.attacks", "robench.defenses", "robench.models", "robench.datasets")


@cache
def sources() -> str:
    """The hash of robench's own files, and of the names and versions of installed plug-ins."""
    digest = hashlib.sha256()
    for package in ("robench", "robench.attacks", "robench.defenses", "robench.reports"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".py", ".toml", ".csv", ".j2"):
                    digest.update(f"{package}:{path.relative_to(folder)};".encode() + path.read_bytes())
    for group in _GROUPS:
        for point in sorted(entry_points(group=group), key=lambda point: point.name):
            digest.update(f"{group}:{point.name}:{point.value}:{point.dist and point.dist.version};".encode())
    return digest.hexdigest()


def seal(out: Path, command: Sequence[str], dataset: str) -> None:
    """Notes that ``command`` has nothing left to do in ``out``."""
    from robench.core.store import write_json

    noted = {"command": [*command, sources()], "files": _files(out), "dataset": dataset, "data": _data(dataset)}
    write_json(out / NAME, noted)


def sealed(out: Path, command: Sequence[str]) -> bool:
    """Whether ``command`` had nothing left to do, and no file, data of the user's or code has changed since."""
    try:
        noted = json.loads((out / NAME).read_text(encoding="utf-8"))
        same = noted["command"] == [*command, sources()] and noted["files"] == _files(out)
        return bool(same and noted["data"] == _data(noted["dataset"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _data(dataset: str) -> dict[str, list[int]]:
    """Size and time of the files of a data set of the user's own, ``npz:PATH`` or ``folder:PATH``."""
    _, colon, name = dataset.partition(":")
    if not colon:
        return {}
    root = Path(name).absolute()
    paths = [path for path in (root, *root.rglob("*")) if path.is_file()]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}


def _files(out: Path) -> dict[str, list[int]]:
    """Size and time of every file that a study keeps; adversarial images can be made again."""
    paths = [*(out / "runs").glob("*/**/*"), *(out / "report").glob("*"), *(out / "tasks").glob("*.json")]
    kept = [path for path in paths if path.is_file() and not path.relative_to(out).parts[1].startswith(".")]
    return {path.relative_to(out).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(kept)}
