"""Tables on the terminal that are never cut: a narrow one wraps lines instead of hiding numbers."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 1000


def new_table(texts: Sequence[str], numbers: Sequence[str], title: str | None = None) -> Table:
    """Columns of text, then of right-aligned numbers; more may be added."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def print_table(console: Console, table: Table) -> None:
    """As wide as it needs to be."""
    options = console.options.update(max_width=_WIDEST)
    width, needed = console.width, Measurement.get(console, options, table).maximum
    console.width = max(width, needed)
    console.print(table, crop=False, highlight=False)
    console.width = width
