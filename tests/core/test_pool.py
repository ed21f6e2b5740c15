"""Processes that do as they are told: one's death is its own, and all of them end with who began them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

from robench.core.pool import Processes, visible_gpus
from tests.core import chores

Begin = Callable[..., Processes]


@pytest.fixture
def begin() -> Iterator[Begin]:
    begun: list[Processes] = []

    def beginning(*arguments: object, **options: object) -> Processes:
        begun.append(Processes(chores.do, *arguments, **options))  # type: ignore[arg-type]
        return begun[-1]

    yield beginning
    for pool in begun:
        pool.close()


def lingering(folder: Path) -> int:
    """The process that lingers, as soon as it does."""
    began = time.monotonic()
    while not (found := list(folder.iterdir())):
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    return int(found[0].name)


def ends(process: int) -> bool:
    """Whether a process is gone within half a minute."""
    began = time.monotonic()
    while chores.running(process) and time.monotonic() - began < 30:
        time.sleep(0.05)
    return not chores.running(process)


def test_processes_are_spread_over_the_gpus(tmp_path: Path, begin: Begin) -> None:
    pool = begin(2, ["4", "7"])
    found = [pool.submit(("meet", str(tmp_path))) for _ in range(2)]
    assert {future.result(timeout=60) for future in found} == {"4", "7"}


def test_gpus_are_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus("auto") == visible_gpus("cuda") == ["0", "1"]
    assert visible_gpus("cuda:1") == visible_gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus("auto") == ["3", "5"]


def test_threads_are_as_many_as_was_said(begin: Begin) -> None:
    assert begin(1, threads=3).submit(("threads",)).result(timeout=60) == 3


def test_one_that_dies_takes_no_other_task_along(tmp_path: Path, begin: Begin) -> None:
    """The first waits for a second, whose place is that of one that died."""
    pool = begin(2)
    first = pool.submit(("meet", str(tmp_path)))
    with pytest.raises(BrokenExecutor):
        pool.submit(("die",)).result(timeout=60)
    second = pool.submit(("meet", str(tmp_path)))
    assert first.result(timeout=60) == second.result(timeout=60)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_is_the_callers(begin: Begin) -> None:
    pool = begin(1)
    with pytest.raises(ValueError, match="no help"):
        pool.submit(("fail",)).result(timeout=60)
    assert pool.submit(("threads",)).result(timeout=60) > 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_closed_it_does_not_wait_for_what_is_under_way(tmp_path: Path) -> None:
    pool = Processes(chores.do, 2)
    task = pool.submit(("linger", str(tmp_path)))
    process = lingering(tmp_path)
    pool.close()
    assert ends(process)
    assert isinstance(task.exception(timeout=0), BrokenExecutor)


CALLER = """
import signal
import sys
from robench.core.pool import Processes
from tests.core import chores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
pool = Processes(chores.do, 1)
try:
    pool.submit(("linger", sys.argv[1])).result()
except KeyboardInterrupt:
    pool.close()
    sys.exit(130)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("killed", [True, False], ids=["kill -9", "Ctrl-C"])
def test_no_process_outlives_its_caller(tmp_path: Path, killed: bool) -> None:
    command = [sys.executable, "-c", CALLER, str(tmp_path)]
    caller = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = lingering(tmp_path)
    if killed:
        caller.kill()
    else:
        os.killpg(caller.pid, signal.SIGINT)
    assert ends(process)
    _, told = caller.communicate(timeout=60)
    assert caller.returncode == (-signal.SIGKILL if killed else 130)
    assert killed or told == "", "the caller alone answers"
