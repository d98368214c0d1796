"""Times between others' code: what the kernel in between holds, and how its own time is taken off."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from zeroskip.core.device import Device, cpu
from zeroskip.core.record import Times
from zeroskip.cuda.assemble import build
from zeroskip.cuda.compile import unpack
from zeroskip.measure import others
from zeroskip.measure.others import Timing
from zeroskip.measure.timer import Measurement

GPU = Device("cuda", "fake", 0)


def calls(log: list[str]) -> dict[str, Callable[[], object]]:
    return {name: lambda name=name: log.append(name) for name in ("one", "two")}  # type: ignore[misc]


def test_what_others_take_is_taken_off_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(others, "_of", lambda device: lambda: log.append("others"))

    def timer(variants: Mapping[str, Callable[[], object]], rounds: int, device: Device) -> Measurement:
        for call in variants.values():
            call()
        samples = {"one": (12.0, 13.0), "two": (9.5, 12.0), others.ALONE: (8.0, 10.0)}
        return Measurement({name: Times(samples[name], "cuda") for name in variants}, True)

    measured = Timing(GPU, timer, between=True).measure(calls(log), 2)
    assert log == ["others", "one", "others", "two", "others"]
    assert {name: times.samples_us for name, times in measured.times.items()} == {"one": (4.0, 3.0), "two": (1.5, 2.0)}
    assert measured.contended


def test_a_quick_look_takes_it_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(others, "_of", lambda device: lambda: log.append("others"))

    def once(call: Callable[[], object], device: Device) -> float:
        del log[:]
        call()
        return {("others", "one"): 12e-6, ("others",): 8e-6}[tuple(log)]

    monkeypatch.setattr(others, "once", once)
    assert Timing(GPU, between=True).once(calls(log)["one"]) == pytest.approx(4e-6)


def test_on_a_cpu_nothing_is_in_between() -> None:
    log: list[str] = []
    timing = Timing(cpu(1), between=True)
    measured = timing.measure(calls(log), 3)
    assert set(measured.times) == {"one", "two"}
    assert timing.once(calls(log)["one"]) > 0
    assert set(log) == {"one", "two"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_no_piece_of_code_was_optimized_away(arch: str) -> None:
    pytest.importorskip("cuda.core")
    built = unpack(build(others.text(), others.SYMBOL, arch))
    assert len(built.cubin) > 16 * others.FUNCTIONS * others.LENGTH
    assert built.resources.spill_bytes == 0


@pytest.mark.gpu
def test_a_kernel_takes_longer_where_its_code_is_gone() -> None:
    """32 KB of straight code on every multiprocessor, and a kernel of a few instructions."""
    from zeroskip.core.device import cuda
    from zeroskip.cuda.launch import load

    device = cuda()
    straight = others.text().replace("mov.u32 %r1, %smid", "mov.u32 %r1, 0")
    kernel = load(build(straight, others.SYMBOL, device.arch))
    y, x = torch.empty(32 * device.num_sms, device="cuda"), torch.randn(1024, device="cuda")

    def code() -> None:
        kernel.launch((device.num_sms, 1, 1), (32, 1, 1), (y,))

    def few() -> None:
        torch.neg(x, out=x)

    for call in (code, few):
        call()
    timing = Timing(device, between=True)
    alone = Timing(device).measure({"code": code, "few": few}, 15).times
    between = timing.measure({"code": code, "few": few}, 15).times
    assert between["code"].median_us > alone["code"].median_us + 1.5
    assert between["few"].median_us < alone["few"].median_us + 1.5
    assert timing.once(code) * 1e6 > alone["code"].median_us + 1.0
