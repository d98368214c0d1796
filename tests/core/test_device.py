"""What a machine says of its CPU."""

from __future__ import annotations

import pytest

from zeroskip.core.device import _cpuinfo

FAMILY = "cpu family\t: 25\nmodel\t\t: 17\n"


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (f"{FAMILY}model name\t: AMD EPYC\nflags\t: sse avx2\n", "AMD EPYC family 25 model 17", {"sse", "avx2"}),
        (f"{FAMILY}model name\t: AMD EPYC 9654\n\nmodel name\t: another\n", "AMD EPYC 9654", set()),
        (FAMILY, "family 25 model 17", set()),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "", {"fp", "asimd"}),
        ("", "", set()),
    ],
)
def test_a_name_tells_generations_apart(text: str, name: str, flags: set[str]) -> None:
    assert _cpuinfo(text) == (name, flags)
