"""What is refused before any work is done for it."""

from collections.abc import Sequence

import pytest

from core.clock import FakeClock
from core.errors import ContextTooLong, InvalidRequest
from core.ids import RequestId
from core.openai import MAX_CHOICES, CompletionRequest
from router.requests import Planner
from tests.router.http_builders import MODEL, ScriptedGenerator, saying, served_model


class Untouched:
    """In place of a tokenizer that must not be asked."""

    vocab_size = 100

    async def encode_texts(self, texts: list[str]) -> list[Sequence[int]]:
        assert not texts, "tokenized before the refusal"
        return []


async def test_too_many_choices_are_refused_before_anything_is_tokenized() -> None:
    planner = Planner(
        generator=ScriptedGenerator(saying("a")),  # type: ignore[arg-type]
        tokenizer=Untouched(),  # type: ignore[arg-type]
        model=served_model(),
        model_names=[MODEL],
        clock=FakeClock(),
    )
    body = CompletionRequest(model=MODEL, prompt=["a"] * 2, n=MAX_CHOICES)
    with pytest.raises(InvalidRequest, match="choices") as caught:
        await planner.plan(body, RequestId("r"), 10.0)
    assert caught.value.param == "n"


async def test_a_prompt_of_more_tokens_than_fit_is_refused_before_they_are_looked_at() -> None:
    planner = Planner(
        generator=ScriptedGenerator(saying("a"), context_tokens=10),  # type: ignore[arg-type]
        tokenizer=Untouched(),  # type: ignore[arg-type]
        model=served_model(),
        model_names=[MODEL],
        clock=FakeClock(),
    )
    body = CompletionRequest(model=MODEL, prompt=[10**6] * 11)
    with pytest.raises(ContextTooLong, match="prompt is too long: it has 11"):
        await planner.plan(body, RequestId("r"), 10.0)
