"""Names of runs, found without torch: a name that is none is told before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from robench.core.errors import RobenchError, unknown
from robench.core.files import checked_name


class RunNames:
    """Which runs a folder holds."""

    def __init__(self, root: Path | str = "runs") -> None:
        self.root = Path(root)

    def folder(self, name: str) -> Path:
        return self.root / checked_name(name)

    def names(self) -> list[str]:
        """Names of finished runs, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(path.parent.name for path in self.root.glob("*/manifest.json"))

    def manifest(self, name: str) -> Path:
        """The file that says what a finished run is; RobenchError where there is no run of that name."""
        if (path := Path(name)).parent != Path() and (path / "manifest.json").exists():
            raise RobenchError(
                f"expected the name of a run, got the path {name!r}; type {path.name} --runs {path.parent}"
            )
        path = self.folder(name) / "manifest.json"
        if not path.exists():
            hint = f"Runs are read from {self.root}; {self.elsewhere() or '--runs names another folder'}."
            raise unknown("run", name, self.names(), hint)
        return path

    def elsewhere(self) -> str:
        """What to type where this is the folder of a study or of a publication, whose runs are one below it."""
        below = self.root / "runs"
        return f"they are in --runs {below}" if not self.names() and RunNames(below).names() else ""
