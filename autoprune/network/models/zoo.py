"""The zoo: small networks of the field that are built by name.

Decides their architectures. Knows nothing of settings or of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.errors import InputError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Option A of the paper subsamples by the stride and zero-pads the new channels on both sides, without parameters;
    option B is a 1x1 convolution with batch normalisation, named `shortcut`.
    """

    def __init__(self, in_planes: int, planes: int, *, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.stride = stride
        self.padding = planes - in_planes
        self.shortcut: nn.Module | None = None
        if shortcut == "B" and (stride != 1 or in_planes != planes):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, in_planes, H, W)` to `(N, planes, ceil(H / stride), ceil(W / stride))`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.padding:
            before = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.padding - before))
        return cast(Tensor, self.relu(out + x))


class CifarResNet(nn.Module):
    """The ResNet for small images with three stages of 16, 32 and 64 channels.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2.
    """

    def __init__(self, blocks: int, *, num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise InputError(f"shortcut must be 'A' or 'B', not {shortcut!r}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks=blocks, stride=1, shortcut=shortcut)
        self.layer2 = _stage(16, 32, blocks=blocks, stride=2, shortcut=shortcut)
        self.layer3 = _stage(32, 64, blocks=blocks, stride=2, shortcut=shortcut)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, in_channels, H, W)` to logits `(N, num_classes)`."""
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 16, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, H/4, W/4)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, 64)
        return cast(Tensor, self.linear(x))


def _stage(in_planes: int, planes: int, *, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride=stride, shortcut=shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes, stride=1, shortcut=shortcut) for _ in range(blocks - 1)))


class Vgg(nn.Module):
    """VGG-16 with batch normalisation for 32x32 images: thirteen convolutions and one linear layer."""

    _LAYOUT = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for stage in self._LAYOUT:
            for planes in stage:
                layers += [
                    nn.Conv2d(width, planes, 3, padding=1, bias=False),
                    nn.BatchNorm2d(planes),
                    nn.ReLU(inplace=True),
                ]
                width = planes
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, in_channels, H, W)`, H and W at least 32, to logits `(N, num_classes)`."""
        x = self.features(x)  # (N, 512, H/32, W/32)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, 512)
        return cast(Tensor, self.classifier(x))


class Mlp(nn.Module):
    """Linear layers with ReLU between them, on flattened samples."""

    def __init__(self, *, in_features: int, hidden: Sequence[int] = (64, 64), num_classes: int = 10) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        if not all(isinstance(width, int) and width > 0 for width in widths):
            raise InputError(f"in_features and hidden are positive whole numbers, got {widths}")
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, ...)` with `in_features` elements a sample to logits `(N, num_classes)`."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return cast(Tensor, self.head(x))


class LstmClassifier(nn.Module):
    """An LSTM that reads a sequence, or an image row by row, and classifies from its last step."""

    def __init__(self, *, in_features: int, hidden: int = 64, layers: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_features, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, T, in_features)`, or images `(N, C, T, W)` with `C * W = in_features`, to `(N, num_classes)`."""
        if x.dim() == 4:
            x = x.transpose(1, 2).flatten(2)  # (N, C, T, W) -> (N, T, C * W)
        out, _ = self.lstm(x)  # (N, T, hidden)
        return cast(Tensor, self.head(out[:, -1]))


def _resnet(blocks: int) -> Callable[..., nn.Module]:
    def build(*, num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> nn.Module:
        return CifarResNet(blocks, num_classes=num_classes, in_channels=in_channels, shortcut=shortcut)

    return build


ZOO: Mapping[str, Callable[..., nn.Module]] = {
    "resnet20": _resnet(3),
    "resnet32": _resnet(5),
    "resnet44": _resnet(7),
    "resnet56": _resnet(9),
    "vgg16_bn_32": Vgg,
    "mlp": Mlp,
    "lstm": LstmClassifier,
}
