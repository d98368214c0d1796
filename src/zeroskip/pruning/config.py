"""What is to be pruned, in one record."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self, get_args

from .fisher import Score
from .masks import FILTERS, Scope, final_sparsity


@dataclass(frozen=True)
class PruneConfig:
    """Every choice that decides which weights go; the arguments of `zeroskip.pruning.prune`, explained there.

    `score` is what the lowest weights are lowest by, "magnitude" or, for `GradualPruner` only, "fisher".

    Checked when it is made: ValueError for a sparsity outside [0, 1), an unknown pattern, scope or score, a scope
    or score that the pattern has no use for, a string in place of names. Whether `skip` and `only` match is known
    once there is a network.
    """

    sparsity: float | None = 0.9
    pattern: str = "unstructured"
    scope: Scope = "layer"
    skip: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None
    permute: bool = False
    score: Score = "magnitude"

    def __post_init__(self) -> None:
        if self.sparsity is not None:  # a number of NumPy is no JSON
            object.__setattr__(self, "sparsity", float(self.sparsity))
        final_sparsity(self.pattern, self.sparsity, self.scope)
        _names("skip", self.skip)
        _names("only", self.only)
        if self.score not in get_args(Score):
            raise ValueError(f'score: got {self.score!r}, expected "magnitude" or "fisher"; choose one of them')
        if self.score != "magnitude" and self.pattern == FILTERS:
            raise ValueError(
                f'score: got {self.score!r} with pattern {self.pattern!r}, expected "magnitude", since filters go by '
                "their norms; drop score"
            )
        if self.permute and ":" not in self.pattern:
            raise ValueError(
                f'permute: got True with pattern {self.pattern!r}, expected an N:M pattern such as "2:4"; '
                "channels are moved for the sake of N:M groups only"
            )

    @classmethod
    def of(
        cls,
        sparsity: "float | PruneConfig | None",
        pattern: str = "unstructured",
        scope: Scope = "layer",
        skip: Sequence[str] | None = None,
        only: Sequence[str] | None = None,
        permute: bool = False,
        score: Score = "magnitude",
    ) -> "PruneConfig":
        """The configuration of these arguments; a `PruneConfig` in the place of `sparsity` stands for them all.

        Raises ValueError as the class does, and where a `PruneConfig` comes with further arguments.
        """
        if isinstance(sparsity, PruneConfig):
            defaults = ("unstructured", "layer", None, None, False, "magnitude")
            if (pattern, scope, skip, only, permute, score) != defaults:
                raise ValueError(
                    "sparsity: got a PruneConfig and further arguments, expected one or the other; "
                    "change the configuration with dataclasses.replace"
                )
            return sparsity
        return cls(sparsity, pattern, scope, _names("skip", skip), _names("only", only), permute, score)

    @property
    def final_sparsity(self) -> float:
        """The sparsity to end at: `sparsity`, or 1 - N/M for "N:M"."""
        return final_sparsity(self.pattern, self.sparsity, self.scope)

    def need_magnitude(self, who: str) -> None:
        """Raises ValueError unless weights go by magnitude, all that `who` knows."""
        if self.score != "magnitude":
            raise ValueError(
                f'score: got {self.score!r}, expected "magnitude", since {who} sees no gradients; take GradualPruner'
            )

    def to_json(self) -> str:
        """The configuration as a JSON object, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The configuration that `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            names = {key: None if fields[key] is None else tuple(fields[key]) for key in ("skip", "only")}
            return cls(**{**fields, **names})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"configuration: got JSON that is none ({error}), expected the output of PruneConfig.to_json; "
                "pass that text unchanged"
            ) from error


def _names(argument: str, patterns: Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(patterns, str):
        raise ValueError(f"{argument}: got the string {patterns!r}, expected a list of patterns; put it in brackets")
    return None if patterns is None else tuple(patterns)
