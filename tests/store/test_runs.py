"""A run is a folder that is whole, or is named as what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.files import read_tensors, tensors_hash, write_tensors
from robench.core.models import ModelSpec, build
from robench.store.provenance import versions
from robench.store.runs import FORMAT, Run, Runs, lineage, load_state, member_hashes

SPECS = [
    ModelSpec(name=name, num_classes=4, in_channels=1, mean=(0.5,), std=(0.25,), negative_slope=slope)
    for name, slope in (("resnet8", 0.0), ("resnet14", 0.1))
]
ENSEMBLE = Ensemble(build(spec, key) for key, spec in enumerate(SPECS))


def save(runs: Runs, name: str = "mine", **changes: Any) -> Run:
    values: dict[str, Any] = {
        "members": SPECS,
        "defense": {"name": "baseline", "version": 1},
        "seed": 3,
        "role": "target",
        "data": {"name": "digits", "fingerprint": "f"},
        "key": "k",
        "more": {"recipe": {"epochs": 1}},
    }
    return runs.save(name, ENSEMBLE, **{**values, **changes})


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def edit(runs: Runs, **changes: Any) -> None:
    """Changes the manifest of ``mine``, as one of before there were checksums; ``...`` removes an entry."""
    path = runs.folder("mine") / "manifest.json"
    manifest = {**json.loads(path.read_text()), "checksum": ..., **changes}
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not ...}))


def test_a_run_makes_the_round_trip(runs: Runs) -> None:
    saved = save(runs)
    run = runs.get("mine")
    assert run == saved
    assert (run.name, run.defense, run.n, run.seed, run.role) == ("mine", "baseline", 2, 3, "target")
    assert run.specs == SPECS
    assert run.manifest["recipe"] == {"epochs": 1}
    assert run.manifest["versions"] == versions()
    loaded = run.load()
    assert not loaded.training
    assert tensors_hash(loaded.state_dict()) == tensors_hash(ENSEMBLE.state_dict()) == run.weights
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(images), ENSEMBLE.eval()(images))
    assert runs.names() == ["mine"]
    assert runs.all() == [run]


def test_a_manifest_holds_no_path_and_no_date(runs: Runs, tmp_path: Path) -> None:
    save(runs)
    text = (runs.folder("mine") / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert str(Path.cwd()) not in text
    assert json.loads(text)["format"] == FORMAT


def test_weights_come_first_and_the_manifest_last(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("robench.store.runs.write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            save(runs)
    assert (runs.folder("mine") / "weights.safetensors").exists()
    assert runs.names() == []
    with pytest.raises(RobenchError, match="unknown run 'mine'"):
        runs.get("mine")


def test_an_unknown_run_lists_its_neighbours(runs: Runs) -> None:
    save(runs, "digits-n3")
    with pytest.raises(RobenchError, match="unknown run 'digits-n4'; did you mean digits-n3") as error:
        runs.get("digits-n4")
    assert "--runs" in str(error.value)


def test_there_may_be_no_folder_yet(runs: Runs) -> None:
    assert runs.names() == []
    with pytest.raises(RobenchError, match="known: none"):
        runs.get("mine")


@pytest.mark.parametrize("name", ["../mine", "a/b", "..", "", "x" * 300])
def test_a_name_never_leaves_the_folder(runs: Runs, name: str) -> None:
    with pytest.raises(RobenchError, match="expected the name of a run"):
        runs.get(name)
    with pytest.raises(RobenchError, match="expected the name of a run"):
        save(runs, name)


def test_other_weights_are_named(runs: Runs) -> None:
    run = save(runs)
    tensors = {name: value + (name.endswith("fc.bias")) for name, value in ENSEMBLE.state_dict().items()}
    write_tensors(run.folder / "weights.safetensors", tensors)
    with pytest.raises(RobenchError, match="weights of run 'mine' are not those that its manifest names"):
        run.load()


@pytest.mark.parametrize("where", [0.001, 0.5, 0.999])
def test_a_flipped_byte_of_the_weights_is_named(runs: Runs, where: float) -> None:
    run = save(runs)
    path = run.folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(RobenchError, match=r"damaged|not those that its manifest names"):
        run.load()


def test_weights_that_are_cut_or_absent_are_named(runs: Runs) -> None:
    run = save(runs)
    path = run.folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RobenchError, match=r"weights\.safetensors is damaged"):
        run.load()
    path.unlink()
    with pytest.raises(RobenchError, match=r"weights\.safetensors does not exist"):
        run.load()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"format": 0}', '{"format": "1"}'])
def test_a_damaged_manifest_is_named(runs: Runs, content: str) -> None:
    save(runs)
    (runs.folder("mine") / "manifest.json").write_text(content)
    with pytest.raises(RobenchError, match=r"manifest.json is (damaged|not a manifest of format 1)"):
        runs.get("mine")


@pytest.mark.parametrize("entry", ["members", "weights", "seed", "key", "ancestors"])
def test_a_manifest_that_lacks_something_is_named(runs: Runs, entry: str) -> None:
    save(runs)
    edit(runs, **{entry: ...})
    with pytest.raises(RobenchError, match=f"manifest.json lacks {entry}"):
        runs.get("mine")


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "surrogate"}, {"seed": 1}, {"defense": {"name": "dverge"}}, {"data": {"name": "mnist"}},
        {"members": []}, {"ancestors": [1]}, {"history": [{}]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_manifest_that_was_edited_is_named(runs: Runs, changes: dict[str, Any]) -> None:
    save(runs)
    path = runs.folder("mine") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RobenchError, match=r"manifest\.json was changed after it was written"):
        runs.get("mine")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"role": "judge"}, "role"), ({"seed": "0"}, "seed"), ({"members": []}, "members"),
        ({"defense": {}}, "defense"),
        ({"members": {"a": 1}}, "members"), ({"ancestors": [1]}, r"ancestors\.0"), ({"data": []}, "data"),
        ({"weights": None}, "weights"), ({"history": {}}, "history"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_named(runs: Runs, changes: dict[str, Any], place: str) -> None:
    save(runs)
    edit(runs, **changes)
    with pytest.raises(RobenchError, match=rf"manifest\.json is damaged: {place}"):
        runs.get("mine")


def test_a_manifest_cannot_name_code(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_model.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    save(runs)
    edit(runs, members=[{**spec.manifest(), "name": "evil_model:make"} for spec in SPECS])
    with pytest.raises(RobenchError, match="'evil_model:make' names code, which a file may not"):
        runs.get("mine").load()
    assert not (tmp_path / "ran").exists()


def test_a_manifest_with_another_model_does_not_load(runs: Runs) -> None:
    save(runs)
    edit(runs, members=[SPECS[0].manifest()] * 2)
    with pytest.raises(RobenchError, match="weights of 'mine' do not fit the model"):
        runs.get("mine").load()


def test_a_folder_may_be_renamed(runs: Runs) -> None:
    save(runs)
    shutil.move(runs.root / "mine", runs.root / "other")
    assert runs.get("other").name == "other"
    runs.get("other").load()


def test_lineage_grows_from_run_to_run(runs: Runs) -> None:
    first = save(runs, "first")
    second = save(runs, "second", ancestors=lineage(first))
    third = save(runs, "third", ancestors=lineage(second))
    assert [ancestor["run"] for ancestor in third.manifest["ancestors"]] == ["second", "first"]
    assert all(ancestor["weights"] == first.weights for ancestor in third.manifest["ancestors"])
    assert third.manifest["ancestors"][0]["members"] == second.manifest["member_weights"]
    assert [ancestor["run"] for ancestor in lineage(third)] == ["third", "second", "first"]


def test_a_shared_member_has_one_hash() -> None:
    one, other = build(SPECS[0], 1), build(SPECS[0], 2)
    first, second = Ensemble([one, other]), Ensemble([other, build(SPECS[0], 3)])
    assert member_hashes(first)[1] == member_hashes(second)[0]
    assert len({*member_hashes(first), *member_hashes(second)}) == 3


def test_an_imported_run_has_neither_key_nor_data(runs: Runs) -> None:
    run = save(runs, key=None, data=None)
    assert run.manifest["key"] is None
    assert runs.get("mine").manifest["data"] is None


def layer(**changes: Any) -> dict[str, torch.Tensor]:
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2), **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (layer(bias=None), r"it lacks 'bias' \(1 in all\)"),
        (layer(extra=torch.ones(1)), r"it has 'extra' \(1 in all\) too many"),
        (layer(bias=None, extra=torch.ones(1)), "lacks 'bias' .* and has 'extra'"),
        (layer(weight=torch.ones(3, 2)), r"'weight' is \(3, 2\), expected \(2, 3\)"),
        (layer(weight=torch.full((2, 3), float("nan"))), "not finite: 'weight'"),
        (layer(bias=torch.tensor([0, float("inf")])), "not finite: 'bias'"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_not_loaded(state: dict[str, torch.Tensor], message: str) -> None:
    module = nn.Linear(3, 2)
    before = tensors_hash(module.state_dict())
    with pytest.raises(RobenchError, match=message) as error:
        load_state(module, state, "theirs")
    assert "'theirs'" in str(error.value)
    assert tensors_hash(module.state_dict()) == before


def test_weights_that_fit_are_loaded() -> None:
    module = nn.Linear(3, 2)
    load_state(module, layer(), "mine")
    assert module.weight.tolist() == [[1] * 3] * 2


def test_the_stored_weights_are_those_of_the_ensemble(runs: Runs) -> None:
    run = save(runs)
    tensors, _ = read_tensors(run.folder / "weights.safetensors")
    assert tensors.keys() == ENSEMBLE.state_dict().keys()


def test_a_place_of_runs_that_is_one_too_high_or_too_low_says_what_to_type(runs: Runs) -> None:
    save(runs)
    with pytest.raises(RobenchError, match=rf"Runs are read from .*; they are in --runs {runs.root}\."):
        Runs(runs.root.parent).get("mine")
    with pytest.raises(RobenchError, match=rf"got the path .*; type mine --runs {runs.root}$"):
        runs.get(str(runs.folder("mine")))
