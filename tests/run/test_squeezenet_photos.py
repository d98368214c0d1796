"""A real trained and pruned network on real photographs: the engine predicts what dense torch predicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zeroskip
from contract.cases import OURS
from real_data import real
from zeroskip.model import zoo

MEAN_BGR = (104.0, 117.0, 123.0)


def photographs() -> list[Tensor]:
    images = pytest.importorskip("PIL.Image", reason="pillow decodes the photographs; pip install zeroskip[demo]")
    found = []
    for path in sorted(
        path for path in real("photos224").iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    ):
        with images.open(path) as image:
            rgb = np.asarray(image.convert("RGB"), np.float32)
        found.append(torch.from_numpy(rgb[..., ::-1] - np.float32(MEAN_BGR)).permute(2, 0, 1).contiguous()[None])
    return found


def network() -> nn.Module:
    model = zoo.squeezenet1_0(classifier_padding=1)
    with np.load(real("squeezenet1_0_pruned.npz")) as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    return model.eval()


@pytest.mark.slow
def test_the_pruned_squeezenet_predicts_what_torch_predicts(quick: None) -> None:
    model, images = network(), photographs()
    assert len(images) == 100
    engine = zeroskip.compile(model, images[0])
    assert len(engine.plan.steps) == 26
    assert {step.method for step in engine.plan.steps} & set(OURS)
    with torch.no_grad():
        wanted = [int(model(image).argmax()) for image in images]
    assert [int(engine(image).argmax()) for image in images] == wanted
    assert len(set(wanted)) >= 10
