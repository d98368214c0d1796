"""SqueezeNet with torchvision's state-dict names."""

import torch
from torch import Tensor, nn

from .init import init_weights


class Fire(nn.Module):
    """Few 1x1 convolutions feed a 1x1 and a 3x3 branch of equal width."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """`features`, then a 1x1 convolution to classes and an average over the image."""

    def __init__(self, features: nn.Sequential, num_classes: int, classifier_padding: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Conv2d(512, num_classes, 1, padding=classifier_padding),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y.flatten(1)


def squeezenet1_0(num_classes: int = 1000, *, classifier_padding: int = 0) -> nn.Module:
    """SqueezeNet 1.0: float image [n, 3, h, w] to logits [n, num_classes]; made for 224x224.

    `classifier_padding` pads the classifier convolution, in pixels: 1 for weights trained in Caffe by the
    authors, 0 for torchvision's.

    Source: Iandola et al. 2016, "SqueezeNet" (arXiv 1602.07360).
    """
    features = nn.Sequential(
        nn.Conv2d(3, 96, 7, stride=2),
        nn.ReLU(inplace=True),
        _pool(),
        Fire(96, 16, 64),
        Fire(128, 16, 64),
        Fire(128, 32, 128),
        _pool(),
        Fire(256, 32, 128),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        _pool(),
        Fire(512, 64, 256),
    )
    model = SqueezeNet(features, num_classes, classifier_padding)
    init_weights(model)
    return model


def squeezenet1_1(num_classes: int = 1000) -> nn.Module:
    """SqueezeNet 1.1, as accurate as 1.0 for less than half the work; shapes and range as there.

    Source: https://github.com/forresti/SqueezeNet, SqueezeNet_v1.1.
    """
    features = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(inplace=True),
        _pool(),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        _pool(),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        _pool(),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )
    model = SqueezeNet(features, num_classes, classifier_padding=0)
    init_weights(model)
    return model


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
