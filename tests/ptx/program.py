"""PTX text as functions, labels and instructions: as much of it as methods/sparsert writes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_KINDS = {".pred": np.bool_, ".b16": np.uint16, ".b32": np.uint32, ".b64": np.uint64, ".f32": np.float32}


class Fault(Exception):
    """The program did what it must not."""


@dataclass(frozen=True)
class Instruction:
    line: int
    guard: str
    name: str
    operands: tuple[Any, ...]
    """Registers and labels as text, numbers, ``(register, offset)`` for addresses, tuples for vectors."""


@dataclass
class Function:
    name: str
    parameters: list[str] = field(default_factory=list)
    kinds: dict[str, Any] = field(default_factory=dict)
    """Types of registers by their prefix."""
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, int] = field(default_factory=dict)


_SKIPPED = (".version", ".target", ".address_size", ".extern")
_INSTRUCTION = re.compile(r"(?:@(%\w+) )?([\w.:]+)(?: (.*))?;")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s]+")


def _operand(text: str) -> Any:
    if text[0] == "%":
        return text
    if text.startswith("["):
        base, plus, offset = text[1:-1].partition("+")
        return (base, int(offset) if plus else 0)
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("0f"):
        return np.array(int(text[2:], 16), np.uint32).view(np.float32)[()]
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9A-F]+|\d+)", text) else text


def parse(text: str) -> dict[str, Function]:
    """The functions of a module by name; the entry is among them."""
    functions: dict[str, Function] = {}
    current: Function | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line in "{}" or line.startswith(_SKIPPED):
            continue
        if current is not None and (table := re.match(r"(\w+): \.branchtargets (.*);$", line)):
            current.tables[table[1]] = table[2].split(", ")
            continue
        if current is not None and line[0] != "." and (found := _INSTRUCTION.fullmatch(line)):
            operands = tuple(_operand(part) for part in _OPERAND.findall(found[3] or "") if part[0] != "(")
            current.code.append(Instruction(number, found[1] or "", found[2], operands))
            continue
        if header := re.match(r"(?:\.visible )?\.(func|entry) (\w+)\((.*)\)$", line):
            current = functions[header[2]] = Function(header[2], re.findall(r"\.param \.\w+ (\w+)", header[3]))
            continue
        if current is None:
            raise Fault(f"line {number} is outside of functions: {line}")
        if declared := re.match(r"\.reg (\.\w+) (%[a-z]+)<\d+>;$", line):
            current.kinds[declared[2]] = _KINDS[declared[1]]
        elif directive := re.match(r"\.(reqntid|maxnreg|noreturn|explicitcluster)(?: (\d+))?$", line):
            current.directives[directive[1]] = int(directive[2] or 1)
        elif line.endswith(":"):
            current.labels[line[:-1]] = len(current.code)
        elif not line.startswith(".param"):
            raise Fault(f"line {number} is not understood: {line}")
    return functions
