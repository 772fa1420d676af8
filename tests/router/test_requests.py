"""What is refused before any work is done for it."""

from typing import NoReturn

import pytest

from core.clock import FakeClock
from core.errors import InvalidRequest
from core.ids import RequestId
from core.openai import MAX_CHOICES, CompletionRequest
from router.requests import Planner
from tests.router.http_builders import MODEL, ScriptedGenerator, saying, served_model


class Untouched:
    """In place of a tokenizer that must not be asked."""

    vocab_size = 100

    async def encode_text(self, text: str) -> NoReturn:
        raise AssertionError("tokenized before the refusal")


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
