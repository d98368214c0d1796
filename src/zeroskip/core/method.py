"""The contract of a sparse method: claim, configs, pack, build, bind.

A method is stateless.  Facts go in (``Segment``, parameters, ``Device``), decisions come out as data
(``Candidate``), and only ``bind`` touches the device.  docs/ADDING_A_METHOD.md walks through it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args

from torch import Tensor

from zeroskip.core.cost import Cost
from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.graph import CONV, LINEAR, Graph, Segment
from zeroskip.core.layer import PRECISION_BYTES, Layer
from zeroskip.core.layout import Layout

ConfigT = TypeVar("ConfigT")
PackedT = TypeVar("PackedT")
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Candidate(Generic[ConfigT]):
    """One way to run a segment: the method's own parameters and what they imply for the edges."""

    config: ConfigT
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    run_seconds: float = 0.0
    """Estimated: to try the likeliest first, and not to try what is hopeless; never to choose.  0: no estimate, always
    tried."""
    build_seconds: float = 0.0
    float16_terms: int = 0
    """Of its products, how many are added in float16 before their sum goes to float32; 0: none.  An error that no plan
    allows: such candidates are never proposed, a suite names them, and they are held to ``Expected.rounded``."""


class Run(Protocol):
    """A bound segment.  Works on torch's current stream, synchronises nothing and keeps nothing between calls."""

    workspace_bytes: int
    """Scratch memory a call needs (64-byte aligned, contents arbitrary)."""
    allocates: bool
    """True: a library call that returns new tensors; ``outputs`` is ignored and may be empty."""

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """Compute and return the outputs.

        Args:
            inputs: NCHW views as the candidate's input layouts promise (``[rows, c]`` for linear layers).
            outputs: views to write, any strides with contiguous columns; every element is overwritten.
            workspace: uint8 ``[workspace_bytes]``.
            residual: a tensor of the output's shape, or None.
        """


class Method(ABC, Generic[ConfigT, PackedT]):
    """One way of skipping zeros.  A folder under ``methods/`` holds exactly one."""

    name: ClassVar[str]
    cite: ClassVar[str]
    exploits: ClassVar[str]
    """"weights", "inputs", "both", or "nothing" for a dense library."""
    config_type: ClassVar[Any]
    """A dataclass, or a union of one for each kind of device."""
    reproducible: ClassVar[bool] = True
    """Two calls on the same inputs give the same bits.  What is not is measured, and run only if asked for by name."""

    @abstractmethod
    def claim(self, graph: Graph, layers: Mapping[str, Layer], start: str, device: Device) -> Sequence[Segment]:
        """The pieces starting at node ``start`` that this method could run on ``device``.

        Raises:
            Unsupported: none, with the reason shown to the user.
        """

    @abstractmethod
    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[ConfigT]]:
        """Valid candidates, best guess first.

        Raises:
            Unsupported: there are none; the message says why.
        """

    @abstractmethod
    def candidate(self, segment: Segment, config: ConfigT) -> Candidate[ConfigT]:
        """``config`` with the layouts it implies, for a plan that is read back.

        Raises:
            ValueError: the configuration does not fit the segment.
        """

    @abstractmethod
    def pack(self, segment: Segment, parameters: Parameters, config: ConfigT) -> PackedT:
        """Weights in the method's format.  Offline, torch and NumPy only.

        ``parameters`` holds ``weight`` and, where the layer has one, ``bias`` (for segments of several layers,
        ``<node>.weight`` and ``<node>.bias``).
        """

    @abstractmethod
    def unpack(self, packed: PackedT) -> Tensor:
        """Exactly the weights that will be computed with, ``[k, c / groups, r, s]``."""

    def build(self, packed: PackedT, device: Device) -> bytes | None:
        """Compile or assemble for ``device``, which need not be there.  May run in parallel; the result may be
        cached."""
        return None

    @abstractmethod
    def bind(self, segment: Segment, packed: PackedT, built: bytes | None, device: Device) -> Run:
        """Load the code and fix the launch.  Owns no mutable memory."""

    def cost(self, segment: Segment) -> Cost:
        """The floor of this segment if every zero weight is skipped and every tensor is touched once."""
        flops = bytes_read = bytes_written = 0
        for layer in segment.layers:
            shape, item = layer.shape, PRECISION_BYTES[layer.precision]
            # The least that says which weights are not zero: a bit for each.
            weight_bytes = item * layer.weights.nnz
            if layer.weights.density < 1:
                weight_bytes += math.prod(shape.weight_shape) // 8
            pixels = shape.n * shape.p * shape.q
            flops += 2 * layer.weights.nnz * pixels
            outputs = shape.k * pixels
            residual = outputs if layer.epilogue.residual != "none" else 0
            bytes_read += item * (shape.n * shape.c * shape.h * shape.w + residual) + weight_bytes
            bytes_written += item * outputs
        return Cost(flops, bytes_read, bytes_written)


def config_types(method: AnyMethod) -> tuple[type, ...]:
    """The dataclasses that a configuration of ``method`` may be."""
    return get_args(method.config_type) or (method.config_type,)


class LayerMethod(Method[ConfigT, PackedT]):
    """A method for one convolution or linear layer at a time; most methods are this."""

    @abstractmethod
    def supports(self, layer: Layer, device: Device) -> str | None:
        """None if the layer can be run on ``device``, else why not (shown to the user)."""

    def claim(self, graph: Graph, layers: Mapping[str, Layer], start: str, device: Device) -> Sequence[Segment]:
        node = graph.node(start)
        if node.op not in (CONV, LINEAR):
            raise Unsupported(f"{node.op} is neither a convolution nor a linear layer")
        layer = layers[start]
        if reason := self.supports(layer, device):
            raise Unsupported(reason)
        return (layer_segment(graph, layer),)


def layer_segment(graph: Graph, layer: Layer) -> Segment:
    """The segment of a single layer: inputs are x and, if fused, the residual."""
    node = graph.node(layer.name)
    residual = [argument.ref for argument in node.args[3:4] if argument is not None]
    return Segment((node.name,), (node.inputs[0], *residual), (node.name,), (layer,))


def layer_parameters(graph: Graph, segment: Segment, tensors: Parameters) -> dict[str, Tensor]:
    """The part of the model's tensors that ``pack`` gets for this segment."""
    result: dict[str, Tensor] = {}
    for layer in segment.layers:
        prefix = "" if len(segment.layers) == 1 else f"{layer.name}."
        _, weight, bias, *_ = graph.node(layer.name).args
        result[f"{prefix}weight"] = tensors[weight.ref]
        if bias is not None:
            result[f"{prefix}bias"] = tensors[bias.ref]
    return result


AnyMethod = Method[Any, Any]
