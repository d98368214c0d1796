"""Train a colour DnCNN denoiser (noise sigma 25/255) and prune it to 90% on Imagenette's photographs.

    python examples/train_denoiser.py --stage dense --out DIR
    python examples/train_denoiser.py --stage prune --dense DIR/dncnn_dense.safetensors --out DIR
    python examples/train_denoiser.py --stage control --dense DIR/dncnn_dense.safetensors --out DIR --steps N

What is compared with what: the dense parent trains from scratch for `--dense-seconds`, its learning rate
decaying to zero along a cosine. The sparse network starts from that finished parent and trains for
`--prune-seconds` with a learning-rate cycle of its own (same peak, same decay to zero), sparsity rising
during the first 45% of it. So the sparse network has seen more steps than its parent. The stage `control`
is the fair opponent: it takes the parent through the very same second cycle, same steps and batches, without
pruning; give it the `steps` from the log of the prune stage.

Sparsity is 90% of each hidden convolution; the first and the last convolution stay dense.

Writes DIR/dncnn_dense.safetensors, dncnn_sparse90.safetensors and dncnn_control.safetensors (float32 state
dicts, BatchNorm unfolded) and beside each a log of JSON lines, the last of which is the summary. PSNR is the
mean over 200 validation photographs, whole (3x112x112), float32, clipped to 0..1, always the same noise.

Each stage measures its speed on a throwaway copy first and picks a step count that fits the time. For one
GPU; `--steps 6 --photos 32 --batch 4` is a smoke test for any machine.
"""

import argparse
import copy
import io
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zeroskip.model.zoo import dncnn
from zeroskip.pruning import GradualPruner

SIGMA = 25 / 255
SPARSITY = 0.9
PEAK_LR = 1e-3
WARMUP = 0.03  # of the steps, learning rate rising linearly
RAMP = (0.02, 0.45)  # of the steps, sparsity rising
MASK_UPDATES = 100
VAL_PHOTOS = 200
NAMES = {"dense": "dncnn_dense", "prune": "dncnn_sparse90", "control": "dncnn_control"}


def decode(webp: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"))


def load_photos(path: Path, count: int | None) -> tuple[Tensor, Tensor]:
    """Train and validation photographs, uint8 [n, 112, 112, 3]; `count` limits the former."""
    with np.load(path) as data:
        blob, offsets, is_val = data["blob"], data["off"], data["is_val"]
    train = np.flatnonzero(~is_val)
    train = train[np.linspace(0, len(train) - 1, count or len(train)).astype(int)]
    # Evenly spaced, since photographs are stored class by class.
    val = np.flatnonzero(is_val)
    val = val[np.linspace(0, len(val) - 1, min(VAL_PHOTOS, count or VAL_PHOTOS)).astype(int)]
    blobs = [blob[offsets[i] : offsets[i + 1]].tobytes() for i in np.concatenate([train, val])]
    # Forked before CUDA starts, so that workers need not import torch again.
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("fork")) as pool:
        photos = torch.from_numpy(np.stack(list(pool.map(decode, blobs, chunksize=64))))
    return photos[: len(train)], photos[len(train) :]


def random_crops(photos: Tensor, batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Float [batch, 3, size, size] in 0..1 from uint8 [n, h, w, 3], flipped and turned at random."""

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=photos.device, generator=generator)

    n, height, width, _ = photos.shape
    along = torch.arange(size, device=photos.device)
    rows = draw(height - size + 1, batch, 1) + along
    cols = draw(width - size + 1, batch, 1) + along
    rows = torch.where(draw(2, batch, 1).bool(), rows.flip(1), rows)
    cols = torch.where(draw(2, batch, 1).bool(), cols.flip(1), cols)
    # Two flips and a transposition make all eight symmetries of the square.
    y, x = rows[:, :, None].expand(-1, -1, size), cols[:, None, :].expand(-1, size, -1)
    turned = draw(2, batch, 1, 1).bool()
    y, x = torch.where(turned, y.mT, y), torch.where(turned, x.mT, x)
    # Channels come last in memory, as channels_last wants them.
    return photos[draw(n, batch, 1, 1), y, x].permute(0, 3, 1, 2).float() / 255


def psnr(model: nn.Module | None, photos: Tensor) -> float:
    """Mean PSNR in dB of the denoised photographs; of the noisy ones where `model` is None."""
    noise = torch.randn((len(photos), 3, *photos.shape[1:3]), generator=torch.Generator().manual_seed(2025))
    values = []
    if model is not None:
        model.eval()
    with torch.no_grad():
        for first in range(0, len(photos), 50):
            clean = photos[first : first + 50].permute(0, 3, 1, 2).float() / 255
            noisy = clean + SIGMA * noise[first : first + 50].to(clean.device)
            denoised = noisy if model is None else model(noisy)
            mse = (denoised.clamp(0, 1) - clean).square().mean((1, 2, 3))
            values.append(-10 * mse.log10())
    return float(torch.cat(values).mean())


class Trainer:
    """A network in training: its optimizer, its random numbers, one step."""

    def __init__(self, model: nn.Module, photos: Tensor, batch: int, crop: int, seed: int) -> None:
        self.model, self.photos, self.batch, self.crop = model, photos, batch, crop
        self.optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LR)
        self.generator = torch.Generator(photos.device).manual_seed(seed)

    def step(self, lr: float) -> Tensor:
        """Train on one batch; the loss, mean squared error in (0..1)^2."""
        device = self.photos.device.type
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clean = random_crops(self.photos, self.batch, self.crop, self.generator)
        noise = torch.empty_like(clean).normal_(0, SIGMA, generator=self.generator)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            denoised = self.model(clean + noise)
        loss: Tensor = (denoised.float() - clean).square().mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero; `step` counts from 1."""
    warmup = max(1, round(WARMUP * steps))
    return PEAK_LR * min(step / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def affordable_steps(model: nn.Module, photos: Tensor, args: argparse.Namespace, seconds: float) -> int:
    """How many steps fit into `seconds`, from 50 timed ones on a copy of `model`; their time counts too."""
    start = time.perf_counter()
    probe = Trainer(copy.deepcopy(model), photos, args.batch, args.crop, args.seed)
    for _ in range(20):
        loss = probe.step(PEAK_LR)
    loss.item()  # waits for the GPU
    timed = time.perf_counter()
    for _ in range(50):
        loss = probe.step(PEAK_LR)
    loss.item()
    now = time.perf_counter()
    return max(100, int((seconds - (now - start)) / ((now - timed) / 50)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and prune a DnCNN denoiser.")
    folder = Path(os.environ.get("ZEROSKIP_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=folder / "imagenette112_webp80.npz")
    parser.add_argument("--stage", choices=list(NAMES), required=True)
    parser.add_argument("--dense", type=Path, help="the dense parent, for the stages prune and control")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dense-seconds", type=float, default=400)
    parser.add_argument("--prune-seconds", type=float, default=400)
    parser.add_argument("--steps", type=int, help="instead of a time budget")
    parser.add_argument("--photos", type=int, help="use fewer photographs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.stage != "dense" and args.dense is None:
        parser.error(f"--stage {args.stage} needs --dense FILE")

    start = time.perf_counter()
    train, val = load_photos(args.data, args.photos)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = train.to(device), val.to(device)
    print(f"{len(train)} + {len(val)} photographs decoded in {time.perf_counter() - start:.1f} s", flush=True)

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # evaluation is float32; training runs in bfloat16 anyway
    torch.manual_seed(args.seed)
    model = dncnn()
    if args.stage != "dense":
        model.load_state_dict(load_file(args.dense))
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    psnr_start = psnr(model, val)

    start = time.perf_counter()
    seconds = args.dense_seconds if args.stage == "dense" else args.prune_seconds
    steps = args.steps or affordable_steps(model, train, args, seconds)
    # The second cycle draws fresh batches and noise instead of repeating the parent's.
    seed = args.seed if args.stage == "dense" else args.seed + 1
    trainer = Trainer(model, train, args.batch, args.crop, seed)
    pruner = None
    if args.stage == "prune":
        begin, end = (round(part * steps) for part in RAMP)
        pruner = GradualPruner(model, SPARSITY, begin=begin, end=end, every=max(1, (end - begin) // MASK_UPDATES))

    args.out.mkdir(parents=True, exist_ok=True)
    name = NAMES[args.stage]
    with (args.out / f"{name}.jsonl").open("w") as log:

        def write(line: dict[str, object]) -> None:
            print(json.dumps(line), file=log, flush=True)
            print({key: value for key, value in line.items() if key != "record"}, flush=True)

        for step in range(1, steps + 1):
            lr = learning_rate(step, steps)
            loss = trainer.step(lr)
            if pruner:
                pruner.step()
            if step % max(1, steps // 20) == 0 or step == steps:
                line: dict[str, object] = {
                    "step": step,
                    "lr": lr,
                    "loss": loss.item(),
                    "psnr": psnr(model, val),
                }
                if pruner:
                    line["sparsity"] = pruner.sparsity
                write(line | {"seconds": time.perf_counter() - start})

        summary: dict[str, object] = {
            "stage": args.stage,
            "psnr": psnr(model, val),
            "psnr_noisy": psnr(None, val),
            "psnr_start": psnr_start,
            "steps": steps,
            "seconds": time.perf_counter() - start,
            "batch": args.batch,
            "crop": args.crop,
            "seed": seed,
            "photos": len(train),
            "val_photos": len(val),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        if pruner:
            record = pruner.record()
            print(record)
            for layer in record.layers:
                dropped = 0 if layer.reason else round(SPARSITY * layer.numel)
                assert layer.numel - layer.nnz == dropped, layer
            summary |= {
                "psnr_dense": psnr_start,
                "density": record.density,
                "record": json.loads(record.to_json()),
            }
        write(summary)
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
