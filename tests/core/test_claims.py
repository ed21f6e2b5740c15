"""Several processes share one store; a dead one's claims are taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from robench.core import claims
from robench.core.claims import Claims


def test_one_has_it_and_the_other_has_not(tmp_path: Path) -> None:
    with Claims(tmp_path).take("unit") as first:
        assert first
        with Claims(tmp_path).take("unit") as second:
            assert not second
        with Claims(tmp_path).take("other") as other:
            assert other
    with Claims(tmp_path).take("unit") as again:
        assert again
    assert not list(tmp_path.iterdir())


def test_a_dead_process_has_no_claim(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    owner = {"host": socket.gethostname(), "process": int(gone.stdout)}
    (tmp_path / "unit.json").write_text(json.dumps(owner))
    with Claims(tmp_path).take("unit") as granted:
        assert granted


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says when a process began")
def test_a_process_that_has_the_number_of_a_dead_one_has_no_claim(tmp_path: Path) -> None:
    owner = {"host": socket.gethostname(), "process": os.getpid(), "began": "1"}
    (tmp_path / "unit.json").write_text(json.dumps(owner))
    with Claims(tmp_path).take("unit") as granted:
        assert granted
        mine = json.loads((tmp_path / "unit.json").read_text())
        assert int(mine["began"]) > 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says what is left of a process")
def test_a_killed_process_that_nobody_waited_for_has_no_claim(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1)
    assert killed.stdout is not None
    killed.stdout.readline()
    owner = {"host": socket.gethostname(), "process": killed.pid, "began": claims._state(killed.pid)[1]}
    (tmp_path / "unit.json").write_text(json.dumps(owner))
    with Claims(tmp_path).take("unit") as granted:
        assert not granted
    killed.kill()
    deadline = time.monotonic() + 20
    while claims._state(killed.pid)[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    with Claims(tmp_path).take("unit") as granted:
        assert granted
    killed.communicate()


def test_another_machine_keeps_its_claim_until_it_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    path.write_text(json.dumps({"host": "elsewhere", "process": 1}))
    with Claims(tmp_path).take("unit") as granted:
        assert not granted
    old = path.stat().st_mtime - claims.STALE - 1
    os.utime(path, (old, old))
    with Claims(tmp_path).take("unit") as granted:
        assert granted


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_who_was_killed_while_it_claimed_has_no_claim_for_long(tmp_path: Path, content: str) -> None:
    path = tmp_path / "unit.json"
    path.write_text(content)
    with claims.Claims(tmp_path).take("unit") as granted:
        assert not granted, "it may be writing"
    old = path.stat().st_mtime - claims.UNWRITTEN - 1
    os.utime(path, (old, old))
    with claims.Claims(tmp_path).take("unit") as granted:
        assert granted


def test_a_sign_of_life_renews_a_claim(tmp_path: Path) -> None:
    mine = Claims(tmp_path)
    with mine.take("unit"):
        path = tmp_path / "unit.json"
        os.utime(path, (0, 0))
        mine.beat()
        assert path.stat().st_mtime > 1e9


def test_without_a_folder_everything_is_granted() -> None:
    with Claims(None).take("unit") as granted:
        assert granted


def test_one_waits_for_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PAUSE", 0.01)
    waited = threading.Event()
    order: list[str] = []

    def second() -> None:
        with Claims(tmp_path).hold("unit", lambda terms: waited.set()):
            order.append("second")

    thread = threading.Thread(target=second)
    with Claims(tmp_path).hold("unit", lambda terms: order.append("never")):
        thread.start()
        assert waited.wait(20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())
