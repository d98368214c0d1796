"""Trained networks of the zoo in files: the weights without their zeros, filters that were removed included.

A safetensors file. Its metadata has one entry, `about`: a JSON document with the network's name, its classes, and dtype
and shape of every tensor of its state dict; the tensors are stored as in a `.zsk` file (`pack.smallest`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from zeroskip.core.atomic import replace_file
from zeroskip.core.errors import FileFormatError, SaveError
from zeroskip.core.jsonable import from_json
from zeroskip.pack.smallest import restored, stored

from . import BUILDERS

IMAGE = (1, 3, 64, 64)
"""What a network must take to be one: large enough for every network of the zoo, and computed without data."""


@dataclass(frozen=True)
class SavedNetwork:
    """What `save_network` was given."""

    network: str
    classes: int
    model: nn.Module
    """On the CPU, in evaluation mode."""


@dataclass(frozen=True)
class _About:
    network: str
    classes: int
    tensors: dict[str, Any]
    """By name: dtype ("float32"), then the sizes."""


def build_network(network: str, classes: int) -> nn.Module:
    """The network as it is trained here, random weights: VGG with a global average pool, so 20 million of them.

    Raises:
        ValueError: the zoo has no such network.
    """
    if network not in BUILDERS:
        raise ValueError(f"no network is called {network!r}; there are {', '.join(BUILDERS)}")
    return BUILDERS[network](classes, **({"pooled": True} if network == "vgg19_bn" else {}))


def save_network(path: Path, network: str, classes: int, model: nn.Module) -> None:
    """Write `model`, which `build_network(network, classes)` made: weights as fp16, vectors (batch norm, bias) as fp32.

    Filters may have been removed. The caller has to measure what was written: rounding moves weights, and makes zeros
    of those below 3e-8.

    Raises:
        SaveError: a weight is beyond float16's 65504.
    """
    shapes: dict[str, list[Any]] = {}
    arrays: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        value = tensor.half().float() if tensor.ndim > 1 else tensor
        if (value.isinf() & tensor.isfinite()).any():
            raise SaveError(f"{name} holds {float(tensor.abs().max()):g}, float16 ends at 65504")
        shapes[name] = _described(tensor)
        arrays |= stored(name, value.contiguous())
    about = {"network": network, "classes": classes, "tensors": shapes}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(arrays, metadata={"about": json.dumps(about)}))


def load_network(path: str | Path) -> SavedNetwork:
    """The network of a file that `save_network` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a network that save_network wrote")
    try:
        return _read(path)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except Exception as error:
        raise FileFormatError(f"{path} holds no network: {type(error).__name__}: {error}") from error


def _read(path: Path) -> SavedNetwork:
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("about")
        if text is None:
            raise FileFormatError("a safetensors file without its network's name; expected one that save_network wrote")
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    about = from_json(_About, json.loads(text), "about")
    if about.network not in BUILDERS:
        raise FileFormatError(f"no network is called {about.network!r}; there are {', '.join(BUILDERS)}")
    # No memory and no random numbers for weights that are replaced.
    with torch.device("meta"):
        model = build_network(about.network, about.classes)
    shapes = {name: shape for name, (_, *shape) in about.tensors.items()}
    _shrink(model, shapes)
    expected = {name: _described(tensor) for name, tensor in model.state_dict().items()}
    for name in sorted({*expected, *about.tensors}):
        found, wanted = about.tensors.get(name), expected.get(name)
        if found != wanted:
            raise FileFormatError(f"{name} is {found}, {about.network} has {wanted}")
    with torch.no_grad():
        logits = model.eval()(torch.empty(IMAGE, device="meta"))
    if logits.shape != (1, about.classes):
        raise FileFormatError(f"{about.network} of these tensors computes {tuple(logits.shape)}, not {about.classes}")
    state = {name: restored(arrays, name, tuple(shape), dtype) for name, (dtype, *shape) in about.tensors.items()}
    for name, tensor in state.items():
        if _described(tensor) != expected[name]:
            raise FileFormatError(f"{name} is stored as {_described(tensor)}, expected {expected[name]}")
    model.load_state_dict(state, assign=True)
    return SavedNetwork(about.network, about.classes, model)


def _described(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def _shrink(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give the layers of `model`, which is on meta, these shapes."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        for part in [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]:
            old, shape = getattr(module, part), shapes.get(f"{name}.{part}")
            if shape is None or len(shape) != old.ndim:
                raise FileFormatError(f"{name}.{part} is {shape}, expected {old.ndim} sizes")
            like = torch.empty(shape, dtype=old.dtype, device="meta")
            setattr(module, part, nn.Parameter(like) if isinstance(old, nn.Parameter) else like)
        outputs, *inputs = shapes[f"{name}.weight"]
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = outputs, inputs[0] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = outputs, inputs[0]
        else:
            module.num_features = outputs
