"""Reordering channels so that N:M groups lose less magnitude.

2:4 hardware wants two zeros among four neighbours in memory. Which input channels are neighbours is an accident of
training: any order computes the same if the layers that produce these channels write them in that order. So the order
is chosen that keeps the most magnitude, and the channels move for real, in every layer that produces, scales or reads
them: the network's function stays, nothing is gathered at run time, and any 2:4 kernel can run the result.

Source: Pool & Yu 2021, "Channel Permutations for N:M Sparsity" (NeurIPS 34), for the idea and the greedy search; ours
swaps two channels at a time and prices all swaps at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .config import PruneConfig
from .dependencies import checked_example, dependency_graph, torch_pruning, traceable
from .layers import choose_layers

_ROUNDS = 500
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Reordered:
    """Channels that moved together: `layers` read them in N:M groups.

    `before` and `after` are the fractions of those layers' magnitude that survive N:M pruning.
    """

    layers: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True)
class _Axis:
    """Where a group's channels are in one module: channel c at `places[c]` of dimension `dim` of its tensors."""

    name: str
    module: nn.Module
    dim: int
    places: tuple[tuple[int, ...], ...]

    @property
    def tensors(self) -> list[str]:
        if self.dim == 1:
            return ["weight"]
        names = ["weight", "bias", "running_mean", "running_var"]
        return [name for name in names if isinstance(getattr(self.module, name, None), Tensor)]

    def index(self, order: Sequence[int]) -> list[int]:
        """What `index_select` takes to put channel order[c] in the place of channel c."""
        size = getattr(self.module, self.tensors[0]).shape[self.dim]
        index = list(range(size))
        for here, there in enumerate(order):
            for to, source in zip(self.places[here], self.places[there], strict=True):
                index[to] = source
        return index


@torch.no_grad()
def permute_channels(model: nn.Module, example: Tensor | None, config: PruneConfig) -> tuple[Reordered, ...]:
    """Reorder channels of `model` in place for `config`'s N:M pattern; it computes what it did before.

    Which channels have to move together is torch-pruning's knowledge. A set of channels stays as it is where a
    module other than convolutions, linear layers and batch norm has weights for them, where a convolution reads them
    in several groups (depthwise ones may), and where moving them changes what the network computes from `example`
    (checked in float64 for each set): outputs, inputs, reshapes that mix channels. Layers whose N:M groups are not
    made of these channels one by one, as after flattening an image, move along without being optimised for.

    Deterministic, so equal networks stay equal. Reorder before there is an optimizer with a state.

    Args:
        example: an input of the network, any values but constant ones, else the check means little.

    Raises:
        ValueError: no example, no N:M pattern, or `skip` and `only` as for `prune`.
        Unsupported: torch-pruning is missing or cannot trace the network.
    """
    if ":" not in config.pattern:
        raise ValueError(f'pattern: got {config.pattern!r}, expected N:M such as "2:4", for whose groups channels move')
    n, m = (int(number) for number in config.pattern.split(":"))
    example = checked_example(example, "permute")
    library = torch_pruning()
    targets = {layer.name for layer in choose_layers(model, config.skip, config.only) if layer.reason is None}
    # All trials happen on a copy: whatever fails, the network is as it was.
    trial, example = traceable(model).double(), example.double() if example.is_floating_point() else example
    graph = dependency_graph(library, trial, example)
    expected = _outputs(trial, example)
    done: list[Reordered] = []
    moves: list[tuple[list[_Axis], list[int]]] = []
    for axes in _groups(library, graph, trial):
        readers = [axis for axis in axes if axis.dim == 1 and axis.name in targets and _in_groups_of(m, axis)]
        if not readers:
            continue
        rows = torch.cat([_rows(axis) for axis in readers])
        order = best_order(rows, n, m)
        before, after = _kept(rows, n, m), _kept(rows[:, order], n, m)
        if not after > before:
            continue
        _move(trial, axes, order)
        if not _same(expected, _outputs(trial, example)):
            _move(trial, axes, torch.tensor(order).argsort().tolist())
            continue
        moves.append((axes, order))
        total = float(rows.sum())
        done.append(Reordered(tuple(axis.name for axis in readers), before / total, after / total))
    for axes, order in moves:
        _move(model, axes, order)
    return tuple(done)


def best_order(rows: Tensor, n: int, m: int) -> list[int]:
    """An order of the columns of `rows` (magnitudes, rows x channels) whose groups of m neighbours keep more.

    Greedy: of all swaps of two channels of different groups, the best ones that touch a group once each are made,
    until none gains anything. Never worse than the order there is; not the best there is.
    """
    rows = rows.float()
    order = torch.arange(rows.shape[1], device=rows.device)
    smallest_gain = 1e-6 * float(rows.sum())
    changed = order
    columns, rest, threshold = rows.clone(), torch.empty_like(order, dtype=rows.dtype), torch.empty_like(rows)
    larger = torch.empty(len(order), len(order), device=rows.device)
    for _ in range(_ROUNDS):
        rest[changed], threshold[:, changed] = _without(columns, changed, n, m)
        # sum of max(threshold of a, column b) over rows: what takes part in a's group if b comes for a.
        larger[changed] = _sum_of_max(threshold[:, changed], columns)
        larger[:, changed] = _sum_of_max(threshold, columns[:, changed])
        swapped = rest[:, None] + larger
        gains = swapped + swapped.T
        group = torch.arange(len(order), device=rows.device) // m
        kept = rest + larger.diagonal()  # of the column's group as it is
        gains -= kept[:, None] + kept[None, :]
        gains[group[:, None] == group[None, :]] = 0
        pairs = _disjoint(gains.triu(), m, smallest_gain)
        if not pairs:
            break
        left, right = (torch.tensor(side, device=rows.device) for side in zip(*pairs, strict=True))
        for tensor in (order, columns.T):
            tensor[left], tensor[right] = tensor[right].clone(), tensor[left].clone()
        touched = torch.cat([left, right]) // m
        changed = (touched[:, None] * m + torch.arange(m, device=rows.device)).flatten()
    found: list[int] = order.tolist()
    return found


def _without(columns: Tensor, which: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """For each column of `which`, of the m-1 others of its group: the n-1 largest, summed over rows, and the n-th."""
    others = torch.stack([torch.cat([torch.arange(i), torch.arange(i + 1, m)]) for i in range(m)]).to(which.device)
    members = (which // m * m)[:, None] + others[which % m]
    top = columns[:, members].topk(n, dim=2).values  # rows x which x n
    return top[:, :, : n - 1].sum((0, 2)), top[:, :, n - 1]


def _sum_of_max(a: Tensor, b: Tensor) -> Tensor:
    # max(x, y) = (x + y + |x - y|) / 2, and the last is a distance that torch computes without a big tensor.
    return (a.sum(0)[:, None] + b.sum(0)[None, :] + torch.cdist(a.T.contiguous(), b.T.contiguous(), p=1)) / 2


def _disjoint(gains: Tensor, m: int, at_least: float) -> list[tuple[int, int]]:
    """The best pairs that touch each group at most once, so that their gains add up."""
    best, at = gains.flatten().topk(min(gains.numel(), 16 * len(gains)))
    touched: set[int] = set()
    pairs = []
    for gain, place in zip(best.tolist(), at.tolist(), strict=True):
        if gain <= at_least:
            break
        a, b = divmod(place, len(gains))
        if touched.isdisjoint((a // m, b // m)):
            touched |= {a // m, b // m}
            pairs.append((a, b))
    return pairs


def _groups(library: Any, graph: Any, model: nn.Module) -> Iterator[list[_Axis]]:
    """The sets of channels that have to move together and can."""
    names = {module: name for name, module in model.named_modules()}
    for group in graph.get_all_groups():
        axes: dict[tuple[str, int], _Axis] = {}
        for item in group:
            module, reads = item.dep.target.module, graph.is_in_channel_pruning_fn(item.dep.handler)
            if module not in names:
                if item.dep.target.type == library.ops.OPTYPE.PARAMETER:
                    break
                continue  # an operator without weights
            dim = int(reads and not isinstance(module, _BATCH_NORMS) and not _depthwise(module))
            places = _places(item.idxs, item.root_idxs)
            if not _movable(module) or places is None or (names[module], dim) in axes:
                break
            axis = _Axis(names[module], module, dim, places)
            if axis.tensors:  # batch norm may have none
                axes[axis.name, dim] = axis
        else:
            if len({len(axis.places) for axis in axes.values()}) == 1:
                yield list(axes.values())


def _movable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 or _depthwise(module)
    return isinstance(module, (nn.Linear, *_BATCH_NORMS))


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _places(here: Sequence[int], channels: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """For channels 0, 1, ... the indices that belong to each; None where that is no clean split."""
    found: dict[int, list[int]] = {}
    for index, channel in zip(here, channels, strict=True):
        found.setdefault(channel, []).append(index)
    if sorted(found) != list(range(len(found))) or len({len(indices) for indices in found.values()}) != 1:
        return None
    return tuple(tuple(found[channel]) for channel in range(len(found)))


def _in_groups_of(m: int, axis: _Axis) -> bool:
    """Whether groups of m neighbours of the layer's inputs are made of these channels alone, one by one."""
    first = axis.places[0][0]
    plain = all(place == (first + channel,) for channel, place in enumerate(axis.places))
    return plain and first % m == 0 and len(axis.places) % m == 0


def _rows(axis: _Axis) -> Tensor:
    weight = axis.module.get_parameter("weight")
    first = axis.places[0][0]
    part = weight.detach().abs()[:, first : first + len(axis.places)]
    return part.movedim(1, -1).reshape(-1, len(axis.places))


def _kept(rows: Tensor, n: int, m: int) -> float:
    return float(rows.reshape(len(rows), -1, m).topk(n, dim=2).values.sum())


def _move(model: nn.Module, axes: Sequence[_Axis], order: Sequence[int]) -> None:
    for axis in axes:
        module = model.get_submodule(axis.name)
        index = torch.tensor(axis.index(order))
        for name in axis.tensors:
            tensor: Tensor = getattr(module, name)
            tensor.copy_(tensor.index_select(axis.dim, index.to(tensor.device)))


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(model(example)) if isinstance(leaf, Tensor)]


def _same(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    """To rounding: sums in another order."""
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= 1e-9 * a.abs().max())
        for a, b in zip(expected, got, strict=True)
    )
