"""Which workers can be built."""

import pytest

from engine.latency.devices import find_device
from engine.latency.shapes import find_shape
from simulator.plan.memory import find_options, kv_capacity_tokens


def test_kv_takes_what_the_weights_leave() -> None:
    model, device = find_shape("llama-3-8b"), find_device("h100")
    left = device.memory_bytes * 0.9 - model.model_bytes
    assert kv_capacity_tokens(model, device, 1, 0.9) == int(left / 131_072)


def test_ranks_beyond_the_kv_heads_hold_copies() -> None:
    model, device = find_shape("qwen2.5-7b"), find_device("h100")
    four, eight = (
        kv_capacity_tokens(model, device, 4, 0.9),
        kv_capacity_tokens(model, device, 8, 0.9),
    )
    assert eight < four * 1.1


def test_a_model_too_large_for_one_gpu_is_refused_with_the_numbers() -> None:
    fit = find_options(
        find_shape("llama-3-70b"), find_device("h100"), longest_tokens=4000, most_gpus=8
    )
    assert [option.tp for option in fit.options] == [2, 4, 8]
    first = fit.refused[0]
    assert "llama-3-70b does not fit h100 at TP 1" in first
    assert "85.9 GB" in first
    assert "77.3 GB" in first
    assert "141" in first


def test_a_request_too_long_for_the_kv_is_refused_with_its_length() -> None:
    fit = find_options(
        find_shape("llama-3-8b"), find_device("h100"), longest_tokens=600_000, most_gpus=1
    )
    assert not fit.options
    assert "600000 tokens, 78.6 GB" in fit.refused[0]


def test_degrees_divide_the_heads_and_the_gpus_there_are() -> None:
    fit = find_options(
        find_shape("qwen2.5-7b"), find_device("h100"), longest_tokens=4000, most_gpus=8
    )
    assert [option.tp for option in fit.options] == [1, 2, 4]


@pytest.mark.parametrize("most_gpus", [1, 2, 4])
def test_no_worker_is_larger_than_it_may_be(most_gpus: int) -> None:
    fit = find_options(
        find_shape("llama-3-8b"), find_device("h100"), longest_tokens=4000, most_gpus=most_gpus
    )
    assert max(option.tp for option in fit.options) == most_gpus
