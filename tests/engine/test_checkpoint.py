"""What a checkpoint directory says of its model, without loading it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from core.kv import KvLayout
from engine.checkpoint import CheckpointInfo, SamplingDefaults, choose_device, read_checkpoint
from engine.config import EngineConfig
from tests.models import CONTEXT_TOKENS, EOS_TOKEN_ID, VOCAB_SIZE, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama")


def read(directory: Path, **settings: object) -> CheckpointInfo:
    return read_checkpoint(directory, EngineConfig.model_validate(settings))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_describes_a_checkpoint(checkpoint: Path) -> None:
    info = read(checkpoint, block_size=32)
    assert info.directory == checkpoint
    assert info.model_type == "llama"
    assert info.layout == KvLayout(
        block_size=32, num_kv_heads=2, num_layers=4, head_dim=16, dtype="float32"
    )
    assert info.context_tokens == CONTEXT_TOKENS
    assert info.vocab_size == VOCAB_SIZE
    assert info.eos_token_ids == {EOS_TOKEN_ID}
    assert info.sampling == SamplingDefaults()


def test_loads_no_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    monkeypatch.setattr("safetensors.safe_open", fail)
    read(checkpoint)


def test_each_part_is_checked(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        directory = tmp_path / f"without-{name}"
        shutil.copytree(checkpoint, directory)
        (directory / name).unlink()
        with pytest.raises(ConfigError, match=str(directory)):
            read(directory)


def test_a_config_that_is_no_json_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read(checkpoint)


def test_a_config_with_wrong_types_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", hidden_size="big")
    with pytest.raises(ConfigError, match=r"transformers cannot read .*config\.json"):
        read(checkpoint)


def test_code_in_a_checkpoint_is_never_run(checkpoint: Path) -> None:
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    edit(
        checkpoint / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(ConfigError, match=r"'evil' in config\.json is not known"):
        read(checkpoint)


def test_auto_takes_float32_on_a_cpu(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", dtype="bfloat16")
    assert read(checkpoint, device="cpu").layout.dtype == "float32"


def test_auto_takes_the_checkpoints_own_dtype_on_cuda(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    edit(checkpoint / "config.json", dtype="bfloat16")
    info = read(checkpoint)
    assert (info.device, info.layout.dtype) == ("cuda", "bfloat16")
    # Without a word in the config, the weights tell.
    edit(checkpoint / "config.json", dtype=None)
    assert read(checkpoint).layout.dtype == "float32"
    edit(checkpoint / "config.json", dtype="float64")
    with pytest.raises(ConfigError, match="is in float64, which the engine does not compute in"):
        read(checkpoint)


def test_an_explicit_dtype_wins(checkpoint: Path) -> None:
    assert read(checkpoint, dtype="bfloat16").layout.dtype == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.device is cuda, but torch finds no CUDA"):
        read(checkpoint, device="cuda")


def test_cpu_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device(EngineConfig(device="cpu")) == "cpu"
    assert choose_device(EngineConfig(device="auto")) == "cuda"


def test_a_copy_has_the_same_model_id(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert read(copy).model_id == read(checkpoint).model_id
    assert read(copy).model_id.startswith("llama-")


def test_what_changes_no_kv_changes_no_model_id(checkpoint: Path) -> None:
    before = read(checkpoint).model_id
    edit(checkpoint / "generation_config.json", temperature=0.3)
    (checkpoint / "README.md").write_text("# model")
    assert read(checkpoint, block_size=32, kv_memory_mb=8).model_id == before


def test_model_id_covers_config_tokenizer_weights_and_dtype(
    checkpoint: Path, tmp_path: Path
) -> None:
    ids = [read(checkpoint).model_id, read(checkpoint, dtype="bfloat16").model_id]
    edit(checkpoint / "config.json", rms_norm_eps=1e-5)
    ids.append(read(checkpoint).model_id)
    edit(checkpoint / "tokenizer.json", version="1.1")
    ids.append(read(checkpoint).model_id)
    other = write_checkpoint(tmp_path / "other", "llama", seed=1)
    shutil.copy(other / "model.safetensors", checkpoint)
    ids.append(read(checkpoint).model_id)
    assert len(set(ids)) == len(ids)


def test_model_id_changes_with_the_kv_format(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(checkpoint).model_id
    monkeypatch.setattr("engine.checkpoint.KV_FORMAT_VERSION", 2)
    assert read(checkpoint).model_id != before


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ([5, 7], 2, {5, 7}),
        (5, 2, {5}),
        (None, [3, 4], {3, 4}),
        (None, 3, {3}),
        (None, None, set()),
    ],
)
def test_eos_comes_from_generation_config_then_config_and_from_the_tokenizer(
    checkpoint: Path, generation: object, config: object, wanted: set[int]
) -> None:
    edit(checkpoint / "generation_config.json", eos_token_id=generation)
    edit(checkpoint / "config.json", eos_token_id=config)
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"eos_token_id": config}))
    assert read(checkpoint).eos_token_ids == wanted | {EOS_TOKEN_ID}


def test_generation_config_may_be_absent(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    info = read(checkpoint)
    assert info.eos_token_ids == {EOS_TOKEN_ID}
    assert info.sampling == SamplingDefaults()


@pytest.mark.parametrize("do_sample", [True, False, None])
def test_sampling_defaults_do_not_ask_do_sample(checkpoint: Path, do_sample: bool | None) -> None:
    edit(
        checkpoint / "generation_config.json",
        do_sample=do_sample,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
    )
    assert read(checkpoint).sampling == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)


def test_no_top_k_limit_may_be_written_as_minus_one(checkpoint: Path) -> None:
    edit(checkpoint / "generation_config.json", top_k=-1)
    assert read(checkpoint).sampling.top_k == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 1.5), ("top_k", True)],
)
def test_nonsensical_defaults_are_refused(checkpoint: Path, key: str, value: object) -> None:
    edit(checkpoint / "generation_config.json", **{key: value})
    with pytest.raises(ConfigError, match=rf"generation_config\.json gives {key}"):
        read(checkpoint)


def test_a_nonsensical_eos_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(ConfigError, match="eos_token_id"):
        read(checkpoint)
