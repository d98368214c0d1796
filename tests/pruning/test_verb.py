"""`zeroskip prune` passes its options on."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from zeroskip.cli.main import app
from zeroskip.model.zoo import BUILDERS


def build() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))


@pytest.mark.parametrize("permute", [[], ["--permute", "--shape", "1,8,6,6"]])
def test_n_of_m_is_written(permute: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if permute:
        pytest.importorskip("torch_pruning")
    monkeypatch.setitem(BUILDERS, "four", build)
    out = tmp_path / "w.safetensors"
    result = CliRunner().invoke(app, ["prune", "four", "--pattern", "2:4", "--out", str(out), *permute])
    assert result.exit_code == 0, result.output
    groups = load_file(out)["1.weight"].movedim(1, -1).reshape(-1, 4)
    assert ((groups != 0).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "filters"], "could not load the smaller"),
        (["--permute"], "permute: got True with pattern"),
        (["--pattern", "2:4", "--scope", "erk"], 'scope: got "erk"'),
    ],
)
def test_errors_write_nothing(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "four", build)
    result = CliRunner().invoke(app, ["prune", "four", "--out", str(tmp_path / "w.safetensors"), *options])
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).split())
    assert not list(tmp_path.iterdir())
