"""How the demo looks: answers as they stream, then where the time of each request went."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.demo_chat import Exchange
from cluster.tables import new_table, print_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something the demo promises, and whether it held."""

    promise: str
    held: bool
    detail: str = ""


class DemoView:
    """Writes to one console, which must own its file."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def heading(self, text: str) -> None:
        self._console.print(f"\n[bold]{escape(text)}[/]", highlight=False)

    def turn(self, question: str) -> Callable[[str], None]:
        """Show a question; the function given back appends to its answer."""
        self._console.print(f"\n[cyan]you>[/] {escape(question)}\n[green]baton>[/] ", end="")
        return self.piece

    def piece(self, text: str) -> None:
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    def answer(self, exchange: Exchange) -> None:
        self.turn(str(exchange.messages[-1].get("content")))(exchange.text)
        self._console.print()

    def stages(self, exchanges: Sequence[Exchange], identical: Sequence[bool]) -> None:
        """Two tables of one row per request: where the time went, and what moved."""
        self._console.print()
        print_table(self._console, _time_table(exchanges))
        self._console.print()
        print_table(self._console, _data_table(exchanges, identical))

    def checks(self, checks: Sequence[Check]) -> None:
        self._console.print()
        for check in checks:
            mark = "[green]yes[/]" if check.held else "[red]NO [/]"
            detail = f"  [dim]{escape(check.detail)}[/]" if check.detail else ""
            self._console.print(
                f"{mark}  {escape(check.promise)}{detail}", highlight=False, soft_wrap=True
            )
        self._console.print()


def _time_table(exchanges: Sequence[Exchange]) -> Table:
    table = new_table(
        ["request"],
        ["queue", "prefill", "first token", "kv_transfer", "decode", "TTFT", "TPOT"],
        title="time in ms",
    )
    for exchange in exchanges:
        times = exchange.times
        first_token_s = max(0.0, times.ttft_s - times.queue_s - times.prefill_s)
        stages_s = (
            times.queue_s,
            times.prefill_s,
            first_token_s,
            times.transfer_s,
            times.decode_s,
            times.ttft_s,
            times.tpot_s,
        )
        table.add_row(exchange.title, *(f"{seconds * 1e3:.1f}" for seconds in stages_s))
    return table


def _data_table(exchanges: Sequence[Exchange], identical: Sequence[bool]) -> Table:
    table = new_table(
        ["request", "prefill on", "decode on"],
        ["prompt", "cached", "output", "KiB", "blocks"],
        title="tokens, and the KV that moved",
    )
    table.add_column("text")
    for exchange, same in zip(exchanges, identical, strict=True):
        times = exchange.times
        table.add_row(
            exchange.title,
            times.prefill_worker,
            times.decode_worker,
            str(exchange.prompt_tokens),
            str(times.cached_tokens),
            str(exchange.output_tokens),
            f"{times.transfer_bytes / 1024:.0f}",
            str(times.transfer_blocks),
            "[green]identical[/]" if same else "[red]DIFFERENT[/]",
        )
    return table
