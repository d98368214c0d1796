"""The CUDA side of depthwise: which tiles to try, packing, the template instance, and the bound call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.layer import PRECISION_BYTES, PRECISION_DTYPES, ConvShape, Epilogue, Layer, Precision, Sparsity
from zeroskip.cuda.compile import Instance
from zeroskip.cuda.compile import build as compile_kernel
from zeroskip.cuda.launch import load
from zeroskip.cuda.limits import CLOCK, MOST_BLOCKS, REGISTERS
from zeroskip.cuda.types import TYPES

KERNEL = Path(__file__).with_name("kernel.cuh")

MAX_THREADS = 256
"""As in kernel.cuh: what its register budget is made for."""
MOST_SIDE = 8
"""Outputs of a thread in one direction."""
SIDES = (1, 2, 4, 7, 8)
"""Of those, what is tried: 7 for images of 7, 14 and 28."""
MOST_TAPS = 49
MOST_LIVE = 170
"""Inputs, taps and sums of a thread that fit its 255 registers beside addresses: no more than that spills."""
ADDRESSES = 30
"""Of a multiprocessor."""
MOST_CANDIDATES = 12
SKIPPING_CANDIDATES = 2
MANY_TAPS = 25
SIMILAR = 0.1
"""What a candidate that differs in its block only must be better by to be tried first."""


@dataclass(frozen=True)
class DepthwiseConfig:
    """Outputs of a thread (``rows`` x ``cols``) and threads of a block (``threads_x`` across a plane, ``threads_y``
    down, on ``planes`` planes; a plane is one output channel of one image).

    ``window`` keeps the taps and the inputs they meet in registers; without it every tap reads its inputs anew, which
    is for convolutions that are too large for that.  ``skip`` branches around taps that are zero; all threads of a
    block must then work on one plane, so that no warp takes both ways.
    """

    rows: int
    cols: int
    threads_x: int
    threads_y: int
    planes: int = 1
    window: bool = True
    skip: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= MOST_SIDE and 1 <= self.cols <= MOST_SIDE):
            raise ValueError(f"rows and cols must be in 1..{MOST_SIDE}, got {self.rows}x{self.cols}")
        if min(self.threads_x, self.threads_y, self.planes) < 1 or self.threads > MAX_THREADS or self.planes > 64:
            block = f"{self.threads_x}x{self.threads_y}x{self.planes}"
            raise ValueError(f"a block has 1..{MAX_THREADS} threads on 1..64 planes, got {block}")
        if self.skip and self.planes != 1:
            raise ValueError(f"blocks that skip taps work on one plane, got {self.planes}")

    @property
    def threads(self) -> int:
        return self.threads_x * self.threads_y * self.planes


@dataclass(frozen=True)
class DepthwisePacked:
    """``taps`` float32 ``[k, r * s + 1 rounded up to 4]``: the weights of a channel (exact, whatever the layer's type),
    its bias or 0, and zeros, so that a thread fetches them 16 bytes at a time."""

    layer: Layer
    config: DepthwiseConfig
    taps: Tensor


# -- geometry -----------------------------------------------------------------------------------------
def _power_of_two(limit: int, *multiples: int) -> int:
    """The largest power of two up to ``limit`` that divides all ``multiples``."""
    while any(multiple % limit for multiple in multiples):
        limit //= 2
    return limit


def vector_of_x(shape: ConvShape, config: DepthwiseConfig, precision: Precision) -> int:
    """Elements of the widest load: every thread's columns must start at the same place within it."""
    return _power_of_two(16 // PRECISION_BYTES[precision], shape.w, config.cols * shape.stride[1])


def vector_of_y(shape: ConvShape, config: DepthwiseConfig, precision: Precision) -> int:
    return _power_of_two(16 // PRECISION_BYTES[precision], shape.q, config.cols)


def _met(outputs: int, taps: int, stride: int, dilation: int) -> set[int]:
    """Which inputs of a row (or column) of them a thread's outputs meet, counted from its first."""
    return {output * stride + tap * dilation for output in range(outputs) for tap in range(taps)}


def _live(shape: ConvShape, config: DepthwiseConfig) -> int:
    """Numbers that a thread has in registers at once, beside addresses."""
    outputs = config.rows * config.cols
    if not config.window:
        return 3 * outputs
    rows = _met(config.rows, shape.r, shape.stride[0], shape.dilation[0])
    cols = _met(config.cols, shape.s, shape.stride[1], shape.dilation[1])
    return len(rows) * len(cols) + shape.r * shape.s + outputs


def _grid(shape: ConvShape, config: DepthwiseConfig) -> tuple[int, int, int]:
    return (
        ceil(shape.n * shape.k / config.planes),
        ceil(shape.p / (config.rows * config.threads_y)),
        ceil(shape.q / (config.cols * config.threads_x)),
    )


def misfit(layer: Layer, config: DepthwiseConfig) -> str | None:
    """Why ``config`` cannot run the layer, or None."""
    shape = layer.shape
    if config.window and shape.r * shape.s > MOST_TAPS:
        return f"a window holds at most {MOST_TAPS} taps, the layer has {shape.r}x{shape.s}"
    if (live := _live(shape, config)) > MOST_LIVE:
        return f"{config.rows}x{config.cols} outputs need {live} registers for {shape}, there are {MOST_LIVE}"
    if max(_grid(shape, config)[1:]) > MOST_BLOCKS:
        return f"{shape.p}x{shape.q} outputs make more than {MOST_BLOCKS} tiles in one direction"
    return None


def check(layer: Layer, config: DepthwiseConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    if reason := misfit(layer, config):
        raise ValueError(reason)


# -- configurations -----------------------------------------------------------------------------------
def configs(layer: Layer, device: Device) -> list[tuple[float, DepthwiseConfig]]:
    """Estimated seconds and configuration, best guess first."""
    fitting = [config for config in _menu(layer.shape) if misfit(layer, config) is None]
    # Where the window fits and taps are few, reading x anew for each of them cannot be faster.
    if layer.shape.r * layer.shape.s < MANY_TAPS and any(config.window for config in fitting):
        fitting = [config for config in fitting if config.window]
    skipping: list[tuple[float, DepthwiseConfig]] = []
    if layer.weights.density < 1:
        one_plane = dict.fromkeys(replace(config, planes=1, skip=True) for config in fitting)
        skipping = _best(one_plane, layer, device, SKIPPING_CANDIDATES)
    found = _best(fitting, layer, device, MOST_CANDIDATES - len(skipping)) + skipping
    return sorted(found, key=lambda pair: pair[0])


def _best(
    configs: Iterable[DepthwiseConfig], layer: Layer, device: Device, count: int
) -> list[tuple[float, DepthwiseConfig]]:
    """The most promising, not too similar: another block for the same outputs of a thread must be worth its place."""
    ranked = sorted(((_seconds(layer, config, device), config) for config in configs), key=lambda pair: pair[0])
    seen: Counter[tuple[int, int, bool]] = Counter()
    order = []
    for seconds, config in ranked:
        tile = config.rows, config.cols, config.window
        order.append((seconds * (1 + SIMILAR * seen[tile]), seconds, config))
        seen[tile] += 1
    return [(seconds, config) for _, seconds, config in sorted(order, key=lambda entry: entry[0])[:count]]


def _menu(shape: ConvShape) -> dict[DepthwiseConfig, None]:
    """Everything that might be worth trying."""
    return dict.fromkeys(
        DepthwiseConfig(rows, cols, *_block(shape, rows, cols, threads), window)
        for cols in SIDES
        for rows in SIDES
        if cols <= shape.q and rows <= shape.p
        for threads in (64, 128, MAX_THREADS)
        for window in (True, False)
    )


def _block(shape: ConvShape, rows: int, cols: int, threads: int) -> tuple[int, int, int]:
    """A block of about so many threads, of equal blocks in each direction: the last one is not left half empty."""
    across, down = ceil(shape.q / cols), ceil(shape.p / rows)
    threads_x = ceil(across / ceil(across / 32))
    threads_y = min(down, threads // threads_x)
    threads_y = ceil(down / ceil(down / threads_y))
    return threads_x, threads_y, min(shape.n * shape.k, threads // (threads_x * threads_y), 64)


def _loads(shape: ConvShape, config: DepthwiseConfig, precision: Precision) -> tuple[int, int]:
    """Load instructions of a thread, and the 128-byte pieces a warp's loads take: those of L1's throughput."""
    if not config.window:
        count = shape.r * shape.s * (1 + config.rows * config.cols)
        return count, count
    rows = len(_met(config.rows, shape.r, shape.stride[0], shape.dilation[0]))
    vector, loads = vector_of_x(shape, config, precision), 0
    cols, phase = max(_met(config.cols, shape.s, shape.stride[1], shape.dilation[1])) + 1, -shape.padding[1]
    while cols > 0:
        step = vector
        while (phase % step) or step > cols:
            step //= 2
        loads, cols, phase = loads + 1, cols - step, phase + step
    apart = config.cols * shape.stride[1] * PRECISION_BYTES[precision] * 32 / 128
    return rows * loads, ceil(rows * loads * max(1.0, min(apart, 32.0)))


LATENCY = 1600.0
"""Cycles of a kernel that does nearly nothing: launch, taps, one round through L2, store."""
TURN = 300.0
"""Cycles that a block adds which finds no room at first: a round through L2, less what the others overlap with it."""


def _seconds(layer: Layer, config: DepthwiseConfig, device: Device) -> float:
    """A rough model in cycles, good enough to order candidates."""
    shape, item = layer.shape, PRECISION_BYTES[layer.precision]
    blocks = ceil(prod(_grid(shape, config)) / (device.num_sms or 132))
    warps = ceil(config.threads / 32)
    resident = REGISTERS // ((_live(shape, config) + ADDRESSES) * 32 * warps)
    turns = ceil(blocks / max(resident, 1))
    outputs, taps = config.rows * config.cols, shape.r * shape.s
    loads, pieces = _loads(shape, config, layer.precision)
    sums = taps * outputs if not config.skip else layer.weights.density * taps * outputs + 2 * taps
    instructions = 60 + 3 * loads + sums + 4 * outputs
    # Of one warp alone, of its scheduler (a quarter of the warps), of L1.
    busy = max(1.5 * instructions, blocks * warps * instructions / 4, blocks * warps * pieces)
    moved = item * (prod(shape.input_shape) + prod(shape.output_shape))
    rate = (device.l2_gbps or 5500.0) if moved < device.l2_bytes / 2 else (device.bandwidth_gbps or 2500.0)
    return (LATENCY + TURN * (turns - 1) + busy) / CLOCK + moved / (rate * 1e9)


# -- weights and code ---------------------------------------------------------------------------------
def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: DepthwiseConfig) -> DepthwisePacked:
    check(layer, config)
    shape = layer.shape
    count = shape.r * shape.s
    taps = torch.zeros(shape.k, ceil((count + 1) / 4) * 4)
    taps[:, :count] = weight.detach().reshape(shape.k, count)
    if bias is not None:
        taps[:, count] = bias.detach()
    return DepthwisePacked(layer, config, taps)


def unpack(packed: DepthwisePacked) -> Tensor:
    shape = packed.layer.shape
    taps = packed.taps[:, : shape.r * shape.s].reshape(shape.weight_shape)
    return taps.to(PRECISION_DTYPES[packed.layer.precision])


def expression(layer: Layer, config: DepthwiseConfig) -> str:
    """The template instance that computes the layer."""
    shape, number = layer.shape, TYPES[layer.precision]
    residual = {"none": "no"}.get(layer.epilogue.residual, layer.epilogue.residual)
    tail = [
        str(config.skip).lower(),
        f"zeroskip::Activation::{layer.epilogue.activation}",
        f"zeroskip::Residual::{residual}",
    ]
    if not config.window:
        return _template("loop", number, config.rows, config.cols, *tail)
    conv = _template("Conv", shape.r, shape.s, *shape.stride, *shape.dilation, shape.padding[1])
    vectors = vector_of_x(shape, config, layer.precision), vector_of_y(shape, config, layer.precision)
    tile = _template("Tile", config.rows, config.cols, *vectors)
    return _template("window", number, conv, tile, shape.k // shape.c, *tail)


def _template(name: str, *arguments: object) -> str:
    return f"zeroskip::depthwise::{name}<{', '.join(map(str, arguments))}>"


def build(packed: DepthwisePacked, device: Device) -> bytes:
    return compile_kernel(KERNEL, expression(packed.layer, packed.config), device.arch)


def instances() -> Sequence[Instance]:
    """The likeliest configuration of common layers and the extremes, for CI."""
    dense = Sparsity(1, 1.0, "dense", 0.0)
    plain, everything = Epilogue(True, "relu"), Epilogue(True, "relu6", "before")

    def layer(
        side: int, taps: int, stride: int, precision: Precision, tail: Epilogue = plain, dilation: int = 1
    ) -> Layer:
        around = dilation * (taps // 2)
        steps = ((stride, stride), (around, around), (dilation, dilation))
        shape = ConvShape(1, 64, side, side, 64, taps, taps, *steps, groups=64)
        return Layer("", "conv2d", shape, precision, dense, tail)

    return [
        Instance(KERNEL, expression(one, config))
        for one, config in (
            (layer(112, 3, 1, "fp32"), DepthwiseConfig(2, 4, 28, 4)),
            (layer(112, 3, 2, "fp32"), DepthwiseConfig(2, 4, 14, 7)),
            (layer(112, 3, 2, "fp16"), DepthwiseConfig(1, 8, 7, 14)),
            (layer(56, 3, 1, "bf16"), DepthwiseConfig(4, 8, 7, 14, 2)),
            (layer(7, 3, 1, "fp32"), DepthwiseConfig(7, 7, 1, 1, 64)),
            (layer(7, 3, 1, "fp16"), DepthwiseConfig(1, 1, 7, 7, 4)),
            (layer(28, 3, 1, "fp32", everything), DepthwiseConfig(2, 4, 7, 14, skip=True)),
            (layer(28, 3, 1, "fp16", Epilogue(residual="after"), dilation=2), DepthwiseConfig(2, 4, 7, 14)),
            (layer(56, 5, 1, "fp32"), DepthwiseConfig(4, 4, 14, 14)),
            (layer(56, 5, 2, "fp16"), DepthwiseConfig(2, 4, 7, 14)),
            (layer(56, 7, 1, "fp32"), DepthwiseConfig(2, 4, 14, 7)),
            (layer(56, 7, 1, "fp16", everything), DepthwiseConfig(2, 4, 14, 7, skip=True)),
            (layer(56, 9, 1, "fp32"), DepthwiseConfig(4, 8, 7, 14, window=False, skip=True)),
            (layer(56, 9, 1, "bf16", everything), DepthwiseConfig(1, 1, 32, 8, window=False)),
        )
    ]


# -- the call -----------------------------------------------------------------------------------------
def divider(divisor: int) -> tuple[int, int]:
    """``(magic, shift)`` of kernel.cuh's ``divide``, the first as the int32 with the same bits."""
    shift = (divisor - 1).bit_length()
    magic = 2**32 * (2**shift - divisor) // divisor + 1
    return magic - 2**32 * (magic >= 2**31), shift


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """From image to image, channel to channel and row to row, in elements; 0 where there is only one."""
    if tensor is None:
        return 0, 0, 0
    (n, c, h, _), (image, channel, row, _) = tensor.shape, tensor.stride()
    return image * (n > 1), channel * (c > 1), row * (h > 1)


def _aligned(tensor: Tensor | None, vector: int) -> bool:
    """Whether rows start at multiples of ``vector`` elements in memory."""
    if tensor is None:
        return True
    steps = (tensor.data_ptr() // tensor.element_size(), *_strides(tensor))
    return not any(step % vector for step in steps)


class DepthwiseRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, packed: DepthwisePacked, built: bytes) -> None:
        layer, config = packed.layer, packed.config
        shape = layer.shape
        self.kernel, self.taps = load(built), packed.taps
        self.grid, self.block = _grid(shape, config), (config.threads_x, config.threads_y, config.planes)
        self.vectors = vector_of_x(shape, config, layer.precision), vector_of_y(shape, config, layer.precision)
        self.window, self.residual = config.window, layer.epilogue.residual != "none"
        self.sizes = (shape.n * shape.k, shape.k, *divider(shape.k), shape.h, shape.w, shape.p, shape.q)
        self.padding = shape.padding
        self.conv = (shape.k // shape.c, shape.r, shape.s, *shape.stride, *shape.dilation, packed.taps.shape[1])

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y, residual = inputs[0], outputs[0], residual if self.residual else None
        tensors = (argument for tensor in (x, y, residual) for argument in (tensor, *_strides(tensor)))
        if self.window:
            x_vector, y_vector = self.vectors
            aligned = _aligned(x, x_vector) and _aligned(y, y_vector) and _aligned(residual, y_vector)
            rest: tuple[int, ...] = (self.padding[0], int(aligned))
        else:
            rest = (*self.padding, *self.conv)
        arguments = (*tensors, self.taps, *self.sizes, *rest)
        self.kernel.launch(self.grid, self.block, arguments, dependent=True)
        return outputs
