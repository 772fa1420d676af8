"""What a config does not show is found out at load, before a request can be answered wrongly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from core.errors import ConfigError
from core.kv import KvLayout
from engine.attention import PAGED, register_attention
from engine.config import EngineConfig
from engine.model import load_engine
from engine.self_check import check_model
from tests.models import write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYOUT = KvLayout(block_size=4, num_kv_heads=2, num_layers=2, head_dim=8, dtype="float32")


def make_model(model_type: str, **settings: Any) -> PreTrainedModel:
    register_attention()
    config = AutoConfig.for_model(model_type, **(SIZES | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=PAGED
    ).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    checked: PreTrainedModel = model
    return checked


def check(model: PreTrainedModel, layout: KvLayout = LAYOUT) -> None:
    with torch.inference_mode():
        check_model(model, layout)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "olmo2", "granite"])
def test_a_plain_decoder_passes_and_stays_paged(model_type: str) -> None:
    model = make_model(model_type)
    check(model)
    assert model.config._attn_implementation == PAGED


def test_a_model_that_attends_twice_per_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer 0 calls its attention 4 times in two"):
        check(make_model("diffllama"))


def test_a_model_with_a_mask_of_its_own_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"layer 0 gives its attention more inputs \(attention_mask"
    ):
        check(make_model("doge", keep_window_size=8))


def test_a_model_with_sinks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 0 gives its attention more inputs \(s_aux\)"):
        check(make_model("gpt_oss", head_dim=8, num_local_experts=2, num_experts_per_tok=1))


def test_a_model_that_keeps_the_window_to_itself_is_refused() -> None:
    model = make_model("phimoe", sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ConfigError, match="layer 0 attends to a window of None instead of 8"):
        check(model)


def test_a_model_that_does_not_pass_the_step_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not run over a paged KV cache"):
        check(make_model("nemotron"))


def test_a_model_with_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="instead of 4 heads of 8"):
        check(make_model("llama"), replace(LAYOUT, num_kv_heads=4))


def test_a_bidirectional_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="attends in both directions"):
        check(make_model("bert"), replace(LAYOUT, num_kv_heads=4))


def test_a_model_with_state_outside_of_its_attention_is_refused() -> None:
    model = make_model(
        "falcon_h1", head_dim=8, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8
    )
    with pytest.raises(ConfigError, match="gives other logits over the paged KV cache"):
        check(model)


def test_a_model_with_broken_weights_is_refused() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="relative error nan"):
        check(model)


def test_load_engine_runs_the_check(tmp_path: Path) -> None:
    make_model("diffllama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="calls its attention"):
        load_engine(tmp_path, EngineConfig(kv_memory_mb=1))


def test_an_attention_outside_of_the_interface_is_refused_before_loading(tmp_path: Path) -> None:
    make_model("stablelm").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="layer 0 of model_type 'stablelm' has an attention of"):
        load_engine(tmp_path, EngineConfig(kv_memory_mb=1))
