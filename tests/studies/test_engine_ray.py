"""The Ray engine, on a local cluster of two workers: the rows of the local engine, also with a worker killed."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robench.cli import run
from robench.core.errors import RobenchError
from robench.studies import engines
from tests.studies import small


def test_two_ray_workers_with_one_killed_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("ray") is None:
        pytest.skip("the extra robench[ray] is not installed")
    addresses: set[str] = set()
    submit = engines.Ray.submit

    def noting(self: engines.Ray, call: tuple[Any, ...]) -> Future[dict[str, Any]]:
        addresses.update(node["NodeManagerAddress"] for node in self._ray.nodes())
        return submit(self, call)

    monkeypatch.setattr(engines.Ray, "submit", noting)
    study = small.write(tmp_path)
    local, ray = tmp_path / "local", tmp_path / "ray"
    common = ["run", str(study), "--device", "cpu"]
    assert run([*common, "--out", str(local), "--workers", "1"]) == 0
    killed: list[int] = []
    killer = threading.Thread(target=small.kill_a_training, args=(ray, killed))
    killer.start()
    assert run([*common, "--out", str(ray), "--engine", "ray", "--workers", "2"]) == 0
    killer.join()
    assert len(killed) == 1
    assert addresses == {"127.0.0.1"}
    pd.testing.assert_frame_equal(small.rows(ray), small.rows(local))


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(engines, "import_module", absent)
    with pytest.raises(RobenchError, match=r"pip install 'robench\[ray\]'"):
        engines.Ray(2)
