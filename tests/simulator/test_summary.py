"""What a run says in numbers."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from simulator.summary import summarise
from tests.simulator.clusters import ask, run, split


def test_the_pause_of_hand_overs_is_of_answers_that_were_handed_over() -> None:
    spec = replace(split(), router=RouterConfig(admission="off", local_prefill=False))
    requests = [ask(2.0 * i, output=11 if i % 4 == 0 else 1) for i in range(8)]
    summary = summarise(run(spec, requests), spec.slo, gpus=2)
    assert summary.outcomes == {"ok": 8}
    # The last chunk's 32 tokens of 1 kB over 1 GB/s, and the closing question.
    assert summary.transfer_s == pytest.approx([32e3 / 1e9 + 0.001] * 3)
