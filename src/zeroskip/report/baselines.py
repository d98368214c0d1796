"""Dense opponents: the same network in torch, in torch's compiler with frozen weights, and in ONNX Runtime."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import Precision
from zeroskip.core.precision import held, searching
from zeroskip.model.bake import bake

Call = Callable[[], Tensor]


def baseline(name: str, model: nn.Module, x: Tensor, device: Device, precision: Precision = "fp32") -> Call:
    """A function that runs ``model`` on ``x`` and returns a tensor; compilation and conversion happen here.

    On a GPU a call can be captured in a graph, and cuDNN has searched its algorithms.

    Raises:
        Unsupported: the opponent is not installed or refuses the model.
    """
    make = {"torch": _torch, "torch_channels_last": _channels_last, "inductor": _inductor, "onnxruntime": _onnxruntime}
    if name not in make or (name == "onnxruntime" and device.kind == "cuda"):
        raise Unsupported(f"{name} does not run such a case on {device.kind}")
    call = make[name](bake(model), x, device, precision)
    if device.kind == "cuda":
        with searching():
            for _ in range(3):
                call()
    return call


def _no_grad(model: Callable[[Tensor], Tensor], x: Tensor, device: Device, precision: Precision) -> Call:
    if device.kind == "cpu":

        def run() -> Tensor:
            with torch.no_grad():
                return model(x)

        return run

    def run_there() -> Tensor:
        with torch.no_grad(), held(precision):
            return model(x)

    return run_there


def _torch(model: nn.Module, x: Tensor, device: Device, precision: Precision) -> Call:
    return _no_grad(model, x, device, precision)


def _channels_last(model: nn.Module, x: Tensor, device: Device, precision: Precision) -> Call:
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _no_grad(model, x.contiguous(memory_format=torch.channels_last), device, precision)


def _inductor(model: nn.Module, x: Tensor, device: Device, precision: Precision) -> Call:
    from torch._inductor import config

    torch._dynamo.reset()
    # The graph is captured by whoever times the call, so torch's compiler is not to capture one; and convolutions are
    # cuDNN's, since trying Triton's takes minutes for each layer.
    mode = None if device.kind == "cpu" else "max-autotune-no-cudagraphs"
    settings = {"freezing": True, "cpp_wrapper": False, "max_autotune_conv_backends": "ATEN"}
    with warnings.catch_warnings(), config.patch(settings):
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, mode=mode)
        try:
            run = _no_grad(compiled, x, device, precision)
            run()
            run()
        except Exception as error:
            raise Unsupported(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    return run


def _onnxruntime(model: nn.Module, x: Tensor, device: Device, precision: Precision) -> Call:
    try:
        import onnxruntime
    except ImportError as error:
        raise Unsupported("onnxruntime is not installed: pip install 'zeroskip[bench]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = device.threads, 1
    # Spinning helpers would slow down the opponents that run next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if device.threads == 1 else "1")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(model, (x,), str(path), input_names=["x"], dynamo=False)
        except Exception as error:
            raise Unsupported(
                f"torch.onnx.export failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
