"""The files of a checkpoint: whole, or refused with a sentence that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import ConfigError
from engine.weights import check_directory, check_tokenizer, check_weights


def write_shard(path: Path, *names: str, fill: float = 0.0) -> None:
    save_file({name: torch.full((8, 4), fill) for name in names}, path)


def write_sharded(directory: Path) -> None:
    write_shard(directory / "model-1.safetensors", "a", "b")
    write_shard(directory / "model-2.safetensors", "c")
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors"}
    index = {"weight_map": weight_map | {"c": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no checkpoint directory .*/nowhere; check"):
        check_directory(tmp_path / "nowhere")


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file, but a model is a directory"):
        check_directory(tmp_path / "model.gguf")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_directory(tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json; save it"):
        check_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\xff"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        check_tokenizer(tmp_path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="only safetensors weights are loaded"):
        check_weights(tmp_path)


def test_a_single_file_is_described(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, "a")
    files = check_weights(tmp_path)
    assert files.shards == (path,)
    assert files.dtype == "F32"


@pytest.mark.parametrize("cut", [1, 100, 128])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, "a")
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with pytest.raises(ConfigError, match=rf"is truncated: {len(content) - cut} bytes where"):
        check_weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 20])
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, "a")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="is no complete safetensors file"):
        check_weights(tmp_path)


def test_a_pointer_file_is_no_weight_file(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with pytest.raises(ConfigError, match="is no complete safetensors file"):
        check_weights(tmp_path)


def test_a_broken_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for header in (b'{"a": ', b'{"a": 5}', b'{"a": {"dtype": "F32"}}', b"[1, 2]", b"\xff\xfe"):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ConfigError, match="has a broken safetensors header"):
            check_weights(tmp_path)


def test_all_shards_of_an_index_are_checked(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    assert [path.name for path in check_weights(tmp_path).shards] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    shard = tmp_path / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"model-2\.safetensors is truncated"):
        check_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 weight files, the first being model-2"):
        check_weights(tmp_path)


def test_a_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_shard(tmp_path / "model-1.safetensors", "a")
    with pytest.raises(ConfigError, match=r"lacks 1 tensors that .* the first being b;"):
        check_weights(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        check_weights(tmp_path)


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    digests = []
    for name, fill in (("one", 0.0), ("copy", 0.0), ("other", 1.0)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "model.safetensors", "a", fill=fill)
        digests.append(check_weights(tmp_path / name).digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_of_large_weights_sees_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.weights.FULL_DIGEST_BYTES", 0)
    monkeypatch.setattr("engine.weights.MIB", 64)
    first = tmp_path / "first"
    first.mkdir()
    write_shard(first / "model.safetensors", "a", "b")
    digest = check_weights(first).digest
    second = tmp_path / "second"
    shutil.copytree(first, second)
    assert check_weights(second).digest == digest
    with (second / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert check_weights(second).digest != digest
