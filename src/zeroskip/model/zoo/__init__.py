"""Model zoo: networks with torchvision's state-dict names and random weights."""

from collections.abc import Callable

from torch import nn

from .dncnn import dncnn
from .mobilenet import mobilenet_v1, mobilenet_v2
from .resnet import resnet18, resnet34, resnet50
from .squeezenet import squeezenet1_0, squeezenet1_1
from .vgg import vgg16, vgg16_bn, vgg19, vgg19_bn

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "dncnn": dncnn,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "squeezenet1_0": squeezenet1_0,
    "squeezenet1_1": squeezenet1_1,
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "vgg19": vgg19,
    "vgg19_bn": vgg19_bn,
}

__all__ = [
    "BUILDERS",
    "dncnn",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]
