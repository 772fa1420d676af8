"""How a time grows with a size."""

import pytest

from benchmarks.router.lookup import growth


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_power_of_a_curve_is_found(power: float) -> None:
    sizes = [64, 256, 1024, 4096]
    assert growth(sizes, [3e-6 * size**power for size in sizes]) == pytest.approx(power)


def test_a_logarithm_grows_with_a_small_power() -> None:
    assert growth([64, 256, 1024, 4096], [6.0, 8.0, 10.0, 12.0]) < 0.3
