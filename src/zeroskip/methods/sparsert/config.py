"""How a layer is cut into pieces of code, and what of that fits which layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zeroskip.core.layer import PRECISION_BYTES, ConvShape, Layer
from zeroskip.cuda.limits import MOST_BLOCKS, REGISTERS
from zeroskip.pack.row_groups import Balance, RowGroups

FLOAT, BARRIER, LINE = 4, 8, 128
"""Bytes."""
MOST_SHARED = 227 * 1024
"""Bytes that a block can have on any GPU with clusters; ``bind`` asks the one at hand."""
MOST_SUMS = 128
OTHERS = 20
"""Registers of a thread beside its sums, at least: addresses, and a few elements of x under way."""
OTHERS_OF_PIECE = 12
"""Registers for each piece of a thread where there are tests for the border: address, coordinates, stores."""
OTHERS_OF_LOOP = 16
"""Registers that a loop over tiles holds for all of them."""
SHORTEST_RING = 4
RUN = 8
"""Pixels that the next tile begins at a multiple of: 32 bytes of float32, which L2 gives at once."""
MOST_REGISTERS, SCHEDULERS = 255, 4
"""Registers of a thread; schedulers of a multiprocessor, which have equally many, for a quarter of the warps each."""


def room(threads: int) -> int:
    """Registers that each thread of a block can have: they come in eights, and each scheduler has its own."""
    return min(REGISTERS // SCHEDULERS // (-(-threads // 32 // SCHEDULERS) * 32) // 8 * 8, MOST_REGISTERS)


@dataclass(frozen=True)
class SparseRTConfig:
    """Which warp of which block computes what.

    A thread holds the sums of ``rows`` rows (a row group) for ``pieces`` times ``vector`` pixels: ``vector`` of them
    lie together and are loaded at once, the pieces lie apart.  A *team* is ``warps`` warps side by side that run the
    same code, that of one part of one row group.  A block has ``stack`` row groups and for each of them ``groups``
    teams that share its nonzeros (SparseRT's thread groups); ``split`` blocks of a cluster share them further.  Their
    sums meet in shared memory.

    ``walk``: how many blocks take turns at the tiles of pixels, so that their code stays in the instruction cache; 0
    gives each tile a block of its own.  ``balance``: how rows are grouped (``pack/row_groups.py``).  ``halo``: x comes
    with a border of zeros as wide as the padding, instead of tests.  ``gaps``: y may have gaps between its rows and
    channels, so that where they lie is an argument and not in the code.  ``terms``: 0 sums in float32; else products of
    float16 are added to up to so many in float16, whose sums go to float32.  ``registers`` of a thread at most: what
    its sums leave holds elements of x on their way.

    ``slab``: 0, or how many input channels of x the copy engine brings to shared memory at a time, ``stages`` of them
    under way; ``mates`` blocks of a cluster, of neighbouring rows and the same pixels, each ask for a part of every
    slab, which goes to all of them (``slabs.py``).
    """

    rows: int
    vector: int = 1
    pieces: int = 1
    warps: int = 4
    stack: int = 1
    groups: int = 1
    split: int = 1
    walk: int = 0
    balance: Balance = "columns"
    halo: bool = False
    gaps: bool = False
    terms: int = 0
    registers: int = 64
    slab: int = 0
    stages: int = 1
    mates: int = 1

    def __post_init__(self) -> None:
        sizes = (self.rows, self.pieces, self.warps, self.stack, self.groups)
        if min(sizes) < 1 or self.walk < 0 or self.terms < 0:
            raise ValueError(f"sizes must be positive, walk and terms at least 0, got {self}")
        if self.vector not in (1, 2, 4, 8) or self.split not in (1, 2, 4, 8):
            raise ValueError(f"vector and split must be 1, 2, 4 or 8, got {self}")
        if self.balance not in ("ranges", "nonzeros", "columns"):
            raise ValueError(f"balance must be ranges, nonzeros or columns, got {self}")
        if self.sums > MOST_SUMS:
            raise ValueError(f"a thread would hold {self.sums} sums in registers, at most {MOST_SUMS}: {self}")
        if self.threads > 1024:
            raise ValueError(f"a block would have {self.threads} threads, at most 1024: {self}")
        if not self.sums + OTHERS <= self.registers <= MOST_REGISTERS:
            raise ValueError(f"{self.sums} sums need {self.sums + OTHERS} to {MOST_REGISTERS} registers: {self}")
        if self.registers > self.room:
            raise ValueError(f"{self.threads} threads have {self.room} registers at most: {self}")
        if self.walk and self.split > 1:
            raise ValueError(f"blocks of a cluster bring their sums once, they do not walk: {self}")
        if self.terms and self.vector == 1:
            raise ValueError(f"float16 is computed with in pairs, vector must be at least 2: {self}")
        if self.exchange_bytes > MOST_SHARED:
            raise ValueError(f"a block would need {self.exchange_bytes} bytes of shared memory: {self}")
        if self.slab < 0 or self.stages < 1 or self.mates not in (1, 2, 4, 8) or self.slab % self.mates:
            raise ValueError(f"mates are 1, 2, 4 or 8 and share the channels of a slab, got {self}")
        if self.slab and (self.parts > 1 or self.halo or self.pieces > 1):
            raise ValueError(f"x comes in slabs to whole row groups and one piece of pixels: {self}")
        if not self.slab and (self.stages, self.mates) != (1, 1):
            raise ValueError(f"stages and mates are for x in slabs, got {self}")

    @property
    def columns(self) -> int:
        """Pixels of a thread."""
        return self.vector * self.pieces

    @property
    def sums(self) -> int:
        """Registers for sums: float16 pairs are kept beside the float32 ones."""
        return self.rows * self.columns + (self.rows * self.columns // 2 if self.terms else 0)

    @property
    def lanes(self) -> int:
        """Threads of a team."""
        return 32 * self.warps

    @property
    def tile(self) -> int:
        """Pixels of a block."""
        return self.lanes * self.columns

    @property
    def teams(self) -> int:
        return self.stack * self.groups

    @property
    def threads(self) -> int:
        """With the warp that asks for slabs."""
        return self.lanes * self.teams + (32 if self.slab else 0)

    @property
    def room(self) -> int:
        """Registers that a thread can have."""
        return room(self.threads)

    @property
    def resident(self) -> int:
        """Blocks of a multiprocessor that there are registers and threads for."""
        warps = REGISTERS // SCHEDULERS // (-(-self.registers // 8) * 8 * 32) * SCHEDULERS
        return min(warps // (self.threads // 32), 2048 // self.threads)

    @property
    def parts(self) -> int:
        """Teams of a cluster that share a row group."""
        return self.groups * self.split

    @property
    def cluster(self) -> int:
        """Blocks of a cluster, which follow each other in z."""
        return self.split * self.mates

    @property
    def chunk(self) -> int:
        """Rows of a group that one of its teams finishes, at most."""
        return -(-self.rows // self.parts)

    @property
    def barrier_bytes(self) -> int:
        """Of shared memory: where each team of a cluster counts what it was brought."""
        return -(-self.teams // 2) * 2 * BARRIER if self.split > 1 else 0

    @property
    def exchange_bytes(self) -> int:
        """The barriers, and the sums that other teams bring to those that finish rows."""
        return self.barrier_bytes + self.teams * self.chunk * (self.parts - 1) * self.tile * FLOAT

    @property
    def ring(self) -> int:
        """Elements of x under way for each piece, where they are loaded into registers that hold zeros."""
        loop = OTHERS_OF_LOOP if self.walk else 0
        return (self.registers - self.sums - OTHERS - loop) // self.pieces - OTHERS_OF_PIECE

    def blocks(self, shape: ConvShape) -> int:
        """Of rows; mates may have none."""
        return -(-shape.k // (self.rows * self.stack * self.mates)) * self.mates

    def span(self, shape: ConvShape) -> int:
        """Pixels that a block computes, of its tile: about as many as every other; if x comes in slabs, whole images,
        or a part of one."""
        plane = shape.p * shape.q
        if self.slab:
            return min(self.tile // plane, shape.n) * plane if plane <= self.tile else self.tile
        tiles = max(1, -(-shape.n * plane // self.tile))
        even = -(-shape.n * plane // tiles // RUN) * RUN
        return self.tile if tiles == 1 else min(even, self.tile)

    def tiles(self, shape: ConvShape) -> int:
        """Of pixels."""
        return -(-shape.n * shape.p * shape.q // self.span(shape))

    def shared_bytes(self, layer: Layer) -> int:
        """Of a block."""
        if not self.slab:
            return self.exchange_bytes
        return self.control_bytes + self.stages * self.slab * self.span(layer.shape) * PRECISION_BYTES[layer.precision]

    @property
    def control_bytes(self) -> int:
        """The barriers of slabs: three for each stage, in lines of 128 bytes."""
        return -(-3 * self.stages * BARRIER // LINE) * LINE


@dataclass(frozen=True)
class SparseRTPacked:
    """A layer ready to be written as code: ``weight`` over columns ``(r * s_size + s) * c_size + c``, so that what one
    test for the border covers lies together, and ``bias`` float32 ``[k]``, zeros where the layer has none."""

    layer: Layer
    config: SparseRTConfig
    weight: RowGroups
    bias: Tensor


def flat(shape: ConvShape) -> bool:
    """Whether output pixel i of a plane reads input pixel i only."""
    return (shape.r, shape.s, *shape.stride, *shape.padding) == (1, 1, 1, 1, 0, 0)


def beyond(shape: ConvShape, down: int, right: int) -> tuple[bool, bool]:
    """Whether a tap so far from tap (0, 0) reads beyond the image for some output: in rows, in columns."""
    rows = down < shape.padding[0] or (shape.p - 1) * shape.stride[0] + down - shape.padding[0] >= shape.h
    columns = right < shape.padding[1] or (shape.q - 1) * shape.stride[1] + right - shape.padding[1] >= shape.w
    return rows, columns


def tested(shape: ConvShape, halo: bool) -> bool:
    """Whether some load is tested for the border."""
    last = (shape.r - 1) * shape.dilation[0], (shape.s - 1) * shape.dilation[1]
    return not halo and any((*beyond(shape, 0, 0), *beyond(shape, *last)))


def check(layer: Layer, config: SparseRTConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    shape = layer.shape
    if config.vector > 1 and not flat(shape):
        raise ValueError(f"pixels are loaded together by 1x1 convolutions of stride 1, the layer is {shape}: {config}")
    if shape.p * shape.q % config.vector:
        raise ValueError(f"an image of {shape.p * shape.q} pixels is no multiple of {config.vector}: {config}")
    if config.vector * PRECISION_BYTES[layer.precision] > 16:
        raise ValueError(f"a load is 16 bytes at most, the layer is {layer.precision}: {config}")
    if config.terms and layer.precision != "fp16":
        raise ValueError(f"float16 sums are for layers of fp16, the layer is {layer.precision}: {config}")
    if config.halo and shape.padding == (0, 0):
        raise ValueError(f"a layer without padding needs no halo: {config}")
    if tested(shape, config.halo) and config.ring < SHORTEST_RING:
        raise ValueError(f"{config.registers} registers leave too few for tests of the border: {config}")
    if config.gaps and config.vector > 1:
        raise ValueError(f"an output with gaps is written pixel by pixel: {config}")
    if config.walk >= max(config.tiles(shape), 1):
        raise ValueError(f"{config.walk} blocks would walk {config.tiles(shape)} tiles: {config}")
    if config.slab:
        _check_slabs(layer, config)
    if config.blocks(shape) > MOST_BLOCKS:
        raise ValueError(f"{shape.k} rows make more than {MOST_BLOCKS} blocks: {config}")


def _check_slabs(layer: Layer, config: SparseRTConfig) -> None:
    shape, span, item = layer.shape, config.span(layer.shape), PRECISION_BYTES[layer.precision]
    plane = shape.p * shape.q
    if not flat(shape):
        raise ValueError(f"x in slabs is for 1x1 convolutions of stride 1, the layer is {shape}: {config}")
    if shape.n * plane % span or (plane > span and plane % span):
        raise ValueError(f"{shape.n} images of {plane} pixels are no multiple of {span}: {config}")
    if shape.c % config.slab:
        raise ValueError(f"{shape.c} channels are no multiple of {config.slab}: {config}")
    if config.walk and shape.c % (2 * config.stages * config.slab):
        # So that the barriers of a stage stand at every tile as at the first.
        raise ValueError(f"blocks that walk take an even number of slabs to each stage: {config}")
    copied = span if plane > span else plane * (config.slab // config.mates)
    if copied * item % 16 or (plane > span and plane * item % 16):
        raise ValueError(f"what is copied of an image of {plane} pixels is no multiple of 16 bytes: {config}")
    if config.shared_bytes(layer) > MOST_SHARED:
        raise ValueError(f"a block would need {config.shared_bytes(layer)} bytes of shared memory: {config}")
