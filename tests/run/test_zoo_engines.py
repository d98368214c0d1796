"""Every network of the zoo computes what torch computes: all dense, and 90% pruned with every layer by our methods."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import zeroskip
from contract.cases import OURS, engine_of, program_of, thin
from zeroskip.core.graph import CONV, LINEAR
from zeroskip.model import zoo
from zeroskip.run.compile import distance


def small(name: str) -> tuple[nn.Module, Tensor]:
    build = zoo.BUILDERS[name]
    if not name.startswith("vgg"):
        torch.manual_seed(0)
        model = build(depth=5, width=16) if name == "dncnn" else build(num_classes=10)
        return model, torch.rand(2, 3, 32, 24) if name == "dncnn" else torch.randn(1, 3, 64, 72)
    with torch.device("meta"):
        model = build(num_classes=10)
        classifier = model.get_submodule("classifier")
        assert isinstance(classifier, nn.Sequential)
        # 120 million weights that say nothing new.
        classifier[0], classifier[3], classifier[6] = nn.Linear(25088, 32), nn.Linear(32, 32), nn.Linear(32, 10)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
    return model, torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_dense_and_sparse_engines_equal_torch(name: str) -> None:
    model, x = small(name)
    thin(model, 0.1)
    with torch.no_grad():
        want, exact = model(x), copy.deepcopy(model).double()(x.double())
    program = program_of(model, x)
    # A random network may amplify rounding: then the engine may be as far from the truth as torch is.
    bound = max(1e-5, 2 * distance(want, exact))
    assert distance(engine_of(program)(x), want) < bound
    sparse = engine_of(program, *OURS)
    assert {step.method for step in sparse.plan.steps} & set(OURS)
    assert distance(sparse(x), want) < max(1e-5, bound)

    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    assert len(program.graph.names(CONV, LINEAR)) == layers
    left = " ".join({node.op for node in program.graph.nodes} - {CONV, LINEAR})
    assert not [word for word in ("batch_norm", "relu", "hardtanh", "dropout", "add.Tensor") if word in left]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_a_compiled_network_equals_torch(name: str, quick: None) -> None:
    model, x = small(name)
    thin(model, 0.1)
    with torch.no_grad():
        want = model(x)
    engine = zeroskip.compile(model, x)
    assert distance(engine(x), want) < 1e-5
    assert engine.plan.confirmation is not None
    assert len(engine.plan.steps) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
