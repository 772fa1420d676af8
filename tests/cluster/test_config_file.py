"""A YAML file becomes settings, or one clear sentence per mistake."""

from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.config_file import BadConfig, load_config

MODEL = "model: {path: /models/tiny}\n"


def load(folder: Path, text: str) -> ClusterConfig:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return load_config(file)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(BadConfig) as caught:
        load(folder, text)
    prefix = f"{folder / 'cluster.yaml'}: "
    assert all(problem.startswith(prefix) for problem in caught.value.problems)
    assert caught.value.message == "\n".join(caught.value.problems)
    return [problem.removeprefix(prefix) for problem in caught.value.problems]


def test_a_file_with_a_model_alone_takes_all_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL)
    assert config.model.name == "tiny"
    assert (config.prefill.workers, config.decode.workers, config.num_workers) == (2, 2, 4)
    assert config.router.port == 8000


def test_settings_of_a_role_sit_beside_its_worker_count(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL + "decode: {workers: 3, max_sequences: 7}\n")
    assert (config.decode.workers, config.decode.max_sequences) == (3, 7)


def test_served_name_wins_over_the_name_of_the_folder(tmp_path: Path) -> None:
    config = load(tmp_path, "model: {path: /models/tiny, served_name: my-model}")
    assert config.model.name == "my-model"


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, "model: {path: weights}\ntelemetry: {spans_file: out/spans.jsonl}")
    assert config.model.path == tmp_path / "weights"
    assert config.telemetry.spans_file == tmp_path / "out/spans.jsonl"


def test_an_override_wins_over_the_file_and_starts_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "cluster.yaml"
    file.write_text("model: {path: weights}\nrouter: {port: 1}")
    config = load_config(file, {"model.path": Path("mine"), "router.port": 2})
    assert config.model.path == tmp_path / "here" / "mine"
    assert config.router.port == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decode: {worker: 3}", "decode.worker is not a known key; did you mean decode.workers?"),
        ("roter: {}", "roter is not a known key; did you mean router?"),
        ("port: 1", "port is not a known key; did you mean router.port?"),
        (
            "engine: {timed: {kv_byte_per_token: 16}}",
            "engine.timed.kv_byte_per_token is not a known key;"
            " did you mean engine.timed.kv_bytes_per_token?",
        ),
        (
            "slo: {zzz: 1}",
            "slo.zzz is not a known key; known keys here: ttft_ms, tpot_ms",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert problems(tmp_path, MODEL + text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decode: {workers: two}", "decode.workers is 'two', but should be a whole number"),
        ("decode: {workers: 1.5}", "decode.workers is 1.5, but should be a whole number"),
        ("decode: 3", "decode is 3, but should be a section of keys"),
        ("router: {api_keys: abc}", "router.api_keys is 'abc', but should be a list"),
        ("slo: {ttft_ms: .nan}", "slo.ttft_ms is nan, but should be a finite number"),
        (
            "router: {port: 70000}",
            "router.port is 70000, but should be less than or equal to 65535",
        ),
        (
            "registry: {kind: redis, url: redis://host:6379/prod}",
            "registry.url is 'redis://host:6379/prod', but should be a URL such as"
            " redis://host:6379/0",
        ),
        ("hang_timeout_s: 0.5", "hang_timeout_s is 0.5, but should be 0 for never, or at least 1"),
        ("engine: {kind: x}", "engine.kind is 'x', but should be 'transformers' or 'timed'"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_its_key(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert problems(tmp_path, MODEL + text) == [expected]


def test_a_bare_off_is_the_setting_of_that_name(tmp_path: Path) -> None:
    config = load(
        tmp_path, MODEL + "transfer: {verify: off}\nrouter: {admission: off, local_decode: off}"
    )
    assert (config.transfer.verify, config.router.admission) == ("off", "off")
    assert config.router.local_decode is False


def test_a_key_that_is_a_number_is_not_known(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MODEL + "1: 2")
    assert problem.startswith("1 is not a known key; known keys here: model, ")


def test_a_missing_model_says_how_to_give_one(tmp_path: Path) -> None:
    assert problems(tmp_path, "") == ["model is missing; set it, or give --model DIR"]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "decode: {workers: 0, worker: 1}")) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "is not valid YAML: line 1, column "),
        ("[a]: 1", "is not valid YAML: line 1, column 1: found unhashable key"),
        ("- a\n- b\n", "holds a list, not sections such as `model:`"),
        (
            MODEL + "slo: {ttft_ms: 1}\nslo: {tpot_ms: 2}",
            "is not valid YAML: line 3, column 1: the key 'slo' is given twice",
        ),
    ],
)
def test_a_file_that_is_no_config_says_where(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(expected)


def test_a_missing_file_and_a_binary_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read: No such file or directory"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfig, match="is not a text file in UTF-8"):
        load_config(tmp_path / "binary")


def test_no_code_runs_from_a_config_file(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "model: !!python/object/apply:os.system ['true']")
    assert "could not determine a constructor" in problem


def test_the_settings_survive_a_trip_through_json(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL + "router: {api_keys: [a, b]}\ntelemetry: {spans_file: s}")
    assert ClusterConfig.model_validate_json(config.model_dump_json()) == config


def test_every_field_of_the_schema_is_described_or_plain() -> None:
    schema = ClusterConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    sections = {"ClusterConfig": schema, **schema["$defs"]}
    assert all(section["description"] for section in sections.values())
    assert schema["$defs"]["DecodePool"]["properties"]["workers"]["description"]
