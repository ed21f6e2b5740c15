"""Weights from where people publish them, each against a stand-in on this machine; no code of theirs runs."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safe
from torch import Tensor, nn

from robench.cli import run
from robench.core.errors import RobenchError
from robench.core.models import MODELS
from robench.store import sources
from robench.store.runs import Run, Runs
from robench.store.sources import fetch
from robench.store.weights import networks_in

PAGE = b"<!DOCTYPE html><html><title>Sign in</title></html>"


def network(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = MODELS.get("resnet8")(num_classes=10, in_channels=1)
    return {name: value.clone() for name, value in made.state_dict().items()}


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def importing(folder: Path, *arguments: str, dataset: str = "digits", model: str = "resnet8") -> Run:
    """The run that `robench import` makes, of 1 channel without a normalisation."""
    told = ["--model", model] if model else []
    told += ["--mean", "none"] if model == "resnet8" else []
    line = ["import", *arguments, *told, "--dataset", dataset, "--name", "it", "--runs", str(folder / "runs")]
    assert run(line) == 0
    return Runs(folder / "runs").get("it")


# --- https


def test_an_address_is_checked_against_its_hash_and_recorded(web: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    server, answers = web
    answers["/net.pth"] = body = saved({"net": network(), "acc": 98.0})
    made = importing(tmp_path, f"{server}/net.pth#sha256={digest(body)}")
    (origin,) = made.manifest["sources"]
    assert origin == {"source": f"{server}/net.pth", "url": f"{server}/net.pth", "sha256": digest(body)}
    torch.testing.assert_close(made.load().members[0].model.conv1.weight, network()["conv1.weight"])
    with pytest.raises(RobenchError, match=f"has SHA-256 {digest(body)}, expected {'0' * 64}"):
        fetch(f"{server}/net.pth#sha256={'0' * 64}", tmp_path)


def test_a_page_is_no_weights(web: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    server, answers = web
    answers["/net.pth"] = b"\n " + PAGE
    with pytest.raises(RobenchError, match=r"net\.pth is a web page \(HTML\), no weights"):
        fetch(f"{server}/net.pth#sha256={'0' * 64}", tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{}/absent.pth#sha256=" + "0" * 64, "cannot be downloaded .*404"),
        ("{}/net.pth", "can be changed on its way; use https, or say its hash"),
        ("{}/net.pth#md5=1", "expected #sha256= and 64 digits"),
        ("{}/net.pth#sha256=12", "expected #sha256= and 64 digits"),
        ("no/such.pth", "does not exist .*, or a source: hf:..., timm:"),
    ],
)
def test_other_addresses_are_refused(source: str, said: str, web: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    with pytest.raises(RobenchError, match=said):
        fetch(source.format(web[0]), tmp_path)


# --- torch hub


def test_torchhub_takes_the_file_of_a_release(
    web: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, answers = web
    monkeypatch.setattr(sources, "GITHUB", server)
    monkeypatch.setattr(sources, "TORCH", f"{server}/models")
    body = saved(network())
    name = f"resnet8-{digest(body)[:8]}.pt"
    answers[f"/o/r/releases/download/v1/{name}"] = answers[f"/models/{name}"] = body
    made = importing(tmp_path, f"torchhub:o/r:v1/{name}")
    assert made.manifest["sources"][0]["sha256"] == digest(body)
    assert fetch(f"torchhub:{name}", tmp_path).origin["url"] == f"{server}/models/{name}"
    answers[f"/models/{name}"] = saved(network(1))
    with pytest.raises(RobenchError, match=f"expected {digest(body)[:8]}"):
        fetch(f"torchhub:{name}", tmp_path)
    with pytest.raises(RobenchError, match="an entry of torch hub runs its repository's code"):
        fetch("torchhub:o/r:resnet20", tmp_path)
    with pytest.raises(RobenchError, match="ends with the first digits of its SHA-256"):
        fetch("torchhub:resnet8.pth", tmp_path)


# --- Hugging Face


def hub(web: tuple[str, dict[str, bytes]], files: dict[str, bytes], repository: str = "o/r") -> None:
    """A repository of these files, at the revision ccc..., which is `main` and `v1`."""
    _, answers = web
    info = {"id": repository, "sha": "c" * 40, "siblings": [{"rfilename": name} for name in files]}
    for where in ("", "/revision/main", "/revision/v1"):
        answers[f"/api/models/{repository}{where}"] = json.dumps(info).encode()
    for name, body in files.items():
        answers[f"/{repository}/resolve/{'c' * 40}/{name}"] = body


@pytest.mark.parametrize("source", ["hf:o/r", "hf:o/r@v1", "hf:o/r/model.safetensors@v1"])
def test_hugging_face_takes_safetensors_and_records_the_revision(
    source: str, endpoint: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    body = safe(network())
    hub(endpoint, {"model.safetensors": body, "pytorch_model.bin": b"never", "config.json": b"{}"})
    made = importing(tmp_path, source)
    assert made.manifest["sources"] == [{"source": source, "sha256": digest(body), "revision": "c" * 40}]


@pytest.mark.parametrize(
    ("source", "files", "said"),
    [
        ("hf:o/r", {"a.pth": b"", "b.pth": b""}, r"several files of weights, a\.pth, b\.pth; say which"),
        ("hf:o/r", {"README.md": b""}, "holds no weights; there are README.md"),
        ("hf:o/r/c.pth", {"a.pth": b""}, r"no file 'c\.pth'; there are a\.pth"),
        ("hf:o/none", {}, "cannot be downloaded"),
        ("hf:o", {}, "expected hf:OWNER/REPO"),
        ("hf:o/r", {"a.pth": PAGE}, "is a web page"),
    ],
)
def test_what_hugging_face_has_not_is_one_line(
    source: str, files: dict[str, bytes], said: str, endpoint: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    hub(endpoint, files)
    with pytest.raises(RobenchError, match=said) as refused:
        fetch(source, tmp_path)
    assert "\n" not in str(refused.value)


TIMM = {
    "architecture": "test_resnet",
    "num_classes": 10,
    "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]},
}


def test_a_repository_that_tells_its_network_is_believed(
    endpoint: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    hub(endpoint, {"model.safetensors": safe(state), "config.json": json.dumps(TIMM).encode()})
    made = importing(tmp_path, "hf:o/r", dataset="cifar10", model="")
    assert made.specs[0].name == "timm/test_resnet"
    assert (made.specs[0].mean, made.specs[0].std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert made.manifest["normalisation"] == "mean 0.5,0.4,0.3, std 0.2,0.2,0.1, as hf:o/r says"


# --- timm


def test_timm_brings_weights_and_normalisation(
    endpoint: tuple[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timm = pytest.importorskip("timm")
    hub(endpoint, {}, "timm/test_resnet.r160_in1k")
    state = timm.create_model("test_resnet").state_dict()
    asked = []

    def load(place: str, *_: Any, weights_only: bool, **__: Any) -> dict[str, Tensor]:
        asked.append((place, weights_only))
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    labels = np.arange(1000)
    images = np.zeros((1000, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    made = importing(tmp_path, "timm:test_resnet.r160_in1k", dataset=f"npz:{tmp_path / 'd.npz'}", model="")
    assert asked == [(f"timm/test_resnet.r160_in1k@{'c' * 40}", True)]
    assert (made.specs[0].name, made.specs[0].mean) == ("timm/test_resnet", (0.5, 0.5, 0.5))
    assert made.manifest["sources"][0]["revision"] == "c" * 40
    torch.testing.assert_close(made.load().members[0].model.state_dict(), state)
    assert run(["import", "timm:test_resnet.r160_in1k", "--dataset", "cifar10", "--runs", str(tmp_path / "r")]) == 2
    assert "tells 1000 classes apart, and cifar10 has 10; choose the data" in capsys.readouterr().err
    with pytest.raises(RobenchError, match=r"timm has no weights 'nonsense'; expected a name of timm.list_pretrained"):
        fetch("timm:nonsense", tmp_path)


# --- RobustBench


class Inside(nn.Module):
    """Takes images in [0, 1], as RobustBench's do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
        self.fc = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc((images - self.mu).mean(dim=(2, 3)))  # type: ignore[no-any-return, operator]


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `robustbench` of one model."""
    data, threat = Enum("D", {"c": "cifar10"}).c, Enum("T", {"l": "Linf"}).l  # type: ignore[attr-defined]
    module = types.ModuleType("robustbench.model_zoo")
    module.model_dicts = {  # type: ignore[attr-defined]
        data: {
            threat: {"Own2024": {"model": Inside, "gdrive_id": "id"}, "Two": {"model": Inside, "gdrive_id": ["a", "b"]}}
        }
    }
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo", module)


def test_robustbench_brings_its_network(
    zoo: None, web: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, answers = web
    monkeypatch.setattr(sources, "DRIVE", server)
    place = "/uc?export=download&confirm=t&id=id"
    answers[place] = body = saved({"state_dict": {f"module.{n}": v for n, v in Inside().state_dict().items()}})
    made = importing(tmp_path, "robustbench:Own2024", dataset="cifar10", model="")
    assert made.specs[0].name == "robustbench/cifar10/Linf/Own2024"
    assert made.manifest["normalisation"] == "none, as robustbench:Own2024 says"
    assert made.manifest["sources"][0]["sha256"] == digest(body)
    answers[place] = PAGE
    with pytest.raises(RobenchError, match="is a web page"):
        fetch("robustbench:Own2024", tmp_path)
    with pytest.raises(RobenchError, match="names no single file"):
        fetch("robustbench:Two", tmp_path)
    with pytest.raises(RobenchError, match=r"unknown model of RobustBench .*; did you mean cifar10/Linf/Own2024"):
        fetch("robustbench:Own2023", tmp_path)


def test_robustbench_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(RobenchError, match="models of robustbench need that package"):
        fetch("robustbench:Carmon2019Unlabeled", tmp_path)


# --- checkpoints of the shapes that people publish


OWN, OTHER = network(), network(1)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in OWN.items()}


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this ran",)


#: What people publish, and the members that come of it, or the line that refuses it.
SHAPES: dict[str, tuple[Any, int | str]] = {
    "net with scalars": ({"net": OWN, "acc": 98.0, "epoch": 3}, 1),
    "state_dict of DataParallel": ({"state_dict": prefixed("module."), "best": np.float64(0.98)}, 1),
    "model with optimizer": ({"model": OWN, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, 1),
    "model_state_dict of Lightning": ({"model_state_dict": prefixed("model."), "epoch": 3}, 1),
    "compiled": (prefixed("_orig_mod.module."), 1),
    "before torch 0.4.1": ({name: value for name, value in OWN.items() if "num_batches" not in name}, 1),
    "ema alone": ({"ema": OWN, "step": torch.tensor(3)}, 1),
    "with its normalisation": ({"mu": torch.tensor([0.3]), "sigma": torch.tensor([0.4]), **prefixed("model.")}, 1),
    "two members": ({"model_0": OWN, "model_1": OTHER}, 2),
    "net and ema": ({"net": OWN, "ema": OTHER}, "holds several state dicts: net, ema; say which one: --key net"),
    "whole module": (Code(), "holds more than tensors, or is damaged: it is refused"),
    "nothing but weights": (OWN, 1),
    "torch.compile alone": (prefixed("_orig_mod."), 1),
    "mu and sigma among them": ({"mu": torch.full((1, 1, 1), 0.3), "sigma": torch.full((1, 1, 1), 0.4), **OWN}, 1),
    "NumPy number": ({"state_dict": OWN, "best": np.float64(0.98)}, 1),
    "timm with its average": (
        {"state_dict": OWN, "state_dict_ema": OTHER, "epoch": 3},
        "holds several state dicts: state_dict, state_dict_ema; say which one: --key state_dict",
    ),
    "another network": ({"state_dict": {"conv.weight": torch.ones(3)}}, "do not fit the model"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_checkpoints_load_or_say_why(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = SHAPES[name]
    torch.save(content, tmp_path / "w.pth")
    own = [] if name in ("with its normalisation", "mu and sigma among them") else ["--mean", "none"]
    line = ["import", str(tmp_path / "w.pth"), "--model", "resnet8", "--dataset", "mnist", *own]
    code = run([*line, "--runs", str(tmp_path / "runs")])
    told = capsys.readouterr()
    assert "this ran" not in told.out
    if isinstance(expected, str):
        assert code == 2
        assert expected in told.err
        assert told.err.count("\n") == 1 + told.err.count("one member")
        return
    assert code == 0, told.err
    made = Runs(tmp_path / "runs").get("w")
    assert made.n == expected
    torch.testing.assert_close(made.load().members[0].model.state_dict(), OWN)
    if not own:
        assert (made.specs[0].mean, made.specs[0].std) == ((0.3,), (0.4,))


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(PAGE)
    (tmp_path / "b.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(RobenchError, match=r"a\.pth is a web page"):
        networks_in(tmp_path / "a.pth", nn.Linear(3, 2), 3)
    with pytest.raises(RobenchError, match=r"b\.pth is Git LFS's note of a file"):
        networks_in(tmp_path / "b.pth", nn.Linear(3, 2), 3)
