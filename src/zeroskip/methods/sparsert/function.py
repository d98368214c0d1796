"""The code of one team: its pixels, its products, the end of the layer.

In which order loads and multiply-adds stand in the text makes no difference (tried with 1 to 16 loads ahead): ptxas
begins with as many loads as registers allow and keeps them coming between the multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from zeroskip.core.layer import PRECISION_BYTES
from zeroskip.methods.sparsert.config import FLOAT, SparseRTPacked, beyond, flat
from zeroskip.methods.sparsert.exchange import Exchange
from zeroskip.methods.sparsert.ptx import BITS, Body, Kind, operand, single, width
from zeroskip.methods.sparsert.slabs import Slabs
from zeroskip.methods.sparsert.team import Team

POINTERS = ("x", "y", "residual")
STRIDES = ("x_image", "y_image", "y_channel", "y_row", "r_image")
MOST_NONZEROS = 2000
"""Between two branches: ptxas schedules what lies between, in time and registers that grow with its length."""
MOST_RING = 32


@dataclass(frozen=True)
class _Piece:
    """``vector`` neighbouring pixels of a thread, as registers: their address in x at tap (0, 0) of channel 0, where
    they lie in the output (``row`` and ``column`` are empty where nothing needs them), and the row and column of x that
    tap (0, 0) meets (empty where taps meet nothing but the image)."""

    x: str
    image: str
    pixel: str
    row: str
    column: str
    top: str
    left: str


@dataclass
class _Ring:
    """Registers that the loads of one tap take in turns: zeros, which the loads leave alone in threads whose pixel lies
    beyond the border.  By piece; empty where no tap of the thread can."""

    tests: list[str] = field(default_factory=list)
    zeros: list[list[str]] = field(default_factory=list)
    turn: int = 0


def parameters(packed: SparseRTPacked) -> list[tuple[Kind, str]]:
    """Kind and name of what functions are told, in the order of the kernel's arguments."""
    shape = packed.layer.shape
    absent = {"x_image", "y_image", "r_image"} if shape.n == 1 else set[str]()
    if not packed.config.gaps:
        absent |= {"y_channel", "y_row"}
    if packed.layer.epilogue.residual == "none":
        absent |= {"residual", "r_image"}
    kinds: list[tuple[Kind, str]] = [("d", name) for name in POINTERS]
    kinds += [("r", name) for name in STRIDES]
    return [(kind, name) for kind, name in kinds if name not in absent]


def function(packed: SparseRTPacked, team: Team, hopper: bool) -> str:
    """PTX of the function ``code_<index>``, which does not return.  ``hopper``: sm_90 or later."""
    declared = ", ".join(f".param {BITS[kind]} {name}" for kind, name in parameters(packed))
    body = _Code(packed, team, hopper).written()
    return "\n".join([f".func code_{team.index}({declared})", ".noreturn", "{", body, "}"])


class _Code:
    """One function on its way to text."""

    def __init__(self, packed: SparseRTPacked, team: Team, hopper: bool) -> None:
        self.team, self.hopper, self.body = team, hopper, Body()
        self.layer, self.config, self.shape = packed.layer, packed.config, packed.layer.shape
        self.item = PRECISION_BYTES[self.layer.precision]
        vector = self.config.vector
        self.word: Kind = "f" if self.item == FLOAT else "h" if vector == 1 else "r"
        self.words = vector // 2 if self.word == "r" else vector
        self.slabs = Slabs.of(self.layer, self.config) if self.config.slab else None
        rows, columns = self.shape.padding if self.config.halo else (0, 0)
        self.x_row = self.shape.w + 2 * columns
        self.x_channel = (self.shape.h + 2 * rows) * self.x_row
        self.known = {
            name: self.body.to(kind, f"ld.param{BITS[kind]}", f"[{name}]") for kind, name in parameters(packed)
        }
        for name in POINTERS:
            if name in self.known:
                self.known[name] = self.body.to("d", "cvta.to.global.u64", self.known[name])
        self.sums: dict[int, list[str]] = {}
        """By place: the registers of its row's sums, one for each pixel of the thread."""
        self.chains: dict[int, tuple[int, list[str]]] = {}
        """By place: how many products are in the sums of pairs of float16, and their registers."""

    def written(self) -> str:
        config, body, team = self.config, self.body, self.team
        self.lane = body.to("r", "mov.u32", "%tid.x")
        if seat := team.index % config.teams:
            self.lane = body.to("r", "sub.u32", f"{self.lane}, {seat * config.lanes}")
        self.tile = body.to("r", "mov.u32", "%ctaid.x")
        if self.hopper and config.walk:
            body.put("griddepcontrol.wait")
        if config.walk:
            body.label("NEXT")
        if self.slabs is not None:
            self.base = body.to("r", "mov.u32", "sums")
            self.first = body.to("p", "setp.eq.u32", f"{body.to('r', 'and.b32', f'{self.lane}, 31')}, 0")
        self.pieces = [self._piece(index) for index in range(config.pieces)]
        if self.hopper and not config.walk:
            body.put("griddepcontrol.wait")
        own = team.owned(team.part)
        if self.layer.epilogue.residual == "before":
            self.sums |= {place: self._residual(team.rows[place]) for place in own}
        self._multiply()
        exchange = Exchange(body, config, team, self.lane, self.sums, self.hopper)
        if config.parts > 1:
            exchange.run(own)
        for place in own:
            self._finish(place)
        if config.walk:
            if config.parts > 1:
                exchange.meet()  # what came is read before more comes
            body.put(f"add.u32 {self.tile}, {self.tile}, {config.walk}")
            more = body.to("p", "setp.lt.u32", f"{self.tile}, {config.tiles(self.shape)}")
            body.put(f"@{more} bra NEXT")
        body.label("END")
        body.put("exit")
        return body.text()

    # -- pixels -----------------------------------------------------------------------------------------
    def _piece(self, index: int) -> _Piece:
        config, shape, body = self.config, self.shape, self.body
        count, first = shape.n * shape.p * shape.q, self.lane
        if config.vector > 1:
            first = body.to("r", "mul.lo.u32", f"{first}, {config.vector}")
        if index:
            first = body.to("r", "add.u32", f"{first}, {index * config.lanes * config.vector}")
        if (span := config.span(shape)) < config.tile:
            first = body.to("r", "min.u32", f"{first}, {span - config.vector}")  # as below
        number = body.to("r", "mad.lo.u32", f"{self.tile}, {span}, {first}")
        if count % span:
            # Threads behind the last pixel compute the last one too, and store the same bits.  With a test before the
            # store ptxas would not take a warp's threads for one any more and would fetch what is common to them anew
            # for every few loads: a tenth more instructions.
            number = body.to("r", "min.u32", f"{number}, {count - config.vector}")
        image, pixel = ("", number) if shape.n == 1 else body.divided(number, shape.p * shape.q)
        row, column = "", pixel
        if shape.p > 1 and (config.gaps or not flat(shape)):
            row, column = body.divided(pixel, shape.q)
        top, left, offset = "", "", pixel
        if not flat(shape):
            up = -shape.padding[0]
            top = body.to("r", "mad.lo.s32", f"{row}, {shape.stride[0]}, {up}") if row else ""
            top = top or body.to("r", "mov.u32", f"{up}")
            left = body.to("r", "mad.lo.s32", f"{column}, {shape.stride[1]}, {-shape.padding[1]}")
            offset = body.to("r", "mad.lo.s32", f"{top}, {self.x_row}, {left}")
        if self.slabs is not None:
            return _Piece(self.slabs.place(body, self.base, first), image, pixel, row, column, top, left)
        x = body.to("d", "mad.wide.s32", f"{offset}, {self.item}, {self.known['x']}")
        if image:
            x = body.to("d", "mad.wide.s32", f"{image}, {self.known['x_image']}, {x}")
        return _Piece(x, image, pixel, row, column, top, left)

    def _output(self, piece: _Piece, tensor: str, row: int) -> str:
        """The address of a piece in a row of y or of the residual."""
        body, known, name = self.body, self.known, tensor[0]
        gaps = self.config.gaps and name == "y"
        if (place := f"{tensor} of {piece.x}") not in known:
            at = piece.column if gaps else piece.pixel
            base = body.to("d", "mad.wide.s32", f"{at}, {self.item}, {known[tensor]}")
            if gaps and piece.row:
                base = body.to("d", "mad.wide.s32", f"{piece.row}, {known['y_row']}, {base}")
            if piece.image:
                base = body.to("d", "mad.wide.s32", f"{piece.image}, {known[f'{name}_image']}, {base}")
            known[place] = base
        if gaps:
            address = body.to("d", "mad.wide.s32", f"{known['y_channel']}, {row}, {known[place]}")
            return f"[{address}]"
        return f"[{known[place]}+{row * self.shape.p * self.shape.q * self.item}]"

    # -- products ---------------------------------------------------------------------------------------
    def _multiply(self) -> None:
        """Add x times weight to the sums, for every nonzero."""
        if self.slabs is not None:
            return self._multiply_slabs(self.slabs)
        body, channels, nonzeros, pieces = self.body, self.shape.c, self.team.nonzeros, self.pieces
        channel = self.item * self.x_channel
        never, count, tap, first, ring = "", 0, -1, 0, _Ring()
        for index, (column, entries) in enumerate(nonzeros):
            if column // channels != tap:
                tap = column // channels
                down, right = self._tap(tap)
                first = self.item * (down * self.x_row + right) - tap * channels * channel
                ring = self._ring(tap, nonzeros[index : index + MOST_RING])
            if count + len(entries) > MOST_NONZEROS:
                # Of a grid without blocks, which ptxas cannot know that there is none of.
                never = never or body.to("p", "setp.eq.u32", f"{body.to('r', 'mov.u32', '%nctaid.x')}, 0")
                body.put(f"@{never} bra END")
                count = 0
            count += len(entries)
            words: list[str] = []
            offset = first + column * channel
            if not ring.tests:
                for piece in pieces:
                    words += self._load("global", f"[{piece.x}+{offset}]")
            else:
                words += [self._tested(f"[{piece.x}+{offset}]", ring, at) for at, piece in enumerate(pieces)]
                ring.turn += 1
            self._products(entries, words)
        self._end_chains()

    def _multiply_slabs(self, slabs: Slabs) -> None:
        """The same where x comes in slabs: every slab is waited for, and left when its last load was made."""
        (piece,), nonzeros, at = self.pieces, self.team.nonzeros, 0
        for slab in range(slabs.count):
            slabs.take(self.body, self.base, slab)
            while at < len(nonzeros) and nonzeros[at][0] // self.config.slab == slab:
                column, entries = nonzeros[at]
                offset = slabs.stage(slab) + column % self.config.slab * slabs.pitch
                self._products(entries, self._load("shared", f"[{piece.x}+{offset}]"))
                at += 1
            slabs.leave(self.body, self.base, slab, self.first)
        self._end_chains()

    def _end_chains(self) -> None:
        for place in list(self.chains):
            self._end_chain(place)

    def _products(self, entries: Sequence[tuple[int, str]], words: Sequence[str]) -> None:
        """One column's, of what was loaded of it."""
        if self.config.terms:
            for place, weight in entries:
                self._chain(place, weight, words)
        else:
            elements = words if self.item == FLOAT else [one for word in words for one in self._single(word)]
            self._add(entries, elements)

    def _add(self, entries: Sequence[tuple[int, str]], elements: Sequence[str]) -> None:
        """One column's products; written for speed, as this is most of the text."""
        sums, lines = self.sums, self.body.lines
        for place, weight in entries:
            if place not in sums:
                sums[place] = [self.body.to("f", "mul.rn.f32", f"{x}, {weight}") for x in elements]
                continue
            lines += [
                f"\tfma.rn.f32 {total}, {x}, {weight}, {total};"
                for total, x in zip(sums[place], elements)  # noqa: B905 -- as many of each
            ]

    def _chain(self, place: int, weight: str, words: Sequence[str]) -> None:
        """A product in float16, whose sums go to float32 after so many terms."""
        body, factor = self.body, self.body.to("r", "mov.b32", weight)
        length, totals = self.chains.get(place, (0, []))
        if not length:
            totals = [body.to("r", "mul.rn.f16x2", f"{word}, {factor}") for word in words]
        else:
            for total, word in zip(totals, words, strict=True):
                body.put(f"fma.rn.f16x2 {total}, {word}, {factor}, {total}")
        self.chains[place] = (length + 1, totals)
        if length + 1 == self.config.terms:
            self._end_chain(place)

    def _end_chain(self, place: int) -> None:
        _, totals = self.chains.pop(place)
        parts = [element for word in totals for element in self._single(word)]
        self.sums[place] = self.body.plus(self.sums[place], parts) if place in self.sums else parts

    # -- x ----------------------------------------------------------------------------------------------
    def _tap(self, tap: int) -> tuple[int, int]:
        """Rows and columns of x from what tap (0, 0) meets."""
        down, right = divmod(tap, self.shape.s)
        return down * self.shape.dilation[0], right * self.shape.dilation[1]

    def _ring(self, tap: int, ahead: Sequence[tuple[int, Sequence[tuple[int, str]]]]) -> _Ring:
        """For a tap whose loads begin the columns ``ahead``."""
        config, shape, body = self.config, self.shape, self.body
        by, sizes, outside = self._tap(tap), (shape.h, shape.w), beyond(shape, *self._tap(tap))
        if config.halo or not any(outside):
            return _Ring()
        ring, loads = _Ring(), sum(column // shape.c == tap for column, _ in ahead)
        kind: Kind = "f" if self.item == FLOAT else "h"
        zero, nothing = ("mov.f32", single(0.0)) if self.item == FLOAT else ("mov.b16", "0")
        for piece in self.pieces:
            tests = []
            for start, step, size, needed in zip((piece.top, piece.left), by, sizes, outside, strict=True):
                if needed:
                    at = body.to("r", "add.s32", f"{start}, {step}") if step else start
                    tests.append(body.to("p", "setp.lt.u32", f"{at}, {size}"))
            ring.tests.append(tests[0] if len(tests) == 1 else body.to("p", "and.pred", ", ".join(tests)))
            ring.zeros.append([body.to(kind, zero, nothing) for _ in range(min(loads, config.ring))])
        return ring

    def _tested(self, where: str, ring: _Ring, at: int) -> str:
        """x at an address of piece number ``at``, or zero."""
        target = ring.zeros[at][ring.turn % len(ring.zeros[at])]
        kind = "f32" if self.item == FLOAT else "b16"
        self.body.put(f"@{ring.tests[at]} ld.global.{kind} {target}, {where}")
        return target

    def _load(self, space: str, where: str) -> list[str]:
        """``vector`` neighbouring elements: one register for each, but for pairs of 16 bits."""
        words = self.body.several(self.word, self.words)
        kind = ".f32" if self.word == "f" else BITS[self.word]
        self.body.lines.append(f"\tld.{space}{width(self.words)}{kind} {operand(words)}, {where};")
        return words

    def _single(self, word: str) -> list[str]:
        """The elements of a register that ``_load`` gave, in float32."""
        body, precision = self.body, self.layer.precision
        if self.item == FLOAT:
            return [word]
        if precision == "fp16":
            halves = [word]
            if not word.startswith("%h"):
                halves = [body.new("h"), body.new("h")]
                body.put(f"mov.b32 {{{halves[0]}, {halves[1]}}}, {word}")
            return [body.to("f", "cvt.f32.f16", half) for half in halves]
        # A bfloat16 is the upper half of a float32.
        if word.startswith("%h"):
            upper = [body.to("r", "shl.b32", f"{body.to('r', 'cvt.u32.u16', word)}, 16")]
        else:
            upper = [body.to("r", "shl.b32", f"{word}, 16"), body.to("r", "and.b32", f"{word}, 0xFFFF0000")]
        return [body.to("f", "mov.b32", bits) for bits in upper]

    # -- the end of the layer ---------------------------------------------------------------------------
    def _residual(self, row: int) -> list[str]:
        """In float32."""
        words = [word for piece in self.pieces for word in self._load("global", self._output(piece, "residual", row))]
        return [element for word in words for element in self._single(word)]

    def _finish(self, place: int) -> None:
        body, config, epilogue = self.body, self.config, self.layer.epilogue
        row, bias = self.team.rows[place], self.team.biases[place]
        if place in self.sums:
            values = self.sums[place]
            if bias != 0:
                values = [body.to("f", "add.rn.f32", f"{value}, {single(bias)}") for value in values]
            if epilogue.activation != "none":
                values = [body.to("f", "max.NaN.f32", f"{value}, {single(0.0)}") for value in values]
            if epilogue.activation == "relu6":
                values = [body.to("f", "min.NaN.f32", f"{value}, {single(6.0)}") for value in values]
        else:
            known = single(_activated(bias, epilogue.activation))
            values = [body.to("f", "mov.f32", known) for _ in range(config.columns)]
        if epilogue.residual == "after":
            values = self.body.plus(values, self._residual(row))
        for index, piece in enumerate(self.pieces):
            self._store(piece, row, values[index * config.vector : (index + 1) * config.vector])

    def _store(self, piece: _Piece, row: int, values: Sequence[str]) -> None:
        body, short = self.body, {"fp16": "f16", "bf16": "bf16"}.get(self.layer.precision)
        kind = "f32"
        if short and len(values) == 1:
            values, kind = [body.to("h", f"cvt.rn.{short}.f32", values[0])], "b16"
        elif short:
            pairs = zip(values[::2], values[1::2], strict=True)
            values, kind = [body.to("r", f"cvt.rn.{short}x2.f32", f"{high}, {low}") for low, high in pairs], "b32"
        body.put(f"st.global{width(len(values))}.{kind} {self._output(piece, 'y', row)}, {operand(values)}")


def _activated(value: float, activation: str) -> float:
    """Of a row without nonzeros."""
    if activation == "none" or math.isnan(value):
        return value
    return min(max(value, 0.0), 6.0 if activation == "relu6" else math.inf)
