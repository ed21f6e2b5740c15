"""Two gloo processes train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robench.core.errors import RobenchError
from robench.core.files import read_tensors
from robench.core.rng import Stream
from robench.defenses import Batch
from robench.store.runs import Runs
from robench.training import loop, parallel
from tests.training import two_processes

pytestmark = pytest.mark.slow

SCRIPT = Path(two_processes.__file__)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left what they found."""
    out = tmp_path_factory.mktemp("together")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, str(SCRIPT), str(out)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("defense", two_processes.DEFENSES)
def test_a_step_is_that_of_one_process(defense: str, together: Path) -> None:
    wanted = two_processes.step(two_processes.task_of(two_processes.tiny(), defense))
    for rank in (0, 1):
        found, _ = read_tensors(together / f"{defense}-{rank}.safetensors")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=f"{name} of process {rank}")


def test_a_training_is_that_of_one_process(together: Path, tmp_path: Path) -> None:
    data = two_processes.tiny()
    task = two_processes.task_of(data, "baseline")
    alone = loop.ensure(task, data, Runs(tmp_path), device=torch.device("cpu"))
    run, again = Runs(together / "runs").all()
    assert run.weights == again.weights
    assert sorted(path.name for path in run.folder.iterdir()) == ["manifest.json", "weights.safetensors"]
    for (name, found), wanted in zip(run.load().state_dict().items(), alone.load().state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=name)
    for mine, theirs in zip(run.manifest["history"], alone.manifest["history"], strict=True):
        assert mine["terms"]["ce"] == pytest.approx(theirs["terms"]["ce"], abs=1e-5)


def test_draws_of_a_part_are_part_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(("x",))
    batch = Batch(torch.zeros(6, 1, 2, 2), torch.arange(6), stream, stream, torch.ones(6, 1, 2, 2))
    assert parallel.part_of(batch) is batch
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "place", lambda rank=rank: (rank, 3))
        part = parallel.part_of(batch)
        assert part.labels.tolist() == [2 * rank, 2 * rank + 1]
        assert part.paired is not None
        assert part.paired.shape == part.images.shape == (2, 1, 2, 2)
        parts.append(part.draws.within("advt").uniform((2, 1, 2, 2), "start"))
        assert torch.equal(part.draws.uniform((1,), "layer"), stream.uniform((1,), "layer"))
    assert torch.equal(torch.cat(parts), stream.within("advt").uniform((6, 1, 2, 2), "start"))
    monkeypatch.setattr(parallel, "place", lambda: (0, 4))
    with pytest.raises(RobenchError, match="multiple of 4 processes, got 6"):
        parallel.part_of(batch)


def test_a_batchnorm_that_cannot_be_shared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4, affine=False))
    parallel.share_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm2d
    monkeypatch.setattr(parallel, "place", lambda: (0, 2))
    with pytest.raises(RobenchError, match=r"statistics of BatchNorm2d\(4"):
        parallel.share_batchnorm(model)
