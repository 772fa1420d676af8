"""The whole path is exact: router flow, two worker processes, NIXL between them, a real model.

Greedy fp32 against transformers' own `generate` for the same checkpoint: equal ids, and logits
within 1e-3. The negative controls damage one transferred block and must change the answer.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from kv_transfer.codec import layout_from_wire
from router.types import Generated
from tests.models import write_checkpoint
from tests.processes import (
    WorkerProcess,
    bytes_read,
    collect,
    flow_over,
    make_request,
    output_tokens,
    stats,
    wait_until_idle,
    worker_processes,
    write_config,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "mixtral")
BLOCK, CHUNK, WINDOW = 16, 256, 64
EDGES = sorted({1, 3000, *(e + d for e in (BLOCK, WINDOW, CHUNK) for d in (-1, 0, 1))})
NEW_TOKENS = 64


@dataclass(frozen=True)
class Cluster:
    """One prefill and one decode process, the config they run by, and the reference model."""

    config: Path
    workers: list[WorkerProcess]
    reference: PreTrainedModel


@pytest.fixture(scope="module", params=FAMILIES)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(directory / "model", request.param)
    reference = load_reference(checkpoint)
    config = write_config(directory, settings(checkpoint))
    with worker_processes(config, ["prefill", "decode"]) as workers:
        yield Cluster(config, workers, reference)


def load_reference(checkpoint: Path) -> PreTrainedModel:
    torch.set_num_threads(1)  # the workers have the cores
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def settings(checkpoint: Path, kv_memory_mb: int = 96) -> dict[str, object]:
    return {
        "model": {"path": str(checkpoint)},
        "engine": {"kv_memory_mb": kv_memory_mb, "step_tokens": CHUNK, "dtype": "float32"},
        "router": {"local_prefill": False},  # every prompt crosses
    }


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(t) for t in torch.randint(6, 500, (length,), generator=generator)]


@dataclass(frozen=True)
class Expected:
    tokens: list[int]
    logits: torch.Tensor


def reference_answer(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> Expected:
    with torch.inference_mode():
        answer = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return Expected(answer.sequences[0, len(prompt) :].tolist(), torch.cat(answer.logits))


def logits_of(items: list[Generated]) -> torch.Tensor:
    raw = b"".join(item.logits for item in items)
    count = len(output_tokens(items))
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(count, -1)


def assert_equal(items: list[Generated], expected: Expected) -> None:
    assert output_tokens(items) == expected.tokens
    torch.testing.assert_close(logits_of(items), expected.logits, atol=1e-3, rtol=0)


async def test_every_edge_is_exact_cold_then_with_a_prefix_hit(cluster: Cluster) -> None:
    async with flow_over(cluster.config, cluster.workers) as flow:
        moved = bytes_read(await stats(cluster.workers[1]))
        for length in EDGES:
            prompt = random_prompt(length, seed=length)
            expected = reference_answer(cluster.reference, prompt, NEW_TOKENS)
            cold = await collect(
                flow, make_request(f"c{length}", prompt, max_tokens=NEW_TOKENS, return_logits=True)
            )
            warm = await collect(
                flow, make_request(f"w{length}", prompt, max_tokens=NEW_TOKENS, return_logits=True)
            )
            assert_equal(cold, expected)
            assert_equal(warm, expected)
            assert cold[-1].cached_tokens == 0
            assert warm[-1].cached_tokens == (length - 1) // BLOCK * BLOCK
        idle = await wait_until_idle(cluster.workers)
    block_bytes = layout_from_wire(idle[1].who.layout).block_bytes
    # Cold, every block crosses; warm, all but the reader's own full cached ones.
    blocks = sum(-(-n // BLOCK) for n in EDGES) + sum(1 for n in EDGES if n % BLOCK)
    assert bytes_read(idle[1]) - moved == blocks * block_bytes
    assert [reply.pool_error for reply in idle] == ["", ""]


async def test_prompts_whose_rest_the_decode_worker_computes_are_exact(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = write_config(tmp_path, yaml.safe_load(cluster.config.read_text()) | {"router": {}})
    crossed: list[int] = []
    async with flow_over(config, cluster.workers) as flow:
        for turn in range(3):
            for length in (WINDOW + 5, CHUNK + 5):
                prompt = random_prompt(length, seed=5000 + length)
                items = await collect(
                    flow,
                    make_request(
                        f"l{turn}-{length}", prompt, max_tokens=NEW_TOKENS, return_logits=True
                    ),
                )
                assert_equal(items, reference_answer(cluster.reference, prompt, NEW_TOKENS))
                timings = items[-1].timings
                assert timings is not None
                crossed.append(timings.transfer_bytes)
    assert min(crossed[:2]) > 0
    assert min(crossed[2:]) == 0, "none was computed where it decodes"


async def test_a_batch_of_sixteen_is_exact(cluster: Cluster) -> None:
    prompts = [random_prompt(20 + 37 * i, seed=1000 + i) for i in range(16)]
    expected = [reference_answer(cluster.reference, prompt, 24) for prompt in prompts]
    async with flow_over(cluster.config, cluster.workers) as flow:
        answers = await asyncio.gather(
            *(
                collect(flow, make_request(f"b{i}", prompt, max_tokens=24, return_logits=True))
                for i, prompt in enumerate(prompts)
            )
        )
    for items, one in zip(answers, expected, strict=True):
        assert_equal(items, one)


async def test_sampling_with_a_seed_is_the_same_alone_and_in_a_batch(cluster: Cluster) -> None:
    prompts = [random_prompt(30 + 11 * i, seed=2000 + i) for i in range(8)]
    sampled = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    async with flow_over(cluster.config, cluster.workers) as flow:
        alone = [
            output_tokens(await collect(flow, make_request(f"a{i}", p, seed=i, **sampled)))
            for i, p in enumerate(prompts)
        ]
        together = await asyncio.gather(
            *(
                collect(flow, make_request(f"t{i}", p, seed=i, **sampled))
                for i, p in enumerate(prompts)
            )
        )
        other_seed = output_tokens(
            await collect(flow, make_request("o", prompts[0], seed=99, **sampled))
        )
    assert [output_tokens(items) for items in together] == alone
    assert other_seed != alone[0]


def test_the_references_can_tell_a_difference(cluster: Cluster) -> None:
    prompt = random_prompt(200, seed=5)
    answer = reference_answer(cluster.reference, prompt, NEW_TOKENS)
    other = reference_answer(cluster.reference, [*prompt[:-60], 7, *prompt[-59:]], NEW_TOKENS)
    assert len(set(answer.tokens)) >= 20
    assert other.tokens != answer.tokens


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two sound pairs, and two decode workers that damage a block of every read."""
    directory = tmp_path_factory.mktemp("llamas")
    checkpoint = write_checkpoint(directory / "model", "llama")
    reference = load_reference(checkpoint)
    config = write_config(directory, settings(checkpoint, kv_memory_mb=16))
    roles = ["prefill", "decode", "prefill", "decode", "decode:zero", "decode:swap"]
    with worker_processes(config, roles) as workers:
        yield Cluster(config, workers, reference)


@pytest.mark.parametrize(("fault", "worker"), [("none", 1), ("zero", 4), ("swap", 5)])
async def test_one_damaged_block_changes_the_answer(
    llamas: Cluster, fault: str, worker: int
) -> None:
    prompt = random_prompt(200, seed=5)
    expected = reference_answer(llamas.reference, prompt, NEW_TOKENS).tokens
    async with flow_over(llamas.config, [llamas.workers[0], llamas.workers[worker]]) as flow:
        items = await collect(flow, make_request(f"d-{fault}", prompt, max_tokens=NEW_TOKENS))
    assert output_tokens(items)[0] == expected[0]
    assert (output_tokens(items) == expected) == (fault == "none")


async def test_sampling_does_not_depend_on_the_pair_of_workers(llamas: Cluster) -> None:
    prompt = random_prompt(150, seed=8)
    request = make_request("x", prompt, max_tokens=40, temperature=0.9, seed=1234)
    answers = []
    for pair in (llamas.workers[0:2], llamas.workers[2:4]):
        async with flow_over(llamas.config, pair) as flow:
            answers.append(output_tokens(await collect(flow, request)))
    assert answers[0] == answers[1]
