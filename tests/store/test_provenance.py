"""Which commit made a file, and whether the sources still were it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from robench.store import provenance


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_says_whether_the_sources_are_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    source = tmp_path / "robench" / "core" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance._commit() is None
    git("init", "-q")
    (tmp_path / "README.md").write_text("")
    assert provenance._commit() is None, "an installed copy inside another project's checkout"
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert provenance._commit() == head
    (tmp_path / "README.md").write_text("a figure that this very report wrote")
    assert provenance._commit() == head
    source.write_text("changed")
    assert provenance._commit() == f"{head}-dirty"
