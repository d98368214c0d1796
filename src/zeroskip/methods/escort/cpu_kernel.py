"""The CPU kernel as LLVM IR.

Equation: ``y[k, p, q] = act(bias[k] + sum over nonzeros (c, r, s) of W[k, c, r, s] x[c, p stride + r, q stride + s])``.

A thread takes work items (chunk of output channels, tile of pixels) by an atomic ticket.  For each block of input
channels it copies the tile's pixels into an L1-sized panel, then for each output channel of the chunk runs over its
nonzeros in that block: broadcast one weight, add one offset, and one multiply-add with a memory operand per vector of
the tile.  Sums of a row that spans several blocks wait in the workspace; the last block adds the epilogue.

Bytes per output: ``nnz / k`` weights of 8 bytes per tile from L2, one input load per multiply-add from L1, each input
read from memory once per chunk and tile (plus the rows that neighbouring tiles share).

Source: Escort/Escoin (arXiv 1802.10280) for the stretched offsets; the panel, its shifted copies and the register
tile are ours.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack

from zeroskip.cpu.emit import Emitter, vector
from zeroskip.methods.escort.cpu_geometry import CACHE_LINE, FLOAT, Geometry, Piece, powers_of_two
from zeroskip.pack.stretched import BLOCK_FIELDS, FIRST, FIRST_AND_LAST, LAST, MIDDLE

SYMBOL = "escort"
ARGUMENTS = (
    "x",
    "y",
    "residual",
    "bias",
    "chunks",
    "blocks",
    "channels",
    "segments",
    "entries",
    "workspace",
    "ticket",
    "thread",
    "x_image",
    "x_plane",
    "x_row",
    "x_col",
    "y_image",
    "y_plane",
    "y_row",
    "y_col",
    "r_image",
    "r_plane",
    "r_row",
    "r_col",
)
"""The 64-bit fields of the argument: pointers, two counters that start at 0, and strides in bytes."""


@functools.cache
def write_kernel(geometry: Geometry) -> str:
    """The module text of ``void escort(int64 *arguments)``."""
    return _Kernel(geometry).write()


class _Kernel:
    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.problem = geometry.problem
        self.config = geometry.config
        self.lanes = geometry.config.lanes
        self.emit = Emitter()
        used = [name for name in ARGUMENTS if geometry.residual != "none" or not name.startswith("r")]
        counters = ("ticket", "thread")
        pointers = ARGUMENTS[: ARGUMENTS.index("ticket")]
        self.arg = {
            name: (self.emit.load_pointer if name in pointers else self.emit.load_i64)("%args", self._field(name))
            for name in used
            if name not in counters
        }
        self.sums_of = [
            [self.emit.slot(vector(self.lanes)) for _ in range(self.config.vectors)] for _ in range(self.config.chains)
        ]

    @staticmethod
    def _field(name: str) -> int:
        return 8 * ARGUMENTS.index(name)

    def write(self) -> str:
        emit, geometry = self.emit, self.geometry
        thread = emit.fetch_add("%args", self._field("thread"))
        self.panel = emit.at(self.arg["workspace"], emit.mul(thread, geometry.thread_bytes))
        self.sums = emit.at(self.panel, geometry.panel_bytes)
        step = self.lanes * FLOAT
        with emit.loop(0, geometry.panel_bytes // step) as i:
            # Lanes beyond the image are computed and dropped; zeros keep them free of slow denormals.
            emit.store("zeroinitializer", self.panel, emit.mul(i, step), self.lanes, step)
        again, work, done = emit.name("again"), emit.name("work"), emit.name("done")
        emit.line(f"br label {again}")
        emit.label(again)
        item = emit.fetch_add("%args", self._field("ticket"))
        emit.line(f"br i1 {emit.let(f'icmp ult i64 {item}, {geometry.items}')}, label {work}, label {done}")
        emit.label(work)
        self._work_item(item)
        emit.line(f"br label {again}")
        emit.label(done)
        emit.line("ret void")
        return emit.function(f"define void @{SYMBOL}(ptr noalias %args)")

    # -- one tile of one chunk --------------------------------------------------------------------
    def _work_item(self, item: str) -> None:
        emit, problem, config = self.emit, self.problem, self.config
        _, image_groups, tile_rows, tile_cols = self.geometry.grid
        rest, col = emit.div(item, tile_cols), emit.mod(item, tile_cols)
        rest, row = emit.div(rest, tile_rows), emit.mod(rest, tile_rows)
        chunk, image = emit.div(rest, image_groups), emit.mod(rest, image_groups)

        def start(index: str, size: int, total: int) -> str:
            # The last tile moves back inside the image: neighbours then compute the same pixels alike.
            return emit.minimum(emit.mul(index, size), max(total - size, 0))

        p = start(row, config.rows, problem.p)
        q = start(col, config.cols, problem.q)
        n = start(image, config.images, problem.n)
        self.x_tile = self._place("x", n, emit.mul(p, problem.stride[0]), emit.mul(q, problem.stride[1]))
        self.y_tile = self._place("y", n, p, q)
        self.r_tile = "" if self.geometry.residual == "none" else self._place("r", n, p, q)
        bounds = emit.at(self.arg["chunks"], emit.mul(chunk, FLOAT))
        with emit.loop(emit.load_i32(bounds), emit.load_i32(bounds, FLOAT)) as index:
            self._block(emit.at(self.arg["blocks"], emit.mul(index, BLOCK_FIELDS * FLOAT)))

    def _place(self, tensor: str, n: str, row: str, col: str) -> str:
        emit = self.emit
        step = self.arg[f"{tensor}_col"] if self.problem.strided else str(FLOAT)
        pointer = self.arg["residual" if tensor == "r" else tensor]
        for index, stride in ((n, self.arg[f"{tensor}_image"]), (row, self.arg[f"{tensor}_row"]), (col, step)):
            pointer = emit.at(pointer, emit.mul(index, stride))
        return pointer

    def _block(self, block: str) -> None:
        emit = self.emit
        field = [emit.load_i32(block, index * FLOAT) for index in range(BLOCK_FIELDS)]
        self._fill_panel(field[0], field[1])
        self.entry = emit.slot("ptr")
        emit.put(self.entry, "ptr", emit.at(self.arg["entries"], emit.mul(field[2], 2 * FLOAT)))
        for kind in (FIRST_AND_LAST, FIRST, MIDDLE, LAST):
            with emit.loop(field[3 + kind], field[4 + kind]) as index:
                self._segment(emit.at(self.arg["segments"], emit.mul(index, 2 * FLOAT)), kind)

    # -- panel -------------------------------------------------------------------------------------
    def _fill_panel(self, begin: str, end: str) -> None:
        emit, geometry, problem, config = self.emit, self.geometry, self.problem, self.config
        with emit.loop(begin, end) as index:
            channel = emit.load_i32(self.arg["channels"], emit.mul(index, FLOAT))
            source = emit.at(self.x_tile, emit.mul(channel, self.arg["x_plane"]))
            target = emit.at(self.panel, emit.mul(emit.sub(index, begin), geometry.channel_floats * FLOAT))
            for phase_index, phase in enumerate(geometry.phases):
                for image in range(config.images):
                    with ExitStack() as stack:
                        rows = min(config.rows, problem.p) + geometry.reach(phase)
                        row = stack.enter_context(emit.loop(0, rows)) if rows > 1 else "0"
                        line = emit.add(emit.mul(row, problem.stride[0]), phase) if rows > 1 else str(phase)
                        x = emit.at(source, emit.mul(line, self.arg["x_row"]))
                        if image:
                            x = emit.at(x, emit.mul(self.arg["x_image"], image))
                        for kernel_col in range(problem.s):
                            start = geometry.copy_floats(phase_index, kernel_col) + image * geometry.image_floats
                            to = emit.at(target, emit.add(emit.mul(row, config.cols * FLOAT), start * FLOAT))
                            self._copy_row(x, kernel_col * problem.dilation[1], to)
                        self._ask_ahead(x, problem.stride[1], write=False)

    def _copy_row(self, source: str, shift: int, target: str) -> None:
        """Every ``stride``-th pixel from ``source`` on, ``cols`` of them, side by side; none beyond the image."""
        stride, col = self.problem.stride[1], 0
        columns = min(self.config.cols, self.problem.q)
        while col < columns:
            for width in powers_of_two(min(self.lanes, columns - col)):
                value = self._pixels(source, shift + col * stride, width)
                self.emit.store(value, target, col * FLOAT, width)
                col += width

    def _ask_ahead(self, row: str, stride: int, write: bool) -> None:
        """Prefetch the part of a row that the tile to the right will use.

        Rows of a tile are short and far apart, which hardware prefetchers do not follow.
        """
        if self.problem.strided:
            return
        width = self.config.cols * stride * FLOAT
        for line in range(width, 2 * width, CACHE_LINE):
            self.emit.prefetch(row, line, write)

    def _pixels(self, source: str, at: int, width: int) -> str:
        emit, stride = self.emit, self.problem.stride[1]
        if not self.problem.strided:
            if stride == 1 or width == 1:
                return emit.load(source, at * FLOAT, width)
            if stride == 2:
                # Two overlapping loads that end exactly at the last pixel wanted.
                low, high = emit.load(source, at * FLOAT, width), emit.load(source, (at + width - 1) * FLOAT, width)
                return emit.shuffle(low, high, width, [*range(0, width, 2), *range(width + 1, 2 * width, 2)])
        value = "poison"
        for lane in range(width):
            index = at + lane * stride
            offset = emit.mul(self.arg["x_col"], index) if self.problem.strided else str(index * FLOAT)
            scalar = emit.load(source, offset, 1)
            value = (
                scalar if width == 1 else emit.let(f"insertelement {vector(width)} {value}, float {scalar}, i32 {lane}")
            )
        return value

    # -- one output channel against one panel -----------------------------------------------------
    def _segment(self, segment: str, kind: int) -> None:
        emit, lanes, main = self.emit, self.lanes, self.sums_of[0]
        kind_text = vector(lanes)
        k, count = emit.load_i32(segment), emit.load_i32(segment, FLOAT)
        waiting = emit.at(self.sums, emit.mul(k, self.config.vectors * lanes * FLOAT))
        if kind in (FIRST, FIRST_AND_LAST):
            bias = emit.broadcast(emit.load(self.arg["bias"], emit.mul(k, FLOAT), 1), lanes)
            for sums in main:
                emit.put(sums, kind_text, bias)
        else:
            for index, sums in enumerate(main):
                emit.put(sums, kind_text, emit.load(waiting, index * lanes * FLOAT, lanes, lanes * FLOAT))
        self._accumulate(count)
        if kind in (LAST, FIRST_AND_LAST):
            self._finish(k)
        else:
            for index, sums in enumerate(main):
                emit.store(emit.get(sums, kind_text), waiting, index * lanes * FLOAT, lanes, lanes * FLOAT)

    def _accumulate(self, count: str) -> None:
        """Add the next ``count`` entries to the sums."""
        emit, chains, kind = self.emit, self.config.chains, vector(self.lanes)
        start = emit.get(self.entry, "ptr")
        stop = emit.at(start, emit.mul(count, 2 * FLOAT))
        emit.put(self.entry, "ptr", stop)
        if chains > 1:
            for chain in self.sums_of[1:]:
                for sums in chain:
                    emit.put(sums, kind, "zeroinitializer")
            whole = emit.at(start, emit.mul(emit.mul(emit.div(count, chains), chains), 2 * FLOAT))
            self._entries(start, whole, chains)
            start = whole
        self._entries(start, stop, 1)
        for chain in self.sums_of[1:]:
            for sums, extra in zip(self.sums_of[0], chain, strict=True):
                emit.put(sums, kind, emit.fadd(emit.get(sums, kind), emit.get(extra, kind), self.lanes))

    def _entries(self, start: str, stop: str, chains: int) -> None:
        emit, lanes, kind = self.emit, self.lanes, vector(self.lanes)
        body, done, cursor = emit.name("nonzeros"), emit.name("end"), emit.slot("ptr")
        emit.put(cursor, "ptr", start)
        emit.line(f"br i1 {emit.let(f'icmp ne ptr {start}, {stop}')}, label {body}, label {done}")
        emit.label(body)
        entry = emit.get(cursor, "ptr")
        for chain in range(chains):
            weight = emit.broadcast(emit.load(entry, chain * 2 * FLOAT, 1), lanes)
            x = emit.at(self.panel, emit.load_i32(entry, chain * 2 * FLOAT + FLOAT))
            for index, sums in enumerate(self.sums_of[chain]):
                image, within = divmod(index, self.config.image_vectors)
                offset = (image * self.geometry.image_floats + within * lanes) * FLOAT
                pixels = emit.load(x, offset, lanes, lanes * FLOAT if self.geometry.aligned else FLOAT)
                emit.put(sums, kind, emit.fma(pixels, weight, emit.get(sums, kind), lanes))
        following = emit.at(entry, chains * 2 * FLOAT)
        emit.put(cursor, "ptr", following)
        emit.line(f"br i1 {emit.let(f'icmp ne ptr {following}, {stop}')}, label {body}, label {done}")
        emit.label(done)

    # -- epilogue ----------------------------------------------------------------------------------
    def _finish(self, k: str) -> None:
        emit, residual = self.emit, self.geometry.residual
        y = emit.at(self.y_tile, emit.mul(k, self.arg["y_plane"]))
        r = "" if residual == "none" else emit.at(self.r_tile, emit.mul(k, self.arg["r_plane"]))
        for row in range(min(self.config.rows, self.problem.p)):
            self._ask_ahead(emit.at(y, emit.mul(self.arg["y_row"], row)), 1, write=True)
        for index, sums in enumerate(self.sums_of[0]):
            image, within = divmod(index, self.config.image_vectors)
            value = emit.get(sums, vector(self.lanes))
            for piece in self.geometry.pieces(within):
                width = piece.width
                part = (
                    value
                    if width == self.lanes
                    else emit.shuffle(value, "poison", self.lanes, range(piece.lane, piece.lane + width))
                )
                if residual == "before":
                    part = emit.fadd(part, emit.load(r, self._offset("r", image, piece), width), width)
                part = self._activate(part, width)
                if residual == "after":
                    part = emit.fadd(part, emit.load(r, self._offset("r", image, piece), width), width)
                emit.store(part, y, self._offset("y", image, piece), width)

    def _offset(self, tensor: str, image: int, piece: Piece) -> str:
        emit = self.emit
        offset = emit.mul(self.arg[f"{tensor}_row"], piece.row) if piece.row else "0"
        if image:
            offset = emit.add(emit.mul(self.arg[f"{tensor}_image"], image), offset)
        if piece.col:
            step = emit.mul(self.arg[f"{tensor}_col"], piece.col) if self.problem.strided else piece.col * FLOAT
            offset = str(step) if offset == "0" else emit.add(offset, step)
        return offset

    def _activate(self, value: str, width: int) -> str:
        activation = self.geometry.activation
        if activation == "none":
            return value
        value = self._clamp(value, "olt", "0.0", width)
        return self._clamp(value, "ogt", "6.0", width) if activation == "relu6" else value

    def _clamp(self, value: str, comparison: str, limit: str, width: int) -> str:
        """``limit`` where ``value`` compares true with it; a NaN compares false and stays."""
        emit, kind = self.emit, vector(width)
        bits = "i1" if width == 1 else f"<{width} x i1>"
        bound = limit if width == 1 else f"<{', '.join([f'float {limit}'] * width)}>"
        outside = emit.let(f"fcmp {comparison} {kind} {value}, {bound}")
        return emit.let(f"select {bits} {outside}, {kind} {bound}, {kind} {value}")
