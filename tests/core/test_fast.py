"""The faster model is the same function, and the original stays as it was."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble, mixture
from robench.core.fast import (
    Precision,
    attackable,
    compiled,
    fold_batchnorm,
    has_bfloat16,
    members,
    slow_precision,
    widen_heads,
)
from robench.core.models import ModelSpec, build


def trained_looking(name: str) -> nn.Module:
    """A network whose running statistics are not those of a fresh one."""
    spec = ModelSpec(name=name, num_classes=5, in_channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    model = build(spec, 3).train()
    with torch.no_grad():
        for seed in range(3):
            model(torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(images).logsumexp(dim=1).sum(), images)
    return slope


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_folding_changes_the_function_by_rounding_only(name: str) -> None:
    model = Ensemble([trained_looking(name)]).double()
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    fast = attackable(model, images, "float64")
    norms = [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not norms
    torch.testing.assert_close(fast(images), model(images), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient(fast, images), gradient(model, images), atol=1e-12, rtol=0)


def test_the_original_is_untouched() -> None:
    model = trained_looking("resnet8").train()
    before = copy.deepcopy(model.state_dict())
    attackable(model, torch.rand(2, 3, 16, 16), "bfloat16")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_members_are_reached_in_what_an_attack_is_given(precision: Precision) -> None:
    model = Ensemble([trained_looking("resnet8"), Viewing(), trained_looking("resnet14")]).eval()
    images = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    fast = attackable(model, images, precision)
    images = images.double() if precision == "float64" else images
    logits = [member(images) for member in members(fast)]
    assert {(each.shape, each.dtype) for each in logits} == {((4, 5), images.dtype)}
    # Bit for bit what the model makes log p̄ of, so under the same autocast.
    assert torch.equal(mixture(torch.stack(logits)), fast(images))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_without_members_is_an_ensemble_of_one(precision: Precision) -> None:
    images = torch.rand(4, 3, 8, 8)
    fast = attackable(trained_looking("resnet8"), images, precision)
    (logits,) = [member(images) for member in members(fast)]
    assert torch.equal(logits, fast(images))


def test_the_gradient_of_a_member_passes_through_no_other() -> None:
    ensemble = Ensemble([Viewing(), Viewing()]).eval()
    called: list[int] = []
    for number, member in enumerate(ensemble.members):
        member.register_full_backward_hook(lambda *_, number=number: called.append(number))  # type: ignore[misc]
    logits = [member(torch.rand(2, 3, 8, 8, requires_grad=True)) for member in members(ensemble)]
    logits[1].sum().backward()
    assert called == [1]


class Viewing(nn.Module):
    """As in TRADES' small network: `view` wants one memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).relu().view(-1, 4 * 64))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", [Viewing(), Ensemble([Viewing(), Viewing()])], ids=["network", "ensemble"])
def test_a_network_with_a_view_takes_images_of_either_layout(inner: nn.Module) -> None:
    images = torch.rand(4, 3, 8, 8)
    near = images.contiguous(memory_format=torch.channels_last)
    fast = attackable(inner, images, "float32")
    torch.testing.assert_close(fast(near), inner(images))
    torch.testing.assert_close(gradient(fast, near), gradient(inner, images))
    judged = Ensemble([inner]) if isinstance(inner, Viewing) else inner
    assert isinstance(judged, Ensemble)
    torch.testing.assert_close(judged.logits(near), judged.logits(images), atol=0, rtol=0)


def test_weights_that_a_hook_computes_are_not_folded() -> None:
    conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5)).eval()
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(attackable(model, images, "float32")(images), model(images))


def test_a_convolution_that_two_modules_read_is_not_folded() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (self.bn(y) + self.other(y)).mean(dim=(2, 3))

    model = Forked().eval()
    images = torch.rand(2, 3, 4, 4)
    expected = model(images)
    assert fold_batchnorm(model, images) == 0
    torch.testing.assert_close(model(images), expected)


def test_bfloat16_returns_float32_and_is_close() -> None:
    model = trained_looking("resnet8")
    images = torch.rand(4, 3, 16, 16)
    logits = attackable(model, images, "bfloat16")(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(images), atol=0.1, rtol=0.1)


def test_bfloat16_keeps_the_slope_where_all_logits_are_large() -> None:
    model = trained_looking("resnet8")
    (head,) = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        head.weight += 10.0  # common to all classes: the same softmax, and a slope that is a difference of large terms
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def slope(model: nn.Module) -> Tensor:
        x = images.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(model(x), torch.full((8,), 2), reduction="sum")
        return torch.autograd.grad(loss, x)[0].flatten(1)

    exact, fast = slope(model), slope(attackable(model, images, "bfloat16"))
    assert (nn.functional.cosine_similarity(1e3 * exact, 1e3 * fast) > 0.97).all()  # .88 with logits in bfloat16


def test_wide_heads_keep_names_and_weights_and_leave_other_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    names = list(model.state_dict())
    widen_heads(model, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.rand(2, 4)).dtype == torch.bfloat16
        assert model(torch.rand(2, 4)).dtype == torch.float32
    assert list(copy.deepcopy(model).state_dict()) == names


def test_a_fold_that_changes_the_function_is_not_taken() -> None:
    class Reread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            nn.init.constant_(self.bn.weight, 3.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (self.bn(y) + y).mean(dim=(2, 3))

    model = Reread().eval()
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(attackable(model, images, "float32")(images), model(images))


class Tiny(nn.Module):
    def __init__(self, key: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(key)
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(dim=(2, 3)))  # type: ignore[no-any-return]


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_is_the_same_function() -> None:
    images = torch.rand(5, 1, 8, 8)
    usual = attackable(Ensemble([Tiny(0), Tiny(1)]), images, "float32")
    fast, why = compiled(usual, images)
    assert not why
    assert fast is not usual
    torch.testing.assert_close(fast(images), usual(images))
    torch.testing.assert_close(gradient(fast, images), gradient(usual, images))


def test_without_a_compiler_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: nn.Module) -> None:
        raise RuntimeError("no C++ compiler\nin many lines")

    monkeypatch.setattr(nn.Module, "compile", fail)
    usual = attackable(Tiny(0), torch.rand(2, 1, 8, 8), "float32")
    fast, why = compiled(usual, torch.rand(2, 1, 8, 8))
    assert fast is usual
    assert why == "RuntimeError: no C++ compiler in many lines"


@pytest.mark.parametrize(
    ("capabilities", "there"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False, "architecture": "x86_64"}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_a_processor_that_would_imitate_bfloat16_is_named(
    capabilities: dict[str, object], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    place = torch.device("cpu")
    assert has_bfloat16(place) is there
    assert bool(slow_precision("bfloat16", place)) is not there
    assert slow_precision("float32", place) == ""
