"""Straight lines between points, and sums along them that equal the loop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.latency.curve import Curve, Grid

CURVE = Curve.of({10: 1.0, 20: 3.0, 40: 2.0, 50: 4.0})
GRID = Grid.of({(1, 0): 1.0, (1, 100): 2.0, (4, 0): 2.0, (4, 50): 3.0, (4, 100): 8.0, (8, 0): 3.0})


@pytest.mark.parametrize(
    ("x", "y"),
    [(0, 1.0), (10, 1.0), (15, 2.0), (20, 3.0), (30, 2.5), (50, 4.0), (60, 6.0)],
)
def test_points_are_joined_by_lines(x: float, y: float) -> None:
    assert CURVE.at(x) == pytest.approx(y)


def test_a_curve_that_ends_falling_goes_on_level() -> None:
    assert Curve.of({0: 2.0, 1: 1.0}).at(9) == 1.0


@pytest.mark.parametrize("xs", [(), (1.0, 1.0), (2.0, 1.0)])
def test_points_out_of_order_are_refused(xs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="curve"):
        Curve(xs, tuple(0.0 for _ in xs))


@given(x=st.floats(0, 70), count=st.integers(0, 90))
def test_a_run_along_a_curve_is_the_sum_of_its_points(x: float, count: int) -> None:
    assert CURVE.run(x, count) == pytest.approx(sum(CURVE.at(x + k) for k in range(count)))


@pytest.mark.parametrize(
    ("x", "y", "z"),
    [(1, 50, 1.5), (4, 75, 5.5), (2, 0, 4 / 3), (0, 0, 1.0), (8, 50, 3.0), (16, 0, 5.0)],
)
def test_a_grid_joins_its_curves(x: float, y: float, z: float) -> None:
    assert GRID.at(x, y) == pytest.approx(z)


@given(x=st.floats(0, 20), y=st.floats(0, 150), count=st.integers(1, 120))
def test_a_run_along_a_grid_is_the_sum_of_its_points(x: float, y: float, count: int) -> None:
    assert GRID.run(x, y, count) == pytest.approx(sum(GRID.at(x, y + k) for k in range(count)))
