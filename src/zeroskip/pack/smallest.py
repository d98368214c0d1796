"""Which form a tensor takes in a file: the one of the fewest bytes, counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from zeroskip.pack.bitmask import Bitmask
from zeroskip.pack.compact_csr import CompactCsr
from zeroskip.pack.gaps import Gaps
from zeroskip.pack.nonzeros import bits, may_expand

Form = Bitmask | Gaps | CompactCsr

FORMS: dict[str, Callable[[Tensor], Form]] = {
    "bitmask": Bitmask.of,
    "gaps8": lambda tensor: Gaps.of(tensor, 8),
    "gaps16": lambda tensor: Gaps.of(tensor, 16),
    "csr": CompactCsr.of,
}
"""How a tensor is stored without its zeros.  Of two forms of the same size the first is taken."""

_INDEX: tuple[tuple[Callable[..., Form], tuple[str, ...]], ...] = (
    (Bitmask, ("mask",)),
    (Gaps, ("gaps",)),
    (CompactCsr, ("counts", "columns")),
)
"""The arrays that a form has beside ``values``: their names tell which form a tensor has."""


def stored(name: str, tensor: Tensor, forms: Mapping[str, Callable[[Tensor], Form]] = FORMS) -> dict[str, Tensor]:
    """What a file holds for ``tensor``: itself, as ``name``, or the arrays of its smallest form, as ``name:array``.

    float32 values that are all float16 numbers are kept as these.
    """
    tensor = tensor.detach().cpu()
    best = {name: _narrow(tensor.clone(memory_format=torch.contiguous_format))}
    if not tensor.is_floating_point():
        return best
    # Every form but the bitmask takes a byte or more for each nonzero: with so many, none can be smaller.
    many = "bitmask" in forms and np.count_nonzero(bits(tensor)) >= -(-tensor.numel() // 8)
    for what, make in forms.items():
        if many and what != "bitmask":
            continue
        arrays = {f"{name}:{part}": array for part, array in vars(make(tensor)).items()}
        arrays[f"{name}:values"] = _narrow(arrays[f"{name}:values"])
        if size(arrays) < size(best) and may_expand(tensor.nbytes, size(arrays)):
            best = arrays
    return best


def restored(file: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The tensor that ``stored`` took apart; the caller checks shape and dtype of one that was stored as it is.

    Args:
        file: every array of the file.
        dtype: that the tensor is to have, as "float32".

    Raises:
        ValueError: the arrays do not fit each other or ``shape``; none of them allocates more than
            ``nonzeros.EXPANSION`` times its bytes.
        KeyError: there are none of that name, or of more forms than one.
    """
    found = [(form, parts) for form, parts in _INDEX if any(f"{name}:{part}" in file for part in parts)]
    if (count := len(found) + (name in file)) != 1:
        raise KeyError(f"tensor {name} is stored in {count} forms, expected one")
    if name in file:
        return _wide(file[name], dtype)
    ((form, parts),) = found
    values = _wide(file[f"{name}:values"], dtype)
    return form(*(file[f"{name}:{part}"] for part in parts), values).dense(shape)


def size(arrays: Mapping[str, Tensor]) -> int:
    """Bytes of their contents."""
    return sum(array.nbytes for array in arrays.values())


def _narrow(values: Tensor) -> Tensor:
    if values.dtype != torch.float32:
        return values
    half = values.half()
    # By bits, as denormal numbers may count as zero in a comparison.  What a NaN carries may depend on the processor.
    exact = torch.equal(half.float().view(torch.int32), values.view(torch.int32)) and not half.isnan().any()
    return half if exact else values


def _wide(values: Tensor, dtype: str) -> Tensor:
    return values.float() if values.dtype == torch.float16 and dtype == "float32" else values
