"""VGG with torchvision's state-dict names."""

from torch import Tensor, nn

from .init import init_weights

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ending in a pooling, then three linear layers, or one where `pooled`."""

    def __init__(self, depths: tuple[int, ...], batch_norm: bool, num_classes: int, pooled: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in zip(WIDTHS, depths, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        if pooled:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(nn.Linear(512, num_classes))
            return
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        y: Tensor = self.classifier(x.flatten(1))
        return y


def vgg16(num_classes: int = 1000) -> nn.Module:
    """VGG-16: float image [n, 3, h, w] to logits [n, num_classes]; made for 224x224.

    Source: Simonyan & Zisserman 2014, "Very Deep Convolutional Networks" (arXiv 1409.1556).
    """
    return _vgg((2, 2, 3, 3, 3), False, num_classes)


def vgg19(num_classes: int = 1000) -> nn.Module:
    """VGG-19: float image [n, 3, h, w] to logits [n, num_classes]; made for 224x224.

    Source: Simonyan & Zisserman 2014, "Very Deep Convolutional Networks" (arXiv 1409.1556).
    """
    return _vgg((2, 2, 4, 4, 4), False, num_classes)


def vgg16_bn(num_classes: int = 1000) -> nn.Module:
    """`vgg16` with a BatchNorm after every convolution."""
    return _vgg((2, 2, 3, 3, 3), True, num_classes)


def vgg19_bn(num_classes: int = 1000, *, pooled: bool = False) -> nn.Module:
    """`vgg19` with a BatchNorm after every convolution.

    Where `pooled`, a global average and a single linear layer end it: 20 million weights instead of 144, for images
    of other sizes. torchvision's names hold up to `classifier.0`, which is then the output layer.
    """
    return _vgg((2, 2, 4, 4, 4), True, num_classes, pooled)


def _vgg(depths: tuple[int, ...], batch_norm: bool, num_classes: int, pooled: bool = False) -> nn.Module:
    model = VGG(depths, batch_norm, num_classes, pooled)
    init_weights(model)
    return model
