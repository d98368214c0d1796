"""A small writer of LLVM IR text: values are names, loops are context managers.

Only what the kernels here need: 64-bit integers, pointers, and float vectors whose width may change
from one operation to the next.  Mutable variables are stack slots; LLVM's ``sroa`` pass turns them
into registers, so a kernel is written like a C function and comes out in SSA form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

FLOAT_BYTES = 4


def vector(lanes: int) -> str:
    """The IR type of ``lanes`` floats."""
    return "float" if lanes == 1 else f"<{lanes} x float>"


class Emitter:
    """Collects the body of one IR function.  A value is the text of an operand: ``%7``, ``42``, ``@g``."""

    def __init__(self) -> None:
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._count = 0
        self._declared: set[str] = set()

    # -- plumbing -------------------------------------------------------------------------------
    def name(self, stem: str = "v") -> str:
        self._count += 1
        return f"%{stem}{self._count}"

    def line(self, text: str) -> None:
        self._lines.append("  " + text)

    def let(self, expression: str, stem: str = "v") -> str:
        result = self.name(stem)
        self.line(f"{result} = {expression}")
        return result

    def label(self, name: str) -> None:
        self._lines.append(f"{name[1:]}:")

    def function(self, signature: str) -> str:
        """The finished module text, the collected body under ``signature``."""
        declarations = "\n".join(sorted(self._declared))
        body = "\n".join(["entry:", *self._slots, *self._lines])
        return f"{declarations}\n\n{signature} {{\n{body}\n}}\n"

    # -- variables ------------------------------------------------------------------------------
    def slot(self, kind: str) -> str:
        """A mutable variable of IR type ``kind``."""
        result = self.name("slot")
        self._slots.append(f"  {result} = alloca {kind}, align 64")
        return result

    def get(self, slot: str, kind: str) -> str:
        return self.let(f"load {kind}, ptr {slot}")

    def put(self, slot: str, kind: str, value: str) -> None:
        self.line(f"store {kind} {value}, ptr {slot}")

    # -- integers -------------------------------------------------------------------------------
    def add(self, a: str, b: str | int) -> str:
        return a if b in (0, "0") else self.let(f"add i64 {a}, {b}")

    def sub(self, a: str, b: str | int) -> str:
        return self.let(f"sub i64 {a}, {b}")

    def mul(self, a: str, b: str | int) -> str:
        return a if b in (1, "1") else self.let(f"mul i64 {a}, {b}")

    def div(self, a: str, b: int) -> str:
        return a if b == 1 else self.let(f"udiv i64 {a}, {b}")

    def mod(self, a: str, b: int) -> str:
        return "0" if b == 1 else self.let(f"urem i64 {a}, {b}")

    def minimum(self, a: str, b: int) -> str:
        return self.let(f"select i1 {self.let(f'icmp ult i64 {a}, {b}')}, i64 {a}, i64 {b}")

    # -- memory ---------------------------------------------------------------------------------
    def at(self, pointer: str, offset: str | int) -> str:
        """``pointer`` moved by ``offset`` bytes."""
        return pointer if offset in (0, "0") else self.let(f"getelementptr i8, ptr {pointer}, i64 {offset}", "p")

    def load_i32(self, pointer: str, offset: str | int = 0) -> str:
        return self.let(f"sext i32 {self.let(f'load i32, ptr {self.at(pointer, offset)}, align 4')} to i64")

    def load_i64(self, pointer: str, offset: str | int = 0) -> str:
        return self.let(f"load i64, ptr {self.at(pointer, offset)}, align 8")

    def load_pointer(self, pointer: str, offset: str | int = 0) -> str:
        return self.let(f"load ptr, ptr {self.at(pointer, offset)}, align 8")

    def load(self, pointer: str, offset: str | int, lanes: int, align: int = FLOAT_BYTES) -> str:
        return self.let(f"load {vector(lanes)}, ptr {self.at(pointer, offset)}, align {align}")

    def store(self, value: str, pointer: str, offset: str | int, lanes: int, align: int = FLOAT_BYTES) -> None:
        self.line(f"store {vector(lanes)} {value}, ptr {self.at(pointer, offset)}, align {align}")

    def prefetch(self, pointer: str, offset: str | int, write: bool = False) -> None:
        """Ask for the cache line at ``pointer + offset``, into L2; never faults."""
        self._declared.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.line(f"call void @llvm.prefetch.p0(ptr {self.at(pointer, offset)}, i32 {int(write)}, i32 2, i32 1)")

    def fetch_add(self, pointer: str, offset: int) -> str:
        """Atomically take the next ticket from a 64-bit counter."""
        return self.let(f"atomicrmw add ptr {self.at(pointer, offset)}, i64 1 monotonic")

    # -- floats ---------------------------------------------------------------------------------
    def broadcast(self, scalar: str, lanes: int) -> str:
        if lanes == 1:
            return scalar
        one = self.let(f"insertelement {vector(lanes)} poison, float {scalar}, i32 0")
        zeros = ", ".join(["i32 0"] * lanes)
        return self.let(f"shufflevector {vector(lanes)} {one}, {vector(lanes)} poison, <{lanes} x i32> <{zeros}>")

    def shuffle(self, a: str, b: str, lanes: int, picks: Sequence[int]) -> str:
        """Lanes ``picks`` of ``a`` followed by ``b`` (each ``lanes`` wide)."""
        if len(picks) == 1:
            return self.let(f"extractelement {vector(lanes)} {a}, i32 {picks[0]}")
        mask = ", ".join(f"i32 {pick}" for pick in picks)
        return self.let(f"shufflevector {vector(lanes)} {a}, {vector(lanes)} {b}, <{len(picks)} x i32> <{mask}>")

    def fma(self, a: str, b: str, c: str, lanes: int) -> str:
        kind = vector(lanes)
        suffix = "f32" if lanes == 1 else f"v{lanes}f32"
        self._declared.add(f"declare {kind} @llvm.fma.{suffix}({kind}, {kind}, {kind})")
        return self.let(f"call {kind} @llvm.fma.{suffix}({kind} {a}, {kind} {b}, {kind} {c})")

    def fadd(self, a: str, b: str, lanes: int) -> str:
        return self.let(f"fadd {vector(lanes)} {a}, {b}")

    # -- control --------------------------------------------------------------------------------
    @contextmanager
    def loop(self, start: str | int, stop: str | int, step: int = 1) -> Iterator[str]:
        """``for i in range(start, stop, step)``: yields ``i``."""
        index = self.slot("i64")
        head, body, done = self.name("head"), self.name("body"), self.name("done")
        self.put(index, "i64", str(start))
        self.line(f"br label {head}")
        self.label(head)
        i = self.get(index, "i64")
        self.line(f"br i1 {self.let(f'icmp slt i64 {i}, {stop}')}, label {body}, label {done}")
        self.label(body)
        yield i
        self.put(index, "i64", self.add(i, step))
        self.line(f"br label {head}")
        self.label(done)
