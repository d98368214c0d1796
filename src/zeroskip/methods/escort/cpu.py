"""The CPU side of Escort: which tiles to try, packing, and the bound call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.layer import Layer
from zeroskip.cpu import jit
from zeroskip.cpu.threads import entry, launcher
from zeroskip.methods.escort.cpu_geometry import FLOAT, EscortConfig, Geometry
from zeroskip.methods.escort.cpu_kernel import ARGUMENTS, SYMBOL, write_kernel
from zeroskip.pack.stretched import Stretched, stretch

WAKE_SECONDS = 5e-6
"""What starting and joining threads costs, roughly."""
PANEL_SHARES = (0.5, 0.75, 0.95, 1.9)
"""Panel sizes to try, as shares of the L1 cache; the last one trades L1 hits for fewer partial sums."""


@dataclass(frozen=True)
class EscortPacked:
    """``bias`` float32 ``[k]``, zeros where the layer has none."""

    geometry: Geometry
    weight: Stretched
    bias: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.numel() * FLOAT


def geometry_of(layer: Layer, config: EscortConfig) -> Geometry:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    return Geometry.of(layer.shape, layer.kind == "linear", layer.epilogue, config)


# -- configurations -----------------------------------------------------------------------------------
SHORT = 8
"""Floats of vectors that CPUs with longer ones have too, and may be faster with: some work on the halves of a long one
in turns, and short ones leave less of a tile beside the image.  With both to choose from ResNet-18 at 90% zeros takes
3.0 instead of 3.6 ms on an EPYC of family 25, model 17."""


def configs(layer: Layer, device: Device) -> list[tuple[float, EscortConfig]]:
    """Estimated seconds and configuration, best guess first."""
    found: dict[EscortConfig, float] = {}
    longest = device.vector_floats
    for tile in itertools.chain(*(_tiles(layer, device, lanes) for lanes in {longest, min(longest, SHORT)})):
        for share in PANEL_SHARES:
            geometry = geometry_of(layer, tile)
            fit = max(1, int(device.l1_bytes * share) // (geometry.channel_floats * FLOAT))
            blocks = -(-layer.shape.c // fit)
            config = replace(tile, block_channels=-(-layer.shape.c // blocks))
            for threads in {1, device.threads}:
                chunks = _chunks(replace(geometry, config=config), threads)
                config = replace(config, chunks=chunks, threads=threads)
                found[config] = _seconds(layer, replace(geometry, config=config), device)
    return sorted(((seconds, config) for config, seconds in found.items()), key=lambda pair: pair[0])


def _tiles(layer: Layer, device: Device, lanes: int) -> Iterator[EscortConfig]:
    shape = layer.shape
    most = device.vector_registers - 2
    flat = (shape.r, shape.s, shape.stride, shape.padding) == (1, 1, (1, 1), (0, 0)) and layer.kind == "conv2d"
    if layer.kind == "linear":
        p, q, n = 1, max(shape.n, 1), 1
    elif flat:
        p, q, n = 1, shape.p * shape.q, shape.n
    else:
        p, q, n = shape.p, shape.q, shape.n
    widths = {lanes * vectors for vectors in (1, 2, 3, 4, 7, 8, most // 2, most - 2, most - 1, most)}
    widths = {width for width in widths if width < q + lanes and width <= lanes * most}
    if q <= lanes * most:
        widths |= {q, -(-q // lanes) * lanes}
    for cols in sorted(widths):
        for fewer in (0, 1):
            rows = max(1, min(p, most * lanes // cols))
            rows = -(-p // (-(-p // rows) + fewer))
            config = EscortConfig(rows, cols, 1, lanes, 1, 1, flat=flat)
            if rows >= p and cols >= q and n > 1:
                config = replace(config, images=max(1, min(n, most // config.vectors)))
            yield replace(config, chains=_chains(config.vectors, most))


def _chains(vectors: int, most: int) -> int:
    """Enough independent multiply-adds to cover a latency of 4 cycles at 2 a cycle."""
    return max(1, min(-(-8 // vectors), most // vectors, 4))


def _chunks(geometry: Geometry, threads: int) -> int:
    """The fewest pieces of the output channels that keep every thread busy to the end."""
    tiles = replace(geometry, config=replace(geometry.config, chunks=1)).items
    if threads == 1 or not tiles:
        return 1
    pieces = 1
    while pieces < geometry.problem.k and tiles * pieces < 4 * threads and (tiles * pieces) % threads:
        pieces += 1
    return pieces


def _seconds(layer: Layer, geometry: Geometry, device: Device) -> float:
    """A rough model in cycles, good enough to order candidates."""
    config, nnz = geometry.config, layer.weights.nnz
    blocks = -(-layer.shape.c // config.block_channels)
    load = (1.0 if geometry.aligned else 1.25) * (1.0 if geometry.panel_bytes <= device.l1_bytes else 1.2)
    per_entry = max(config.vectors * max(1.0, config.lanes / SHORT) / 2 * load, 4 / config.chains, 2.0)
    pieces = min(layer.shape.k * blocks, nnz + layer.shape.k)
    per_piece = 12 + config.vectors * (1.0 if blocks == 1 else 2.0)
    panel = layer.shape.c * geometry.channel_floats / config.lanes * 1.5 * config.chunks
    tiles = geometry.items / config.chunks
    return tiles * (nnz * per_entry + pieces * per_piece + panel) / 3e9 / config.threads + WAKE_SECONDS * (
        config.threads > 1
    )


# -- weights and code -----------------------------------------------------------------------------------
def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: EscortConfig) -> EscortPacked:
    geometry = geometry_of(layer, config)
    stretched = stretch(
        weight.detach().reshape(layer.shape.weight_shape),
        layer.shape.groups,
        geometry.tap_bytes,
        geometry.channel_floats * FLOAT,
        config.block_channels,
        config.chunks,
    )
    bias = torch.zeros(layer.shape.k) if bias is None else bias.detach().to(torch.float32).contiguous()
    return EscortPacked(geometry, stretched, bias)


def build(packed: EscortPacked) -> bytes:
    return jit.assemble(write_kernel(packed.geometry))


class EscortRun:
    allocates = False

    def __init__(self, layer: Layer, packed: EscortPacked, built: bytes, device: Device) -> None:
        self.linear = layer.kind == "linear"
        self.packed = packed
        self.code = jit.load(built, SYMBOL)
        self.threads = max(1, min(packed.geometry.config.threads, packed.geometry.items))
        self.workspace_bytes = packed.geometry.thread_bytes * self.threads
        self.padding = layer.shape.padding
        self._call = entry(self.code.address)
        weight = packed.weight
        tables = {
            "bias": packed.bias,
            "chunks": weight.chunks,
            "blocks": weight.blocks,
            "channels": weight.channels,
            "segments": weight.segments,
            "entries": weight.entries,
        }
        self._template = np.zeros(len(ARGUMENTS), np.int64)
        for name, table in tables.items():
            self._template[ARGUMENTS.index(name)] = table.data_ptr()

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        assert workspace is not None
        x, y = inputs[0], outputs[0]
        arguments = self._template.copy()
        arguments[12:16] = x_strides = self._strides(x)
        arguments[16:20] = self._strides(y)
        arguments[0] = x.data_ptr() - self.padding[0] * x_strides[2] - self.padding[1] * FLOAT
        arguments[1] = y.data_ptr()
        arguments[9] = workspace.data_ptr()
        if residual is not None:
            arguments[2] = residual.data_ptr()
            arguments[20:24] = self._strides(residual)
        if self.threads == 1:
            self._call(arguments.ctypes.data)
        else:
            launcher()(self.code.address, arguments.ctypes.data, self.threads)
        return outputs

    def _strides(self, tensor: Tensor) -> tuple[int, int, int, int]:
        """Bytes from image to image, plane to plane, row to row and pixel to pixel, as the kernel sees them."""
        if self.linear:
            return 0, FLOAT, 0, tensor.stride(-2) * FLOAT if tensor.dim() > 1 else 0
        image, plane, row, col = tensor.stride()
        return image * FLOAT, plane * FLOAT, row * FLOAT, col * FLOAT
