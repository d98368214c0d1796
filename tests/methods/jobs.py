"""Layers of their own for the vendor baselines, without a graph around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import PRECISION_DTYPES, ConvShape, Epilogue, Layer, Precision, Sparsity
from zeroskip.core.layout import conform
from zeroskip.core.method import AnyMethod, Candidate
from zeroskip.core.oracle import Expected, expected

GPU = Device("cuda", "a GPU to plan for", 50 << 20, arch="sm_90a", num_sms=132, shared_bytes=227 * 1024)
"""Facts only: what needs no GPU can be tested with it."""
PLAIN = Epilogue()
EPILOGUES = tuple(
    Epilogue(bias, activation, residual)
    for bias in (False, True)
    for activation in ("none", "relu", "relu6")
    for residual in ("none", "before", "after")
)


@dataclass(frozen=True)
class Job:
    """A layer with weights and inputs, all on one device."""

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    residual: Tensor | None

    @staticmethod
    def of(
        shape: ConvShape,
        epilogue: Epilogue = PLAIN,
        precision: Precision = "fp32",
        kind: Literal["conv2d", "linear"] = "conv2d",
        weight: Tensor | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> Job:
        generator, dtype = torch.Generator().manual_seed(seed), PRECISION_DTYPES[precision]

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device, dtype)

        x, y, w = shape.input_shape, shape.output_shape, shape.weight_shape
        if kind == "linear":
            x, y, w = x[:2], y[:2], w[:2]  # type: ignore[assignment]
        weight = draw(*w) if weight is None else weight.reshape(w).to(device, dtype)
        layer = Layer("layer", kind, shape, precision, Sparsity.of(weight), epilogue)
        residual = None if epilogue.residual == "none" else draw(*y)
        return Job(layer, weight, draw(shape.k) if epilogue.bias else None, draw(*x), residual)

    @property
    def segment(self) -> Segment:
        inputs = ("x",) if self.residual is None else ("x", "r")
        return Segment(("layer",), inputs, ("layer",), (self.layer,))

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"weight": self.weight.cpu()} | ({} if self.bias is None else {"bias": self.bias.cpu()})

    @property
    def expected(self) -> Expected:
        return expected(self.layer, self.x, self.weight, self.bias, self.residual)

    def run(self, run: Any, candidate: Candidate[Any]) -> Tensor:
        """One call, inputs laid out as ``candidate`` asks and the output full of NaN."""
        x = conform(self.x, (0, 0), candidate.inputs[0])
        residual = None if self.residual is None else conform(self.residual, (0, 0), candidate.inputs[1])
        sizes = self.layer.shape.output_shape[: x.dim()]
        outputs = [] if run.allocates else [torch.full(sizes, torch.nan, dtype=x.dtype, device=x.device)]
        with torch.no_grad():
            result: Tensor = run([x], outputs, None, residual)[0]
        return result

    def bound_share(self, method: AnyMethod, candidate: Candidate[Any], device: Device = GPU) -> float:
        """The largest share of its error bound that an element of this candidate's result used."""
        from zeroskip.measure.bound import moved

        packed = moved(method.pack(self.segment, self.parameters, candidate.config), self.x.device)
        y = self.run(method.bind(self.segment, packed, method.build(packed, device), device), candidate)
        want = self.expected
        assert y.shape == want.value.shape
        error = (y.double() - want.value).abs()
        bound = want.rounded(candidate.float16_terms)
        return float(torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=torch.inf).max())
