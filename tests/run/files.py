"""A small saved engine that uses a little of everything, and ways to damage its file."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.cases import OURS, Net, engine_with, thin
from zeroskip.methods import registry
from zeroskip.pack.smallest import FORMS, restored
from zeroskip.run.engine import Engine
from zeroskip.run.file import OPERATORS

Document = dict[str, Any]
LABELS = ("ant", "bee", "café", "bee", "")


def everything() -> tuple[nn.Module, Tensor]:
    """Convolutions of every kind of layout, a free concatenation, poolings, a residual and a linear layer."""
    torch.manual_seed(0)

    def forward(net: Any, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(net.a(x)), 3, 2, 1)
        x = torch.cat([functional.relu(net.b(x)), functional.relu6(net.c(x))], 1)
        y = functional.relu(net.d(x) + x)
        y = functional.adaptive_avg_pool2d(functional.hardswish(y), 3)
        return net.e(y.flatten(1)).softmax(-1)

    model = Net(
        forward,
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(8, 8, 1),
        c=nn.Conv2d(8, 8, 3, padding=1),
        d=nn.Conv2d(16, 16, 3, padding=1, groups=2),
        e=nn.Linear(144, 5),
    )
    return thin(model, 0.3), torch.randn(2, 3, 13, 12, generator=torch.Generator().manual_seed(1))


def save_example(path: Path) -> tuple[Tensor, Tensor]:
    """Write the engine, with labels; its input and output."""
    model, x = everything()
    engine = Engine(engine_with(model, x, *OURS).variants, registry(), LABELS)
    engine.save(path)
    return x, engine(x)


def read(path: Path) -> tuple[Document, dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["zeroskip"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(path: Path, document: Document, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(tensors, path, metadata={"zeroskip": json.dumps(document)})


def in_form(tensors: dict[str, Tensor], document: Document, form: str) -> dict[str, Tensor]:
    """``tensors`` with every weight in that form, whether or not it is the smallest."""
    result = {}
    for name, value in document["variants"][0]["graph"]["parameters"].items():
        tensor = restored(tensors, name, tuple(value["shape"]), value["dtype"])
        if tensor.is_floating_point():
            result |= {f"{name}:{part}": array for part, array in vars(FORMS[form](tensor)).items()}
        else:
            result[name] = tensor
    return result


NUMBERS = (0, 1, -1, 2, 3, 7, 64, 1000, 2**20, 2**31 - 1, 2**31, 2**63, -(2**31), 1.5, -0.5, 1e30)
THINGS = (
    None,
    True,
    False,
    "",
    "x",
    [],
    {},
    [1, 1],
    [-1, -1],
    {"ref": "x"},
    {"tuple": []},
    {"float": "nan"},
    {"dtype": "float16"},
)


def places(nest: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    found = [path] if path else []
    items = nest.items() if isinstance(nest, dict) else enumerate(nest) if isinstance(nest, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def edited(document: Document, chance: random.Random) -> tuple[Document, str]:
    """``document`` with one to three values changed, and what was done."""
    document, done = copy.deepcopy(document), []
    words = sorted({value for path in places(document) if isinstance(value := at(document, path), str)}) + sorted(
        OPERATORS
    )
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        paths = places(document)
        # Texts for people fill most of a plan; what matters is the graph, the configurations and the device.
        sharp = [path for path in paths if not {"why", "layer", "notes", "versions", "rejected"} & set(path)]
        path = chance.choice(sharp or paths)
        parent, key = at(document, path[:-1]), path[-1]
        old = parent[key]
        kind = chance.random()
        if isinstance(old, (dict, list)) and kind < 0.7:
            if isinstance(old, list):
                new: Any = chance.choice([old[1:], old[::-1], old + old[:1], [*old, 1], []])
            else:
                new = dict(old)
                name = chance.choice([*old, "more"])
                new.pop(name, None)
                if chance.random() < 0.5:
                    new[chance.choice(words)] = old.get(name)
        elif isinstance(old, str) and kind < 0.8:
            new = chance.choice(words)
        elif isinstance(old, (int, float)) and not isinstance(old, bool) and kind < 0.8:
            new = chance.choice([*NUMBERS, old + 1, old - 1, old * 2, -old])
            if chance.random() < 0.3:
                document = everywhere(document, old, new)
                done.append(f"every {old} -> {new}")
                continue
        else:
            new = chance.choice([*THINGS, *NUMBERS])
        parent[key] = new
        done.append(f"{path}: {old!r:.60} -> {new!r:.60}")
    return document, "; ".join(done)


def everywhere(nest: Any, old: Any, new: Any) -> Any:
    """Every number ``old`` exchanged: edits that stay consistent get further."""
    if isinstance(nest, dict):
        return {key: everywhere(item, old, new) for key, item in nest.items()}
    if isinstance(nest, list):
        return [everywhere(item, old, new) for item in nest]
    return new if type(nest) is type(old) and nest == old else nest


def retensored(tensors: dict[str, Tensor], chance: random.Random) -> tuple[dict[str, Tensor], str]:
    """``tensors`` with one renamed, dropped, reshaped, converted or with other contents."""
    tensors = dict(tensors)
    name = chance.choice(sorted(tensors))
    old = tensors.pop(name)
    kind = chance.choice(["drop", "rename", "reshape", "convert", "shorten", "fill", "flip"])
    if kind == "rename":
        tensors[name + chance.choice(["2", ":mask", ":gaps", ":columns", ":values", "."])] = old
    elif kind == "reshape":
        tensors[name] = old.reshape(1, *old.shape)
    elif kind == "convert":
        tensors[name] = old.to(chance.choice([torch.float16, torch.float64, torch.int64, torch.uint8]))
    elif kind == "shorten":
        tensors[name] = old.reshape(-1)[:-1].clone()
    elif kind == "fill":
        tensors[name] = torch.full_like(old, chance.choice([0, 1, 255]))
    elif kind == "flip":
        tensors[name] = old.flip(0)
    return tensors, f"{kind} {name}"
