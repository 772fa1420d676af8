"""The router's tokenizer against the library's own, and what it needs of a checkpoint."""

import asyncio
import json
import threading

import pytest
from http_builders import (
    CHAT_TEMPLATE,
    TEXT,
    THINKING_TEMPLATE,
    byte_level_bpe,
    in_loop,
    model_directory,
)
from transformers import AutoTokenizer

from core.errors import ConfigError, InvalidRequest, Overloaded
from core.openai import ChatMessage
from router import tokenizer as module
from router.tokenizer import Tokenizer

CHAT = [
    ChatMessage(role="system", content="be brief"),
    ChatMessage(
        role="user", content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ),
]


@in_loop
async def test_ids_equal_the_librarys(tmp_path):
    folder = model_directory(tmp_path)
    hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokenizer = Tokenizer.load(folder, 2)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}]
    expected = hf.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    try:
        assert [list(one) for one in await tokenizer.encode_texts([TEXT, "a"])] == [
            hf(TEXT).input_ids,
            hf("a").input_ids,
        ]
        assert list(await tokenizer.encode_chat(CHAT, {})) == expected
    finally:
        tokenizer.close()


@in_loop
async def test_threads_may_tokenize_at_once(tmp_path):
    tokenizer = Tokenizer.load(model_directory(tmp_path), 4)
    try:
        texts = [f"{TEXT} {i}" for i in range(64)]
        ids = await asyncio.gather(*(tokenizer.encode_texts([text]) for text in texts))
    finally:
        tokenizer.close()
    assert [list(one) for (one,) in ids] == [byte_level_bpe().encode(text).ids for text in texts]


@in_loop
async def test_text_over_what_may_wait_is_overload(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING_CHARS", 1000)
    monkeypatch.setattr(module, "INLINE_CHARS", 0)
    tokenizer = Tokenizer.load(model_directory(tmp_path), 1)
    try:
        results = await asyncio.gather(
            *(tokenizer.encode_texts(["x" * 600]) for _ in range(2)), return_exceptions=True
        )
        assert isinstance(results[1], Overloaded)
        assert await tokenizer.encode_texts(["x" * 600])
    finally:
        tokenizer.close()


@pytest.mark.parametrize(
    ("message", "times", "variables"),
    [
        ({"content": ""}, 100, {}),
        ({"content": "", "name": "n" * 3000}, 100, {}),
        ({"content": ""}, 1, {"unused": "x" * 3000}),
    ],
)
@in_loop
async def test_many_messages_long_names_or_variables_are_no_work_for_the_loop(
    tmp_path, message, times, variables
):
    tokenizer = Tokenizer.load(model_directory(tmp_path), 1)
    threads: list[str] = []
    encode = tokenizer._encode_turns

    def noting(messages, variables):
        threads.append(threading.current_thread().name)
        return encode(messages, variables)

    tokenizer._encode_turns = noting
    try:
        await tokenizer.encode_chat([ChatMessage(role="user", content="short")], {})
        await tokenizer.encode_chat([ChatMessage(role="user", **message)] * times, variables)
    finally:
        tokenizer.close()
    assert threads[0] == threading.main_thread().name
    assert threads[1].startswith("tokenizer")


@pytest.mark.parametrize(("texts", "inline"), [(["x" * 200] * 2, True), (["x" * 200] * 20, False)])
@in_loop
async def test_texts_that_are_long_together_are_no_work_for_the_loop(tmp_path, texts, inline):
    tokenizer = Tokenizer.load(model_directory(tmp_path), 1)
    threads: set[str] = set()
    encode = tokenizer._encode

    def noting(text, *, special):
        threads.add(threading.current_thread().name)
        return encode(text, special=special)

    tokenizer._encode = noting
    try:
        assert len(await tokenizer.encode_texts(texts)) == len(texts)
    finally:
        tokenizer.close()
    assert (threads == {threading.main_thread().name}) == inline


@pytest.mark.parametrize(
    ("template", "role"),
    [(CHAT_TEMPLATE, "system"), (CHAT_TEMPLATE + "{# developer #}", "developer")],
)
@in_loop
async def test_developer_is_system_to_a_template_that_does_not_know_it(tmp_path, template, role):
    tokenizer = Tokenizer.load(model_directory(tmp_path, chat_template=template), 1)
    try:
        ids = await tokenizer.encode_chat([ChatMessage(role="developer", content="x")], {})
    finally:
        tokenizer.close()
    assert byte_level_bpe().decode(list(ids)).startswith(role)


VARIED = (
    THINKING_TEMPLATE + "{% if effort is defined %}{{ 100 // effort }}{% endif %}"
    "{% for d in documents or [] %}{{ d.text }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("variables", "ends"),
    [
        ({}, "assistant\n"),
        ({"enable_thinking": True}, "assistant\n"),
        ({"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n"),
        ({"effort": 50}, "assistant\n2"),
        ({"documents": [{"text": "a fox"}]}, "a fox"),
        ({"unused": {"deep": [None]}}, "assistant\n"),
    ],
)
@in_loop
async def test_template_sees_the_clients_variables_as_with_the_library(tmp_path, variables, ends):
    folder = model_directory(tmp_path, chat_template=VARIED)
    hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}]
    expected = hf.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, **variables
    )
    tokenizer = Tokenizer.load(folder, 1)
    try:
        ids = list(await tokenizer.encode_chat(CHAT, variables))
    finally:
        tokenizer.close()
    assert ids == expected
    assert byte_level_bpe().decode(ids).endswith(ends)


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("conversations", "return_assistant_tokens_mask", "self", "bos_token", "eos_token"),
    ],
)
@in_loop
async def test_client_cannot_set_what_the_router_passes_to_the_template(tmp_path, name):
    tokenizer = Tokenizer.load(model_directory(tmp_path), 1)
    try:
        with pytest.raises(InvalidRequest, match="not for the client to set") as caught:
            await tokenizer.encode_chat(CHAT, {"unused": 1, name: True})
    finally:
        tokenizer.close()
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("variables", [{"effort": 0}, {"effort": "x"}, {"documents": 5}])
@in_loop
async def test_template_that_cannot_use_a_variable_blames_it_too(tmp_path, variables):
    tokenizer = Tokenizer.load(model_directory(tmp_path, chat_template=VARIED), 1)
    try:
        with pytest.raises(InvalidRequest, match=r"these messages with .+chat_template_kwargs'"):
            await tokenizer.encode_chat(CHAT, variables)
    finally:
        tokenizer.close()


@in_loop
async def test_template_with_a_bug_blames_the_messages(tmp_path):
    broken = "{{ messages[0].content + 1 }}"
    tokenizer = Tokenizer.load(model_directory(tmp_path, chat_template=broken), 1)
    try:
        with pytest.raises(InvalidRequest, match="chat template refuses"):
            await tokenizer.encode_chat(CHAT, {})
    finally:
        tokenizer.close()


@in_loop
async def test_template_that_repeats_a_message_does_not_make_the_refusal_long(tmp_path):
    repeats = "{{ raise_exception(messages[0].content) }}"
    tokenizer = Tokenizer.load(model_directory(tmp_path, chat_template=repeats), 1)
    try:
        with pytest.raises(InvalidRequest, match="chat template refuses") as caught:
            await tokenizer.encode_chat([ChatMessage(role="user", content="x" * 10_000)], {})
    finally:
        tokenizer.close()
    assert len(caught.value.message) < 400


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path):
    folder = model_directory(tmp_path)
    cutting = byte_level_bpe().from_str(byte_level_bpe().to_str())
    cutting.enable_truncation(8)
    cutting.enable_padding(length=8)
    cutting.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder, 1)

    @in_loop
    async def encode():
        assert len((await tokenizer.encode_texts([TEXT]))[0]) > 8
        assert len((await tokenizer.encode_texts(["a"]))[0]) == 1

    encode()
    tokenizer.close()


@in_loop
async def test_tokenizer_json_alone_is_enough_for_texts(tmp_path, caplog):
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, 1)
    try:
        assert list((await tokenizer.encode_texts([TEXT]))[0]) == byte_level_bpe().encode(TEXT).ids
        with pytest.raises(InvalidRequest, match=r"no chat template.+use /v1/completions"):
            await tokenizer.encode_chat(CHAT, {})
    finally:
        tokenizer.close()
    assert f"no_chat_template directory={tmp_path}" in caplog.messages


@in_loop
async def test_model_type_does_not_change_what_tokenizer_json_says(tmp_path):
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = Tokenizer.load(tmp_path, 1)
    try:
        assert list((await tokenizer.encode_texts([TEXT]))[0]) == byte_level_bpe().encode(TEXT).ids
    finally:
        tokenizer.close()


@in_loop
async def test_chat_template_beside_a_bare_tokenizer_is_used(tmp_path):
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].content }}")
    tokenizer = Tokenizer.load(tmp_path, 1)
    try:
        ids = await tokenizer.encode_chat(CHAT, {})
    finally:
        tokenizer.close()
    assert byte_level_bpe().decode(list(ids)) == "a\nb"


def test_directory_without_a_tokenizer_is_one_clear_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path, 1)
    assert "\n" not in caught.value.message


def test_file_that_the_library_refuses_is_one_clear_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "nonsense"}}')
    with pytest.raises(ConfigError, match="cannot load a tokenizer from") as caught:
        Tokenizer.load(tmp_path, 1)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_truncated_file_is_named(tmp_path, name):
    folder = model_directory(tmp_path)
    (folder / name).write_text('{"model": ')
    with pytest.raises(ConfigError, match=f"{name} cannot be read as JSON"):
        Tokenizer.load(folder, 1)
