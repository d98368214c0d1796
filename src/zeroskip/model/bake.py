"""A copy of the model in evaluation mode, its pruning masks and parametrizations turned into plain weights."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


def bake(model: nn.Module) -> nn.Module:
    """Copy ``model``; the original is not touched.

    ``torch.nn.utils.prune`` masks and parametrizations would otherwise be exported as operators that compute
    the weight anew at every call.
    """
    # A freshly masked weight is no leaf of the autograd graph, which deepcopy refuses.
    computed = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in vars(module).values()
        if isinstance(tensor, Tensor) and not tensor.is_leaf
    }
    model = copy.deepcopy(model, computed).eval()
    for module in model.modules():
        for name in [
            hook._tensor_name
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, prune.BasePruningMethod)
        ]:
            prune.remove(module, name)  # type: ignore[no-untyped-call]
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for parameter in model.parameters():
        # A masked weight may hold -0.0, which is as much a zero as 0.0 and is stored as that.
        parameter.data[parameter.data == 0] = 0
    return model.requires_grad_(False)
