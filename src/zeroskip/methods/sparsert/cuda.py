"""Packing, assembling and the launch of a layer whose weights are code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.env import source_hash
from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import ConvShape, Layer
from zeroskip.core.layout import allocate
from zeroskip.cuda import assemble
from zeroskip.cuda.launch import load
from zeroskip.methods.sparsert.config import SparseRTConfig, SparseRTPacked
from zeroskip.methods.sparsert.emit import SYMBOL, emit
from zeroskip.pack.csr import Csr
from zeroskip.pack.row_groups import RowGroups


def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: SparseRTConfig) -> SparseRTPacked:
    shape = layer.shape
    csr = _by_tap(weight, shape)
    groups = config.blocks(shape) * config.stack
    columns = shape.r * shape.s * shape.c
    grouped = RowGroups.of(csr, columns, groups, config.rows, config.parts, config.balance)
    values = torch.zeros(shape.k) if bias is None else bias.detach().float().clone()
    return SparseRTPacked(layer, config, grouped, values)


def unpack(packed: SparseRTPacked) -> Tensor:
    shape = packed.layer.shape
    inputs = shape.c // shape.groups
    dense = packed.weight.dense().reshape(shape.groups, -1, shape.r, shape.s, shape.groups, inputs)
    own = torch.stack([dense[group, :, :, :, group] for group in range(shape.groups)])
    return own.permute(0, 1, 4, 2, 3).reshape(shape.weight_shape)


def _by_tap(weight: Tensor, shape: ConvShape) -> Csr:
    """``[k, c / groups, r, s]`` -> a matrix over columns ``(r * s_size + s) * c_size + c`` of all input channels."""
    inputs = shape.c // shape.groups
    csr = Csr.of(weight.detach().permute(0, 2, 3, 1).reshape(shape.k, -1))
    tap, channel = csr.col_indices // inputs, csr.col_indices % inputs
    first = csr.row_indices // (shape.k // shape.groups) * inputs
    return replace(csr, col_indices=tap * shape.c + first + channel)


def build(packed: SparseRTPacked, device: Device) -> bytes:
    return assemble.build_from(lambda: emit(packed, device.arch), _made_of(packed), SYMBOL, device.arch)


def _made_of(packed: SparseRTPacked) -> str:
    """All that ``emit`` reads, and by which sources: told much sooner than the text is written."""
    weight, digest = packed.weight, hashlib.sha256()
    for tensor in (weight.rows, weight.bounds, weight.places, weight.columns, weight.values, packed.bias):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode() + tensor.cpu().numpy().tobytes())
    layer = packed.layer
    precision = "fp32" if layer.precision == "tf32" else layer.precision  # the same code
    facts = (layer.shape, layer.epilogue, precision, packed.config, weight.shape, weight.parts)
    return f"{source_hash()} {facts} {digest.hexdigest()}"


class SparseRTRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, packed: SparseRTPacked, built: bytes, device: Device) -> None:
        config, shape = packed.config, packed.layer.shape
        self.shared_bytes = config.shared_bytes(packed.layer)
        if self.shared_bytes > device.shared_bytes:
            raise Unsupported(f"a block would need {self.shared_bytes} bytes of shared memory: {config}")
        self.kernel = load(built)
        blocks = config.blocks(shape) // config.mates
        self.grid = (config.walk or config.tiles(shape), blocks, config.cluster)
        self.block = (config.threads, 1, 1)
        self.cluster = (1, 1, config.cluster) if config.cluster > 1 else None
        self.halo, self.gaps = shape.padding if config.halo else None, config.gaps

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x = as_written(inputs[0], self.halo)
        y = (
            outputs[0]
            if self.gaps or planes(outputs[0])
            else torch.empty_like(outputs[0], memory_format=torch.contiguous_format)
        )
        added = None if residual is None else as_written(residual)
        item = x.element_size()
        strides = (x.stride(0), *y.stride()[:3], 0 if added is None else added.stride(0))
        self.kernel.launch(
            self.grid,
            self.block,
            (x, y, added, *(item * stride for stride in strides)),
            shared_bytes=self.shared_bytes,
            cluster=self.cluster,
            dependent=True,
        )
        if y is not outputs[0]:
            outputs[0].copy_(y)
        return outputs


def planes(x: Tensor) -> bool:
    """Whether rows and channels of an image follow each other without gaps."""
    _, c, h, w = x.shape
    return (c == 1 or x.stride(1) == h * w) and (h == 1 or x.stride(2) == w) and (w == 1 or x.stride(3) == 1)


def as_written(x: Tensor, halo: tuple[int, int] | None = None) -> Tensor:
    """``x`` if its rows and channels lie as the code has them, else a copy that does: without gaps, or with exactly
    that halo of zeros."""
    if halo is None:
        return x if planes(x) else x.clone(memory_format=torch.contiguous_format)
    n, c, h, w = x.shape
    rows, columns = h + 2 * halo[0], w + 2 * halo[1]
    if x.stride()[1:] == (rows * columns, columns, 1):
        return x
    return allocate((n, c, h, w), halo, x.dtype, x.device).copy_(x)
