"""The sampler: a function of (seed, choice, position, token id), with the right distribution."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from core.errors import InternalError
from core.sampling import SamplingParams
from engine.sampler import Draw, sample

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def make_draw(
    position: int = 0,
    *,
    seed: int = 1,
    choice: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Draw:
    params = SamplingParams(
        max_tokens=1, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p
    )
    return Draw(params=params, choice=choice, output_position=position)


def random_logits(rows: int, vocab: int = 300, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def tokens_of(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    tokens = sample(logits, draws)
    assert all(isinstance(token, int) for token in tokens)
    return [token for token in tokens if isinstance(token, int)]


def chi_square(counts: Counter[int], probabilities: dict[int, float], total: int) -> float:
    return sum((counts[t] - total * p) ** 2 / (total * p) for t, p in probabilities.items())


def critical(degrees: int) -> float:
    """Chi-square value exceeded by chance once in 10,000 (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


LOGITS = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 1.5, 2.5, -2.0])
DRAWS = 8_000


def count_draws(*, temperature: float, top_k: int, top_p: float) -> Counter[int]:
    draws = [
        make_draw(position, temperature=temperature, top_k=top_k, top_p=top_p)
        for position in range(DRAWS)
    ]
    return Counter(tokens_of(LOGITS.expand(DRAWS, -1), draws))


def expected(*, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The distribution by the book: temperature, then top-k, then top-p over the rest."""
    weights = {t: math.exp(float(x) / temperature) for t, x in enumerate(LOGITS)}
    kept = sorted(weights, key=lambda t: -weights[t])[: top_k or len(weights)]
    total, mass, nucleus = sum(weights[t] for t in kept), 0.0, []
    for token in kept:
        if mass < top_p * total:
            nucleus.append(token)
        mass += weights[token]
    total = sum(weights[t] for t in nucleus)
    return {t: weights[t] / total for t in nucleus}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (2.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.8), (1.3, 5, 0.7)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    counts = count_draws(temperature=temperature, top_k=top_k, top_p=top_p)
    probabilities = expected(temperature=temperature, top_k=top_k, top_p=top_p)
    assert set(counts) == set(probabilities)
    assert chi_square(counts, probabilities, DRAWS) < critical(len(probabilities) - 1)


def test_the_distribution_test_notices_a_slightly_wrong_temperature() -> None:
    counts = count_draws(temperature=1.1, top_k=0, top_p=1.0)
    probabilities = expected(temperature=1.0, top_k=0, top_p=1.0)
    assert chi_square(counts, probabilities, DRAWS) > critical(len(probabilities) - 1)


@pytest.mark.parametrize("vary", ["seed", "choice", "position"])
def test_draws_of_neighbouring_keys_are_independent(vary: str) -> None:
    pairs = 8_000
    flat = torch.zeros(2 * pairs, 4)
    neighbours = []
    for i in range(pairs):
        for step in (0, 1):
            number = 2 * i + step
            neighbours.append(
                make_draw(
                    number if vary == "position" else 5,
                    seed=number if vary == "seed" else 5,
                    choice=number if vary == "choice" else 0,
                )
            )
    tokens = tokens_of(flat, neighbours)
    counts = Counter(4 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True))
    assert chi_square(counts, dict.fromkeys(range(16), 1 / 16), pairs) < critical(15)


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = random_logits(40)
    draws = [
        make_draw(
            i,
            seed=i % 3,
            choice=i % 2,
            temperature=(0.0, 0.7, 1.0, 1.5)[i % 4],
            top_k=(0, 20)[i % 2],
            top_p=(1.0, 0.9, 0.5)[i % 3],
        )
        for i in range(40)
    ]
    together = tokens_of(logits, draws)
    alone = [tokens_of(logits[i : i + 1], draws[i : i + 1])[0] for i in range(40)]
    backwards = tokens_of(logits.flip(0), draws[::-1])[::-1]
    assert together == alone == backwards


def test_a_large_batch_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, draws = random_logits(50), [make_draw(i) for i in range(50)]
    whole = tokens_of(logits, draws)
    monkeypatch.setattr("engine.sampler.CHUNK_VALUES", 900)
    assert tokens_of(logits, draws) == whole


def test_noise_equals_its_definition() -> None:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    def by_definition(seed: int, choice: int, position: int, row: list[float]) -> int:
        key = mix((seed + GOLDEN) & MASK)
        key = mix((key + choice + GOLDEN) & MASK)
        key = mix((key + position + GOLDEN) & MASK)
        scores = []
        for token, logit in enumerate(row):
            bits = mix(mix((key + (token + 1) * GOLDEN) & MASK)) >> 12
            scores.append(logit - math.log(-math.log((bits + 0.5) / 2**52)))
        return scores.index(max(scores))

    logits = random_logits(60)
    keys = [(s, c, p) for s in (0, 1, MASK, -5, 1 << 80) for c in (0, 3) for p in range(6)]
    drawn = tokens_of(logits, [make_draw(p, seed=s, choice=c) for s, c, p in keys])
    rows = logits.double().tolist()
    assert drawn == [by_definition(*key, row) for key, row in zip(keys, rows, strict=True)]


def test_limits_that_limit_nothing_change_no_draw() -> None:
    logits = random_logits(50)
    free = tokens_of(logits, [make_draw(i) for i in range(50)])
    assert tokens_of(logits, [make_draw(i, top_k=300) for i in range(50)]) == free
    assert tokens_of(logits, [make_draw(i, top_k=10_000) for i in range(50)]) == free


@pytest.mark.parametrize(
    "only_best",
    [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"temperature": 1e-300}],
)
def test_a_choice_of_one_is_the_best(only_best: dict[str, float]) -> None:
    logits = random_logits(20)
    draws = [make_draw(i, **only_best) for i in range(20)]  # type: ignore[arg-type]
    assert tokens_of(logits, draws) == logits.argmax(-1).tolist()


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.zeros(500, 6)
    logits[:, [0, 2, 5]] = float("-inf")
    draws = [make_draw(i, top_p=(1.0, 0.99)[i % 2], temperature=5.0) for i in range(500)]
    assert set(tokens_of(logits, draws)) == {1, 3, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_invalid_logits_fail_their_own_row_only(temperature: float, bad: float) -> None:
    logits = random_logits(3)
    draws = [make_draw(i, temperature=temperature) for i in range(3)]
    sound = tokens_of(logits, draws)
    logits[1, 17] = bad
    answers = sample(logits, draws)
    assert isinstance(answers[1], InternalError)
    assert [answers[0], answers[2]] == [sound[0], sound[2]]


def test_no_finite_logit_is_an_error() -> None:
    (answer,) = sample(torch.full((1, 9), float("-inf")), [make_draw()])
    assert isinstance(answer, InternalError)
