"""Which layers of a network get pruned."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer; `reason` says why it is left alone, None if it is pruned."""

    name: str
    module: nn.Conv2d | nn.Linear
    reason: str | None

    @property
    def weight(self) -> Tensor:
        return self.module.weight


def choose_layers(
    model: nn.Module,
    skip: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    *,
    filters: bool = False,
) -> list[Layer]:
    """Every Conv2d and Linear of `model` in module order, each with the verdict on it.

    Left alone by default: the first convolution, depthwise convolutions (groups == in_channels), and
    the output layer: the last Linear or, in a network without any, the last convolution; where whole
    `filters` are to go, which ties layers to each other, the output layer alone.
    `only` replaces these defaults; `skip` always counts. Both are fnmatch patterns of module names.
    A weight that several modules share appears once, under its first name; patterns may use any name.

    Raises ValueError for a pattern that matches no layer, for a weight that is not a plain parameter,
    and where no layer is left to prune.
    """
    names = _names_by_weight(model)
    _check_patterns("skip", skip, names)
    _check_patterns("only", only, names)
    reasons = _default_reasons(model, filters)
    layers = []
    for group in names:
        if _matches(group, skip or ()):
            reason: str | None = "skip"
        elif only is not None:
            reason = None if _matches(group, only) else "not in only"
        else:
            reason = next((reasons[name] for name in group if name in reasons), None)
        module = model.get_submodule(group[0])
        assert isinstance(module, nn.Conv2d | nn.Linear)
        layers.append(Layer(group[0], module, reason))
    if all(layer.reason for layer in layers):
        verdicts = ", ".join(f"{layer.name!r} ({layer.reason})" for layer in layers) or "no Conv2d, no Linear"
        raise ValueError(
            f"model: got no layer to prune [{verdicts}], expected at least one; name layers with only=[...]"
        )
    return layers


def _names_by_weight(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    # Without duplicates a module that is used under two names would have one.
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        # The value of such a weight is recomputed from other tensors, which would undo the pruning.
        if parametrize.is_parametrized(module, "weight") or not isinstance(module.weight, nn.Parameter):
            raise ValueError(
                f"layer {name!r}: got a weight computed from other tensors, expected a plain parameter; "
                'bake it first: torch.nn.utils.prune.remove(module, "weight") for masks of '
                "torch.nn.utils.prune, torch.nn.utils.parametrize.remove_parametrizations(module, "
                '"weight") for parametrizations'
            )
        names.setdefault(id(module.weight), []).append(name)
    return list(names.values())


def _check_patterns(argument: str, patterns: Sequence[str] | None, names: list[list[str]]) -> None:
    for pattern in patterns or ():
        if not any(_matches(group, [pattern]) for group in names):
            known = ", ".join(name for group in names for name in group)
            raise ValueError(
                f"{argument}: got {pattern!r}, which matches no Conv2d or Linear; expected one of: {known}; "
                "correct the pattern or drop it"
            )


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _default_reasons(model: nn.Module, filters: bool) -> dict[str, str]:
    """Why the defaults leave a layer alone, for those they leave alone."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    output = dict.fromkeys((linears or list(convs))[-1:], "output layer")
    if filters:
        return output
    reasons = {name: "depthwise" for name, conv in convs.items() if conv.groups == conv.in_channels > 1} | output
    reasons |= dict.fromkeys(list(convs)[:1], "first convolution")
    return reasons
