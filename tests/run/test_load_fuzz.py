"""Damaged files: an error that says so, or an engine that works.  Never a crash, a hang, or another exception."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import zeroskip
from run.files import edited, in_form, read, retensored, save_example, write
from zeroskip.core.errors import FileFormatError
from zeroskip.pack.smallest import FORMS

EDITS, BYTES, TENSORS = 600, 100, 40
BATCHES = 8


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.zsk"
    save_example(path)
    return path


def survives(path: Path, what: str) -> None:
    """Load and, if that works, run on inputs as the file describes them."""
    try:
        engine = zeroskip.load(path)
    except FileFormatError:
        return
    except Exception as error:  # noqa: BLE001 -- the message must say what was done to the file
        pytest.fail(f"{type(error).__name__}: {error} after {what}")
    graph = engine.variants[0].program.graph
    inputs = [
        torch.ones(graph.values[name].shape, dtype=getattr(torch, graph.values[name].dtype)) for name in graph.inputs
    ]
    try:
        results = engine(*inputs)
    except Exception as error:  # noqa: BLE001
        pytest.fail(f"the call raised {type(error).__name__}: {error} after {what}")
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(results) if leaf is not None) or what


@pytest.mark.parametrize("batch", range(BATCHES))
def test_edited_documents(batch: int, example: Path, tmp_path: Path) -> None:
    document, tensors = read(example)
    for seed in range(batch, EDITS, BATCHES):
        changed, what = edited(document, random.Random(seed))
        write(tmp_path / "model.zsk", changed, tensors)
        survives(tmp_path / "model.zsk", f"seed {seed}: {what}")


@pytest.mark.parametrize("form", FORMS)
def test_exchanged_tensors(form: str, example: Path, tmp_path: Path) -> None:
    document, tensors = read(example)
    tensors = in_form(tensors, document, form)
    for seed in range(TENSORS):
        changed, what = retensored(tensors, random.Random(seed))
        write(tmp_path / "model.zsk", document, changed)
        survives(tmp_path / "model.zsk", f"seed {seed}: {what}")


def test_truncated_files_are_refused(example: Path, tmp_path: Path) -> None:
    whole, chance = example.read_bytes(), random.Random(0)
    for length in [0, 1, 7, 8, 9, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(BYTES // 2))]:
        (tmp_path / "model.zsk").write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            zeroskip.load(tmp_path / "model.zsk")


def test_flipped_bytes(example: Path, tmp_path: Path) -> None:
    whole, chance = example.read_bytes(), random.Random(1)
    for seed in range(BYTES):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 4])):
            position = chance.choice([chance.randrange(8), chance.randrange(len(data)), chance.randrange(len(data))])
            data[position] ^= 1 << chance.randrange(8)
        (tmp_path / "model.zsk").write_bytes(data)
        survives(tmp_path / "model.zsk", f"flip {seed}")
