"""Train and prune ResNet-18 and VGG-19-BN on Imagenette at 112x112, row by row of `plan.py`.

    python -m tools.train --out DIR                      # everything that DIR does not have yet
    python -m tools.train --out DIR --budget 540         # for nine minutes; the same command again goes on
    python -m tools.train --out DIR --list               # what is done, what is left and how long it may take

Run it in the repository's folder, with `src` in PYTHONPATH; the photographs are `imagenette112_webp80.npz` in
ZEROSKIP_DATA. Ten classes at 112 pixels are an easy task: nothing here compares with ImageNet's figures.

DIR gets `trained.jsonl` (`zeroskip.pruning.TrainedFile`: one record for each network, with densities and hold-out
accuracy by step and the accuracy on the test part), `networks/*.safetensors` (fp16 weights without their zeros; read by
`zeroskip.model.zoo.files`) and `checkpoints/`, which hold what is unfinished. Each network is measured as it was
written to its file, and what goes on from a parent starts from its file, so that no result depends on an interruption.

The parent is trained from scratch. Every other row, "dense" among them, goes on from the parent of its seed through the
same second cycle: the dense row is the fair opponent of the pruned ones, and better than the parent. Filters are
removed in one shot at the beginning of that cycle; masks grow in its first half. A tenth of the training part is held
out for choosing; the validation part is the test part and is looked at once, when a row is done.

Time: 3 seeds x 24 epochs of parents and 25 trainings x 24 epochs are 672 epochs a network. On an H200 with one process
for each network and seed, each with a DIR of its own (launching keeps one process busy, not the GPU), an epoch takes
the GPU about 0.7 s for ResNet-18 and 1.3 s for VGG-19-BN: 22 minutes for all, plus some seconds a row for measuring,
one to two minutes for reordering channels, and what the changes of masks by Fisher scores take. The rows of a network
and seed need that parent's file: keep DIR between calls. A parent that is in the log but not in DIR is trained anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroskip.core import device as devices
from zeroskip.core.env import data_folder, environment
from zeroskip.core.errors import ZeroskipError
from zeroskip.core.jsonable import to_json
from zeroskip.model.zoo.files import build_network, load_network, save_network
from zeroskip.pruning import Trained, TrainedFile

from . import networks, photos
from .cycle import Budget, Cycle, OutOfTime, accuracy
from .plan import PARENT, ROWS, SEEDS, Job, Settings, jobs

FINISH_SECONDS = 5.0
"""To write a network and measure it."""


class Runner:
    """Does jobs into a folder."""

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self.settings = out, settings
        self.results = TrainedFile(out / "trained.jsonl")
        wanted = to_json(asdict(settings))
        for row in self.results.rows:
            if row.settings != wanted:
                raise SystemExit(
                    f"{self.results.path}: {row.key} was trained with {row.settings}, not {wanted}; take another --out"
                )

    def file(self, job: Job) -> Path:
        return self.out / "networks" / f"{job.name}.safetensors"

    def done(self, job: Job) -> bool:
        return job.key in self.results

    def do(self, job: Job, data: photos.Photos, facts: dict[str, Any], budget: Budget) -> None:
        """Train one network, or what is left of that, and record it. Raises OutOfTime."""
        print(f"{job.name}", flush=True)
        device = data.train.images.device
        checkpoint = self.out / "checkpoints" / f"{job.name}.pt"
        cycle = Cycle(job, self._start(job, data.classes, device), data, self.settings, checkpoint)
        pruned = cycle.run(budget)
        save_network(self.file(job), job.network, data.classes, cycle.model)
        model = self._read(job, device)
        layers = networks.counted(pruned, model)
        trained = Trained(
            network=job.network,
            row=job.row.name,
            seed=job.seed,
            pruning=job.row.config,
            settings=to_json(asdict(self.settings)),
            layers=layers,
            log=tuple(cycle.log.entries),
            holdout=accuracy(model, data.holdout),
            accuracy=accuracy(model, data.test),
            macs=networks.macs(model, photos.normalized(data.test.images[:1])),
            file_bytes=self.file(job).stat().st_size,
            seconds=round(cycle.watch.seconds, 2),
            environment=facts["id"],
        )
        if not self.done(job):
            self.results.add(trained, facts)
        checkpoint.unlink(missing_ok=True)
        print(
            f"  density {layers.density:.1%}, hold-out {trained.holdout:.2%}, test {trained.accuracy:.2%}, "
            f"{trained.file_bytes / 1e6:.2f} MB, {trained.seconds:.0f} s",
            flush=True,
        )

    def _start(self, job: Job, classes: int, device: torch.device) -> nn.Module:
        if job.parent is not None:
            return self._read(job.parent, device)
        torch.manual_seed(job.seed)
        return _placed(build_network(job.network, classes), device)

    def _read(self, job: Job, device: torch.device) -> nn.Module:
        return _placed(load_network(self.file(job)).model, device)


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def show(runner: Runner, wanted: Sequence[Job]) -> None:
    left = 0.0
    for job in wanted:
        seconds = job.expected_seconds(runner.settings)
        found = next((row for row in runner.results.rows if row.key == job.key), None)
        left += 0 if found else seconds
        state = f"test {found.accuracy:.2%}, {found.seconds:.0f} s" if found else f"about {seconds:.0f} s"
        print(f"{job.name:36} {state}")
    print(f"left: about {left / 60:.1f} minutes of an H200")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m tools.train",
        description=about[0],
        epilog=about[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=data_folder() / "imagenette112_webp80.npz")
    parser.add_argument("--networks", nargs="+", choices=networks.NETWORKS, default=networks.NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="these only, and the parents")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which to stop")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of epochs")
    parser.add_argument("--peak", type=float, default=Settings.peak, help="highest learning rate")
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--photos", type=int, help="take so many photographs of each part, for a trial")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    try:
        train(arguments(words))
    except (ZeroskipError, ArithmeticError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def train(args: argparse.Namespace) -> None:
    """What is asked for and not done yet, as far as the budget goes."""
    start = time.monotonic()
    settings = replace(
        Settings(batch=args.batch, peak=args.peak, photos=args.photos),
        parent_epochs=max(1, round(args.scale * Settings.parent_epochs)),
        epochs=max(1, round(args.scale * Settings.epochs)),
    )
    runner = Runner(args.out, settings)
    names = {PARENT, *(args.rows or (row.name for row in ROWS))}
    wanted = [job for job in jobs(tuple(args.networks), tuple(args.seeds)) if job.row.name in names]
    if args.list:
        show(runner, wanted)
        return
    left = [job for job in wanted if not runner.done(job)]
    # What is left may go on from parents whose record came from another machine, and whose file did not.
    missing = {job.parent.key for job in left if job.parent and not runner.file(job.parent).exists()}
    left = [job for job in wanted if job in left or job.key in missing]
    if not left:
        print("nothing is left to do")
        return
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # what is measured is measured in fp32; training runs in bf16 on a GPU
    here = devices.cuda() if torch.cuda.is_available() else devices.cpu(torch.get_num_threads())
    data = photos.load(args.data, here.torch, args.photos)
    sizes = ", ".join(f"{len(part.labels):,}" for part in (data.train, data.holdout, data.test))
    print(f"{sizes} photographs (train, hold-out, test) after {time.monotonic() - start:.1f} s", flush=True)
    facts = environment(here)
    budget = Budget(start + args.budget - FINISH_SECONDS)
    for count, job in enumerate(left):
        try:
            budget.need(0)
            runner.do(job, data, facts, budget)
        except OutOfTime:
            print(f"the budget is spent: {len(left) - count} trainings are left; call again to go on")
            return
    print(f"all done after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
