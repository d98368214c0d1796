"""Whether all processes of a training prune alike."""

import hashlib

import torch
from torch import distributed

from .pruner import Pruner


def check_ranks(pruner: Pruner) -> None:
    """Compare this rank's pruner with those of all others; call it on every rank, at the same step.

    Costs one exchange of 64 bytes a rank and a copy of the masks to the CPU: right after masks have changed is
    often enough. Does nothing outside of `torch.distributed`.

    Raises:
        RuntimeError: configuration, schedule, step or masks differ; the same on every rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    schedule = hashlib.sha256(repr(pruner.schedule).encode())
    masks = hashlib.sha256()
    for name, mask in pruner.masks.items():
        masks.update(name.encode())
        masks.update(mask.cpu().numpy().tobytes())
    device = next(iter(pruner.masks.values())).device
    # NCCL moves tensors of the GPU only, gloo those of the CPU as well.
    mine = torch.tensor(list(schedule.digest() + masks.digest()), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, mine)
    for what, part in (("configuration, schedule or step", slice(0, 32)), ("masks", slice(32, 64))):
        others = [rank for rank, each in enumerate(everyone) if not torch.equal(each[part], everyone[0][part])]
        if others:
            raise RuntimeError(
                f"{what}: got others on ranks {others} than on rank 0, expected the same; build the pruner on every "
                "rank with the same arguments, after DistributedDataParallel, and call step on all of them"
            )
