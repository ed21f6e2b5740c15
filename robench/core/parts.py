"""Files that can be made again, read under one policy: a damaged one is named, set aside, and made again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from robench.core.errors import RobenchError
from robench.core.files import Damaged

log = logging.getLogger(__name__)

T = TypeVar("T")


def read_intact(path: Path, read: Callable[[Path], T], content: str, remedy: str, *, repair: bool = True) -> T | None:
    """What ``path`` holds; None where it is damaged, which is told.

    Args:
        read: raises `Damaged` where the file is not what was written, as `robench.core.files.read_frame` and
            `robench.core.files.read_hashed` do.
        content, remedy: what the file holds, and what is done about it: "its rows", "are judged again".
        repair: set a damaged file aside, under a name that ends in ``.damaged``; whoever only reads leaves it there.

    Raises:
        FileNotFoundError: there is none.
        RobenchError: it is no file, or cannot be read.
    """
    try:
        return read(path)
    except Damaged:
        if repair:
            with suppress(FileNotFoundError):  # another process did
                path.rename(path.with_name(f"{path.name}.damaged"))
        told = f"it is set aside and {content} {remedy}" if repair else f"{content} do not count here"
        log.warning(f"{path} is damaged: {told}")
        return None


def read_parts(
    folder: Path,
    pattern: str,
    read: Callable[[Path], T],
    content: str,
    remedy: str,
    *,
    known: Collection[Path] = (),
    repair: bool = True,
) -> Iterator[tuple[Path, T | None]]:
    """The files of a folder that match ``pattern``, each with what it holds, in the order of their names; arguments and
    errors as for `read_intact`.

    Args:
        known: files that are left out.
    """
    seen = set(known)
    while fresh := [path for path in sorted(folder.glob(pattern)) if path not in seen]:
        for path in fresh:
            seen.add(path)
            try:
                yield path, read_intact(path, read, content, remedy, repair=repair)
            except FileNotFoundError:
                if path.is_symlink():
                    raise RobenchError(f"{path} is a link to nothing; restore what it names, or remove it") from None
                # Another process put it into a larger file in between, which is found when the folder is listed again.
