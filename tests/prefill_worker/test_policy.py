import pytest

from core.errors import BatonError, InvalidRequest, Overloaded
from engine.runner import RunnerLoad
from prefill_worker.config import PrefillConfig
from prefill_worker.policy import refuse_prompt

CONFIG = PrefillConfig(max_queued_tokens=100)


def refusal(num_tokens: int, *, queued: int = 0, capacity: int = 1000) -> BatonError | None:
    load = RunnerLoad(queued_tokens=queued, waiting=0, running=0, context_tokens=0)
    return refuse_prompt(num_tokens, capacity, load, CONFIG)


@pytest.mark.parametrize(
    ("num_tokens", "queued", "error"),
    [
        (0, 0, InvalidRequest),
        (1000, 0, type(None)),
        (1001, 0, InvalidRequest),
        (40, 60, type(None)),
        (41, 60, Overloaded),
        (500, 1, Overloaded),
    ],
)
def test_a_prompt_is_taken_when_it_fits_the_worker_and_its_queue(
    num_tokens: int, queued: int, error: type
) -> None:
    assert type(refusal(num_tokens, queued=queued)) is error


def test_the_refusal_names_both_lengths() -> None:
    refused = refusal(1001)
    assert refused is not None
    assert "1001" in refused.message
    assert "1000" in refused.message
