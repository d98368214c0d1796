"""A plan and records made by hand, with names that would break a page that forgets to escape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zeroskip.core.device import Device
from zeroskip.core.record import Record, Times
from zeroskip.plan.plan import Confirmation, Plan, Rejection, Step
from zeroskip.report.records import RecordFile

HOSTILE = '</script><b>"a&b|%{x}$'


def step(name: str, layer: str, density: float, method: str, time_us: float, dense_us: float) -> Step:
    other = Rejection("dense", "", dense_us) if method != "dense" else Rejection("escort", "", 1.31 * dense_us)
    config = {"tile_k": 8, "flat": False} if method == "escort" else {}
    return Step(
        (name,),
        layer,
        density,
        method,
        config,
        "measured: fastest of 5 candidates",
        time_us,
        dense_us,
        0.4 * time_us,
        rejected=(other, Rejection("two_four", f"{1 - density:.0%} zeros, but not two of every four")),
    )


@pytest.fixture
def plan() -> Plan:
    steps = [step("conv1", "3->64 7x7/2 @224x224 n1", 1.0, "dense", 2412.0, 2412.0)]
    stages = [(64, 56, 1321.0), (128, 28, 1170.0), (256, 14, 1105.0), (512, 7, 1290.0)]
    for stage, (channels, size, dense) in enumerate(stages, 1):
        for block in range(2):
            for conv in (1, 2):
                name = f"layer{stage}.{block}.conv{conv}" if (stage, block, conv) != (2, 1, 1) else HOSTILE
                steps.append(
                    step(
                        name,
                        f"{channels}->{channels} 3x3 @{size}x{size} n1",
                        0.1,
                        "escort",
                        dense / (2.4 + 0.31 * stage + 0.1 * conv),
                        dense,
                    )
                )
    steps.append(step("fc", "512->1000 1x1 @1x1 n1", 1.0, "dense", 96.0, 96.0))
    device = Device("cpu", "AMD EPYC 7B13 (2 cores)", 524288, 1, 8, 16, 32768)
    device = replace(device, peak_tflops={"fp32": 0.0952}, bandwidth_gbps=17.3)
    return Plan(
        device,
        "fp32",
        ((1, 3, 224, 224),),
        tuple(steps),
        "0" * 32,
        {"torch": "2.13.0+cpu", "llvmlite": "0.50.0", "zeroskip": "0.1.0"},
        Confirmation(9411.0, 20817.0, 25102.0, 25, False),
        31.4,
        ("Of 18 layers, 16 are run by escort and 2 dense because they hold no zeros.",),
    )


def times(median: float, spread: float = 0.03) -> Times:
    return Times(tuple(median * (1 + spread * shift) for shift in (-2, -0.5, -0.4, 0, 0.1, 0.5, 0.9, 3)), "cpu")


def record(case: dict[str, object], method: str, median: float, **more: object) -> Record:
    return Record(
        "layers",
        case,
        method,
        "OK",
        times=times(median),
        floor_us=20.0,
        flops=12_000_000,
        bytes=700_000,
        error={"relative": 2e-7, "worst": 0.05},
        environment="e1",
        **more,
    )  # type: ignore[arg-type]


@pytest.fixture
def records() -> RecordFile:
    cases = [
        {"kind": "layer", "name": name, "density": 0.1, "batch": 1, "threads": 1}
        for name in ("1x1 128->128 @56x56", "3x3 128->128 @28x28", HOSTILE)
    ]
    found = []
    for case, scale in zip(cases, (1.0, 2.7, 0.4), strict=True):
        found += [
            record(case, "dense", 1210 * scale),
            record(case, "inductor", 1330 * scale),
            record(case, "onnxruntime", 1105 * scale),
            record(case, "escort", 262 * scale),
        ]
    found.append(Record("layers", cases[0], "two_four", "UNSUPPORTED", "no 2:4 on this CPU", environment="e1"))
    model = {"kind": "model", "name": "resnet18", "density": 0.1, "batch": 1, "threads": 1}
    found += [
        record(model, method, median, contended=True)
        for method, median in (("torch", 25102.0), ("torch_channels_last", 24870.0), ("zeroskip", 9411.0))
    ]
    environment = {
        "id": "e1",
        "device": "AMD EPYC 7B13 (2 cores)",
        "threads": 1,
        "libraries": {"torch": "2.13.0", "numpy": "2.4.6"},
    }
    return RecordFile({"e1": environment}, tuple(found))
