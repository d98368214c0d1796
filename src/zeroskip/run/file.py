"""The ``.zsk`` file: one safetensors file whose metadata holds graph and plans as JSON.

Weights are stored once, each in its smallest form (``pack.smallest``), and are packed for the methods at load.  There
is no code and no pickle in the file; whatever is wrong with it is found before any kernel sees it.  docs/FILE_FORMAT.md
describes it for other readers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from zeroskip.core.atomic import replace_file
from zeroskip.core.errors import FileFormatError, SaveError
from zeroskip.core.graph import CONV, LINEAR, Graph, Value, graph_from_json, graph_to_json
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.methods import registry
from zeroskip.model.program import Program
from zeroskip.pack.smallest import restored, stored
from zeroskip.plan.plan import Plan
from zeroskip.plan.planner import validate
from zeroskip.run.engine import Engine, Variant
from zeroskip.run.shapes import check_shapes

FORMAT = 2

# fmt: off
OPERATORS = frozenset(
    f"aten.{name}"
    for name in (
        "_adaptive_avg_pool2d.default", "_log_softmax.default", "_native_batch_norm_legit_no_training.default",
        "_softmax.default", "_to_copy.default", "abs.default", "adaptive_avg_pool1d.default",
        "adaptive_avg_pool2d.default", "add.Scalar", "add.Tensor", "addmm.default", "amax.default", "amin.default",
        "argmax.default", "avg_pool1d.default", "avg_pool2d.default", "bmm.default", "cat.default", "chunk.default",
        "clamp.default", "clamp_max.default", "clamp_min.default", "clip.default", "clone.default",
        "constant_pad_nd.default",
        "contiguous.default", "conv1d.default", "conv2d.default", "conv2d.padding", "conv_transpose2d.input",
        "div.Scalar", "div.Tensor", "elu.default", "exp.default", "expand.default", "flatten.using_ints",
        "gelu.default", "group_norm.default", "hardsigmoid.default", "hardswish.default", "hardtanh.default",
        "instance_norm.default", "layer_norm.default", "leaky_relu.default", "linear.default", "log_softmax.int",
        "matmul.default", "max_pool1d.default", "max_pool2d.default", "maximum.default", "mean.default", "mean.dim",
        "minimum.default", "mish.default", "mm.default", "mul.Scalar", "mul.Tensor", "native_group_norm.default",
        "native_layer_norm.default", "neg.default", "pad.default", "permute.default", "pixel_shuffle.default",
        "pixel_unshuffle.default", "pow.Tensor_Scalar", "prelu.default", "relu.default", "relu6.default",
        "reshape.default", "rsqrt.default", "rsub.Scalar", "select.int", "sigmoid.default", "silu.default",
        "slice.Tensor", "softmax.int", "softplus.default", "split.Tensor", "split_with_sizes.default", "sqrt.default",
        "squeeze.default", "squeeze.dim", "squeeze.dims", "stack.default", "sub.Scalar", "sub.Tensor", "sum.default",
        "sum.dim_IntList", "t.default", "tanh.default", "topk.default", "transpose.int", "unsqueeze.default",
        "upsample_bilinear2d.default", "upsample_bilinear2d.vec", "upsample_nearest2d.default",
        "upsample_nearest2d.vec", "view.default", "where.self",
    )
) | {CONV, LINEAR, "getitem"}
# fmt: on
"""What a file may call: functions of tensors without side effects."""


def save(variants: Sequence[Variant], path: Path, labels: Sequence[str] | None = None) -> None:
    """Write ``variants``, which share their weights, to ``path``; see ``Engine.save``."""
    replace_file(path, contents(variants, labels))


def contents(variants: Sequence[Variant], labels: Sequence[str] | None = None) -> bytes:
    """Of such a file."""
    documents, tensors = [], dict[str, Tensor]()
    for variant in variants:
        graph = variant.program.graph
        for node in graph.nodes:
            if node.op not in OPERATORS:
                raise SaveError(
                    f"node {node.name} runs {node.op}, which a .zsk file may not call: the engine works in "
                    "this process, but it cannot be saved"
                )
        try:
            documents.append({"graph": graph_to_json(graph), "plan": to_json(variant.plan)})
        except TypeError as error:
            raise SaveError(f"an argument of the graph cannot be written as JSON: {error}") from error
        tensors |= {name: tensor.detach().cpu() for name, tensor in variant.program.tensors.items()}
    arrays: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = stored(name, tensor)
        if taken := arrays.keys() & parts.keys():
            raise SaveError(
                f"two tensors would be stored as {sorted(taken)}: rename a parameter or buffer with a colon"
            )
        arrays |= parts
    document = {"format": FORMAT, "variants": documents} | ({} if labels is None else {"labels": list(labels)})
    return safetensors.torch.save(arrays, metadata={"zeroskip": json.dumps(document, allow_nan=False)})


def load(path: str | Path, device: str | torch.device | None = None) -> Engine:
    """Open a file that ``engine.save`` wrote.  Needs neither the model's code nor ``torch.export``.

    Args:
        device: "cpu" or "cuda" (the current GPU), to be sure of it: a file runs on the kind of device that it was
            compiled for.

    Raises:
        FileFormatError: the file is damaged, is something else, is of a newer format, or was compiled for a GPU where
            there is none.
        ValueError: the file was compiled for another device than ``device``.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected one written by engine.save(...)")
    try:
        variants, labels = _read(path, None if device is None else torch.device(device))
        return Engine(variants, registry(), labels)
    except FileFormatError:
        raise
    except Exception as error:
        raise FileFormatError(f"{path} is no valid .zsk file: {type(error).__name__}: {error}") from error


def _read(path: Path, wanted: torch.device | None) -> tuple[list[Variant], tuple[str, ...] | None]:
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("zeroskip")
        if text is None:
            raise FileFormatError(
                f"{path} is a safetensors file without zeroskip's metadata; expected one written by engine.save(...)"
            )
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    document = json.loads(text)
    if document["format"] != FORMAT:
        older = isinstance(document["format"], int) and document["format"] < FORMAT
        raise FileFormatError(
            f"{path} has format {document['format']!r}, this zeroskip reads {FORMAT}: "
            + ("compile the model and save it again" if older else "update zeroskip")
        )
    variants: list[Variant] = []
    tensors: dict[str, Tensor] = {}
    methods = registry()
    for item in document["variants"]:
        graph = graph_from_json(item["graph"])
        _check_names(graph)
        plan = from_json(Plan, item["plan"])
        _check_device(path, plan, wanted)
        for name, value in graph.parameters.items():
            if name not in tensors:  # variants share their weights
                tensors[name] = restored(arrays, name, value.shape, value.dtype)
            _check_tensor(name, tensors[name], value)
        program = Program(graph, {name: tensors[name] for name in graph.parameters})
        check_shapes(program)
        if plan.device.kind == "cuda":
            place = plan.device.torch
            program = Program(graph, {name: tensor.to(place) for name, tensor in program.tensors.items()})
        validate(plan, program, methods, plan.device.kind)
        variants.append(Variant(program, plan))
    if len({variant.plan.device.kind for variant in variants}) != 1:
        raise FileFormatError(f"{path} holds no plan, or plans for several kinds of device")
    labels = from_json(tuple[str, ...], document["labels"], "labels") if "labels" in document else None
    return variants, labels


def _check_device(path: Path, plan: Plan, wanted: torch.device | None) -> None:
    made_for = f"{path} was compiled for {plan.device.kind} ({plan.device.name})"
    if plan.device.kind == "cuda" and not torch.cuda.is_available():
        raise FileFormatError(
            f"{made_for} and torch finds no NVIDIA GPU here: load it on a machine with one, or compile the model here "
            "with an example on the cpu"
        )
    if wanted is None:
        return
    if wanted.type != plan.device.kind:
        raise FileFormatError(
            f"{made_for}, not for {wanted}: load it without device=, or compile the model with an example on {wanted}"
        )
    if wanted.index not in (None, plan.device.torch.index):
        raise FileFormatError(
            f"engines run on the current GPU, {plan.device.torch}, not on {wanted}: call "
            f"torch.cuda.set_device({wanted.index}) first"
        )


def _check_tensor(name: str, tensor: Tensor, value: Value) -> None:
    if tuple(tensor.shape) != value.shape or str(tensor.dtype) != f"torch.{value.dtype}":
        raise FileFormatError(f"tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, the graph expects {value}")


def _check_names(graph: Graph) -> None:
    """Every operator allowed, every value made before it is read, nothing made twice."""
    known = {*graph.inputs, *graph.parameters}
    for node in graph.nodes:
        if node.op not in OPERATORS:
            raise FileFormatError(f"node {node.name} calls {node.op!r}, which is not allowed in a file")
        unknown = [name for name in node.inputs if name not in known]
        if unknown or node.name in known:
            raise FileFormatError(f"node {node.name} reads {unknown} before they exist, or exists twice")
        if (node.conv is not None) != (node.op in (CONV, LINEAR)):
            raise FileFormatError(
                f"node {node.name} ({node.op}) must have convolution attributes if it is a layer, and only then"
            )
        known.add(node.name)
    if not graph.output_names or not set(graph.output_names) <= known or not set(graph.inputs) <= set(graph.values):
        raise FileFormatError("the graph's inputs or outputs name values that do not exist")
