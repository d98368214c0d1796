"""Training that goes on where it was interrupted."""

import copy
import io
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import nn

from zeroskip.core.atomic import write_atomically
from zeroskip.core.errors import FileFormatError

_FORMAT = "zeroskip training checkpoint 1"


class Stateful(Protocol):
    """Anything with torch's pair of methods: networks, optimizers, schedulers, gradient scalers, pruners, logs."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def save_checkpoint(path: Path | str, step: int, **parts: Stateful) -> None:
    """Write everything that training needs to go on after `step` into one file, atomically.

    ::

        save_checkpoint(path, step, model=model, optimizer=optimizer, pruner=pruner, log=log)

    Besides the parts it holds the state of torch's random numbers, on the CPU and on this process's current GPU;
    not those of `random`, NumPy and worker processes: derive the order of the data from the step. With several
    ranks, let the first one write.

    Raises:
        ValueError: a state holds what could not be loaded without running code, as NumPy's numbers. What was at `path`
            is still there.
    """
    path = Path(path)
    payload = {
        "format": _FORMAT,
        "step": step,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "types": {name: _type(part) for name, part in parts.items()},
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    }

    def write(file: BinaryIO) -> None:
        torch.save(payload, file)
        if _unloadable(file):
            found = {name: types for name, part in parts.items() if (types := _unloadable(_saved(part)))}
            raise ValueError(
                f"{path}: got {found}, expected states of tensors and Python's own types, since loading runs no code; "
                "turn NumPy's numbers into Python's with float(...)"
            )

    write_atomically(path, write)


def load_checkpoint(path: Path | str, **parts: Stateful) -> int:
    """Put the parts back into the states that `save_checkpoint` wrote; returns the step to go on after.

    Pass parts that were built in the same way, under the same names. No code of the file is run.

    Raises:
        FileFormatError: no such checkpoint, or a damaged one.
        ValueError: it holds other parts, or those of another network, optimizer, configuration or schedule.
            All parts are then as they were.
        FileNotFoundError: there is no file.
    """
    payload = _read(Path(path))
    states, types = payload["parts"], payload["types"]
    if set(states) != set(parts):
        raise ValueError(f"{path}: got the parts {sorted(states)}, expected {sorted(parts)}; pass what was saved")
    for name, part in parts.items():
        if types[name] != _type(part):
            raise ValueError(
                f"{path}: {name}: got the state of a {types[name]}, expected a {_type(part)}; build it as it was"
            )
        if isinstance(part, nn.Module):
            _check_architecture(f"{path}: {name}", states[name], part)
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except Exception as error:  # of any part
        for each, state in before.items():
            parts[each].load_state_dict(state)
        raise ValueError(f"{path}: {name}: {error}") from error
    torch.set_rng_state(payload["random"])
    if payload["random_cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(payload["random_cuda"])
    return int(payload["step"])


def _type(part: Stateful) -> str:
    # The classes of networks change (DistributedDataParallel, torch.compile); their tensors say enough.
    return "Module" if isinstance(part, nn.Module) else type(part).__name__


def _saved(part: Stateful) -> BinaryIO:
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    return file


def _unloadable(file: BinaryIO) -> list[str]:
    """The types and functions in a file of `torch.save` that `torch.load` refuses to call."""
    file.seek(0)
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        try:
            # torch.load does not look at the checksums that torch.save writes.
            if (damaged := zipfile.ZipFile(file).testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load and zipfile raise a handful of unrelated types
            raise FileFormatError(
                f"{path}: not a checkpoint ({type(error).__name__}), expected a file of save_checkpoint; "
                "take an older one"
            ) from error
    if not isinstance(payload, dict) or payload.get("format") != _FORMAT:
        raise FileFormatError(f"{path}: got a file of torch.save, expected one of save_checkpoint")
    return payload


def _form(value: Any) -> str:
    """What must be equal of two values of a module's state; what it adds by get_extra_state need not be a tensor."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _check_architecture(where: str, state: dict[str, Any], model: nn.Module) -> None:
    got, expected = ({name: _form(value) for name, value in each.items()} for each in (state, model.state_dict()))
    differences = [
        f"{name} {got.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
        for name in (*expected, *(name for name in got if name not in expected))
        if got.get(name) != expected.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{where}: got the weights of another network: {', '.join(differences[:3])}{more}; "
            "build the network that was saved"
        )
