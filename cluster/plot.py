"""A plot: one panel per part. matplotlib is an extra, and only imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = (6.4, 4.2)
_COLUMNS = 2


def draw_plot(path: Path, title: str, draws: Mapping[str, Callable[[Axes], None]]) -> str:
    """Write a PNG; answers a line that says where, or why not."""
    if not draws:
        return "no plot: nothing to draw"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError:
        return "no plot: matplotlib is not installed (pip install 'baton[bench]')"
    columns = min(_COLUMNS, len(draws))
    rows = -(-len(draws) // columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for i, draw in enumerate(draws.values()):
        draw(figure.add_subplot(rows, columns, i + 1))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # a run is worth more than its plot
        return f"no plot: {path} cannot be written: {error}"
    return f"wrote {path}"
