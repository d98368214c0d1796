"""One training: one cycle of the learning rate, interrupted and resumed at will."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core.errors import FileFormatError
from zeroskip.core.jsonable import to_json
from zeroskip.pruning import (
    GradualPruner,
    PruneLog,
    PruneRecord,
    load_checkpoint,
    permute_channels,
    prune,
    save_checkpoint,
)

from .photos import Part, Photos, augmented, normalized
from .plan import DENSE, Job, Settings

EVALUATED = 500
"""Photographs at a time."""
CHECKPOINT_SECONDS = 300.0
"""What an unexpected end may cost; VGG-19's takes 160 MB."""
PERMUTE_SECONDS = 120.0
"""Set aside for reordering channels, which cannot be interrupted."""


class OutOfTime(Exception):
    """The budget is spent; what was done is in the checkpoint."""


@dataclass(frozen=True)
class Budget:
    """Until when to work, in seconds of `time.monotonic`."""

    end: float

    def need(self, seconds: float) -> None:
        """Raises OutOfTime unless so many are left."""
        if time.monotonic() + seconds > self.end:
            raise OutOfTime


@dataclass
class Stopwatch:
    """Seconds of training; a part of the checkpoint, so that it goes on counting."""

    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds += time.monotonic() - start


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; a part of it."""

    job: str
    settings: Settings

    def state_dict(self) -> dict[str, Any]:
        return {"job": self.job, "settings": to_json(asdict(self.settings))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where it is of something else."""
        if state != self.state_dict():
            raise ValueError(
                f"the checkpoint is of {state['job']} with {state['settings']}, not of {self.job} with "
                f"{self.state_dict()['settings']}: go on with those, or take another --out"
            )


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Top-1, a fraction, of whole photographs, in fp32 unless the caller is in autocast."""
    model.eval()
    right = 0
    # Without cuDNN's search, which tries many slow ways to compute in fp32: there are few calls.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        for first in range(0, len(part.labels), EVALUATED):
            images, labels = part.images[first : first + EVALUATED], part.labels[first : first + EVALUATED]
            right += int((model(normalized(images)).argmax(1) == labels).sum())
    return right / len(part.labels)


def learning_rate(progress: float, settings: Settings) -> float:
    """At the fraction `progress` of the steps: up along a line, down along a cosine."""
    return settings.peak * min(progress / settings.warmup, 0.5 + 0.5 * math.cos(math.pi * progress))


class Cycle:
    """The training of one job, from its network before (on the device, in training precision) to its network after.

    The photographs of a step, and how they are cut, depend on the seed, the epoch and the step alone. On a CPU a run
    that was interrupted therefore ends at the same bits.

    Args:
        checkpoint: where its state goes; if it is there, training goes on from it.
    """

    def __init__(self, job: Job, model: nn.Module, photos: Photos, settings: Settings, checkpoint: Path) -> None:
        self.job, self.model, self.photos, self.settings, self.checkpoint = job, model, photos, settings, checkpoint
        self.device = photos.train.images.device
        self.per_epoch = max(1, len(photos.train.labels) // settings.batch)
        self.epochs = job.epochs(settings)
        self.watch = Stopwatch()
        self.log = PruneLog(None, job.row.config)
        self.generator = torch.Generator(self.device)

    def run(self, budget: Budget) -> PruneRecord:
        """Train until the end; what was pruned.

        Raises OutOfTime, ArithmeticError where the loss is no number, FileFormatError for another checkpoint.
        """
        self._prepare(budget)
        done = self._resume()
        epoch_seconds, saved = 0.0, time.monotonic()
        while done < self.epochs:
            try:
                budget.need(1.5 * epoch_seconds)
            except OutOfTime:
                self._save(done)
                raise
            before = self.watch.seconds
            with self.watch.running(self.device):
                loss = self._epoch(done)
            epoch_seconds = self.watch.seconds - before
            done += 1
            if not math.isfinite(loss):
                raise ArithmeticError(f"{self.job.name}: the loss is {loss} after epoch {done}; lower the peak")
            if done % max(1, self.epochs // 8) == 0 or done == self.epochs:
                with self._autocast():
                    held_out = accuracy(self.model, self.photos.holdout)
                self.log.add(done * self.per_epoch, self._record(), held_out, loss=round(loss, 4))
                print(f"  epoch {done}: loss {loss:.3f}, hold-out {held_out:.2%}, {epoch_seconds:.2f} s", flush=True)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save(done)
                saved = time.monotonic()
        return self._record()

    def _prepare(self, budget: Budget) -> None:
        """What happens to the network before its first step; optimizer and pruner for it."""
        config, settings = self.job.row.config, self.settings
        example = normalized(self.photos.train.images[:2])
        self._removed = None
        if self.job.row.filters:
            self._removed = prune(self.model, config, example=example)
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif config.permute and not self.checkpoint.exists():
            budget.need(PERMUTE_SECONDS)
            permute_channels(self.model, example, config)
        weights = [weight for weight in self.model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.model.parameters() if weight.ndim == 1]
        self.optimizer = torch.optim.SGD(
            [{"params": weights, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.peak,
            momentum=settings.momentum,
            nesterov=True,
            fused=self.device.type == "cuda",
        )
        self.pruner = None
        if self.job.row.masks:
            steps = self.epochs * self.per_epoch
            begin = round(settings.ramp[0] * steps)
            end = max(begin + 1, round(settings.ramp[1] * steps))
            # Channels have been reordered, just now or before the checkpoint was written.
            masks = replace(config, permute=False)
            every = max(1, (end - begin) // settings.mask_updates)
            self.pruner = GradualPruner(self.model, masks, begin=begin, end=end, every=every)

    def _record(self) -> PruneRecord:
        if self.pruner is not None:
            return self.pruner.record()
        return self._removed or prune(self.model, DENSE)

    def _parts(self) -> dict[str, Any]:
        identity = Identity(self.job.name, self.settings)
        parts = {"identity": identity, "model": self.model, "optimizer": self.optimizer}
        parts |= {"log": self.log, "watch": self.watch}
        return parts if self.pruner is None else parts | {"pruner": self.pruner}

    def _resume(self) -> int:
        """Epochs that were done."""
        if not self.checkpoint.exists():
            return 0
        try:
            done = load_checkpoint(self.checkpoint, **self._parts())
        except ValueError as error:
            raise FileFormatError(str(error)) from error
        print(f"  goes on after epoch {done} of {self.epochs}", flush=True)
        return done

    def _save(self, done: int) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.checkpoint, done, **self._parts())

    def _epoch(self, epoch: int) -> float:
        """Train on every photograph once; the mean loss."""
        self.model.train()
        # Seeds and epochs are small numbers, and the parent's epochs are not repeated by what goes on from it.
        second = 0 if self.job.parent is None else 1
        self.generator.manual_seed(10_000 * (2 * self.job.seed + second) + epoch)
        order = torch.randperm(len(self.photos.train.labels), device=self.device, generator=self.generator)
        total = torch.zeros((), device=self.device)
        for step in range(self.per_epoch):
            total += self._step(order[step * self.settings.batch :][: self.settings.batch], epoch, step)
        return float(total) / self.per_epoch

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _step(self, batch: Tensor, epoch: int, step: int) -> Tensor:
        progress = (epoch * self.per_epoch + step + 1) / (self.epochs * self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, self.settings)
        images = augmented(self.photos.train.images[batch], self.generator)
        with self._autocast():
            logits = self.model(images)
        loss = nn.functional.cross_entropy(
            logits.float(), self.photos.train.labels[batch], label_smoothing=self.settings.label_smoothing
        )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()
        return loss.detach()
