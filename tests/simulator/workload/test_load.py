"""Every format, told by its content; what is broken or left out is said with its line."""

import gzip
import json
from pathlib import Path

import pytest

from simulator.workload.build import Shaping
from simulator.workload.load import load_workload
from simulator.workload.records import BadTrace
from simulator.workload.types import SimRequest, Workload

AZURE = """\ufeffTIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
BAILIAN = [
    {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.1, "input_length": 40, "turn": 1}
    | {"output_length": 9, "type": "text", "hash_ids": [1, 2, 3]},
    {"chat_id": 8, "parent_chat_id": 7, "timestamp": 65.1, "input_length": 70, "turn": 2}
    | {"output_length": 4, "type": "text", "hash_ids": [1, 2, 4, 5, 6]},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "a" * 400},
            {"from": "gpt", "value": "b" * 200},
            {"from": "human", "value": "c" * 80},
            {"from": "gpt", "value": "d" * 40},
        ]
    },
    {"conversations": [{"from": "human", "value": "nobody answers"}]},
]


def write(tmp_path: Path, text: str, name: str = "some.trace") -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def write_rows(tmp_path: Path, rows: list[dict[str, object]]) -> Path:
    return write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))


def mooncake(at_ms: float, tokens: int, ids: list[int], output: int = 5) -> dict[str, object]:
    return {
        "timestamp": at_ms,
        "input_length": tokens,
        "output_length": output,
        "hash_ids": ids,
    }


def load(file: Path | str, **shaping: float) -> Workload:
    return load_workload(file, Shaping(**shaping)).workload  # type: ignore[arg-type]


def sizes(workload: Workload) -> list[tuple[int, int]]:
    return [(request.prompt_tokens, request.output_tokens) for request in workload.requests]


def times(workload: Workload) -> list[float]:
    return [request.at_s for request in workload.requests]


def test_azure(tmp_path: Path) -> None:
    workload = load(write(tmp_path, AZURE))
    assert sizes(workload) == [(374, 44), (396, 109)]
    assert times(workload) == pytest.approx([0.0, 4.314579])


def test_burstgpt_and_its_failures(tmp_path: Path) -> None:
    loaded = load_workload(write(tmp_path, BURSTGPT))
    assert sizes(loaded.workload) == [(472, 18), (417, 276)]
    assert times(loaded.workload) == [0.0, 113.0]
    assert loaded.notes == ("1 x no prompt or no answer",)


def test_mooncake_gzipped_with_shared_prefixes(tmp_path: Path) -> None:
    rows = [mooncake(0, 1100, [0, 1, 2]), mooncake(2500, 1600, [0, 1, 3, 4])]
    file = tmp_path / "conversation.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    workload = load(file)
    first, second = (request.hashes for request in workload.requests)
    assert (workload.name, workload.block_size) == ("conversation", 512)
    assert len(first) == 2
    assert len(second) == 3
    assert first == second[:2]
    assert times(workload) == [0.0, 2.5]


def test_blocks_of_short_prompts_are_as_large_as_most_of_them_say(tmp_path: Path) -> None:
    rows = [mooncake(1000 * i, 600 + i, [0, i + 1]) for i in range(80)]
    workload = load(write_rows(tmp_path, rows))
    assert workload.block_size == 512
    assert {len(request.hashes) for request in workload.requests} == {1}


def test_blocks_of_prompts_whose_last_is_left_out_where_it_is_not_full(tmp_path: Path) -> None:
    rows = [mooncake(1000 * i, 40 + 13 * i, list(range((40 + 13 * i) // 16))) for i in range(9)]
    assert load(write_rows(tmp_path, rows)).block_size == 16


def test_a_block_after_another_prefix_is_another_block(tmp_path: Path) -> None:
    rows = [mooncake(0, 1024, [0, 9]), mooncake(1, 1024, [1, 9])]
    first, second = (request.hashes for request in load(write_rows(tmp_path, rows)).requests)
    assert first[1] != second[1]


def test_bailian_counts_in_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    workload = load(write_rows(tmp_path, BAILIAN))
    assert workload.block_size == 16
    assert times(workload) == pytest.approx([0.0, 4.0])
    assert workload.requests[0].hashes == workload.requests[1].hashes[:2]


def test_sharegpt_asks_with_all_the_text_so_far(tmp_path: Path) -> None:
    loaded = load_workload(write_rows(tmp_path, SHAREGPT))
    first, second = loaded.workload.requests
    assert sizes(loaded.workload) == [(100, 50), (170, 10)]
    assert first.hashes == second.hashes[:6]
    assert second.think_s is not None
    assert "1 x conversation without an answer" in loaded.notes
    assert "the trace has no arrival times" in "".join(loaded.notes)


def test_vllm_bench(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"arrival_time": 1777.5, "input_toks": 20, "output_toks": 3},
        {"arrival_time": 1778.0, "input_toks": 30, "output_toks": 2},
    ]
    workload = load(write_rows(tmp_path, rows))
    assert (sizes(workload), times(workload)) == ([(20, 3), (30, 2)], [0.0, 0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("what,is,this\n1,2,3\n", "line 1: neither"),
        (AZURE + "2023-11-16,12\n", "line 4: only 2 columns"),
        (BURSTGPT + "nan,GPT-4,1,2,3,x\n", "line 5: its time is nan"),
        (BURSTGPT + "9,GPT-4,-1,2,3,x\n", "line 5: -1 is not a count"),
        (BURSTGPT + "9,GPT-4,1,0.5,3,x\n", "line 5: 0.5 is not a count"),
        (AZURE + "yesterday,12,13\n", "line 4: Invalid isoformat"),
        (json.dumps(mooncake(0, 512, [1])) + "\n{oops\n", "line 2: no JSON"),
        (json.dumps(mooncake(0, 512, [1])) + "\n[]\n", "line 2: not a JSON object"),
        (
            json.dumps(mooncake(0, 512, [1])) + '\n{"timestamp": "x"}\n',
            "line 2: timestamp is 'x', not a number",
        ),
        (json.dumps({"who": 1}) + "\n", "line 1: not a request of a known trace"),
        (
            json.dumps(mooncake(0, 4, [1, 2, 3, 4, 5, 6, 7, 8])) + "\n",
            "line 1: 8 hash_ids are more",
        ),
        (
            '{"timestamp": 0, "input_length": ' + 400 * "9" + ', "hash_ids": [1]}\n',
            "line 1: input_length is '999",
        ),
        ("\n[1]\n", "item 1: not a JSON object"),
        (json.dumps([SHAREGPT[0], {"conversations": [{}]}]), "item 2: a turn of its conv"),
        ("[{]\n", "line 1: no JSON"),
        (200_000 * "[" + "\n", "line 1: no JSON"),
        ("Timestamp,Request tokens,Response tokens\n", "holds no requests"),
    ],
)
def test_a_broken_trace_is_a_sentence_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(BadTrace, match=message):
        load_workload(write(tmp_path, text))


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        BadTrace, match=r"^there is no trace file .*none\.csv, and no such generator"
    ):
        load_workload(tmp_path / "none.csv")
    with pytest.raises(BadTrace, match=r"generator: poisson, gamma, ramp, sine, step$"):
        load_workload("poison:rate=4")
    with pytest.raises(BadTrace, match=r"^cannot read .*: Is a directory$"):
        load_workload(tmp_path)
    with pytest.raises(BadTrace, match=r"^cannot read .*: File name too long$"):
        load_workload("poison:" + "x" * 300)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("poisson:rate=1e200", "rate of poisson is 1e200, but at most 1e\\+06"),
        ("ramp:from=1,to=1e7", "to of ramp is 1e7, but"),
        ("poisson:prompt=1e12", "prompt of poisson is 1e12, but at most 1e\\+07"),
        ("poisson:spread=1000", "spread of poisson is 1000, but at most 10"),
        ("poisson:spread=10", "a spread of 10 around 1000 tokens draws more than 1e\\+07"),
    ],
)
def test_a_generator_of_what_no_run_would_end_is_refused(source: str, said: str) -> None:
    with pytest.raises(BadTrace, match=said):
        load_workload(source)


def test_a_vllm_bench_skips_what_has_no_tokens(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"arrival_time": 1.0, "input_toks": 20, "output_toks": 3},
        {"arrival_time": 2.0, "input_toks": 0, "output_toks": 3},
        {"arrival_time": 3.0, "input_toks": 20, "output_toks": 0},
    ]
    loaded = load_workload(write_rows(tmp_path, rows))
    assert sizes(loaded.workload) == [(20, 3)]
    assert loaded.notes == ("2 x no prompt or no answer",)


def test_lines_of_json_may_begin_with_an_empty_one(tmp_path: Path) -> None:
    text = "\n" + json.dumps(mooncake(0, 512, [1])) + "\n"
    loaded = load_workload(write(tmp_path, text))
    assert sizes(loaded.workload) == [(512, 5)]
    assert loaded.notes == ("1 x empty line",)


@pytest.mark.parametrize("indent", [None, 2])
def test_sharegpt_is_read_from_an_array_too(tmp_path: Path, indent: int | None) -> None:
    array = load_workload(write(tmp_path, json.dumps(SHAREGPT, indent=indent)))
    lines = load_workload(write_rows(tmp_path, SHAREGPT))
    assert array == lines


@pytest.mark.parametrize(("shared", "blocks"), [(511, 0), (512, 1), (1100, 2)])
def test_shared_tokens_are_whole_blocks_rounded_down(shared: int, blocks: int) -> None:
    first, second = load(f"poisson:prompt=2048,shared={shared},requests=2").requests
    assert sum(a == b for a, b in zip(first.hashes, second.hashes, strict=True)) == blocks


def test_more_requests_than_can_be_held_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match=r"2000001 requests of .* are too many"):
        load(write(tmp_path, AZURE), requests=2_000_001)
    with pytest.raises(BadTrace, match="1000000000000 requests of poisson are too many"):
        load("poisson:requests=1e12")


# -- shaping ------------------------------------------------------------------------------------


BUCKETED = [mooncake(3000 * (i // 10), 512, [i]) for i in range(100)]


def test_equal_time_stamps_are_spread_over_their_bucket_by_the_seed(tmp_path: Path) -> None:
    file = write_rows(tmp_path, BUCKETED)
    one, same, other = load(file), load(file), load(file, seed=1)
    assert one == same
    assert len(set(times(one))) == 100
    assert times(one) != times(other)
    assert 25 < one.horizon_s <= 30


def test_a_burst_within_a_coarse_time_stamp_stays_one(tmp_path: Path) -> None:
    """Thirty at once each minute, stamped in seconds, and a few that come in between."""
    starts_s = [60 * minute for minute in range(20) for _ in range(30)]
    lone_s = [60 * minute + 30 + minute % 2 for minute in range(20)] + [90, 91]
    lines = [f"{at_s},ChatGPT,100,10,110,Conversation log" for at_s in sorted(starts_s + lone_s)]
    text = "\n".join([BURSTGPT.splitlines()[0], *lines, ""])
    came_s = times(load(write(tmp_path, text)))
    assert max(at_s % 60 for at_s in came_s[:30]) < 1.0
    assert len(set(came_s)) == len(came_s)


def test_a_rate_scale_divides_every_gap(tmp_path: Path) -> None:
    file = write_rows(tmp_path, BUCKETED)
    assert times(load(file, rate_scale=4)) == pytest.approx([t / 4 for t in times(load(file))])


def test_a_recording_repeats_with_blocks_of_its_own(tmp_path: Path) -> None:
    rows = [mooncake(1000 * i, 512, [5]) for i in range(4)]
    workload = load(write_rows(tmp_path, rows), requests=6)
    assert times(workload) == [0, 1, 2, 3, 4, 5]
    assert len({request.hashes for request in workload.requests[:4]}) == 1
    assert workload.requests[4].hashes != workload.requests[0].hashes


def test_a_later_part_of_a_recording_goes_on_in_its_repetition(tmp_path: Path) -> None:
    rows = [mooncake(1000 * i, 1024 + i, [0, i]) for i in (0, 1, 3)]
    workload = load(write_rows(tmp_path, rows), skip=4, requests=3)  # 4: the second one
    assert [request.prompt_tokens for request in workload.requests] == [1025, 1027, 1024]
    assert times(workload) == pytest.approx([0.0, 2.0, 3.5])
    before, _, repeated = (request.hashes[0] for request in workload.requests)
    assert before != repeated


def test_long_prompts_are_cut_with_their_blocks(tmp_path: Path) -> None:
    rows = [mooncake(0, 5000, list(range(10)))]
    (request,) = load(write_rows(tmp_path, rows), max_prompt_tokens=1024).requests
    assert (request.prompt_tokens, len(request.hashes)) == (1024, 2)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_rate_scale_that_is_none_is_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(BadTrace, match="rate scale"):
        load(write_rows(tmp_path, BUCKETED), rate_scale=scale)


def session(name: int, turn: int, at_ms: int, ids: list[int]) -> dict[str, object]:
    row = mooncake(at_ms, 16 * len(ids), ids, output=100)
    return {"session_id": name, "turn": turn, **row}


SESSIONS = [
    session(0, 0, 0, [0, 1]),
    session(0, 1, 5000, [0, 1, 2]),
    session(1, 0, 0, [0, 3]),
    session(1, 1, 1000, [0, 3, 4]),
]


def by_session(workload: Workload) -> dict[str, list[SimRequest]]:
    found: dict[str, list[SimRequest]] = {}
    for request in workload.requests:
        found.setdefault(request.session, []).append(request)
    return found


def test_a_turn_waits_for_what_is_left_of_its_gap_after_the_answer(tmp_path: Path) -> None:
    found = by_session(load(write_rows(tmp_path, SESSIONS)))
    thoughts = {name: [turn.think_s for turn in turns] for name, turns in found.items()}
    assert thoughts == {"0.0": [None, 3.0], "1.0": [None, 0.0]}
    first, second = found["0.0"]
    assert second.at_s - first.at_s == pytest.approx(5.0)


def test_copies_of_sessions_share_only_what_sessions_share(tmp_path: Path) -> None:
    found = by_session(load(write_rows(tmp_path, SESSIONS), requests=8))
    here, copy = found["0.0"][0].hashes, found["0.1"][0].hashes
    assert here[0] == copy[0] == found["1.0"][0].hashes[0]
    assert here[1] != copy[1]


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(bytes(i * i % 251 for i in range(3000))))
    raw[12:40] = b"\xff" * 28
    file = tmp_path / "t.jsonl.gz"
    file.write_bytes(raw)
    with pytest.raises(BadTrace, match=r"cannot read .*t\.jsonl\.gz"):
        load_workload(str(file))
