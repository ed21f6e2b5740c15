"""What produced a file: versions, never a path or a date."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

SOURCES = ("robench", "attacks", "defenses", "reports")
_GROUPS = ("robench.attacks", "robench.defenses", "robench.models", "robench.datasets", "robench.figures")


@cache
def versions() -> dict[str, str]:
    """Versions of robench, Python and the packages that numbers depend on; the commit where this is a checkout."""
    found = {"python": platform.python_version()}
    for package in ("robench", "torch", "torchvision", "torchattacks", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit()
    if commit:
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """The commit, and ``-dirty`` where the sources are no longer what it holds; None outside a checkout."""
    try:
        if _git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return None
        head = _git("rev-parse", "HEAD").stdout.strip()
        changed = _git("diff", "--quiet", "HEAD", "--", *(f":/{each}" for each in SOURCES)).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "-dirty" * bool(changed) if head else None


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
    )


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
