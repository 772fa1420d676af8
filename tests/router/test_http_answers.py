"""Answers through the real server and the official client."""

import asyncio

import pytest
from http_builders import (
    MODEL,
    TEXT,
    THINKING_TEMPLATE,
    ScriptedGenerator,
    byte_level_bpe,
    endless,
    in_loop,
    model_directory,
    running,
    saying,
    served_model,
)

from core.sampling import FinishReason

SPOKEN = "The fox: Größe 日本語 🎉!"
CHAT = [{"role": "user", "content": "hello"}]


@in_loop
async def test_whole_chat_answer(tmp_path):
    generator = ScriptedGenerator(saying(SPOKEN, cached_tokens=3))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", SPOKEN)
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(generator.requests[0].prompt_tokens)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    ("variables", "prompt_ends"),
    [
        ({}, "assistant\n"),
        ({"enable_thinking": True, "unused": 1}, "assistant\n"),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
    ],
)
@in_loop
async def test_chat_template_kwargs_reach_the_models_template(tmp_path, variables, prompt_ends):
    generator = ScriptedGenerator(saying("a"))
    folder = model_directory(tmp_path, chat_template=THINKING_TEMPLATE)
    async with running(generator, folder) as server, server.client() as client:
        await client.chat.completions.create(
            model=MODEL, messages=CHAT, extra_body={"chat_template_kwargs": variables}
        )
    prompt = byte_level_bpe().decode(list(generator.requests[0].prompt_tokens))
    assert prompt.endswith(prompt_ends)


@in_loop
async def test_streamed_chat_answer(tmp_path):
    generator = ScriptedGenerator(saying(SPOKEN, finish=FinishReason.LENGTH))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SPOKEN
    assert [c.choices[0].finish_reason for c in chunks[-2:]] == [None, "length"]
    assert all("�" not in (chunk.choices[0].delta.content or "") for chunk in chunks)


@in_loop
async def test_usage_chunk_comes_last_and_only_when_asked(tmp_path):
    generator = ScriptedGenerator(saying("a fox", cached_tokens=2))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
        )
        asked = [chunk async for chunk in stream]
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        unasked = [chunk async for chunk in stream]
    assert asked[-1].choices == []
    assert asked[-1].usage.prompt_tokens_details.cached_tokens == 2
    spoken = byte_level_bpe().encode("a fox").ids
    assert asked[-1].usage.completion_tokens == len(spoken) + 1  # and the token that ends it
    assert all(chunk.usage is None for chunk in asked[:-1])
    assert all(chunk.usage is None and chunk.choices for chunk in unasked)


@pytest.mark.parametrize("include_usage", [False, True])
@in_loop
async def test_usage_so_far_is_in_every_chunk_when_asked(tmp_path, include_usage):
    said = "a fox ran"
    generator = ScriptedGenerator(saying(said, cached_tokens=2))
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, n=2, stream=True, stream_options=options
        )
        chunks = [chunk async for chunk in stream]
    prompt_tokens = len(generator.requests[0].prompt_tokens)
    num_tokens = len(byte_level_bpe().encode(said).ids) + 1  # and the token that ends it
    for index in range(2):
        mine = [c for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(c.choices[0].delta.content or "" for c in mine) == said
        assert [c.usage.completion_tokens for c in mine] == list(range(num_tokens + 1))
        assert {c.usage.prompt_tokens for c in mine} == {prompt_tokens}
        assert mine[-1].usage.total_tokens == prompt_tokens + num_tokens
        assert mine[-1].usage.prompt_tokens_details.cached_tokens == 2
    assert [c.usage.completion_tokens for c in chunks if not c.choices] == (
        [2 * num_tokens] if include_usage else []
    )


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_text_completion(tmp_path, stream):
    generator = ScriptedGenerator(saying(" over the hill"))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        answer = await client.completions.create(model=MODEL, prompt="ran", stream=stream)
        if stream:
            chunks = [chunk async for chunk in answer]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, finish) == (" over the hill", "stop")


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_stop_string_across_tokens_ends_the_answer_and_the_generator(tmp_path, stream):
    async def forever(request):
        async for item in saying("The fox ran over the hill")(request):
            yield item if item.finish is None else type(item)(tokens=(5,))
        async for item in endless()(request):
            yield item

    generator = ScriptedGenerator(forever)
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=CHAT, stop=["nowhere", "x ran ov"], stream=stream
        )
        if stream:
            chunks = [chunk async for chunk in answer]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        await generator.until_running(0)
    assert (text, finish) == ("The fo", "stop")


@in_loop
async def test_held_text_is_given_out_when_no_stop_string_came(tmp_path):
    generator = ScriptedGenerator(saying("a fox ran", finish=FinishReason.LENGTH))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT, stop="ran away")
    assert answer.choices[0].message.content == "a fox ran"
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_two_choices_are_two_sequences(tmp_path, stream):
    async def numbered(request):
        async for item in saying(f"fox {request.choice}")(request):
            yield item

    generator = ScriptedGenerator(numbered)
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=CHAT, n=2, seed=11, stream=stream
        )
        texts = ["", ""]
        if stream:
            async for chunk in answer:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        else:
            for choice in answer.choices:
                texts[choice.index] = choice.message.content
            assert answer.usage.prompt_tokens == len(generator.requests[0].prompt_tokens)
    assert texts == ["fox 0", "fox 1"]
    assert sorted(request.choice for request in generator.requests) == [0, 1]
    assert {request.sampling.seed for request in generator.requests} == {11}


@in_loop
async def test_several_prompts_are_answered_in_order(tmp_path):
    async def echo_length(request):
        async for item in saying(f"{len(request.prompt_tokens)}")(request):
            yield item

    generator = ScriptedGenerator(echo_length)
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        answer = await client.completions.create(model=MODEL, prompt=[[1, 2, 3], [4]], n=2)
    assert [choice.text for choice in answer.choices] == ["3", "3", "1", "1"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 4


@in_loop
async def test_sampling_reaches_the_generator(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    model = served_model([0, 9], temperature=0.7, top_k=20)
    async with (
        running(generator, model_directory(tmp_path), model=model) as server,
        server.client() as client,
    ):
        await client.chat.completions.create(model=MODEL, messages=CHAT)
        await client.chat.completions.create(model=MODEL, messages=CHAT)
        await client.chat.completions.create(
            model=MODEL,
            messages=CHAT,
            temperature=0,
            top_p=0.5,
            seed=-1,
            max_completion_tokens=9,
            extra_body={"top_k": -1, "stop_token_ids": [5], "cache_salt": "s", "ignore_eos": True},
        )
    plain, again, chosen = generator.requests
    assert (plain.sampling.temperature, plain.sampling.top_p, plain.sampling.top_k) == (0.7, 1, 20)
    assert plain.sampling.max_tokens == generator.context_tokens - len(plain.prompt_tokens)
    assert plain.sampling.stop_token_ids == {0, 9}
    assert plain.sampling.seed != again.sampling.seed
    assert 0 < plain.deadline_s <= 600
    assert (chosen.sampling.temperature, chosen.sampling.top_p, chosen.sampling.top_k) == (
        0,
        0.5,
        0,
    )
    assert (chosen.sampling.max_tokens, chosen.sampling.seed) == (9, 2**63 - 1)
    assert (chosen.sampling.stop_token_ids, chosen.cache_salt) == ({5}, "s")


@in_loop
async def test_timings_come_only_when_asked(tmp_path):
    generator = ScriptedGenerator(saying("a fox"))
    asked = {"x-baton-timings": "1"}
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        whole = await client.chat.completions.create(
            model=MODEL, messages=CHAT, extra_headers=asked
        )
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, extra_headers=asked, stream=True
        )
        last = [chunk async for chunk in stream][-1]
        silent = await client.chat.completions.create(model=MODEL, messages=CHAT)
    assert whole.model_extra["baton"]["prefill_worker"] == "p0"
    assert last.choices[0].finish_reason == "stop"
    assert last.model_extra["baton"]["cached_tokens"] == 7
    assert "baton" not in silent.model_extra


@in_loop
async def test_many_streams_at_once_keep_their_texts_apart(tmp_path):
    async def by_prompt(request):
        async for item in saying(TEXT[: len(request.prompt_tokens)])(request):
            await asyncio.sleep(0)
            yield item

    generator = ScriptedGenerator(by_prompt)
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:

        async def one(size):
            stream = await client.completions.create(model=MODEL, prompt=[2] * size, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(one(size) for size in range(1, 60)))
    assert texts == [TEXT[:size] for size in range(1, 60)]
