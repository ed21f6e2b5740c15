"""Networks without skips, and with inverted ones, for images of 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn


class VGG16(nn.Module):
    """The 16-layer network of Simonyan & Zisserman 2015 (configuration D) with BatchNorm and one linear layer, as it is
    used for 32 pixels: https://arxiv.org/abs/1409.1556.

    14,728,266 parameters for 10 classes, as in https://github.com/kuangliu/pytorch-cifar.
    """

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
            for width in widths:
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                in_channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class _InvertedResidual(nn.Module):
    """1x1 to ``expand`` times the width, 3x3 of each channel, 1x1 to ``width``; a skip where the shape stays."""

    def __init__(self, in_width: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = in_width * expand
        widened = _convolution(in_width, inner, 1) if expand > 1 else []
        deep = _convolution(inner, inner, 3, stride, groups=inner)
        self.conv = nn.Sequential(*widened, *deep, *_convolution(inner, width, 1)[:2])
        self.skips = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv(x)
        return x + branch if self.skips else branch


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, table 2, https://arxiv.org/abs/1801.04381) of width 1, with strides 1 in the
    stem and in the second stage instead of 2, for 32 pixels.

    2,236,682 parameters for 10 classes, as in torchvision and in https://github.com/chenyaofo/pytorch-cifar-models.
    """

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers, width = _convolution(in_channels, 32, 3), 32
        for expand, wide, count, stride in (
            *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ):
            for number in range(count):
                layers.append(_InvertedResidual(width, wide, 1 if number else stride, expand))
                width = wide
        self.features = nn.Sequential(*layers, *_convolution(width, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _convolution(in_width: int, width: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size but for its stride, BatchNorm and ReLU6."""
    layer = nn.Conv2d(in_width, width, size, stride, size // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(width), nn.ReLU6()]
