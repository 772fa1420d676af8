"""Traces with a JSON object per line, or all of them in one JSON array.

Mooncake, agent sessions   timestamp ms, input_length, output_length, hash_ids, session_id
Qwen-Bailian               timestamp s, chat_id, parent_chat_id, the same lengths and hash_ids
ShareGPT                   conversations of {from, value}: text, without times
vLLM bench                 arrival_time s, input_toks, output_toks
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

from simulator.workload.records import Line, Record, Recorded

_CHARACTERS_PER_TOKEN = 4
_TEXT_BLOCK = 16
_TIMES_MS, _TIMES_S = 1e-3, 1.0

Fields = Mapping[str, object]


def read_json_trace(lines: Iterator[Line]) -> Recorded:
    """All requests of a file; its first object says which kind it is. Raises BadTrace."""
    skipped = Counter[str]()
    rows = list(_rows(lines, skipped))
    if not rows:
        return Recorded(kind="empty", records=(), block_size=1, skipped=skipped)
    line, fields = rows[0]
    if "conversations" in fields or "messages" in fields:
        return _conversations(rows, skipped)
    if "input_toks" in fields:
        return _engine_log(rows, skipped)
    if "hash_ids" in fields:
        return _hashed(rows, skipped)
    raise line.bad(f"not a request of a known trace: its fields are {', '.join(fields)}")


def _rows(lines: Iterator[Line], skipped: Counter[str]) -> Iterator[tuple[Line, Fields]]:
    """The objects of all lines, or of the one array that the whole file is."""
    is_first = True
    for line in lines:
        if not line.text.strip():
            skipped["empty line"] += 1
        elif is_first and line.text.lstrip().startswith("["):
            yield from _items(line, lines)
        else:
            yield line, _object(line, _parse(line, line.text))
            is_first = False


def _items(first: Line, rest: Iterator[Line]) -> Iterator[tuple[Line, Fields]]:
    items = _parse(first, "\n".join([first.text, *(line.text for line in rest)]))
    if not isinstance(items, list):
        raise first.bad("not a JSON array")
    for number, item in enumerate(items, start=1):
        place = Line(first.file, number, "", kind="item")
        yield place, _object(place, item)


def _hashed(rows: Sequence[tuple[Line, Fields]], skipped: Counter[str]) -> Recorded:
    first = rows[0][1]
    bailian, sessions = "parent_chat_id" in first, "session_id" in first
    records = list[Record]()
    for line, fields in rows:
        record = Record(
            at_s=_number(line, fields, "timestamp") * (_TIMES_S if bailian else _TIMES_MS),
            prompt_tokens=_count(line, fields, "input_length"),
            output_tokens=_count(line, fields, "output_length"),
            ids=_ids(line, fields),
            session=str(fields.get("session_id")) if sessions else "",
        )
        if len(record.ids) > max(1, record.prompt_tokens):
            raise line.bad(
                f"{len(record.ids)} hash_ids are more than its {record.prompt_tokens} tokens"
            )
        _keep(record, records, skipped)
    kind = "bailian" if bailian else "sessions" if sessions else "mooncake"
    return Recorded(
        kind=kind, records=tuple(records), block_size=_block_size(records), skipped=skipped
    )


def _conversations(rows: Sequence[tuple[Line, Fields]], skipped: Counter[str]) -> Recorded:
    """A request for every answer, with all the text before it. Tokens are of four characters."""
    records = list[Record]()
    for number, (line, fields) in enumerate(rows):
        text, answered = "", False
        for speaker, said in _turns(line, fields):
            if speaker in {"gpt", "assistant", "chatgpt", "bing", "bard"} and text:
                records.append(
                    Record(
                        at_s=0.0,
                        prompt_tokens=max(1, len(text) // _CHARACTERS_PER_TOKEN),
                        output_tokens=max(1, len(said) // _CHARACTERS_PER_TOKEN),
                        ids=_text_ids(text),
                        session=str(number),
                    )
                )
                answered = True
            text += said
        if not answered:
            skipped["conversation without an answer"] += 1
    return Recorded(
        kind="sharegpt",
        records=tuple(records),
        block_size=_TEXT_BLOCK,
        skipped=skipped,
        timed=False,
    )


def _engine_log(rows: Sequence[tuple[Line, Fields]], skipped: Counter[str]) -> Recorded:
    records = list[Record]()
    for line, fields in rows:
        record = Record(
            at_s=_number(line, fields, "arrival_time"),
            prompt_tokens=_count(line, fields, "input_toks"),
            output_tokens=_count(line, fields, "output_toks"),
        )
        _keep(record, records, skipped)
    return Recorded(kind="vllm", records=tuple(records), block_size=16, skipped=skipped)


def _keep(record: Record, records: list[Record], skipped: Counter[str]) -> None:
    if record.prompt_tokens < 1 or record.output_tokens < 1:
        skipped["no prompt or no answer"] += 1
    else:
        records.append(record)


# -- fields -------------------------------------------------------------------------------------


def _parse(line: Line, text: str) -> object:
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise line.bad(f"no JSON: {error}") from error
    return parsed


def _object(line: Line, parsed: object) -> Fields:
    if not isinstance(parsed, dict):
        raise line.bad("not a JSON object")
    return parsed


def _number(line: Line, fields: Fields, name: str) -> float:
    value = fields.get(name)
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise line.bad(f"{name} is {str(value)[:80]!r}, not a number")
    return number


def _count(line: Line, fields: Fields, name: str) -> int:
    number = _number(line, fields, name)
    if number < 0 or number != int(number):
        raise line.bad(f"{name} is {number:g}, not a count")
    return int(number)


def _ids(line: Line, fields: Fields) -> tuple[int, ...]:
    ids = fields.get("hash_ids")
    if not isinstance(ids, list) or not all(isinstance(block, int) for block in ids):
        raise line.bad("hash_ids is not a list of numbers")
    return tuple(ids)


def _turns(line: Line, fields: Fields) -> Iterator[tuple[str, str]]:
    turns = fields.get("conversations", fields.get("messages"))
    if not isinstance(turns, list):
        raise line.bad("its conversation is not a list")
    for turn in turns:
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        said = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or not isinstance(said, str):
            raise line.bad("a turn of its conversation has no speaker or no text")
        yield speaker, said


def _text_ids(text: str) -> tuple[int, ...]:
    size = _TEXT_BLOCK * _CHARACTERS_PER_TOKEN
    return tuple(
        int.from_bytes(blake2b(text[at : at + size].encode(), digest_size=8).digest())
        for at in range(0, len(text) - size + 1, size)
    )


def _block_size(records: Sequence[Record]) -> int:
    """The power of two by which most prompts have as many blocks as ids; some traces leave out the
    last block of a prompt where it is not full. It is near the tokens per id of the longest prompt.
    """
    longest = max(records, key=lambda record: record.prompt_tokens, default=None)
    if longest is None or not longest.ids:
        return 512
    power = round(math.log2(longest.prompt_tokens / len(longest.ids)))
    sizes = [1 << near for near in (power, power + 1, power - 1) if near >= 0]
    lengths = [(record.prompt_tokens, len(record.ids)) for record in records]
    fits = [
        (sum((tokens + spare * (size - 1)) // size == ids for tokens, ids in lengths), size)
        for spare in (1, 0)
        for size in sizes
    ]
    return max(fits, key=lambda fit: fit[0])[1]
