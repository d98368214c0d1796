"""Two processes of torchrun, on the CPU: masks, schedules and weights stay the same without communication."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

import zeroskip
from pruning.training import network, optimizer_of, pruner_of
from zeroskip.pruning import check_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")

AGREE = ("gradual", "gradual 2:4", "gradual fisher", "rewind", "gradual, other objects")
SCENARIOS = (*AGREE, "gradual, other config", "gradual, other weights")


@pytest.fixture(scope="module")
def said() -> str:
    """What both ranks print; all scenarios in one run, since starting it takes most of the time."""
    paths = [str(Path(zeroskip.__file__).parents[1]), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=localhost:0", str(Path(__file__).with_name("ddp_worker.py")), *SCENARIOS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scenario", AGREE)
def test_ranks_agree(said: str, scenario: str) -> None:
    """Also where all go on from what rank 0 wrote, with objects as new processes would build them."""
    sparsity = "0.50" if "2:4" in scenario else "0.80"
    for rank in (0, 1):
        assert f"{scenario}: rank {rank} sparsity {sparsity}" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (SCENARIOS[-2], "configuration, schedule or step: got others on ranks [1]"),
        (SCENARIOS[-1], "masks: got others on ranks [1]"),
    ],
)
def test_ranks_that_differ_are_told(said: str, scenario: str, message: str) -> None:
    for rank in (0, 1):
        assert f"{scenario}: rank {rank} RuntimeError {message}" in said


def test_without_torchrun_there_is_nothing_to_check() -> None:
    model = network()
    check_ranks(pruner_of("gradual", model, optimizer_of(model)))
