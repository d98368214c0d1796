"""The plan as a record: JSON both ways, and a table for people."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract.cases import stable
from zeroskip.core.device import Device
from zeroskip.core.errors import FileFormatError
from zeroskip.plan.plan import Confirmation, Plan, Rejection, Step, weights_hash

DEVICE = Device("cpu", "a machine (2 cores)", 524288, 2, 8, 16, 32768, peak_tflops={"fp32": 0.1}, bandwidth_gbps=17.0)
STEP = Step(
    ("conv1",),
    "3->8 3x3 @9x9 n1",
    0.1,
    "escort",
    {"rows": 3, "flat": False},
    "fastest",
    100.0,
    250.0,
    rejected=(Rejection("dense", "slower", 250.0), Rejection("two_four", "not two of every four")),
)
PLAN = Plan(
    DEVICE,
    "fp32",
    ((1, 3, 9, 9),),
    (STEP, Step(("a", "b"), "two layers", 1.0, "pair", {}, "why not")),
    "0" * 32,
    {"torch": "2"},
    Confirmation(1000.0, 2000.0, 3000.0, 9, False),
    12.5,
    ("a note",),
)

times = st.none() | st.floats(0, 1e9)
steps = st.builds(
    Step,
    st.lists(st.text(max_size=5), min_size=1, max_size=3).map(tuple),
    st.text(max_size=9),
    st.floats(0, 1),
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers() | st.booleans(), max_size=3),
    st.text(max_size=9),
    times,
    times,
    rejected=st.lists(st.builds(Rejection, st.text(max_size=4), st.text(max_size=4), times), max_size=2).map(tuple),
)
plans = st.builds(
    Plan,
    st.just(DEVICE),
    st.sampled_from(["fp32", "fp16/fp32"]),
    st.just(((1, 3, 9, 9), (2,))),
    st.lists(steps, max_size=3).map(tuple),
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4)),
    st.none() | st.just(PLAN.confirmation),
    st.floats(0, 1e5),
    st.lists(st.text(max_size=5), max_size=2).map(tuple),
)


@given(plan=plans)
@stable(60)
def test_a_plan_survives_json(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(plan.to_json())
        assert Plan.read(path) == plan


@given(plan=plans)
@stable(60)
def test_every_plan_is_printable(plan: Plan) -> None:
    assert all(step.method in str(plan) for step in plan.steps)


def test_the_table_says_what_was_chosen_and_why_not_the_others() -> None:
    text = str(PLAN)
    row = next(line for line in text.splitlines() if line.startswith("conv1"))
    for expected in (
        "3->8 3x3 @9x9 n1",
        "90%",
        "escort",
        "0.100",
        "0.250",
        "2.50x",
        "fastest",
        "dense 0.250 ms",
        "two_four: not two of every four",
    ):
        assert expected in row
    assert "a..b" in text
    assert "3.00x over torch, of which zeros 2.00x" in text
    assert "2 threads" in text
    assert "a note" in text


def test_a_busy_machine_is_said_to_be_busy() -> None:
    assert PLAN.confirmation is not None
    assert "busy" not in str(PLAN)
    assert "busy" in str(replace(PLAN, confirmation=replace(PLAN.confirmation, contended=True)))


def test_a_gpu_has_no_threads() -> None:
    plan = replace(PLAN, device=Device("cuda", "NVIDIA H100", 50 * 2**20, arch="sm_90a"), precision="fp32/tf32")
    assert "NVIDIA H100, fp32/tf32, inputs 1x3x9x9" in str(plan)
    assert "thread" not in plan.summary()[0]


def test_step_finds_the_step_of_a_node_or_says_what_there_is() -> None:
    assert PLAN.step("b").method == "pair"
    with pytest.raises(KeyError, match=r"no step of this plan covers 'c'.*conv1"):
        PLAN.step("c")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"device": 3}'])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(FileFormatError):
        Plan.read(tmp_path / "plan.json")


# -- the hash of the weights ---------------------------------------------------------------------------------
def test_the_hash_sees_names_types_shapes_and_bits() -> None:
    base = {"a": torch.arange(6.0), "b": torch.zeros(())}
    different = [
        {"a": torch.arange(6.0)},
        {"a2": torch.arange(6.0), "b": torch.zeros(())},
        {"a": torch.arange(6.0).double(), "b": torch.zeros(())},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(())},
        {"a": torch.arange(6.0) + 1e-7, "b": torch.zeros(())},
        {"a": torch.arange(6.0).flip(0), "b": torch.zeros(())},
    ]
    hashes = [weights_hash(tensors) for tensors in (base, *different)]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_does_not_see_memory_order_or_strides() -> None:
    weight = torch.randn(4, 3, 3, 3)
    assert weights_hash({"a": weight, "b": weight[0]}) == weights_hash(
        {"b": weight[0].clone(), "a": weight.contiguous(memory_format=torch.channels_last)}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float64])
def test_every_dtype_and_empty_tensors_have_a_hash(dtype: torch.dtype) -> None:
    assert weights_hash({"a": torch.ones(3).to(dtype), "b": torch.zeros(0, 4).to(dtype)})
