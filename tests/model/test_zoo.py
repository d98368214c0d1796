"""The zoo has torchvision's shapes and names."""

import numpy as np
import pytest
import torch
from torch import nn

from real_data import real
from zeroskip.model import zoo

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
}

SPOT_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "resnet18": {"layer2.0.downsample.1.running_var": (128,), "fc.bias": (1000,)},
    "resnet34": {"layer3.5.conv2.weight": (256, 256, 3, 3)},
    "resnet50": {"layer1.0.downsample.0.weight": (256, 64, 1, 1), "layer4.2.bn3.weight": (2048,)},
    "vgg16": {"features.28.weight": (512, 512, 3, 3), "classifier.6.weight": (1000, 4096)},
    "vgg19": {"features.34.bias": (512,), "classifier.0.weight": (4096, 25088)},
    "vgg16_bn": {"features.41.running_mean": (512,), "features.40.bias": (512,)},
    "vgg19_bn": {"features.49.weight": (512, 512, 3, 3), "features.50.bias": (512,)},
    "mobilenet_v1": {
        "stem.weight": (32, 3, 3, 3),
        "blocks.12.depthwise.weight": (1024, 1, 3, 3),
        "blocks.0.pointwise_bn.weight": (64,),
        "classifier.weight": (1000, 1024),
    },
    "mobilenet_v2": {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.17.conv.1.0.weight": (960, 1, 3, 3),
        "features.18.1.running_mean": (1280,),
        "classifier.1.weight": (1000, 1280),
    },
    "squeezenet1_0": {
        "features.3.squeeze.weight": (16, 96, 1, 1),
        "features.12.expand3x3.weight": (256, 64, 3, 3),
        "classifier.1.bias": (1000,),
    },
    "squeezenet1_1": {"features.0.weight": (64, 3, 3, 3), "features.12.expand1x1.weight": (256, 64, 1, 1)},
    "dncnn": {"layers.0.weight": (64, 3, 3, 3), "layers.3.running_var": (64,), "layers.47.bias": (3,)},
}


def build_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return zoo.BUILDERS[name]()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert sum(p.numel() for p in build_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_state_dict_names_and_shapes(name: str) -> None:
    state = build_meta(name).state_dict()
    for key, shape in SPOT_SHAPES[name].items():
        assert tuple(state[key].shape) == shape


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_logits_shape(name: str) -> None:
    with torch.device("meta"):
        model = zoo.BUILDERS[name](num_classes=10).eval()
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "squeezenet1_1"])
def test_random_weights_give_finite_logits_that_depend_on_the_image(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.BUILDERS[name](num_classes=10)  # training mode: batch statistics keep values in range
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 64, 64))
    assert logits.isfinite().all()
    assert logits.std(dim=0).max() > 0


def test_resnet_is_its_parts_with_shortcuts() -> None:
    """A block whose last BatchNorm is zero passes its (non-negative) input through."""
    torch.manual_seed(0)
    model = zoo.resnet18()
    block = model.get_submodule("layer1.0")
    nn.init.zeros_(model.get_parameter("layer1.0.bn2.weight"))
    x = torch.rand(1, 64, 8, 8)
    assert torch.equal(block.eval()(x), x)


def test_dncnn_subtracts_its_noise_estimate() -> None:
    model = zoo.dncnn(channels=1, depth=4, width=8).eval()
    x = torch.rand(2, 1, 12, 10)
    layers = model.get_submodule("layers")
    with torch.no_grad():
        assert torch.equal(model(x), x - layers(x))
    assert sum(isinstance(m, nn.Conv2d) for m in layers.modules()) == 4
    assert sum(isinstance(m, nn.BatchNorm2d) for m in layers.modules()) == 2


def test_dncnn_rejects_a_depth_without_room_for_both_ends() -> None:
    with pytest.raises(ValueError, match="depth: got 1, expected at least 2"):
        zoo.dncnn(depth=1)


def test_pruned_squeezenet_weights_load() -> None:
    model = zoo.squeezenet1_0(classifier_padding=1).eval()
    with np.load(real("squeezenet1_0_pruned.npz")) as weights:
        model.load_state_dict({key: torch.from_numpy(weights[key]) for key in weights})
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).isfinite().all()
