"""Several processes share one store; a dead one's claims are taken over."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from robench.store import claims
from robench.store.claims import Claims, alive, owner

#: Holds a unit until it is killed, and says so.
HOLDER = """
import sys, time
from pathlib import Path
from robench.store.claims import Claims, owner
with Claims(Path(sys.argv[1])).take("unit") as granted:
    print(granted, owner()["began"], flush=True)
    time.sleep(100)
"""

Begin = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Begins a process that holds ``unit`` in a folder."""
    begun: list[subprocess.Popen[str]] = []

    def holder(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(folder)]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert begun[-1].stdout is not None
        assert begun[-1].stdout.readline().startswith("True")
        return begun[-1]

    yield holder
    for process in begun:
        process.kill()
        process.communicate()


def granted(taker: Claims) -> bool:
    with taker.take("unit") as answer:
        return answer


def seconds_until_granted(taker: Claims) -> float:
    began = time.monotonic()
    while not granted(taker):
        assert time.monotonic() - began < 30
        time.sleep(0.05)
    return time.monotonic() - began


def test_one_has_it_and_the_other_has_not(tmp_path: Path) -> None:
    with Claims(tmp_path).take("unit") as first:
        assert first
        assert not granted(Claims(tmp_path))
        with Claims(tmp_path).take("other") as other:
            assert other
    assert granted(Claims(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_killed_process_has_no_claim(tmp_path: Path, begin: Begin) -> None:
    holder, other = begin(tmp_path), Claims(tmp_path)
    assert not granted(other)
    holder.kill()
    holder.wait()
    assert granted(other)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says when a process began")
def test_a_process_that_has_the_number_of_a_dead_one_has_no_claim(tmp_path: Path, begin: Begin) -> None:
    holder = begin(tmp_path)
    holder.kill()
    holder.wait()
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace(f"pid={holder.pid}\n", f"pid={os.getpid()}\n"))
    assert granted(Claims(tmp_path))


def test_a_killed_process_that_nobody_waited_for_has_no_claim_for_long(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LEASE", 1.0)
    with Claims(tmp_path).take("unit"):
        (path,) = tmp_path.iterdir()
        lasting = path.read_text()
    begin(tmp_path).kill()
    path.write_text(re.sub("duration=.*", re.search("duration=.*", lasting).group(), path.read_text()))  # type: ignore[union-attr]
    assert 1.0 <= seconds_until_granted(Claims(tmp_path)) < 10


def test_another_machine_keeps_its_claim_until_it_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE", 1.0)
    with Claims(tmp_path).take("unit"):
        (path,) = tmp_path.iterdir()
        told = re.sub("pid=.*\nhost=.*", "pid=1\nhost=elsewhere", path.read_text())
    path.write_text(told)
    other = Claims(tmp_path)
    for number in range(6):
        os.utime(path, (number, number))  # its clock is another
        assert not granted(other), "it renews its claim"
        time.sleep(0.3)
    assert 0.5 < seconds_until_granted(other) < 10


def test_a_claim_lasts_as_long_as_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE", 1.5)
    other = Claims(tmp_path)
    with Claims(tmp_path).take("unit"):
        until = time.monotonic() + 4
        while time.monotonic() < until:
            assert not granted(other)
            time.sleep(0.1)
    assert granted(other)


@pytest.mark.parametrize("content", ["", "{", "[]", "filelock/2\npid="])
def test_who_was_killed_while_it_claimed_has_no_claim_for_long(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "UNWRITTEN", 1.0)
    (tmp_path / "unit.lock").write_text(content)
    other = Claims(tmp_path)
    assert not granted(other), "it may be writing"
    assert 1.0 <= seconds_until_granted(other) < 10
    assert not list(tmp_path.iterdir())


def test_no_two_win_the_claim_of_a_dead_process(tmp_path: Path, begin: Begin) -> None:
    """Eight look at once, again and again: whoever is late does not take the claim of who was first."""
    holder = begin(tmp_path / "dead")
    holder.kill()
    holder.wait()
    (dead,) = (tmp_path / "dead").iterdir()
    rounds, contenders = 60, 8
    holding, most, winners = 0, 0, 0
    counting = threading.Lock()

    def plant() -> None:
        shutil.copy(dead, tmp_path / "unit.lock")

    every = threading.Barrier(contenders, action=plant)
    told: list[BaseException] = []

    def contend() -> None:
        nonlocal holding, most, winners
        try:
            for _ in range(rounds):
                every.wait(60)
                for _ in range(3):
                    with Claims(tmp_path).take("unit") as answer:
                        if answer:
                            with counting:
                                holding, winners = holding + 1, winners + 1
                                most = max(most, holding)
                            time.sleep(0.002)
                            with counting:
                                holding -= 1
        except BaseException as error:
            told.append(error)
            every.abort()

    threads = [threading.Thread(target=contend) for _ in range(contenders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not told
    assert winners >= rounds
    assert most == 1


def test_without_a_folder_everything_is_granted() -> None:
    assert granted(Claims(None))


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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says what is left of a process")
def test_who_is_alive_is_told_from_who_was(tmp_path: Path, begin: Begin) -> None:
    mine, holder = owner(), begin(tmp_path)
    assert alive(mine)
    assert not alive({**mine, "began": "1"}), "a dead process had this number"
    theirs = {**mine, "process": holder.pid, "began": None}
    assert alive(theirs)
    holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive(theirs):
        assert time.monotonic() < deadline, "killed and not waited for, it does not run"
        time.sleep(0.01)
    holder.wait()
    assert not alive(theirs)
