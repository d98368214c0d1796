"""What fits a multiprocessor and a grid."""

from __future__ import annotations

import pytest

from zeroskip.cuda.limits import reached


@pytest.mark.parametrize(("cluster", "sms"), [(1, 132), (2, 132), (4, 120), (8, 120)])
def test_clusters_of_an_h200_reach_what_the_driver_says(cluster: int, sms: int) -> None:
    assert reached(132, cluster) == sms


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_a_small_gpu_has_room_for_one(cluster: int) -> None:
    for sms in range(1, 40):
        assert reached(sms, cluster) >= (cluster if cluster > 2 else 1)
        assert reached(sms, cluster) % (cluster if cluster > 2 else 1) == 0
