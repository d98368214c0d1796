"""One rank of `torchrun`: trains a network on its own share of the data and prunes it, once for each scenario (its
arguments: a kind of pruner, and what rank 1 has different)."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pruning.training import batch, network, optimizer_of, pruner_of, train_step
from zeroskip.pruning import Pruner, check_ranks, load_checkpoint, save_checkpoint

STEPS, STOP = 12, 5


def sparsity(scenario: str, rank: int) -> float:
    """At the end of the training; raises RuntimeError where the ranks differ."""
    kind, _, other = scenario.partition(", other ")
    model = network()
    # Ranks start differently, as they do without a seed: DistributedDataParallel gives all the weights of rank 0.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank * torch.randn_like(parameter)
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    pruner = pruner_of("gradual erk" if other == "config" and rank else kind, model, optimizer)
    torch.manual_seed(rank)  # dropout
    for step in range(1, STEPS + 1):
        if other == "objects" and step == STOP + 1:
            model, ddp, optimizer, pruner = resumed(kind, model, optimizer, pruner, rank)
        data = batch(2 * step + rank)
        train_step(ddp, optimizer, pruner, data)
        if other == "weights" and rank and step == 4:
            with torch.no_grad():
                model.get_parameter("3.weight").normal_()
        check_ranks(pruner)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everyone = [torch.empty_like(flat) for _ in range(2)]
    distributed.all_gather(everyone, flat)
    assert torch.equal(*everyone)
    assert not (flat == 0).all()
    return pruner.sparsity


def resumed(
    kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, rank: int
) -> tuple[nn.Sequential, DistributedDataParallel, torch.optim.Optimizer, Pruner]:
    """What rank 0 writes, loaded by all into what new processes would build."""
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    distributed.broadcast_object_list(folder)
    path = Path(folder[0]) / "c.pt"
    if rank == 0:
        save_checkpoint(path, STOP, model=model, optimizer=optimizer, pruner=pruner)
    distributed.barrier()
    new = network()
    ddp, optimizer = DistributedDataParallel(new), optimizer_of(new)
    pruner = pruner_of(kind, new, optimizer)
    assert load_checkpoint(path, model=new, optimizer=optimizer, pruner=pruner) == STOP
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])
    torch.manual_seed(STOP * 2 + rank)  # dropout
    return new, ddp, optimizer, pruner


def main(scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for scenario in scenarios:
        try:
            found = f"sparsity {sparsity(scenario, rank):.3f}"
        except RuntimeError as error:  # the same on every rank, so all go on
            found = f"RuntimeError {error}"
        sys.stdout.write(f"{scenario}: rank {rank} {found}\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.destroy_process_group()
    # All is done.  Python's own way out has aborted here, once in many runs: "terminate called without an active
    # exception", threads of torch's that nobody has joined.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
