"""Make the denoisers that come with the package from what train_denoiser.py wrote.

    python examples/pack_denoiser.py --dense DIR/dncnn_control.safetensors --sparse DIR/dncnn_sparse90.safetensors

The log of each is expected beside it (`.jsonl`; other places: `--dense-log`, `--sparse-log`). Batch norm is folded
into the convolutions, in float64, rounded once. The dense weights are then stored as float16, the sparse ones as one
bit per weight and the nonzeros in float32. What is written is read back and must denoise a photograph of
scikit-image as the trained network does, to 0.005 dB. Both files say in their metadata how they were trained, and
README.md beside them is written from the same logs. `--equal-log` is the log of another sparse network, which had
exactly the dense one's parent and steps: README.md then says what that reached, too.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from skimage import data
from torch import Tensor, nn

from zeroskip.assets import DENSE, SPARSE, Denoiser, restored, stored
from zeroskip.model.zoo import dncnn

SIGMA = 25 / 255
TOLERANCE_DB = 0.005
ASSETS = Path(__file__).parents[1] / "src/zeroskip/assets"
LICENCE = (
    "Apache-2.0, like the rest of zeroskip. The weights are our own, trained from scratch on the photographs "
    "of Imagenette; no photograph is contained in them."
)
DATA = "Imagenette (fast.ai), 112x112 pixels, WebP quality 80"


def folded(model: nn.Module) -> dict[str, Tensor]:
    """The state of a `Denoiser` that computes what `model`, a `zoo.dncnn()` in evaluation mode, computes."""
    result: dict[str, Tensor] = {}
    convs = 0
    for module in model.layers:  # type: ignore[union-attr]
        name = f"layers.{2 * (convs - 1)}"  # of the last convolution seen: each is followed by a ReLU there
        if isinstance(module, nn.Conv2d):
            name = f"layers.{2 * convs}"
            convs += 1
            result[f"{name}.weight"] = module.weight.detach().double()
            bias = torch.zeros(module.out_channels) if module.bias is None else module.bias.detach()
            result[f"{name}.bias"] = bias.double()
        elif isinstance(module, nn.BatchNorm2d):
            norm = {key: tensor.detach().double() for key, tensor in module.state_dict().items()}
            scale = norm["weight"] / torch.sqrt(norm["running_var"] + module.eps)
            result[f"{name}.weight"] *= scale.reshape(-1, 1, 1, 1)
            result[f"{name}.bias"] = (result[f"{name}.bias"] - norm["running_mean"]) * scale + norm["bias"]
    return {name: tensor.float() for name, tensor in result.items()}


def psnr(model: nn.Module) -> float:
    """In dB, on one photograph with noise."""
    clean = torch.from_numpy(data.astronaut())  # type: ignore[no-untyped-call]
    clean = clean[None, :192, 128:320].permute(0, 3, 1, 2).float() / 255
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(-10 * (model(noisy).clamp(0, 1) - clean).square().mean().log10())


def summary(log: Path) -> dict[str, Any]:
    """The last line of a training log."""
    result: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return result


def pack(source: Path, log: dict[str, Any], target: Path, *, half: bool) -> dict[str, Any]:
    """Fold, check, write; what the file says about itself."""
    model = dncnn()
    model.load_state_dict(load_file(source))
    model.eval()
    state = folded(model)
    about = {
        "network": "DnCNN, colour, 17 convolutions of 3x3, 64 channels, batch norm folded",
        "task": "remove Gaussian noise of sigma 25/255 from an image in 0..1",
        "data": f"{DATA}, {log['photos']} photographs",
        "psnr_db": round(log["psnr"], 3),
        "psnr_noisy_db": round(log["psnr_noisy"], 3),
        "psnr_of": f"{log['val_photos']} validation photographs of the same set, before folding and rounding",
        "training": {key: log[key] for key in ("stage", "steps", "batch", "crop", "seed", "torch", "device")},
        "nonzeros": {
            name.removesuffix(".weight"): [int(tensor.count_nonzero()), tensor.numel()]
            for name, tensor in state.items()
            if name.endswith(".weight")
        },
        "licence": LICENCE,
    }
    tensors = stored({name: tensor.half() if half else tensor for name, tensor in state.items()})
    # save_file would make a file that nobody else may read.
    target.write_bytes(save(tensors, metadata={"about": json.dumps(about)}))

    packed = Denoiser()
    packed.load_state_dict(restored(load_file(target), {name: tuple(value.shape) for name, value in state.items()}))
    before, after = psnr(model), psnr(packed.eval())
    print(f"{target.name}: {target.stat().st_size / 1e3:.0f} kB; {before:.4f} dB as trained, {after:.4f} dB as packed")
    if abs(before - after) > TOLERANCE_DB:
        raise SystemExit(f"packing changed the PSNR by {after - before:+.4f} dB, allowed are {TOLERANCE_DB}")
    return about


README = """\
# Denoisers

A DnCNN (17 convolutions of 3x3, 64 channels, colour) that removes Gaussian noise of sigma 25/255, twice: dense, and
with 90% of the weights of each hidden convolution zero. `zeroskip.assets.dense_denoiser()` and `sparse_denoiser()`
load them, `zeroskip demo` shows them.

| file | bytes | nonzeros | PSNR |
|---|---:|---:|---:|
{rows}

PSNR is the mean over {val_photos} validation photographs of the training set's own split, whole, the same noise for
both (noisy: {noisy:.2f} dB), before folding and rounding; packing changes it by less than {tolerance} dB.

{verdict}

Batch norm is folded into the convolutions. The dense weights are float16. Tensors with zeros are stored as one bit per
weight (`name:mask`) and the nonzeros in float32 (`name:values`). The metadata of each file holds its training summary.

## How they were made

{lineage}

```
{commands}
```

These files were trained on one {device} with torch {torch}, in batches of {batch} crops of {crop}x{crop}
pixels. Where `--steps` is left out, the script fits the number of steps to a time budget.
Training on a GPU is not bitwise repeatable, so expect another run to differ by some hundredths of a dB.

Data: {data}, {photos} photographs.

## Licence

{licence}
"""


def readme(
    dense: dict[str, Any],
    sparse: dict[str, Any],
    parent_steps: int,
    dense_log: dict[str, Any],
    sparse_log: dict[str, Any],
    equal: dict[str, Any] | None,
) -> str:
    train, parent = "python examples/train_denoiser.py --out DIR", "DIR/dncnn_dense.safetensors"
    commands = [
        f"{train} --stage dense --steps {parent_steps}",
        f"{train} --stage control --dense {parent} --steps {dense_log['steps']}",
    ]
    difference = f"Sparse minus dense: {sparse['psnr_db'] - dense['psnr_db']:+.2f} dB."
    # A network starts with the PSNR of the one that it goes on from.
    if abs(sparse_log["psnr_start"] - dense_log["psnr"]) < 1e-3:
        parent = "DIR/dncnn_control.safetensors"
        lineage = (
            "The dense network was trained in two cycles of the learning rate, the second (the stage `control`) "
            f"over {dense_log['steps']} steps. The sparse network is that network, pruned gradually over "
            f"{sparse_log['steps']} more steps."
        )
        difference += " The dense network is the sparse one's parent, so the sparse one has seen more training."
    else:
        lineage = (
            "Both go on from one dense parent, through the same second cycle of the learning rate: the dense "
            f"network for {dense_log['steps']} steps as it is, the sparse one for {sparse_log['steps']} steps "
            "while it is pruned gradually."
        )
    if equal:
        if equal["steps"] != dense_log["steps"] or equal["psnr_start"] != dense_log["psnr_start"]:
            raise SystemExit("--equal-log is of a network with another parent or another number of steps")
        difference += (
            f" With equally much training, {equal['steps']} steps from the same parent, a sparse network of "
            f"the same density reached {equal['psnr']:.2f} dB: {equal['psnr'] - dense_log['psnr']:+.2f} dB."
        )
    commands += [
        f"{train} --stage prune --dense {parent} --steps {sparse_log['steps']}",
        "python examples/pack_denoiser.py --dense DIR/dncnn_control.safetensors "
        "--sparse DIR/dncnn_sparse90.safetensors",
    ]
    rows = []
    for name, facts in ((DENSE, dense), (SPARSE, sparse)):
        nonzero, total = (sum(pair[i] for pair in facts["nonzeros"].values()) for i in (0, 1))
        rows.append(
            f"| {name} | {(ASSETS / name).stat().st_size:,} | {nonzero:,} of {total:,} | {facts['psnr_db']:.2f} dB |"
        )
    facts = {key: sparse_log[key] for key in ("device", "torch", "batch", "crop", "photos")}
    return README.format(
        rows="\n".join(rows),
        val_photos=dense_log["val_photos"],
        noisy=dense_log["psnr_noisy"],
        tolerance=TOLERANCE_DB,
        verdict=textwrap.fill(difference, 119),
        lineage=textwrap.fill(lineage, 119),
        commands="\n".join(commands),
        data=DATA,
        licence=textwrap.fill(LICENCE, 119),
        **facts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack the trained denoisers as package data.")
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--sparse", type=Path, required=True)
    parser.add_argument("--dense-log", type=Path, help="default: beside the network, .jsonl")
    parser.add_argument("--sparse-log", type=Path)
    parser.add_argument("--parent-log", type=Path, help="of the stage dense; default: dncnn_dense.jsonl beside --dense")
    parser.add_argument("--equal-log", type=Path, help="of a sparse network with the dense one's parent and steps")
    args = parser.parse_args()
    dense_log = summary(args.dense_log or args.dense.with_suffix(".jsonl"))
    sparse_log = summary(args.sparse_log or args.sparse.with_suffix(".jsonl"))
    parent = summary(args.parent_log or args.dense.with_name("dncnn_dense.jsonl"))
    equal = summary(args.equal_log) if args.equal_log else None
    dense = pack(args.dense, dense_log, ASSETS / DENSE, half=True)
    sparse = pack(args.sparse, sparse_log, ASSETS / SPARSE, half=False)
    (ASSETS / "README.md").write_text(readme(dense, sparse, parent["steps"], dense_log, sparse_log, equal))


if __name__ == "__main__":
    main()
