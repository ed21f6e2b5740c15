"""SIM, TIM, Admix, BSR and SIA against loops over pixels and blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks import ATTACKS
from robench.attacks.admix import Admix, partners
from robench.attacks.bsr import BSR, shuffled
from robench.attacks.pgd import PGD
from robench.attacks.sia import OPERATIONS, SIA, numbers, transformed
from robench.attacks.sim import SIM
from robench.attacks.tim import TIM, blurred, gaussian
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.rng import Draws, Stream
from tests.attacks.plain import climb, compare, counted, noises, slope

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., tuple[Tensor, Tensor]]
Array = npt.NDArray[np.float64]

SHAPES = pytest.mark.parametrize("shape", [(3, 8, 8), (3, 32, 32), (1, 20, 12), (2, 7, 31)], ids=str)


def drawn(*shape: int, purpose: str = "images") -> Tensor:
    return Stream(("views",)).uniform(shape, purpose)


# SIM and TIM


def test_sim_is_its_formula(make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = SIM(steps=4, scales=3), make_ensemble(dtype=torch.float64)

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        def rule(z: Tensor, step: int) -> Tensor:
            found = [slope(model, z / 2**number, label) / 2**number for number in range(3)]
            return sum(found, torch.zeros_like(z)) / 3

        return climb(image, eps, attack, rule)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_the_kernel_is_gaussian_with_its_edge_at_three_sigma(size: int) -> None:
    sigma = (size // 2) / 3
    line = [math.exp(-((place - size // 2) ** 2) / (2 * sigma**2)) for place in range(size)]
    wanted = torch.tensor([[one * other for other in line] for one in line], dtype=torch.float64)
    torch.testing.assert_close(gaussian(size, torch.empty(0, dtype=torch.float64)), wanted / wanted.sum())


def test_tim_is_its_formula(make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = TIM(steps=4), make_ensemble(dtype=torch.float64)
    kernel = gaussian(5, torch.empty(0, dtype=torch.float64))

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        def rule(z: Tensor, step: int) -> Tensor:
            padded = F.pad(slope(model, z, label), (2, 2, 2, 2))
            height, width = z.shape[1:]
            parts = [
                kernel[down, right] * padded[:, down : down + height, right : right + width]
                for down in range(5)
                for right in range(5)
            ]
            return sum(parts, torch.zeros_like(z))

        return climb(image, eps, attack, rule)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)


def test_a_constant_stays_itself_inside(make_ensemble: Make) -> None:
    found = blurred(torch.ones(2, 3, 9, 9), gaussian(5, torch.empty(0)))
    torch.testing.assert_close(found[:, :, 2:-2, 2:-2], torch.ones(2, 3, 5, 5))
    assert (found[:, :, 0] < 0.999).all()


# Admix


def test_partners_are_others_of_another_class_each_as_likely() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1])
    images = torch.arange(1.0, 6.0).view(5, 1, 1, 1)
    unit = drawn(4_000, 5, purpose="unit")
    found = torch.stack([partners(images, labels, each).flatten() for each in unit]).long() - 1
    for row, label in enumerate(labels.tolist()):
        others = [number for number, other in enumerate(labels.tolist()) if other != label]
        counts = torch.bincount(found[:, row], minlength=5)
        assert counts[others].sum() == len(unit)
        torch.testing.assert_close(
            counts[others] / len(unit), torch.full((len(others),), 1 / len(others)), rtol=0, atol=0.04
        )


def test_admix_is_its_formula(make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = Admix(steps=3, scales=2, mixtures=3), make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    eps = (0.1, 0.03, 0.2, 0.06, 0.1, 0.1)
    found = attack(model, images, labels, torch.tensor(eps, dtype=torch.float64), Draws.of(range(6))).images
    for row in range(6):
        others = [number for number in range(6) if labels[number] != labels[row]]
        unit = Draws.of([row]).uniform("partners", (3, 3), torch.empty(0))[0]

        def rule(z: Tensor, step: int, row: int = row, others: list[int] = others, unit: Tensor = unit) -> Tensor:
            total = torch.zeros_like(z)
            for mixture in range(3):
                other = images[others[int(unit[step, mixture] * len(others))]]
                for scale in (1.0, 0.5):
                    total += scale * slope(model, scale * (z + 0.2 * other), labels[row]) / 6
            return total

        torch.testing.assert_close(found[row], climb(images[row], eps[row], attack, rule), rtol=0, atol=1e-12)


def test_of_one_class_it_is_any_other_image() -> None:
    images = torch.arange(1.0, 4.0).view(3, 1, 1, 1)
    for unit, wanted in ((0.1, [2, 1, 1]), (0.9, [3, 3, 2])):
        found = partners(images, torch.zeros(3, dtype=torch.int64), torch.full((3,), unit))
        assert found.flatten().tolist() == wanted


def test_an_image_alone_is_not_mixed(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, 1, dtype=torch.float64)
    mixed, plain = Admix(steps=3)(model, images, labels, 0.1), SIM(steps=3)(model, images, labels, 0.1)
    torch.testing.assert_close(mixed.images, plain.images, rtol=0, atol=1e-9)
    assert Admix.batch_dependent


# BSR


def strip_cuts(lengths: Array, size: int) -> list[int]:
    return [0, *(round(share) for share in np.cumsum(lengths) / lengths.sum() * size)]


def plain_shuffled(image: Array, unit: Array, blocks: int, degrees: float) -> Array:
    """One image (C,H,W), pixel by pixel; what no block covers is left NaN."""
    lengths, order, other_lengths, other_order = (unit[blocks * part :][:blocks] for part in range(4))
    turns = unit[4 * blocks :].reshape(blocks, blocks)
    rows, columns = strip_cuts(lengths, image.shape[1]), strip_cuts(other_lengths, image.shape[2])
    result = np.full_like(image, np.nan)
    top = 0
    for place, row in enumerate(np.argsort(order)):
        left = 0
        height = rows[row + 1] - rows[row]
        for other_place, column in enumerate(np.argsort(other_order)):
            width = columns[column + 1] - columns[column]
            block = image[:, rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
            angle = math.radians(degrees) * (2 * turns[place, other_place] - 1)
            result[:, top : top + height, left : left + width] = turned(block, angle)
            left += width
        top += height
    return result


def turned(block: Array, angle: float) -> Array:
    """(C,h,w) turned about its centre, bilinear, zeros around."""
    _, height, width = block.shape
    padded = np.pad(block, ((0, 0), (height + 2, height + 2), (width + 2, width + 2)))
    middle = (height - 1) / 2, (width - 1) / 2
    result = np.zeros_like(block)
    for row in range(height):
        for column in range(width):
            down, right = row - middle[0], column - middle[1]
            y = middle[0] + math.cos(angle) * down + math.sin(angle) * right
            x = middle[1] + math.cos(angle) * right - math.sin(angle) * down
            if not (-1 < y < height and -1 < x < width):
                continue
            above, before = math.floor(y), math.floor(x)
            for at_y, share in ((above, 1 - (y - above)), (above + 1, y - above)):
                for at_x, part in ((before, 1 - (x - before)), (before + 1, x - before)):
                    result[:, row, column] += share * part * padded[:, at_y + height + 2, at_x + width + 2]
    return result


@SHAPES
@pytest.mark.parametrize(("blocks", "degrees"), [(2, 24.0), (3, 24.0), (1, 180.0), (3, 0.0)])
def test_blocks_move_and_turn_as_in_loops(shape: tuple[int, ...], blocks: int, degrees: float) -> None:
    images = drawn(8, *shape).double()
    unit = drawn(8, 4 * blocks + blocks**2, purpose="unit")
    found = shuffled(images, unit, blocks, degrees)
    wanted = [
        plain_shuffled(image, values, blocks, degrees)
        for image, values in zip(images.numpy(), unit.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), np.stack(wanted), rtol=0, atol=1e-12)


def test_a_shuffle_alone_keeps_every_pixel() -> None:
    images = drawn(9, 3, 16, 12)
    found = shuffled(images, drawn(9, 21, purpose="unit"), 3, 0.0)
    assert torch.equal(found.flatten(2).sort().values, images.flatten(2).sort().values)
    assert not torch.equal(found, images)


def test_bsr_s_gradient_is_exact() -> None:
    images = drawn(3, 2, 6, 7).double().requires_grad_(True)
    unit = drawn(3, 12, purpose="unit")
    assert torch.autograd.gradcheck(lambda z: shuffled(z, unit, 2, 24.0), (images,))


@pytest.mark.parametrize(("blocks", "degrees"), [(2, 24.0), (1, 180.0)])
def test_no_pixel_gets_more_than_two_terms_from_a_gather(
    blocks: int, degrees: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sum of three the rounding would depend on their order, which a GPU does not fix."""
    read: list[tuple[Tensor, Tensor]] = []

    def kept(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
        pixels = torch.ones_like(images, requires_grad=True)
        read.append(((row * images.shape[3] + column).flatten(1), pixels))
        return pixels

    monkeypatch.setattr("robench.attacks.bsr.read", kept)
    unit = drawn(50, 4 * blocks + blocks**2, purpose="unit")
    shuffled(torch.zeros(50, 1, 20, 17), unit, blocks, degrees).sum().backward()  # type: ignore[no-untyped-call]
    for source, pixels in read:
        assert pixels.grad is not None
        terms = torch.zeros_like(source).scatter_add_(1, source, (pixels.grad != 0).long().flatten(1))
        assert terms.max() == 2


# SIA


def operated(block: Array, name: str, amount: float, noise: Array, kept: Array) -> Array:
    """One block (C,h,w) under an operation."""
    _, height, width = block.shape
    if name == "shift down":
        return np.roll(block, math.floor(amount * height), axis=1)
    if name == "shift right":
        return np.roll(block, math.floor(amount * width), axis=2)
    if name == "flip down":
        return block[:, ::-1]
    if name == "flip right":
        return block[:, :, ::-1]
    if name == "turn":
        return np.rot90(block, 2, axes=(1, 2))
    if name == "scale":
        return amount * block
    if name == "noise":
        return np.clip(block + noise, 0, 1)
    if name == "resize":
        small = [math.floor(0.8 * size + 1e-9) + 1 for size in (height, width)]
        tensor = F.interpolate(torch.from_numpy(block.copy())[None], small, mode="bilinear", align_corners=False)
        return F.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)[0].numpy()
    if name == "low frequencies":
        spectrum = scipy.fft.dctn(block, axes=(1, 2))
        spectrum[:, height - math.floor(0.4 * height + 1e-9) :] = 0
        spectrum[:, :, width - math.floor(0.4 * width + 1e-9) :] = 0
        return np.asarray(scipy.fft.idctn(spectrum, axes=(1, 2)))
    return block * kept[:, None, None] / 0.9


def plain_transformed(image: Array, unit: Array, noise: Array, blocks: int) -> Array:
    """One image (C,H,W), block by block."""
    channels, height, width = image.shape
    squares = blocks**2
    lines = [np.sort(np.argsort(keys)[: blocks - 1]) + 1 for keys in np.split(unit[: height + width - 2], [height - 1])]
    rows, columns = ([0, *each, size] for each, size in zip(lines, (height, width), strict=True))
    unit = unit[height + width - 2 :]
    kinds, amounts, kept = unit[:squares], unit[squares : 2 * squares], unit[2 * squares :].reshape(channels, squares)
    result = image.copy()
    for row in range(blocks):
        for column in range(blocks):
            number = row * blocks + column
            place = np.s_[:, rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
            name = OPERATIONS[math.floor(kinds[number] * len(OPERATIONS))]
            result[place] = operated(image[place], name, amounts[number], noise[place], kept[:, number] >= 0.1)
    return result


@SHAPES
@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_are_transformed_as_in_loops(shape: tuple[int, ...], blocks: int) -> None:
    images = drawn(60, *shape).double()
    unit = drawn(60, numbers(images, blocks), purpose="unit")
    noise = 0.2 * drawn(60, *shape, purpose="noise").double() - 0.1
    found = transformed(images, unit, noise, blocks)
    wanted = [
        plain_transformed(image, values, extra, blocks)
        for image, values, extra in zip(images.numpy(), unit.double().numpy(), noise.numpy(), strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), np.stack(wanted), rtol=0, atol=1e-12)


def test_every_operation_happens() -> None:
    unit = drawn(400, numbers(torch.empty(1, 3, 8, 8), 3), purpose="unit")
    kinds = (unit[:, 14:23] * len(OPERATIONS)).long()
    shares = torch.bincount(kinds.flatten(), minlength=10) / kinds.numel()
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.03)


def test_sia_s_gradient_is_exact() -> None:
    images = (0.2 + 0.6 * drawn(4, 2, 6, 7)).double().requires_grad_(True)
    unit = drawn(4, numbers(images, 3), purpose="unit")
    noise = 0.1 * drawn(4, 2, 6, 7, purpose="noise").double()
    assert torch.autograd.gradcheck(lambda z: transformed(z, unit, noise, 3), (images,))


def test_an_image_with_fewer_pixels_than_blocks_is_refused(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble()
    images, labels = make_batch(model)
    with pytest.raises(RobenchError, match=r"`blocks=9` of attack 'sia' .* 8x8"):
        SIA(steps=1, blocks=9)(model, images, labels, 0.1)


# Both


@pytest.mark.parametrize("name", ["bsr", "sia"])
def test_the_mean_gradient_through_copies_is_followed(name: str, make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack: Any = ATTACKS.get(name)(steps=3, copies=2)  # type: ignore[call-arg]
    model = make_ensemble(dtype=torch.float64)

    def one(image: Tensor, label: Tensor, eps: float, draws: Draws) -> Tensor:
        like = torch.empty(0)

        def rule(z: Tensor, step: int) -> Tensor:
            total = torch.zeros_like(z)
            for copy in range(2):
                if name == "bsr":
                    unit = draws.uniform("blocks", (3, 2, 12), like)[:, step, copy]
                    seen: Any = lambda point, unit=unit: shuffled(point, unit, 2, 24.0)  # noqa: E731
                else:
                    unit = draws.uniform(f"blocks/{step}", (2, numbers(image[None], 3)), like)[:, copy]
                    noise = noises(draws, z, 16 / 255, step, 2)[copy]
                    seen = lambda point, unit=unit, noise=noise: transformed(point, unit, noise, 3)  # noqa: E731
                total += slope(lambda point, seen=seen: model(seen(point)), z, label) / 2
            return total

        return climb(image, eps, attack, rule)

    compare(attack, model, *make_batch(model, dtype=torch.float64), one)


@pytest.mark.parametrize(
    "attack",
    [
        SIM(steps=4, scales=1),
        TIM(steps=4, kernel=1),
        Admix(steps=4, scales=1, strength=0.0),
        BSR(steps=4, blocks=1, degrees=0.0, copies=1),
    ],
    ids=["sim", "tim", "admix", "bsr"],
)
def test_without_a_view_it_is_momentum_pgd(attack: Any, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    plain = PGD(steps=4, step_ratio=0.1, momentum=1.0, random_start=False)(model, images, labels, 0.1)
    torch.testing.assert_close(attack(model, images, labels, 0.1).images, plain.images, rtol=0, atol=1e-9)
    assert not attack.stochastic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_sees_the_same_geometry(dtype: torch.dtype) -> None:
    # 64 grey levels, exact in every dtype.
    images = (drawn(9, 3, 32, 32) * 64).floor() / 64
    unit = drawn(9, 12, purpose="unit")
    found = shuffled(images.to(dtype), unit, 2, 0.0)
    assert found.dtype == dtype
    assert torch.equal(found.float(), shuffled(images, unit, 2, 0.0))
    unit = drawn(9, numbers(images, 3), purpose="other")
    found = transformed(images.to(dtype), unit, torch.zeros_like(images, dtype=dtype), 3)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), transformed(images.double(), unit, images.double() * 0, 3), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("name", ["sim", "tim", "admix", "bsr", "sia"])
def test_passes_are_those_that_it_makes(name: str, make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = ATTACKS.get(name)(steps=2), make_ensemble()  # type: ignore[call-arg]
    images, labels = make_batch(model)
    with counted(model) as counts:
        attack(model, images, labels, 0.1)
    assert sum(counts) == (attack.passes + 1) * len(images)  # the contract looks at the last iterate
    assert not attack.restarts_are_versions


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sim", {"scales": 0}),
        ("tim", {"kernel": 4}),
        ("tim", {"kernel": -1}),
        ("admix", {"scales": 0}),
        ("admix", {"mixtures": 0}),
        ("admix", {"strength": -0.1}),
        ("bsr", {"copies": 0}),
        ("bsr", {"blocks": 0}),
        ("bsr", {"degrees": 181.0}),
        ("sia", {"copies": 0}),
        ("sia", {"blocks": 0}),
        ("sia", {"noise": 1.5}),
    ],
)
def test_wrong_fields_are_named(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(RobenchError, match=rf"`{next(iter(values))}` of attack '{name}'"):
        ATTACKS.get(name)(**values)
