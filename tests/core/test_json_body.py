"""JSON objects as typed models: what is refused before it is read, and in which words."""

import json

import pytest
from pydantic import BaseModel, ConfigDict

from core.errors import InvalidRequest
from core.json_body import MAX_NAME_CHARS, MAX_STRUCTURES, read_object, shortened, shown, validated


class Point(BaseModel):
    model_config = ConfigDict(extra="forbid")

    x: int
    label: str = ""


@pytest.mark.parametrize("item", [b"{}", b"[]", b'{"":0}', b'{"\\\\":"\\""}'])
def test_millions_of_lists_and_objects_are_refused_unread(item):
    with pytest.raises(InvalidRequest, match=f"more than {MAX_STRUCTURES} lists, objects"):
        read_object(b'{"a": [' + b",".join([item] * MAX_STRUCTURES) + b"]}")


def test_millions_of_fields_are_refused_unread():
    with pytest.raises(InvalidRequest, match=f"more than {MAX_STRUCTURES} lists, objects"):
        read_object(json.dumps(dict.fromkeys(map(str, range(MAX_STRUCTURES)))).encode())


@pytest.mark.parametrize("text", ["{[:", '"{', "\\{", '\\"[', "\\\\{"])
def test_brackets_within_texts_are_none(text):
    body = {"a": text * (MAX_STRUCTURES + 1), "b": [{}]}
    assert read_object(json.dumps(body).encode()) == body


@pytest.mark.parametrize("raw", [b"[1]", b"1", b"null", b""])
def test_what_is_no_object_is_refused(raw):
    with pytest.raises(InvalidRequest):
        read_object(raw)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "'x' is required"),
        ({"x": 1, "labl": ""}, "unknown field 'labl'; did you mean 'label'?"),
        ({"x": 1, "a": 1, "b": 1}, "unknown field 'a'"),
        ({"x": 1, "a": None, "b": 1}, "unknown field 'b'"),
        ({"x": 1, "a": False}, "unknown field 'a'"),
        ({"x": [1]}, "'x' should be a valid integer, got a list"),
        ({"x": 1, "label": {}}, "'label' should be a valid string, got an object"),
    ],
)
def test_finding_is_one_sentence(body, message):
    with pytest.raises(InvalidRequest) as caught:
        validated(Point, body)
    assert caught.value.message == message


def test_unknown_field_that_is_null_says_nothing():
    assert validated(Point, {"x": 1, "a": None, "b": None}) == Point(x=1)


def test_what_the_client_made_up_is_cut():
    assert shortened("x" * MAX_NAME_CHARS) == "x" * MAX_NAME_CHARS
    assert len(shortened("x" * 10**6)) == MAX_NAME_CHARS + 3
    assert len(shown("x" * 10**6)) < 100
    assert shown("a") == '"a"'
