"""Which channels of which layers belong together, as the library torch-pruning finds it."""

import copy
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core.errors import Unsupported


def torch_pruning() -> ModuleType:
    """The library. Raises Unsupported, with what to install, where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning as library
    except ImportError as error:
        raise Unsupported(
            "Moving or removing channels needs the library torch-pruning, which is not installed; "
            "pip install 'zeroskip[prune]' (or pip install --no-deps torch-pruning, which leaves torch as it is)"
        ) from error
    module: ModuleType = library
    return module


def traceable(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode that records gradients, which the library traces by.

    Raises Unsupported where it cannot be copied.
    """
    try:
        return copy.deepcopy(model).eval().requires_grad_(True)
    except RuntimeError as error:  # of tensors that are results
        raise Unsupported(
            f"{type(model).__name__} cannot be copied, which moving or removing channels begins with: {error}; drop "
            "what its modules keep of the last input"
        ) from error


def checked_example(example: Tensor | None, why: str) -> Tensor:
    """`example` itself. Raises ValueError where there is none; `why` says what it is needed for."""
    if not isinstance(example, Tensor):
        raise ValueError(
            f"example: got {type(example).__name__}, expected an input of the network as a tensor, since {why} "
            "traces it; pass example=torch.rand(1, 3, 224, 224) or the like"
        )
    return example


def dependency_graph(library: ModuleType, model: nn.Module, example: Tensor) -> Any:
    """The library's graph of `model`, a `traceable` one.

    Raises Unsupported where the network does not run on the example or cannot be traced.
    """
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.DependencyGraph().build_dependency(model, example, verbose=False)
    except Exception as error:  # of the network or of the library: any type
        raise Unsupported(
            f"torch-pruning could not trace {type(model).__name__} with an example of shape {tuple(example.shape)}: "
            f"{type(error).__name__}: {error}; check that model(example) runs and that its layers are modules"
        ) from error
