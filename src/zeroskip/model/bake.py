"""A copy of the model in evaluation mode, its pruning masks and parametrizations turned into plain weights."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import parametrize, prune


def bake(model: nn.Module) -> nn.Module:
    """Copy ``model``; the original is not touched.

    ``torch.nn.utils.prune`` masks and parametrizations would otherwise be exported as operators that compute
    the weight anew at every call.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        for name in [
            hook._tensor_name
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, prune.BasePruningMethod)
        ]:
            prune.remove(module, name)
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model.requires_grad_(False)
