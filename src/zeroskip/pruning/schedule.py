"""How sparsity grows during training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity rises fast while there is redundancy and slowly towards the end.

    It starts at step `begin`, changes every `every` steps, and is final at step `end`, whether or not
    `every` divides the distance. Steps count optimizer steps from 1.

    Source: Zhu & Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878), equation 1.
    """

    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"begin, end: got {self.begin}, {self.end}, expected 0 <= begin < end; swap or raise them")
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, expected at least 1; 100 is a common choice")

    def due(self, step: int) -> bool:
        """Whether the masks change at `step`."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    def sparsity(self, step: int, initial: float, final: float) -> float:
        """The sparsity due at `step`, from `initial` up to `final`."""
        progress = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return final + (initial - final) * (1 - progress) ** 3
