"""Kernels on torch's current stream."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zeroskip.core.errors import Unsupported
from zeroskip.cuda.compile import imported, unpack

Triple = tuple[int, int, int]

BOXES_BYTES = 128
_FREE_SHARED_BYTES = 48 * 1024
"""Static and dynamic shared memory together that any kernel may use; more must be asked for."""


class _Thread(threading.local):
    has_context = False


_thread = _Thread()


class Kernel:
    """One compiled kernel in this process, for every GPU of its architecture.  Made by ``load``."""

    def __init__(self, built: bytes) -> None:
        core, driver = imported("cuda.core"), imported("cuda.bindings.driver")
        unpacked = unpack(built)
        _give_context()
        try:
            self._kernel = core.ObjectCode.from_cubin(unpacked.cubin).get_kernel(unpacked.symbol)
            self._sizes = tuple(info.size for info in self._kernel.arguments_info)
            # CUDA would load the code at the first launch, which may be inside the capture of a graph.
            (status, _) = driver.cuKernelGetFunction(self._kernel.handle)
            refusal = "" if status == driver.CUresult.CUDA_SUCCESS else status.name
        except Exception as error:  # noqa: BLE001  (cuda.core's own error class is private)
            refusal = str(error)
        if refusal:
            gpu = torch.cuda.get_device_name()
            raise Unsupported(f"{unpacked.symbol} was compiled for {unpacked.arch}, {gpu} refuses it: {refusal}")
        self.symbol, self.resources = unpacked.symbol, unpacked.resources
        self._start = core.launch
        self._checked = False
        self._shared_bytes: dict[int, int] = {}  # dynamic shared memory granted so far, by GPU

    def launch(
        self,
        grid: Triple,
        block: Triple,
        arguments: Sequence[object],
        *,
        shared_bytes: int = 0,
        cluster: Triple | None = None,
        dependent: bool = False,
    ) -> None:
        """Queue the kernel on the stream that is torch's current one at this call; never waits.

        Args:
            grid: blocks in x, y, z, also when there are clusters (which must divide it).
            block: threads in x, y, z.
            arguments: CUDA tensors (their addresses), None (a null pointer), ints (as ``int``), floats (as ``float``),
                what ``boxes`` returns.  The caller keeps the tensors alive as for any operator of torch.
            shared_bytes: dynamic shared memory of a block.
            cluster: blocks of a cluster in x, y, z.
            dependent: may start before the previous kernel of the stream has ended; the kernel must then call
                ``zeroskip::dependent_wait()`` before it reads what earlier ones write and before it writes anything.

        Raises:
            ValueError: a tensor is not on the GPU, an int does not fit 32 bits, clusters do not divide the grid.
            TypeError: the arguments are not those of the kernel.
        """
        passed = [_passed(argument) for argument in arguments]
        if len(passed) != len(self._sizes) or not self._checked:
            self._check(passed)
        if not _thread.has_context:
            _give_context()
        stream = torch.cuda.current_stream()
        if shared_bytes + self.resources.shared_bytes > _FREE_SHARED_BYTES:
            self._grant(shared_bytes, stream.device_index)
        config = _config(grid, block, cluster, shared_bytes, dependent)
        self._start(_stream(stream.device_index, stream.cuda_stream), config, self._kernel, *passed)

    def _check(self, passed: Sequence[Any]) -> None:
        """The driver takes addresses on faith: a missing or short argument would be read from beyond its end."""
        sizes = tuple(getattr(value, "itemsize", 8 if type(value) is int else BOXES_BYTES) for value in passed)
        if sizes != self._sizes:
            raise TypeError(f"{self.symbol} takes arguments of {self._sizes} bytes, got {sizes}")
        self._checked = True

    def _grant(self, shared_bytes: int, device: int) -> None:
        if shared_bytes <= self._shared_bytes.get(device, 0):
            return
        driver = imported("cuda.bindings.driver")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, self._kernel.handle, device)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise ValueError(
                f"{self.symbol}: a block cannot have {shared_bytes} bytes of shared memory here ({status.name})"
            )
        self._shared_bytes[device] = shared_bytes


def boxes(tensor: torch.Tensor, box: Triple) -> Any:
    """An argument for a kernel that copies boxes of ``tensor`` [images, channels, pixels] (``zeroskip::Boxes``, sm_90).

    Args:
        tensor: any strides that are multiples of 16 bytes, pixels next to each other, at a multiple of 16 bytes.
        box: images, channels and pixels of a box, at most 256 each, its pixels a multiple of 16 bytes.

    Raises:
        ValueError: the tensor or the box is none of the kind.
    """
    view = imported("cuda.core.utils").StridedMemoryView
    bits = tensor.view(torch.float16) if tensor.dtype is torch.bfloat16 else tensor  # copied, not computed with
    return view.from_any_interface(bits.detach(), stream_ptr=-1).as_tensor_map(box)


@functools.lru_cache(1024)
def load(built: bytes) -> Kernel:
    """The kernel that ``zeroskip.cuda.compile.build`` made, ready to launch; layers of one shape share it.

    Raises:
        Unsupported: this GPU does not run it.
        FileFormatError: ``built`` is not a kernel.
    """
    return Kernel(built)


def _passed(value: object) -> Any:
    """``value`` as cuda.core wants it: a Python int is taken for an address, NumPy scalars for what they are."""
    kind = type(value)  # asked first: isinstance(5, torch.Tensor) is slow
    if kind is int:
        return _integer(value)
    if kind is float:
        return np.float32(value)  # type: ignore[arg-type]
    if value is None:
        return 0
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            raise ValueError(f"a kernel cannot read a tensor on {value.device}; move it to the GPU")
        return value.data_ptr()
    if isinstance(value, imported("cuda.core").TensorMapDescriptor):
        return value
    raise TypeError(f"kernels take tensors, None, ints and floats, got {kind.__name__}")


@functools.lru_cache(4096)
def _integer(value: Any) -> np.int32:
    """Looked up in less time than it is made."""
    try:
        return np.int32(value)
    except OverflowError:
        raise ValueError(f"kernels take 32-bit integers, got {value}") from None


@functools.lru_cache(4096)
def _config(grid: Triple, block: Triple, cluster: Triple | None, shared_bytes: int, dependent: bool) -> Any:
    if cluster is not None:
        if any(blocks % size for blocks, size in zip(grid, cluster, strict=True)):
            raise ValueError(f"clusters of {cluster} blocks do not divide a grid of {grid} blocks")
        # cuda.core counts the grid in clusters
        x, y, z = (blocks // size for blocks, size in zip(grid, cluster, strict=True))
        grid = (x, y, z)
    return imported("cuda.core").LaunchConfig(
        grid=grid,
        block=block,
        cluster=cluster,
        shmem_size=shared_bytes,
        # Before Hopper kernels of a stream never overlap, and dependent_wait() is nothing.
        programmatic_stream_serialization=dependent and torch.cuda.get_device_capability() >= (9, 0),
    )


@functools.lru_cache(256)
def _stream(device: int, handle: int) -> Any:
    """cuda.core's view of a stream; it remembers its device, and handle 0 is every device's default stream."""
    return imported("cuda.core").Stream.from_handle(handle)


def _give_context() -> None:
    """Torch's context for this thread: torch itself sets it at a thread's first operator, which may come later."""
    imported("cuda.core").Device(torch.cuda.current_device()).set_current()
    _thread.has_context = True
