"""The Triton kernels of the dense baseline: values through Triton's interpreter, code through its compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroskip.methods.dense.blocks import BLOCKS
from zeroskip.methods.dense.config import Blocks

SOURCE = Path(__file__).parents[2] / "src"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = """
import torch
from zeroskip.core.layer import Epilogue
from zeroskip.core.oracle import epilogue as apply_epilogue
from zeroskip.methods.dense import matmul, pointwise
from zeroskip.methods.dense.config import Blocks

torch.manual_seed(0)
blocks = Blocks(16, 32, 16, 4, 2)
for precision, dtype, tolerance in (("fp32", torch.float32, 1e-6), ("fp16", torch.float16, 1e-3)):
    for n, c, k, pixels in ((1, 5, 7, 63), (3, 37, 33, 49), (2, 64, 16, 200), (5, 16, 40, 12)):
        for activation, place in (("relu", "none"), ("relu6", "before"), ("relu", "after"), ("none", "none")):
            bias = torch.randn(k).to(dtype) if place != "none" or activation == "relu" else None
            weight, x = torch.randn(k, c).to(dtype), torch.randn(n, c, pixels).to(dtype)
            residual = None if place == "none" else torch.randn(n, k, pixels).to(dtype)
            for transposed in (False, True):
                if transposed:
                    x = x.transpose(1, 2).contiguous().transpose(1, 2)
                around = torch.full((n, k + 2, pixels), 7.0, dtype=dtype)
                y = around[:, 1:-1]
                epilogue = Epilogue(bias is not None, activation, place)
                matmul.multiply(weight, x, bias, residual, y, epilogue, precision, blocks)
                want = torch.einsum("kc,ncp->nkp", weight.double(), x.double())
                want = want if bias is None else want + bias.double()[:, None]
                want = apply_epilogue(want, activation, place, residual)
                assert (y - want).abs().max() < tolerance * want.abs().max(), (precision, n, c, k, pixels, epilogue)
                assert (around[:, [0, -1]] == 7).all()

x = torch.randn(2, 5, 7)
x[0, 2, 3] = torch.nan
y = torch.empty(2, 4, 7)
matmul.multiply(torch.randn(4, 5), x, None, None, y, Epilogue(activation="relu6"), "fp32", blocks)
assert y[0, :, 3].isnan().all() and y.isnan().sum() == 4

y, bias, residual = torch.randn(2, 6, 3, 5), torch.randn(6), torch.randn(2, 6, 3, 5)
y[1, 2, 1, 1] = torch.nan
for activation, place in (("relu", "after"), ("relu6", "before"), ("none", "none")):
    want = apply_epilogue(y + bias[:, None, None], activation, place, residual)
    for plane, layout in ((15, torch.contiguous_format), (1, torch.channels_last)):
        got = y.clone(memory_format=torch.contiguous_format).contiguous(memory_format=layout)
        other = residual.contiguous(memory_format=layout) if place != "none" else None
        pointwise.apply(got, bias, activation, place, other, plane)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=1e-6)
print("all right")
"""


@needs_triton
def test_the_kernels_compute_the_right_values() -> None:
    """bfloat16 is left out: Triton's interpreter multiplies its bit patterns."""
    if torch.cuda.is_available():
        pytest.skip("the GPU itself is tested here")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SOURCE)}
    found = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "all right" in found.stdout


def test_knowing_the_methods_does_not_import_triton() -> None:
    code = "import sys; from zeroskip.methods import registry; registry(); print('triton' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert found.stdout.strip() == "False", found.stderr[-2000:]


def compiled(blocks: Blocks, dtype: str, arch: int, **choices: Any) -> Any:
    """The matrix product for ``sm_<arch>``, NCHW, as Triton would specialise it at a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from zeroskip.methods.dense.matmul import DOT_PRECISION, _multiply

    constants = {
        "folded": False,
        "wide": False,
        "even": True,
        "biased": True,
        "place": "before",
        "activation": "relu",
        "dot_precision": DOT_PRECISION["fp32" if dtype == "fp32" else "fp16"],
        "m": blocks.m,
        "n": blocks.n,
        "k": blocks.k,
        "x_pixel": 1,
        "r_pixel": 1,
        "y_pixel": 1,
        **choices,
    }
    names = _multiply.arg_names
    pointers = ("w", "x", "bias", "residual", "y")
    signature = {
        name: "constexpr" if name in constants else f"*{dtype}" if name in pointers else "i32" for name in names
    }
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in constants}
    source = ASTSource(
        _multiply, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("index", [0, 6, len(BLOCKS) - 1])
def test_blocks_compile_to_tensor_core_code_that_fits(
    index: int, dtype: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks = BLOCKS[index] if dtype == "fp32" else replace(BLOCKS[index], k=2 * BLOCKS[index].k)
    code = compiled(blocks, dtype, arch)
    assert any(instruction in code.asm["ptx"] for instruction in ("wgmma.mma", "mma.sync", "tcgen05.mma"))
    assert "fma.rn.f32" not in code.asm["ptx"], "the product must not run on the ordinary cores"
    assert code.metadata.shared <= blocks.shared_bytes(4 if dtype == "fp32" else 2) * 9 // 8 + 16384


@needs_triton
def test_folded_and_wide_products_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiled(BLOCKS[6], "fp32", 90, folded=True, wide=True, even=False).asm["cubin"]
