"""The files of a checkpoint directory, checked before anything is loaded from them.

A safetensors file begins with its own table of contents: an 8-byte length, then JSON naming every
tensor with its byte range. Reading that is enough to know that a file is complete, what it holds,
and to name it by content. Needs neither torch nor transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import cast

from core.errors import ConfigError

MIB = 1 << 20
FULL_DIGEST_BYTES = 64 * MIB
"""Weights up to this size are digested in full, larger ones by headers and both ends."""
MAX_HEADER_BYTES = 100 * MIB

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """All shards of a checkpoint, whole. `digest` names their content; `dtype` is safetensors'
    name of the first floating point tensor's type, "" when there is none."""

    shards: tuple[Path, ...]
    dtype: str
    digest: str


def check_directory(directory: Path) -> None:
    """Raise ConfigError unless this is a directory with a config.json."""
    if not directory.exists():
        raise ConfigError(f"there is no checkpoint directory {directory}; check the model path")
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is a file, but a model is a directory with config.json and safetensors; "
            "give the directory"
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory} has no config.json, so it is no Hugging Face checkpoint; "
            "copy the model's complete directory"
        )


def check_tokenizer(directory: Path) -> Path:
    """The directory's tokenizer.json, or ConfigError. All that an engine without a model needs."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{directory} has no tokenizer.json; save it there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if "model" not in read_json(path):
        raise ConfigError(f"{path} describes no tokenizer model; copy the file again")
    return path


def read_json(path: Path) -> Mapping[str, object]:
    """The object in a JSON file, or ConfigError."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; copy it again")
    return cast(Mapping[str, object], content)


def check_weights(directory: Path) -> WeightFiles:
    """Find the shards as transformers would and check that each is whole, or ConfigError."""
    named = _named_shards(directory)
    headers: dict[Path, _Header] = {}
    for shard in sorted(named):
        headers[shard] = _read_header(shard)
        missing = named[shard] - headers[shard].tensors.keys()
        if missing:
            raise ConfigError(
                f"{shard} lacks {len(missing)} tensors that {INDEX} places there, the first being "
                f"{min(missing)}; copy the checkpoint again"
            )
    nbytes = sum(header.file_bytes for header in headers.values())
    dtypes = [d for header in headers.values() for d in header.tensors.values()]
    return WeightFiles(
        shards=tuple(headers),
        dtype=next((d for d in dtypes if d.startswith(("F", "BF"))), ""),
        digest=_digest(headers, nbytes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    raw: bytes
    tensors: dict[str, str]
    file_bytes: int


def _named_shards(directory: Path) -> dict[Path, set[str]]:
    """Each shard and the tensors the index places in it; none named for a single file."""
    single = directory / SINGLE
    if single.is_file():
        return {single: set()}
    index = directory / INDEX
    if not index.is_file():
        raise ConfigError(
            f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors weights are loaded, "
            "so save the model with save_pretrained"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map; copy the checkpoint again")
    shards: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(directory / str(name), set()).add(tensor)
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise ConfigError(
            f"{directory} lacks {len(missing)} of {len(shards)} weight files, the first being "
            f"{missing[0]}; copy the checkpoint again"
        )
    return shards


def _read_header(path: Path) -> _Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise ConfigError(
                f"{path} is no complete safetensors file ({size} bytes); copy it again"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        dtypes = {name: str(entry["dtype"]) for name, entry in tensors.items()}
        data_bytes = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path} has a broken safetensors header; copy it again") from error
    expected = 8 + length + data_bytes
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise ConfigError(
            f"{path} is {state}: {size} bytes where its header promises {expected}; copy it again"
        )
    return _Header(raw=raw, tensors=dtypes, file_bytes=size)


def _digest(headers: Mapping[Path, _Header], nbytes: int) -> str:
    digest = blake2b(digest_size=16)
    for path, header in headers.items():
        for part in (path.name.encode(), str(header.file_bytes).encode(), header.raw):
            digest.update(len(part).to_bytes(8, "little") + part)
        with path.open("rb") as file:
            if nbytes <= FULL_DIGEST_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(MIB))
                file.seek(max(0, header.file_bytes - MIB))
                digest.update(file.read(MIB))
    return digest.hexdigest()
