"""Every network of the zoo computes what torch computes: all dense, and 90% pruned with every layer by our methods."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zeroskip
from contract.cases import OURS, engine_of, program_of, thin
from run.networks import small
from zeroskip.core.graph import CONV, LINEAR
from zeroskip.model import zoo
from zeroskip.run.compile import distance


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
