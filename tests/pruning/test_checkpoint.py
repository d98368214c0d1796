"""An interrupted training goes on to bitwise the same weights, and nothing is lost on the way."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pruning.training import KINDS, batch, network, optimizer_of, pruner_of, train_step
from zeroskip.core.atomic import write_atomically
from zeroskip.core.errors import FileFormatError
from zeroskip.pruning import PruneConfig, PruneLog, PruneRecord, load_checkpoint, read_log, save_checkpoint

STEPS = 12


def start(kind: str, log: Path) -> dict[str, Any]:
    """Everything as a new process would build it."""
    model = network()
    optimizer = optimizer_of(model)
    pruner = pruner_of(kind, model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    torch.manual_seed(7)  # dropout
    log_ = PruneLog(log, pruner.config)
    return {"model": model, "optimizer": optimizer, "pruner": pruner, "scheduler": scheduler, "log": log_}


def train(parts: dict[str, Any], first: int, last: int) -> None:
    for step in range(first, last + 1):
        train_step(parts["model"], parts["optimizer"], parts["pruner"], batch(step))
        parts["scheduler"].step()
        parts["log"].add(step, parts["pruner"].record(), accuracy=step / 100, loss=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_any_step_the_weights_are_bitwise_the_same(kind: str, tmp_path: Path) -> None:
    whole = start(kind, tmp_path / "whole.jsonl")
    train(whole, 1, STEPS)
    for stop in range(STEPS + 1):
        parts = start(kind, tmp_path / "log.jsonl")
        train(parts, 1, stop)
        save_checkpoint(tmp_path / "c.pt", stop, **parts)
        train(parts, stop + 1, min(stop + 2, STEPS))  # work that the interruption loses, its log lines too

        torch.manual_seed(123)
        parts = start(kind, tmp_path / "log.jsonl")
        assert load_checkpoint(tmp_path / "c.pt", **parts) == stop
        train(parts, stop + 1, STEPS)
        for a, b in zip(whole["model"].state_dict().values(), parts["model"].state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert parts["pruner"].schedule == whole["pruner"].schedule
        assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_checkpoint_does_not_change_with_the_training(tmp_path: Path) -> None:
    """States that are loaded are copies: going on must not write into another pruner's."""
    first, second = (start("rewind", tmp_path / "log.jsonl") for _ in range(2))
    train(first, 1, 4)
    state = first["pruner"].state_dict()
    second["pruner"].load_state_dict(state)
    kept = {name: value.clone() for name, value in state["kept"]["model"].items()}
    train(second, 5, STEPS)
    assert all(torch.equal(value, kept[name]) for name, value in state["kept"]["model"].items())


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_interrupted_while_writing_the_old_checkpoint_stays(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = start("gradual", tmp_path / "log.jsonl")
    path = tmp_path / "c.pt"
    save_checkpoint(path, 1, model=parts["model"])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, 2, model=parts["model"])
    assert load_checkpoint(path, model=parts["model"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def other_width(parts: dict[str, Any]) -> None:
    parts["model"] = network(12)


def other_network(parts: dict[str, Any]) -> None:
    parts["model"] = nn.Linear(3, 3)


def other_precision(parts: dict[str, Any]) -> None:
    parts["model"].bfloat16()


def other_optimizer(parts: dict[str, Any]) -> None:
    parts["optimizer"] = torch.optim.Adam(parts["model"].parameters())


def other_groups(parts: dict[str, Any]) -> None:
    groups = [{"params": [parameter]} for parameter in parts["model"].parameters()]
    parts["optimizer"] = torch.optim.SGD(groups, lr=0.1)


def other_pruner(parts: dict[str, Any]) -> None:
    parts["pruner"] = pruner_of("rewind", parts["model"], parts["optimizer"])


def other_scope(parts: dict[str, Any]) -> None:
    parts["pruner"] = pruner_of("gradual erk", parts["model"], parts["optimizer"])


def no_scheduler(parts: dict[str, Any]) -> None:
    del parts["scheduler"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_width,
            r"c.pt: model: got the weights of another network: 0.weight \(8, 4, 3, 3\) float32 instead of \(12, 4",
        ),
        (other_network, "weight missing instead of .* and 1.* more; build the network that was saved"),
        (other_precision, r"got the weights of .*: 0.weight \(8, 4, 3, 3\) float32 instead of \(8, 4, 3, 3\) bfloat16"),
        (other_optimizer, "optimizer: got the state of a SGD, expected a Adam"),
        (other_groups, "optimizer: .* parameter group"),
        (other_pruner, "pruner: got the state of a GradualPruner, expected a RewindPruner"),
        (other_scope, 'pruner: config: got .*"scope": "layer".* expected .*"scope": "erk"'),
        (no_scheduler, r"got the parts \['log', 'model', .*'scheduler'\], expected \['log', 'model'"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: Any, message: str, tmp_path: Path) -> None:
    saved = start("gradual", tmp_path / "log.jsonl")
    train(saved, 1, 5)
    save_checkpoint(tmp_path / "c.pt", 5, **saved)
    parts = start("gradual", tmp_path / "log.jsonl")
    train(parts, 1, 2)
    change(parts)
    before = {name: value.clone() for name, value in parts["model"].state_dict().items()}
    log, step, random = (tmp_path / "log.jsonl").read_bytes(), parts["pruner"].training_step, torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c.pt", **parts)
    assert all(torch.equal(value, before[name]) for name, value in parts["model"].state_dict().items())
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert parts["pruner"].training_step == step
    assert torch.equal(torch.get_rng_state(), random)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code of the file ran",))


def test_other_files_are_refused_and_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = network(), tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError):
        load_checkpoint(path, model=model)
    save_checkpoint(path, 1, model=model)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="not a checkpoint"):
            load_checkpoint(path, model=model)
    torch.save(Evil(), path)
    with pytest.raises(FileFormatError, match="not a checkpoint"):
        load_checkpoint(path, model=model)
    assert capsys.readouterr().out == ""
    torch.save(model.state_dict(), path)
    with pytest.raises(FileFormatError, match=r"got a file of torch.save, expected one of save_checkpoint"):
        load_checkpoint(path, model=model)


def test_the_log_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    parts = start("gradual", path)
    train(parts, 1, 3)
    config, entries = read_log(path)
    assert config == parts["pruner"].config
    assert entries == list(parts["log"].entries)
    assert (entries[0].step, entries[0].accuracy, entries[0].figures) == (1, 0.01, {"loss": 1.0})
    record: PruneRecord = parts["pruner"].record()
    assert entries[-1].density == record.density
    assert entries[-1].layers == {layer.name: layer.density for layer in record.layers}
    assert json.loads(path.read_text().splitlines()[0])["only"] == ["3", "7"]
    assert PruneLog(None, config).add(1, record) == PruneLog(tmp_path / "b", config).add(1, record)
    for text in ("", "{}", path.read_text() + '{"a": 1}\n', path.read_text()[:-9]):
        (tmp_path / "b").write_text(text)
        with pytest.raises(ValueError, match=r"JSON that is none|no entry"):
            read_log(tmp_path / "b")
    with pytest.raises(ValueError, match="log: got one of"):
        PruneLog(None, PruneConfig()).load_state_dict(parts["log"].state_dict())


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "c.pt"
    save_checkpoint(path, 1, model=model)
    whole = path.read_bytes()
    weight = whole.index(model.get_parameter("3.weight").detach().numpy().tobytes())
    path.write_bytes(whole[: weight + 5] + bytes([whole[weight + 5] ^ 1]) + whole[weight + 6 :])
    with pytest.raises(FileFormatError, match=r"not a checkpoint .*; take an older one"):
        load_checkpoint(path, model=model)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "c.pt"
    optimizer = optimizer_of(model)
    save_checkpoint(path, 1, model=model, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 0.1 * np.cos(0.3)
    with pytest.raises(ValueError, match=r"got {'optimizer': .*numpy.* with float"):
        save_checkpoint(path, 2, model=model, optimizer=optimizer)
    assert load_checkpoint(path, model=model, optimizer=optimizer) == 1


def test_a_refused_checkpoint_costs_no_line_of_the_log(tmp_path: Path) -> None:
    saved = start("gradual", tmp_path / "log.jsonl")
    train(saved, 1, 5)
    save_checkpoint(tmp_path / "c.pt", 5, **saved)
    before = (tmp_path / "log.jsonl").read_bytes()
    parts = start("gradual", tmp_path / "log.jsonl")  # a new process, with a mistake in its arguments
    parts["pruner"] = pruner_of("gradual erk", parts["model"], parts["optimizer"])
    for order in (parts, dict(reversed(parts.items()))):
        with pytest.raises(ValueError, match="pruner: config"):
            load_checkpoint(tmp_path / "c.pt", **order)
        assert (tmp_path / "log.jsonl").read_bytes() == before


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"a": 1}


def test_states_that_are_no_tensors_are_welcome(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", 1, model=Extra(2, 2))
    assert load_checkpoint(tmp_path / "c.pt", model=Extra(2, 2)) == 1


@pytest.mark.parametrize("number", [torch.tensor(0.5), np.float32(0.5)])
def test_the_log_takes_numbers_of_torch_and_numpy(number: Any, tmp_path: Path) -> None:
    parts = start("gradual", tmp_path / "log.jsonl")
    parts["log"].add(1, parts["pruner"].record(), accuracy=number, loss=number)
    (entry,) = read_log(tmp_path / "log.jsonl")[1]
    assert (entry.accuracy, entry.figures) == (0.5, {"loss": 0.5})


def test_links_are_followed_and_devices_stay(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    write_atomically(link, lambda file: file.write(b"a"))
    assert link.is_symlink()
    assert target.read_bytes() == b"a"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, lambda file: file.write(b"b"))
    assert os.read(reader, 9) == b"b"
    os.close(reader)
    assert pipe.is_fifo()
