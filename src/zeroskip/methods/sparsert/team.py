"""What one function computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Team:
    """What one function computes: one part of a row group, whose row numbers and biases are listed by place.

    ``nonzeros``: columns in ascending order, with place and weight of each of their nonzeros, the weight as the operand
    of its instruction.  ``given`` bool ``[parts, places]``: which parts of the group have nonzeros in which row.
    """

    index: int
    part: int
    rows: Sequence[int]
    biases: Sequence[float]
    nonzeros: Sequence[tuple[int, Sequence[tuple[int, str]]]]
    given: npt.NDArray[np.bool_]

    def owner(self, place: int) -> int:
        """The part that finishes a row."""
        return place * len(self.given) // len(self.rows)

    def owned(self, part: int) -> list[int]:
        """The places that a part finishes."""
        return [place for place in range(len(self.rows)) if self.owner(place) == part]
