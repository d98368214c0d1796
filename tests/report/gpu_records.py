"""Records as a GPU suite writes them, with times made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeroskip.core.record import Record, Times
from zeroskip.report.records import RecordFile

ENVIRONMENT = {
    "id": "g1",
    "device": "NVIDIA H100",
    "driver": "580",
    "cudnn": 91900,
    "libraries": {"torch": "2.11.0"},
    "source": "s",
    "peak_tflops": {"fp32": 50.0, "tf32": 300.0, "fp16": 700.0},
}


def records(case: Mapping[str, Any], times_us: Mapping[str, float], suite: str = "fig10", **more: Any) -> list[Record]:
    """One record a method."""
    return [
        Record(
            suite,
            dict(case),
            method,
            "OK",
            times=Times(tuple(median * shift for shift in (0.98, 0.99, 1, 1.01, 1.02)), "cuda"),
            floor_us=1.25,
            environment="g1",
            **more,
        )
        for method, median in times_us.items()
    ]


def layer(name: str, **facts: Any) -> dict[str, Any]:
    return {
        "kind": "layer",
        "name": name,
        "density": 0.1,
        "mask": "random",
        "batch": 1,
        "device": "cuda",
        "precision": "fp32",
        "cache": "warm",
        "c": 512,
        "k": 512,
        "h": 14,
        "w": 14,
        "kernel": 1,
        "stride": 1,
        "padding": 0,
        "groups": 1,
    } | facts


def network(name: str, precision: str, batch: int = 1) -> dict[str, Any]:
    return {"kind": "model", "name": name, "density": 0.1, "batch": batch, "device": "cuda", "precision": precision}


def file(*parts: list[Record]) -> RecordFile:
    return RecordFile({"g1": ENVIRONMENT}, tuple([record for part in parts for record in part]))


SHAPES = ("64,32,12544", "1024,1024,49")
WARM = {"cublas": 8.0, "cublas_epilogue": 9.0, "dense": 7.0, "cusparse": 16.0, "sputnik": 5.0, "slab": 4.0}


def figure_10() -> RecordFile:
    parts = []
    for name in SHAPES:
        parts.append(records(layer(name), WARM))
        parts.append(records(layer(name, cache="cold"), {method: 2 * time for method, time in WARM.items()}))
        parts.append(records(layer(name, precision="tf32"), {"cublas": 3.0}))
        parts.append(records(layer(name, precision="fp16"), {"cublas": 2.0, "slab": 2.5, "sputnik": 3.0}))
        parts.append(records(layer(name, mask="clustered"), {"cublas": 8.0, "slab": 4.4}))
        parts.append(records(layer(name, batch=8), {"cublas": 40.0, "dense": 30.0, "slab": 10.0}))
    parts.append(records(layer(SHAPES[0], mask="trained:net.npz:key"), {"slab": 4.2}))
    return file(*parts)


def searched_figure_10() -> RecordFile:
    """With every dense library, some faster and some slower than cuBLAS; and 32 images."""
    parts = []
    for name in SHAPES:
        for cache, factor in (("warm", 1.0), ("cold", 2.0)):
            fp32 = WARM | {"cublaslt": 6.0, "cublaslt_epilogue": 6.5, "triton": 6.4}
            fp16 = {"cublas": 2.0, "cublaslt": 1.5, "triton": 1.8, "slab": 1.0, "sputnik": 3.0}
            tf32 = {"cublas": 3.0, "cublaslt": 2.5, "triton": 2.0}
            for precision, times in (("fp32", fp32), ("tf32", tf32), ("fp16", fp16)):
                case = layer(name, precision=precision, cache=cache)
                parts.append(records(case, {method: factor * time for method, time in times.items()}))
    case = layer("512,512,196", batch=32)
    parts.append(records(case, {"cublas": 81.0, "cublaslt": 80.0, "slab": 40.0, "sputnik": 60.0}))
    parts.append(records(case | {"precision": "tf32"}, {"cublas": 23.0, "triton": 22.0}))
    return file(*parts)


def float16_sums() -> RecordFile:
    """Twice as fast as the fastest of ours, for one layer."""
    times = {"sparsert": 1.2, "sparsert:4 in float16": 0.7, "sparsert:8 in float16": 0.5, "cublas": 2.0}
    return file(records(layer(SHAPES[0], precision="fp16"), times, "sparsert_halves"))


TRAINED = "trained:resnet50_3x3_sparse.npz:sparse90.stage3.weight"


def convolutions() -> RecordFile:
    shape = {"c": 256, "k": 256, "kernel": 3, "padding": 1, "mask": TRAINED}
    nonzeros = round(0.09 * 256 * 256 * 9)
    parts = []
    for batch in (1, 8):
        case = layer("256,256,3x3 @14", batch=batch, **shape)
        times = {"cudnn": 20.0, "cudnn_epilogue": 21.0, "slab": 8.0, "dense": 22.0}
        flops = 2 * nonzeros * 196 * batch
        parts.append(records(case, times, "conv3x3", flops=flops))
        fp16 = {"cudnn": 8.3, "cudnn_epilogue": 9.0, "slab": 10.0}
        parts.append(records(case | {"precision": "fp16"}, fp16, "conv3x3", flops=flops))
    return file(*parts)


def figure_11() -> RecordFile:
    parts = []
    for density in (0.5, 0.1, 0.02):
        times = {"cublas": 7.0, "cusparse": 30 * density + 10, "sputnik": 20 * density + 3, "slab": 12 * density + 2}
        parts.append(records(layer("128,128,3136", density=density), times, "fig11"))
        times = {"cublas": 2.9, "sputnik": 15 * density + 2}
        parts.append(records(layer("128,128,3136", density=density, precision="fp16"), times, "fig11"))
    return file(*parts)


def square_products() -> RecordFile:
    parts = []
    for size in (512, 2048):
        name = f"{size},{size},{size}"
        parts.append(records(layer(name), {"cublas": size / 6, "cusparse": size / 5, "sputnik": size / 9}, "squares"))
        parts.append(records(layer(name, precision="tf32"), {"cublas": size / 40}, "squares"))
    return file(*parts)


def ablations() -> RecordFile:
    parts = []
    for density in (0.5, 0.1):
        for name in ("128,128,3136", "512,512,196"):
            times = {"cublas": 7.0, "sputnik": 5.0, "sputnik:no row swizzle": 5.5, "sputnik:no subwarps": 8.0}
            parts.append(records(layer(name, density=density), times, "sputnik_ablation"))
    return file(*parts)


def whole_networks() -> RecordFile:
    times = {"torch": 900.0, "torch_channels_last": 800.0, "zeroskip_dense": 500.0, "zeroskip": 400.0}
    parts = [
        records(network(name, precision, batch), times, "networks_cuda", setup={"call_us": 430.0})
        for name in ("MobileNetV1", "ResNet-50", "ResNet-18", "VGG-19")
        for batch in (1, 32)
        for precision in ("fp32", "tf32", "fp16")
    ]
    return file(*parts)
