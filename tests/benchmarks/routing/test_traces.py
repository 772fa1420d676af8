import json
from pathlib import Path

import pytest

from benchmarks.routing.traces import finer, load_trace
from benchmarks.types import BenchFailed


def write(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "tiny_trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(at_ms: int, ids: list[int], **more: object) -> dict[str, object]:
    return {"timestamp": at_ms, "input_length": 512 * len(ids), "hash_ids": ids, **more}


def test_blocks_are_as_long_as_the_lengths_say(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, row(0, [1, 2, 3]), row(9000, [1, 4])))
    assert (trace.name, trace.block_size) == ("tiny_trace", 512)
    first, second = trace.prompts(10, seed=0)
    assert (first.tokens, len(first.hashes)) == (1536, 3)
    assert first.hashes[0] == second.hashes[0]
    assert len({*first.hashes, *second.hashes}) == 4
    assert first.at_s < 3.0 and 9.0 <= second.at_s < 12.0


def test_long_prompts_are_cut(tmp_path: Path) -> None:
    (prompt,) = load_trace(write(tmp_path, row(0, list(range(100))))).prompts(1, seed=0)
    assert (prompt.tokens, len(prompt.hashes)) == (20_480, 40)


def test_a_partial_last_block_has_no_hash(tmp_path: Path) -> None:
    whole, part = row(0, [1, 2]), {"timestamp": 1, "input_length": 600, "hash_ids": [1, 3]}
    prompts = load_trace(write(tmp_path, whole, part)).prompts(2, seed=0)
    assert sorted(len(prompt.hashes) for prompt in prompts) == [1, 2]


def test_a_seed_always_draws_the_same(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, *[row(0, [i]) for i in range(20)]))
    assert trace.prompts(20, 1) == trace.prompts(20, 1)
    assert trace.prompts(20, 1) != trace.prompts(20, 2)


def test_copies_of_sessions_share_what_the_sessions_shared(tmp_path: Path) -> None:
    rows = [row(0, [0, 1], session_id=1), row(5000, [0, 1, 2], session_id=1)]
    rows.append(row(0, [0, 9], session_id=2))
    prompts = load_trace(write(tmp_path, *rows)).prompts(9, seed=0)
    assert len(prompts) == 9
    assert len({prompt.hashes[0] for prompt in prompts}) == 1
    assert len({prompt.hashes[-1] for prompt in prompts}) == 9
    assert [p.at_s for p in prompts] == sorted(p.at_s for p in prompts)


def test_finer_blocks_are_equal_where_the_coarse_ones_were(tmp_path: Path) -> None:
    a, b = load_trace(write(tmp_path, row(0, [1, 2]), row(9000, [1, 3]))).prompts(2, 0)
    left, right = finer(a.hashes, 32), finer(b.hashes, 32)
    assert len(left) == 64
    assert left[:32] == right[:32]
    assert not set(left[32:]) & set(right[32:])


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n"])
def test_what_is_no_trace_is_said_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(BenchFailed, match=r"x\.jsonl"):
        load_trace(path)
