"""Suites: which cases a benchmark runs, as data."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zeroskip.core.errors import FileFormatError
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import ConvShape
from zeroskip.core.method import config_types
from zeroskip.methods import registry
from zeroskip.model.zoo import BUILDERS

Cache = Literal["warm", "cold", "between"]

BASELINES = ("torch", "torch_channels_last", "inductor", "onnxruntime")
"""Of the CPU, for layers and models."""
CUDA_BASELINES = {
    "layer": ("cublas", "cublas_epilogue", "cublaslt", "cublaslt_epilogue", "triton"),
    "model": ("torch", "torch_channels_last"),
}
CONVOLUTION_BASELINES = ("cudnn", "cudnn_epilogue")
"""For layers that are no matrix products."""
EVERY_BASELINE = (*BASELINES, *CUDA_BASELINES["layer"], *CONVOLUTION_BASELINES)
NETWORK_FILE = ".safetensors"
"""How the name of a file ends that ``zeroskip.model.zoo.files`` wrote."""
LABEL = "label"
"""The name of an entry of ``configs``."""


@dataclass(frozen=True)
class BenchCase:
    """One row of a suite.

    A ``layer`` is a convolution with bias and ReLU, ``c`` to ``k`` channels on ``h x w``; a ``model`` a zoo network (or
    ``denoiser``, which ships with the package) on ``image``; a ``load`` the time to open that model's ``.zsk`` file.

    ``mask``: "random" (uniform), "clustered" (whole 4x4 blocks of output x input channels), for layers "2:4" (two of
    every four neighbouring input channels), or of the data folder "trained:FILE.npz:KEY" for layers, for models
    "trained:FILE.npz" (a state dict) or "trained:FILE.safetensors" (a network as ``zeroskip.model.zoo.files`` writes
    it, of any number of classes, filters removed or not).  With trained and 2:4 masks ``density`` is not used, only
    recorded.
    """

    kind: Literal["layer", "model", "load"]
    name: str
    density: float = 0.1
    mask: str = "random"
    batch: int = 1
    threads: int = 1
    c: int = 0
    k: int = 0
    h: int = 0
    w: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    model: str = ""
    image: tuple[int, ...] = (3, 224, 224)
    baselines: tuple[str, ...] | None = None
    """Dense opponents; by default those that are right for device and kind (``opponents``)."""
    rounds: int = 31
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "fp32"
    """The column.  On the CPU only fp32."""
    caches: tuple[Cache, ...] = ("warm", "cold")
    """CUDA layers: with one set of tensors; in turns through more of them than the L2 cache holds; with one set, but
    between others' code (``measure.others``), tuned anew for that as plans are."""
    epilogue: bool = True
    """Layers: bias and ReLU, or neither."""
    methods: tuple[str, ...] | None = None
    """Those to measure, for a model those to choose from; all by default."""
    configs: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict, hash=False)
    """CUDA layers, by method: fields of its configuration that are fixed, and a ``label``.  Each is tuned over whatever
    it leaves open and measured as ``method:label``: what a method loses without one of its ideas."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.rounds < 1 or self.batch < 1 or self.threads < 1:
            raise ValueError(
                f"rounds, batch and threads must be 1 or more, got {self.rounds, self.batch, self.threads}"
            )
        if unknown := set(self.opponents) - set(EVERY_BASELINE):
            raise ValueError(f"unknown baselines {sorted(unknown)}; there are {EVERY_BASELINE}")
        if self.kind != "layer" and self.model not in (*BUILDERS, "denoiser"):
            raise ValueError(f"no model is called {self.model!r}; there are {sorted(BUILDERS)} and denoiser")
        if self.mask.startswith("trained:") and not _names_a_file(self.mask, self.kind):
            expected = "FILE.npz:KEY" if self.kind == "layer" else f"FILE.npz or trained:FILE{NETWORK_FILE}"
            raise ValueError(f"the mask of a {self.kind} is trained:{expected}, got {self.mask!r}")
        if unknown := {*(self.methods or ()), *self.configs} - set(registry()):
            raise ValueError(f"unknown methods {sorted(unknown)}; there are {sorted(registry())}")
        if self.device == "cpu" and self.precision != "fp32":
            raise ValueError(f"the column {self.precision} is measured on cuda only")
        if not self.caches or len(set(self.caches)) < len(self.caches):
            raise ValueError(f"caches are some of warm, cold and between, each once, got {self.caches}")
        for method, entries in self.configs.items():
            _check_configs(method, entries)

    @property
    def opponents(self) -> tuple[str, ...]:
        """The dense opponents by name."""
        if self.baselines is not None:
            return self.baselines
        return BASELINES if self.device == "cpu" else CUDA_BASELINES.get(self.kind, ())

    @property
    def facts(self) -> dict[str, Any]:
        """The case as it is written into a record, but for the cache."""
        hidden = {"baselines", "rounds", "caches", "methods", "configs"}
        hidden |= {"model", "image"} if self.kind == "layer" else {"c", "k", "h", "w", "kernel", "stride", "padding"}
        hidden |= {"groups", "epilogue"} if self.kind != "layer" else set()
        if self.device == "cuda":
            hidden.add("threads")
        else:
            # What a record of a CPU does not say: cpu, fp32, bias and ReLU.
            hidden |= {"device", "precision"} | ({"epilogue"} if self.epilogue else set())
        return {name: value for name, value in to_json(self).items() if name not in hidden}

    @property
    def all_facts(self) -> tuple[dict[str, Any], ...]:
        """``facts`` of each of its records: on a GPU one for each cache of a layer."""
        if self.device == "cpu" or self.kind != "layer":
            return (self.facts,)
        return tuple([self.facts | {"cache": cache} for cache in self.caches])

    @property
    def shape(self) -> ConvShape:
        return ConvShape(
            self.batch,
            self.c,
            self.h,
            self.w,
            self.k,
            self.kernel,
            self.kernel,
            (self.stride, self.stride),
            (self.padding, self.padding),
            (1, 1),
            self.groups,
        )


def _names_a_file(mask: str, kind: str) -> bool:
    _, file, *key = mask.split(":")
    if kind == "layer":
        return file.endswith(".npz") and len(key) == 1
    return file.endswith((".npz", NETWORK_FILE)) and not key


def _check_configs(method: str, entries: tuple[dict[str, Any], ...]) -> None:
    known = {item.name for kind in config_types(registry()[method]) for item in dataclasses.fields(kind)}
    labels = [entry.get(LABEL) for entry in entries]
    if not all(isinstance(label, str) and label for label in labels) or len(set(labels)) < len(labels):
        raise ValueError(f"each entry of configs.{method} needs a {LABEL} of its own, got {labels}")
    for entry in entries:
        if unknown := set(entry) - known - {LABEL}:
            raise ValueError(f"configurations of {method} have no {sorted(unknown)}; they have {sorted(known)}")


@dataclass(frozen=True)
class Suite:
    name: str
    cases: tuple[BenchCase, ...] = field(default=())


SKIPPING = "skipping"
"""In a file, among ``methods``: every method that skips zeros and gives the same bits twice."""
SWEPT = ("density", "mask", "batch", "model", "precision")
"""A list of these in a file stands for a case for each value; the last of them changes fastest."""


def read_suite(path: Path) -> Suite:
    """The suite in a TOML file of ``[[case]]`` tables; ``defaults`` is a table of what they do not say.

    Raises:
        FileFormatError: no TOML, no case, an unknown field or a bad value; the case is named by its number.
    """
    try:
        document = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(f"{path} is no TOML: {error}") from error
    rows, defaults = document.get("case"), document.get("defaults", {})
    if not isinstance(rows, list) or not rows or not isinstance(defaults, dict):
        raise FileFormatError(f"{path} has no [[case]] table; see benchmarks/suites for examples")
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise FileFormatError(f"{path}: a case is a table such as {{ name = ... }}, got {wrong[0]!r}")
    return Suite(
        path.stem,
        tuple(
            from_json(BenchCase, row, f"{path.name}: case {index + 1}")
            for index, table in enumerate(rows)
            for row in _swept(defaults | table)
        ),
    )


def _swept(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(named := table.get("methods"), list) and SKIPPING in named:
        ours = [name for name, method in registry().items() if method.exploits != "nothing" and method.reproducible]
        table = table | {"methods": sorted({*named, *ours} - {SKIPPING})}
    lists = {name: table[name] for name in SWEPT if isinstance(table.get(name), list)}
    for values in itertools.product(*lists.values()):
        yield table | dict(zip(lists, values, strict=True))
