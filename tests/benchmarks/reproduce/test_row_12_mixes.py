"""Row 12: the classes of lengths, and who is paid how long."""

import pytest

from benchmarks.reproduce.row_12_mixes import MIXES, SYSTEMS, cost_of, draw_requests, simulate_mix
from simulator.job import Record


@pytest.mark.parametrize(
    ("name", "prompts", "answers"),
    [("LPLD", (1, 512), (1, 128)), ("HPLD", (513, 1024), (1, 128)), ("LPHD", (1, 512), (129, 900))],
)
def test_lengths_are_of_their_class(
    name: str, prompts: tuple[int, int], answers: tuple[int, int]
) -> None:
    mix = next(mix for mix in MIXES if mix.name == name)
    requests = draw_requests(mix, seed=1)
    assert all(prompts[0] <= r.prompt_tokens <= prompts[1] for r in requests)
    assert all(answers[0] <= r.output_tokens <= answers[1] for r in requests)
    assert len({r.prompt_tokens for r in requests}) > 20


def test_a_prefill_worker_is_paid_until_its_last_prompt_and_others_until_their_last_answer() -> (
    None
):
    def record(first_s: float, end_s: float) -> Record:
        return Record(
            0.0, 10, 5, first_s=first_s, end_s=end_s, prefill_worker="p", decode_worker="d"
        )

    cost = cost_of([record(1.0, 6.0), record(2.0, 4.0)])
    assert cost.paid_s == pytest.approx(2.0 + 6.0)
    assert cost.ttft_s == pytest.approx(1.5)
    assert cost.whole_s == pytest.approx(5.0)


def test_every_system_serves_the_same_draw() -> None:
    costs = {name: simulate_mix(MIXES[2], name, seed=0, count=12) for name in SYSTEMS}
    assert costs["two, chunked"].paid_s != costs["split"].paid_s
    assert costs["one, whole prompts"].ttft_s > costs["two, whole prompts"].ttft_s > 0
