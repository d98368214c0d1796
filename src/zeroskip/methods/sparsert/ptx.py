"""Writing PTX: lines, fresh registers, and the few idioms that take more than one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["p", "h", "r", "d", "f"]
BITS: dict[Kind, str] = {"p": ".pred", "h": ".b16", "r": ".b32", "d": ".b64", "f": ".f32"}
"""Types of registers by the letter that their names begin with."""


def single(value: float) -> str:
    """``value`` rounded to float32 as PTX writes it."""
    return singles(np.array([value], np.float32))[0]


def singles(values: npt.NDArray[np.float32]) -> list[str]:
    """``single`` of each."""
    return [f"0f{bits:08X}" for bits in values.view(np.uint32).tolist()]


def half_pairs(values: npt.NDArray[np.float16]) -> list[str]:
    """Each value twice, as a 32-bit operand."""
    return [f"0x{bits:04X}{bits:04X}" for bits in values.view(np.uint16).tolist()]


def operand(registers: Sequence[str]) -> str:
    """Of an instruction that takes so many at once."""
    return registers[0] if len(registers) == 1 else "{" + ", ".join(registers) + "}"


def width(count: int) -> str:
    """The suffix of such an instruction."""
    return "" if count == 1 else f".v{count}"


@dataclass
class Body:
    """The body of a function: registers and instructions, in the order they are asked for."""

    lines: list[str] = field(default_factory=list)
    _used: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(BITS, 0))

    def new(self, kind: Kind) -> str:
        """A register that nothing has been written to: predicate, 16, 32 or 64 bits, or float32."""
        number = self._used[kind]
        self._used[kind] = number + 1
        return f"%{kind}{number}"

    def several(self, kind: Kind, count: int) -> list[str]:
        """So many new registers."""
        first = self._used[kind]
        self._used[kind] = first + count
        return [f"%{kind}{number}" for number in range(first, first + count)]

    def put(self, instruction: str) -> None:
        self.lines.append(f"\t{instruction};")

    def to(self, kind: Kind, instruction: str, operands: str) -> str:
        """``instruction`` into a new register."""
        target = self.new(kind)
        self.put(f"{instruction} {target}, {operands}")
        return target

    def label(self, name: str) -> None:
        self.lines.append(f"{name}:")

    def text(self) -> str:
        """With the declarations of the registers in front."""
        declared = [f"\t.reg {BITS[kind]} %{kind}<{self._used[kind]}>;" for kind in BITS if self._used[kind]]
        return "\n".join([*declared, *self.lines])

    def plus(self, totals: Sequence[str], more: Sequence[str]) -> list[str]:
        """Sums in float32, one for each of as many pairs."""
        return [self.to("f", "add.rn.f32", f"{a}, {b}") for a, b in zip(totals, more, strict=True)]

    def wait(self, barrier: str, parity: int, again: str, over: str, scope: str) -> None:
        """Until the turn of that parity is over at a barrier in this block's shared memory; two labels.  ``scope``: of
        who wrote what is waited for, "cta" or "cluster"."""
        self.label(again)
        done = self.to("p", f"mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64", f"[{barrier}], {parity}")
        self.put(f"@{done} bra {over}")
        self.put(f"bra {again}")
        self.label(over)

    def meet_cluster(self) -> None:
        """Every block of the cluster has begun, and its barriers are ready."""
        self.put("fence.mbarrier_init.release.cluster")
        self.put("barrier.cluster.arrive.relaxed.aligned")
        self.put("barrier.cluster.wait.aligned")

    def enter(self, index: str, functions: int, arguments: Sequence[tuple[str, str]]) -> None:
        """Run function ``code_<index>`` of so many, which does not return, with registers and their types as PTX writes
        them."""
        if functions > 1:
            # A table: with a tree of branches every warp would wait for several lines of instructions.
            self.put(f"TABLE: .branchtargets {', '.join(f'TO_{code}' for code in range(functions))}")
            self.put(f"brx.idx.uni {index}, TABLE")
        for code in range(functions):
            self.label(f"TO_{code}")
            self.lines.append("\t{")
            for at, (bits, register) in enumerate(arguments):
                self.put(f".param {bits} a{at}")
                self.put(f"st.param{bits} [a{at}], {register}")
            self.put(f"call.uni code_{code}, ({', '.join(f'a{at}' for at in range(len(arguments)))})")
            self.put("exit")
            self.lines.append("\t}")

    def quotient(self, numerator: str, divisor: int) -> str:
        """Of an integer below 2**31.

        ``n // d = floor(n * m / 2**s)`` with ``m = ceil(2**s / d)`` and ``2**(s - 31) >= d``.

        Source: T. Granlund and P. Montgomery, Division by invariant integers using multiplication, PLDI 1994.
        """
        if divisor == 1:
            return numerator
        shift = 31 + (divisor - 1).bit_length()
        high = self.to("r", "mul.hi.u32", f"{numerator}, {-(-(2**shift) // divisor)}")
        return high if shift == 32 else self.to("r", "shr.u32", f"{high}, {shift - 32}")

    def divided(self, numerator: str, divisor: int) -> tuple[str, str]:
        """Quotient and remainder."""
        if divisor == 1:
            return numerator, self.to("r", "mov.u32", "0")
        quotient = self.quotient(numerator, divisor)
        product = self.to("r", "mul.lo.u32", f"{quotient}, {divisor}")
        return quotient, self.to("r", "sub.u32", f"{numerator}, {product}")
