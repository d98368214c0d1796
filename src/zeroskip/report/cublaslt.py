"""cublasLt through ctypes: a matrix product by every algorithm that the library proposes, to be tried one by one.

torch takes what the library's heuristic puts first; this is the search behind the baseline "cublaslt".  The library is
the one that torch has loaded.  Every call returns a status, and anything but success is an error here.

Names, numbers and structures: cublasLt.h of CUDA 13.1, documented at docs.nvidia.com/cuda/cublas.  Matrices lie column
by column, the only order in which the library adds a bias to its products: one number for each row of the output.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import PRECISION_DTYPES, Precision

WORKSPACE_BYTES = 32 * 2**20
DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
"""``cudaDataType``."""
COMPUTE_TYPES: dict[Precision, int] = {"fp32": 68, "tf32": 77, "fp16": 68, "bf16": 68}
"""``cublasComputeType_t``: sums in float32, of strict float32 or half-precision products (32F) or TF32 ones
(32F_FAST_TF32)."""
REDUCTIONS: dict[Precision, int] = {"fp32": 7, "tf32": 7, "fp16": 2, "bf16": 2}
"""``cublasLtReductionScheme_t``, a mask: how parts of a sum may be added up.  In half precision only as float32."""
TURN_A, TURN_B, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8
"""``cublasLtMatmulDescAttributes_t``."""
RELU_BIAS = 6
"""``cublasLtEpilogue_t``; its ReLU turns NaN into 0."""
BATCH_COUNT, BATCH_STRIDE = 5, 6
"""``cublasLtMatrixLayoutAttribute_t``."""
MOST_WORKSPACE, REDUCTION_MASK = 1, 3
"""``cublasLtMatmulPreferenceAttributes_t``."""
CHOICES = {"id": 0, "tile": 1, "stages": 6, "split": 2}
"""``cublasLtMatmulAlgoConfigAttributes_t`` of 32 bits."""

_ANY = ctypes.c_void_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_ANY,),
    "cublasLtMatmulDescCreate": (_ANY, ctypes.c_int, ctypes.c_int),
    "cublasLtMatrixLayoutCreate": (_ANY, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatmulPreferenceCreate": (_ANY,),
    "cublasLtMatmulAlgoGetHeuristic": (*(_ANY,) * 7, ctypes.c_int, _ANY, _ANY),
    "cublasLtMatmulAlgoConfigGetAttribute": (_ANY, ctypes.c_int, _ANY, ctypes.c_size_t, _ANY),
    "cublasLtMatmul": (*(_ANY,) * 14, ctypes.c_size_t, _ANY),
}
for _kind in ("MatmulDesc", "MatrixLayout", "MatmulPreference"):
    _PROTOTYPES[f"cublasLt{_kind}SetAttribute"] = (_ANY, ctypes.c_int, _ANY, ctypes.c_size_t)
    _PROTOTYPES[f"cublasLt{_kind}Destroy"] = (_ANY,)


class Algorithm(ctypes.Structure):
    """``cublasLtMatmulAlgo_t``."""

    _fields_ = (("data", ctypes.c_uint64 * 8),)


class Proposal(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Matrix:
    """``rows x columns`` numbers, column by column without gaps; that of the next image begins ``step`` numbers later
    (0: all images share it)."""

    rows: int
    columns: int
    step: int = 0


@dataclass(frozen=True)
class Product:
    """``D = op(A) op(B)`` for each of ``images``, where ``op`` turns a matrix if ``turns`` (of A, of B) says so."""

    a: Matrix
    b: Matrix
    d: Matrix
    turns: tuple[bool, bool]
    weights_first: bool
    """A holds the weights; else B."""
    images: int = 1


def by_pixels(k: int, c: int, pixels: int, turned: bool) -> Product:
    """``Y [pixels, k] = X [pixels, c] W^T``, the channels of a pixel side by side: an output channel is a row of D, as
    the library's bias wants it.

    Args:
        turned: weights lie as ``[c, k]``, not ``[k, c]``.
    """
    weights = Matrix(k, c) if turned else Matrix(c, k)
    return Product(weights, Matrix(c, pixels), Matrix(k, pixels), (not turned, False), True)


def by_planes(k: int, c: int, pixels: int, turned: bool, images: int = 1) -> Product:
    """``Y [k, pixels] = W X [c, pixels]`` for each of ``images``, the pixels of a channel side by side.

    Args:
        turned: weights lie as ``[c, k]``, not ``[k, c]``.
    """
    weights = Matrix(k, c) if turned else Matrix(c, k)
    x, y = Matrix(pixels, c, c * pixels), Matrix(pixels, k, k * pixels)
    return Product(x, weights, y, (False, turned), False, images)


class Library:
    """The functions at ``path``.

    Raises:
        OSError: there is none, or it is no cublasLt.
    """

    def __init__(self, path: str) -> None:
        loaded = ctypes.CDLL(path)
        self._functions = {}
        for name, arguments in _PROTOTYPES.items():
            try:
                function = getattr(loaded, name)
            except AttributeError as error:
                raise OSError(f"{path} has no {name}") from error
            function.argtypes, function.restype = arguments, ctypes.c_int
            self._functions[name] = function
        self._status_name = loaded.cublasLtGetStatusName
        self._status_name.argtypes, self._status_name.restype = (ctypes.c_int,), ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Raises ``RuntimeError`` with the function and its status unless that is success."""
        if status := self._functions[name](*arguments):
            raise RuntimeError(f"{name}: {(self._status_name(status) or b'an unknown status').decode()} ({status})")


@functools.cache
def library() -> Library:
    """The one that is loaded, else the one among torch's wheels.

    Raises:
        Unsupported: neither is here.
    """
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return Library(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, RuntimeError, OSError) as error:
        raise Unsupported(f"cublasLt cannot be loaded: {str(error).partition(chr(10))[0]}") from error


def reachable(tensor: Tensor) -> bool:
    """Whether the library can read it."""
    return tensor.is_cuda


@functools.cache
def _handle(loaded: Library, device: torch.device) -> ctypes.c_void_p:
    """A context of the library, which lives as long as the process."""
    handle = ctypes.c_void_p()
    loaded.call("cublasLtCreate", ctypes.byref(handle))
    return handle


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """One for all calls: they follow each other on one stream."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


class _Descriptor:
    """An object of the library's, destroyed with this one."""

    def __init__(self, loaded: Library, kind: str, *arguments: Any) -> None:
        self.handle = ctypes.c_void_p()
        self._loaded, self._set = loaded, f"cublasLt{kind}SetAttribute"
        loaded.call(f"cublasLt{kind}Create", ctypes.byref(self.handle), *arguments)
        weakref.finalize(self, loaded.call, f"cublasLt{kind}Destroy", self.handle).atexit = False

    def set(self, attribute: int, value: Any) -> None:
        """``value``: a number of ctypes, of the attribute's own size."""
        self._loaded.call(self._set, self.handle, attribute, ctypes.byref(value), ctypes.sizeof(value))


class Matmul:
    """A product on a device, with what its calls have in common.

    Args:
        weights: on the device, as the product says; kept.
        bias: ``[k]``, then bias and ReLU follow in the library's epilogue: for products ``by_pixels`` only.
    """

    def __init__(self, product: Product, weights: Tensor, precision: Precision, bias: Tensor | None = None) -> None:
        if bias is not None and product.d.rows != len(bias):
            raise ValueError(f"the bias has {len(bias)} numbers, the output {product.d.rows} rows: these must agree")
        loaded = library()
        self.loaded, self.product, self.precision = loaded, product, precision
        self.weights, self.bias = weights, bias
        self.type = DATA_TYPES[PRECISION_DTYPES[precision]]
        self.operation = _Descriptor(loaded, "MatmulDesc", COMPUTE_TYPES[precision], DATA_TYPES[torch.float32])
        for attribute, turn in zip((TURN_A, TURN_B), product.turns, strict=True):
            self.operation.set(attribute, ctypes.c_int32(turn))
        if bias is not None:
            self.operation.set(EPILOGUE, ctypes.c_uint32(RELU_BIAS))
            self.operation.set(BIAS_POINTER, ctypes.c_uint64(bias.data_ptr()))
        self.layouts = [self._layout(matrix) for matrix in (product.a, product.b, product.d)]
        self.handle = _handle(loaded, weights.device)
        self.workspace = _workspace(weights.device)
        self.one, self.zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def _layout(self, matrix: Matrix) -> _Descriptor:
        layout = _Descriptor(self.loaded, "MatrixLayout", self.type, matrix.rows, matrix.columns, matrix.rows)
        if self.product.images > 1:
            layout.set(BATCH_COUNT, ctypes.c_int32(self.product.images))
            layout.set(BATCH_STRIDE, ctypes.c_int64(matrix.step))
        return layout

    def algorithms(self, most: int) -> list[Algorithm]:
        """The library's proposals, at most ``most``, likeliest fastest first; none where it cannot do this product.

        Operands are taken to begin at multiples of 256 bytes, as torch's allocations do.
        """
        wanted = _Descriptor(self.loaded, "MatmulPreference")
        wanted.set(MOST_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))
        wanted.set(REDUCTION_MASK, ctypes.c_uint32(REDUCTIONS[self.precision]))
        found, count = (Proposal * most)(), ctypes.c_int(0)
        a, b, d = (layout.handle for layout in self.layouts)
        fixed = (self.handle, self.operation.handle, a, b, d, d, wanted.handle)
        try:
            self.loaded.call("cublasLtMatmulAlgoGetHeuristic", *fixed, most, found, ctypes.byref(count))
        except RuntimeError as error:
            if "NOT_SUPPORTED" in str(error):
                return []
            raise
        usable = [proposal for proposal in found[: count.value] if proposal.state == 0]
        fitting = [proposal.algorithm for proposal in usable if proposal.workspace <= WORKSPACE_BYTES]
        return list({bytes(algorithm): Algorithm.from_buffer_copy(algorithm) for algorithm in fitting}.values())

    def describe(self, algorithm: Algorithm) -> str:
        """By the numbers that the library gives its kernels, tiles and stages."""
        parts = []
        for name, attribute in CHOICES.items():
            value, written = ctypes.c_uint32(), ctypes.c_size_t()
            place = (ctypes.byref(value), ctypes.sizeof(value), ctypes.byref(written))
            self.loaded.call("cublasLtMatmulAlgoConfigGetAttribute", ctypes.byref(algorithm), attribute, *place)
            parts.append(f"{name} {value.value}")
        return ", ".join(parts)

    def __call__(self, algorithm: Algorithm, x: Tensor, y: Tensor) -> None:
        """Enqueue ``y = product`` on the current stream; both without gaps, in the order that the product says.

        Raises:
            RuntimeError: the library refuses; nothing was computed.
        """
        first, second = (self.weights, x) if self.product.weights_first else (x, self.weights)
        a, b, d = (layout.handle for layout in self.layouts)
        operands = (ctypes.byref(self.one), first.data_ptr(), a, second.data_ptr(), b)
        result = (ctypes.byref(self.zero), y.data_ptr(), d, y.data_ptr(), d)
        scratch = (ctypes.byref(algorithm), self.workspace.data_ptr(), WORKSPACE_BYTES)
        fixed = (self.handle, self.operation.handle)
        self.loaded.call("cublasLtMatmul", *fixed, *operands, *result, *scratch, _stream(x.device))
