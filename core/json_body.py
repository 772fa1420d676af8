"""JSON request bodies as typed models, and one sentence on what is wrong with one.

    raw bytes -> JSON object -> no unknown field, unless it is null -> types and ranges

What a refusal says, and what it costs, is bounded whatever the body: pydantic lists every finding
and here only the first is told, so models fail fast on lists, and no object with a field that there
is none of reaches it.
"""

import difflib
import json
from typing import TypeVar

import orjson
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from core.errors import InvalidRequest

MAX_NAME_CHARS = 100
"""Of a name the client made up, in messages and logs."""
MAX_STRUCTURES = 100_000
"""Lists, objects and fields of a body. To make millions takes long, and nobody else runs then."""
_SHOWN_CHARS = 60

M = TypeVar("M", bound=BaseModel)
Object = dict[str, JsonValue]


def read_object(raw: bytes | bytearray) -> Object:
    """Raises InvalidRequest where it is none."""
    if _structures(raw) > MAX_STRUCTURES:
        _check_structures(bytes(raw))
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    return body


def _structures(raw: bytes | bytearray) -> int:
    return raw.count(b"[") + raw.count(b"{") + raw.count(b":")


def _check_structures(raw: bytes) -> None:
    """What stands in strings does not count."""
    pieces = raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    if _structures(b"".join(pieces[::2])) > MAX_STRUCTURES:  # a string lies between any two
        raise InvalidRequest(f"the body holds more than {MAX_STRUCTURES} lists, objects and fields")


def validated(kind: type[M], body: Object) -> M:
    """Raises InvalidRequest that names the field at fault."""
    check_names(kind, body)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise _explain(first) from None


def check_names(kind: type[BaseModel], body: Object, where: str = "") -> None:
    """Drop the nulls of fields there are none of: clients send those of other servers' fields that
    way. Raises InvalidRequest for another unknown field.
    """
    known = kind.__pydantic_fields__
    if body.keys() <= known.keys():
        return
    for name in [name for name in body if name not in known]:
        if body.pop(name) is not None:
            raise _unknown(kind, f"{where}{shortened(name)}", name)


def shown(value: object) -> str:
    """A value of the client's, in a message."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, str) and len(value) > _SHOWN_CHARS:
        value = value[:_SHOWN_CHARS] + "..."
    return shortened(json.dumps(value, ensure_ascii=False))


def shortened(name: str) -> str:
    """A name or text of the client's that a message holds, or a log."""
    return name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "..."


def _explain(error: ErrorDetails) -> InvalidRequest:
    """One sentence a person can act on, from pydantic's first finding."""
    param = shortened(_path(error["loc"]))
    if error["type"] == "missing":
        return InvalidRequest(f"'{param}' is required", param=param)
    problem = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = "" if error["type"] == "value_error" else f", got {shown(error['input'])}"
    return InvalidRequest(f"'{param}' {problem}{got}", param=param)


def _unknown(owner: type[BaseModel], param: str, name: str) -> InvalidRequest:
    near = difflib.get_close_matches(name[:MAX_NAME_CHARS], list(owner.model_fields), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return InvalidRequest(f"unknown field '{param}'{hint}", param=param)


def _path(loc: tuple[int | str, ...]) -> str:
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part[: MAX_NAME_CHARS + 1]}" for part in loc
    )
    return path.removeprefix(".")
