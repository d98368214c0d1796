"""What a pruning did, layer by layer."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from .layers import Layer


@dataclass(frozen=True)
class LayerRecord:
    """One layer's weight: `numel` values, `nnz` of them not zero.

    `pattern` is what it was pruned to, "dense" where it was left alone; then `reason` says why.
    """

    name: str
    numel: int
    nnz: int
    pattern: str
    reason: str | None = None

    @property
    def density(self) -> float:
        """Fraction of the weights that are not zero."""
        return self.nnz / max(self.numel, 1)


@dataclass(frozen=True)
class PruneRecord:
    """Every Conv2d and Linear weight of a network after pruning; shared weights count once."""

    layers: tuple[LayerRecord, ...]

    @property
    def density(self) -> float:
        """Fraction of all the listed weights that are not zero, layers left alone included."""
        return sum(layer.nnz for layer in self.layers) / max(sum(layer.numel for layer in self.layers), 1)

    def to_json(self) -> str:
        """The record as a JSON object, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record that `to_json` wrote. Raises ValueError for anything else."""
        try:
            return cls(tuple(LayerRecord(**layer) for layer in json.loads(text)["layers"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"record: got JSON that is no pruning record ({error}), expected the output of "
                "PruneRecord.to_json; pass that text unchanged"
            ) from error

    def __str__(self) -> str:
        rows = [("layer", "weights", "nonzero", "density", "pattern")]
        for layer in self.layers:
            pattern = layer.pattern if layer.reason is None else f"{layer.pattern} ({layer.reason})"
            rows.append((layer.name, f"{layer.numel:,}", f"{layer.nnz:,}", f"{layer.density:.1%}", pattern))
        numel, nnz = (sum(getattr(layer, key) for layer in self.layers) for key in ("numel", "nnz"))
        rows.append(("total", f"{numel:,}", f"{nnz:,}", f"{self.density:.1%}", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{name:<{widths[0]}}  {numbers[0]:>{widths[1]}}  {numbers[1]:>{widths[2]}}  "
            f"{numbers[2]:>{widths[3]}}  {pattern}".rstrip()
            for name, *numbers, pattern in rows
        )


def record_layers(layers: Sequence[Layer], pattern: str) -> PruneRecord:
    """The record of `layers` as their weights are now, `pattern` being that of the pruned ones."""
    return PruneRecord(
        tuple(
            LayerRecord(
                name=layer.name,
                numel=layer.weight.numel(),
                nnz=int(layer.weight.count_nonzero()),
                pattern="dense" if layer.reason else pattern,
                reason=layer.reason,
            )
            for layer in layers
        )
    )
