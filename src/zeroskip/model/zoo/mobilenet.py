"""MobileNet: version 1 with names of our own (torchvision has none), version 2 with torchvision's."""

from torch import Tensor, nn

from .init import init_weights

# Output channels and stride of each depthwise-separable block.
V1_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1),
    (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip

# Expansion, output channels, repetitions and first stride of each group of inverted residuals.
V2_GROUPS = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class Separable(nn.Module):
    """A depthwise 3x3 convolution and a pointwise one, each with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.depthwise_bn(self.depthwise(x)))
        y: Tensor = self.relu(self.pointwise_bn(self.pointwise(x)))
        return y


class MobileNetV1(nn.Module):
    """A stem, thirteen separable blocks and a linear classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        inputs = (32, *(outputs for outputs, _ in V1_BLOCKS))
        self.blocks = nn.Sequential(*(Separable(i, *block) for i, block in zip(inputs, V1_BLOCKS, strict=False)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.stem_bn(self.stem(x))))
        y: Tensor = self.classifier(self.avgpool(x).flatten(1))
        return y


class InvertedResidual(nn.Module):
    """Pointwise up, depthwise, pointwise down; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu6(inputs, hidden, 1)]
        layers += [
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """A stem, seventeen inverted residuals, a last pointwise convolution and a linear classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, stride=2)]
        channels = 32
        for expansion, outputs, repetitions, stride in V2_GROUPS:
            for i in range(repetitions):
                layers.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expansion))
                channels = outputs
        layers.append(_conv_bn_relu6(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return y


def mobilenet_v1(num_classes: int = 1000) -> nn.Module:
    """MobileNet 1.0: float image [n, 3, h, w] to logits [n, num_classes]; made for 224x224.

    Activations are plain ReLU. Names: stem, blocks.0 to blocks.12 with depthwise and pointwise, each with
    its BatchNorm under the same name and "_bn", and classifier.

    Source: Howard et al. 2017, "MobileNets" (arXiv 1704.04861).
    """
    model = MobileNetV1(num_classes)
    init_weights(model)
    return model


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """MobileNet V2 1.0: float image [n, 3, h, w] to logits [n, num_classes]; made for 224x224.

    Source: Sandler et al. 2018, "MobileNetV2" (arXiv 1801.04381).
    """
    model = MobileNetV2(num_classes)
    init_weights(model)
    return model


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )
