"""What users see of a mistake or a doubt, and its wording: parameter, owner, allowed, received, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RobenchError(ValueError):
    """A mistake that the user can mend; the command line prints it on one line and exits with 2."""


class DoubtWarning(UserWarning):
    """A check of a result that does not pass; a call from Python has no terminal to print it on."""


#: How torch, cuDNN and cuBLAS say that memory has run out, where it is no `torch.OutOfMemoryError`.
_NO_MEMORY = ("allocate memory", "out of memory", "unable to find an engine to execute", "STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a smaller batch might do."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def in_a_line(error: BaseException, most: int = 200) -> str:
    """An error on one line: of robench what it says, of other people's code its type and the first ``most``
    characters."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RobenchError) else f"{type(error).__name__}: {text[:most]}"


@contextmanager
def within(kind: str, name: str) -> Iterator[None]:
    """An error of a plug-in's own code says, below its traceback, whose it is, and what looks for the reason."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, RobenchError) and not getattr(error, "__notes__", ()):
            error.add_note(f"in the code of {kind} {name!r}; `robench check plugin {name}` looks for the reason")
        raise


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> RobenchError:
    """The error for a name that is not registered, with its nearest neighbours."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    suggestion = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}."
    return RobenchError(f"unknown {kind} {name!r}; {suggestion}{' ' + hint if hint else ''}")
