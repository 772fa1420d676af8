"""Every format of profile, from a small file of its kind."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from engine.latency.base import StepShape
from engine.latency.shapes import SHAPES, ModelShape
from simulator.profiles.kernel_tables import read_aiconfigurator, read_llmservingsim
from simulator.profiles.load import load_profile
from simulator.profiles.own import DecodeRow, OwnProfile, PrefillRow, own_text
from simulator.profiles.types import BadProfile

OWN = OwnProfile(
    model="m",
    device="d",
    tp=2,
    kv_tokens=5000,
    prefill=tuple(PrefillRow(start=0, end=n, seconds=n / 1e4) for n in (100, 200, 400)),
    decode=tuple(
        DecodeRow(sequences=b, context_tokens=b * c, seconds=0.01 + b * c / 1e6)
        for b in (1, 8)
        for c in (100, 1000)
    ),
)


def zipped(file: Path, text: str) -> Path:
    file.write_bytes(gzip.compress(text.encode()))
    return file


@pytest.mark.parametrize("kind", ["table", "fitted"])
def test_our_own_format(tmp_path: Path, kind: str) -> None:
    (tmp_path / "p.json").write_text(own_text(OWN))
    profile = load_profile(str(tmp_path / "p.json"), tp=2, kind=kind)  # type: ignore[arg-type]
    assert (profile.name, profile.kv_tokens) == ("m on d", 5000)
    assert profile.latency.step_s(StepShape([], 8, 800)) == pytest.approx(0.0108)
    assert profile.latency.step_s(StepShape([(0, 200)])) == pytest.approx(0.02)


def test_another_degree_than_was_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(own_text(OWN))
    with pytest.raises(BadProfile, match="degree 2, not 1"):
        load_profile(str(tmp_path / "p.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no profile"),
        (OWN.model_dump_json().replace("0.01}", "-1}", 1), "is no profile: prefill.0.seconds"),
        (OWN.model_dump_json().replace("profile-1", "profile-9"), "of format 'baton-profile-9'"),
    ],
)
def test_a_broken_file_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(BadProfile, match=message):
        load_profile(str(tmp_path / "p.json"), tp=2)


def write_npz(folder: Path) -> Path:
    tp = np.array([[4], [2]])
    np.savez(
        folder / "x_prefill.npz",
        prefill_isl=np.array([[100, 1000, 4000], [100, 1000, 4000]]),
        prefill_ttft=np.array([[10.0, 55.0, 220.0], [20.0, 110.0, 440.0]]),
        tp=tp,
    )
    np.savez(
        folder / "x_decode.npz",
        y_context_length=np.array([[500.0, 500, 2000, 2000]] * 2),
        z_itl=np.array([[5.0, 10, 6, 20], [10.0, 20, 12, 40]]),
        z_thpt_per_gpu=np.array([[50.0, 1600, 41.7, 200], [50.0, 1600, 41.7, 200]]),
        max_kv_tokens=np.array([[9000], [4000]]),
        tp=tp,
    )
    return folder / "x_prefill.npz"


def test_dynamos_curves_of_one_degree(tmp_path: Path) -> None:
    profile = load_profile(str(write_npz(tmp_path)), tp=2)
    assert profile.kv_tokens == 4000
    assert profile.latency.step_s(StepShape([(0, 1000)])) == pytest.approx(0.11)
    assert profile.measured is not None
    first, second, *_ = profile.measured.decode
    assert (first.sequences, first.context_tokens) == (1, 500)
    assert (second.sequences, second.context_tokens) == (64, 32_000)
    assert profile.latency.step_s(StepShape([], 64, 32_000)) == pytest.approx(0.02)


def test_a_degree_that_dynamo_did_not_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadProfile, match=r"no tensor parallel degree 8, only \[4, 2\]"):
        load_profile(str(write_npz(tmp_path)), tp=8)


SPLITWISE = (
    "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"
)
SPLITWISE += "".join(
    f"m,gpu,{prompt},{batch},128,{prompt / 10},{30 + batch},8\n"
    for prompt, batch in ((128, 1), (512, 1), (2048, 1), (512, 8), (512, 32))
)


def test_splitwise(tmp_path: Path) -> None:
    file = zipped(tmp_path / "perf_model.csv.gz", SPLITWISE)
    profile = load_profile(f"{file}#m/gpu", tp=8)
    assert profile.latency.step_s(StepShape([(0, 2048)])) == pytest.approx(0.2048)
    assert profile.latency.step_s(StepShape([], 32, 32 * 576)) == pytest.approx(0.062)


def test_splitwise_names_what_there_is(tmp_path: Path) -> None:
    file = zipped(tmp_path / "perf_model.csv.gz", SPLITWISE)
    with pytest.raises(BadProfile, match="only: m/gpu/8"):
        load_profile(f"{file}#m/other", tp=8)


TINY = ModelShape(
    name="tiny", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=1000
)


def test_llmservingsim_sums_its_layers(tmp_path: Path) -> None:
    file = zipped(
        tmp_path / "g-attention.csv.gz",
        "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
        "16,0,0,0,10\n16,16,0,0,20\n0,0,1,16,5\n0,0,4,16,8\n16,0,1,16,999\n",
    )
    layers = ["layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn"]
    layers += ["down_proj", "embedding", "final_layernorm"]
    rows = "".join(f"{layer},{n},{n}\n" for layer in layers for n in (1, 100))
    zipped(tmp_path / "g-dense.csv.gz", "layer,tokens,time_us\n" + rows)
    zipped(
        tmp_path / "g-per_sequence.csv.gz",
        "layer,sequences,time_us\nlm_head,1,70\nlm_head,8,77\nsampler,1,7\nsampler,8,7\n",
    )
    table = read_llmservingsim(file, TINY)
    dense = 2 * (2 + 6) + 2
    assert table.step_s(StepShape([(16, 32)])) * 1e6 == pytest.approx(16 * dense + 77 + 2 * 20)
    assert table.step_s(StepShape([], 4, 64)) * 1e6 == pytest.approx(4 * dense + 80 + 2 * 8)


def write_kernels(prefix: Path) -> None:
    """Products take a microsecond per 1000 x outputs x inputs, at any number of tokens."""
    heads = "num_heads,num_key_value_heads,head_dim,attn_dtype,kv_cache_dtype,step,latency\n"
    gemm = "gemm_dtype,m,n,k,latency\n" + "".join(
        f"bfloat16,{m},{n},{k},{n * k / 1e6}\nfp8,{m},{n},{k},9999\n"
        for m in (1, 4096)
        for n in (64, 1024)
        for k in (32, 128)
    )
    zipped(prefix.with_name("gpu-gemm_perf.csv.gz"), gemm)
    zipped(
        prefix.with_name("gpu-context_attention_perf.csv.gz"),
        f"batch_size,isl,{heads}1,16,2,1,16,bfloat16,bfloat16,0,0.016\n"
        "1,64,2,1,16,bfloat16,bfloat16,0,0.064\n8,64,2,1,16,bfloat16,bfloat16,0,9999\n",
    )
    zipped(
        prefix.with_name("gpu-generation_attention_perf.csv.gz"),
        f"batch_size,isl,{heads}1,1,2,1,16,bfloat16,bfloat16,63,0.01\n"
        "8,1,2,1,16,bfloat16,bfloat16,63,0.08\n8,1,2,1,16,bfloat16,fp8,63,9999\n",
    )
    zipped(
        prefix.with_name("gpu-custom_allreduce_perf.csv.gz"),
        "num_gpus,message_size,latency,backend\n2,64,0.005,vllm_graph\n2,6400,0.5,vllm_graph\n"
        "2,64,9999,vllm_eager\n4,64,9999,vllm_graph\n",
    )


def test_aiconfigurator_sums_the_kernels_of_a_rank(tmp_path: Path) -> None:
    write_kernels(tmp_path / "gpu")
    table = read_aiconfigurator(tmp_path / "gpu", TINY, 2, overhead_s=1e-3)
    products_ms = (64 * 64 + 64 * 32 + 128 * 64 + 64 * 64) / 1e6
    layers_ms = 2 * (products_ms + 2 * 0.005 * 8 + 0.08)
    step_ms = table.step_s(StepShape([], 8, 8 * 64)) * 1e3
    assert step_ms == pytest.approx(1 + layers_ms + 500 * 64 / 1e6)


def test_experts_have_no_kernel_tables(tmp_path: Path) -> None:
    moe = ModelShape(
        name="moe",
        layers=1,
        hidden=1,
        heads=1,
        kv_heads=1,
        head_dim=1,
        ffn=1,
        vocab=1,
        experts=8,
        top_k=2,
    )
    with pytest.raises(BadProfile, match="experts"):
        read_aiconfigurator(tmp_path / "gpu", moe, 1)


def test_a_roofline_and_published_coefficients_need_no_file() -> None:
    roofline = load_profile("roofline:h100", model="llama-3-8b", tp=2)
    assert 0.003 < roofline.latency.step_s(StepShape([], 1, 512)) < 0.01
    published = load_profile("distserve:opt-13b", tp=1).latency
    milliseconds = 18.10 + 2 + (0.1019 + 1e-4) * 500 + 7.12e-6 * 500**2
    assert published.step_s(StepShape([(0, 500)])) == pytest.approx(milliseconds / 1e3)


@pytest.mark.parametrize("source", ["nothing", "nothing.csv", "distserve:opt-1b"])
def test_what_is_no_profile_is_a_sentence(source: str) -> None:
    with pytest.raises(BadProfile, match=r"no profile|no fit"):
        load_profile(source)


def test_a_profile_of_no_one_model_asks_for_it() -> None:
    with pytest.raises(BadProfile, match="name the model"):
        load_profile("roofline:h100")
    with pytest.raises(ConfigError, match=next(iter(SHAPES))):
        load_profile("roofline:h100", model="unknown")


def test_a_roofline_tells_the_room_for_kv_and_refuses_a_model_that_leaves_none() -> None:
    assert (load_profile("roofline:h100", model="llama-3-70b", tp=4).kv_tokens or 0) > 100_000
    with pytest.raises(BadProfile, match="llama-3-70b does not fit h100 at TP 1"):
        load_profile("roofline:h100", model="llama-3-70b", tp=1)


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(BadProfile, match=r"distserve:opt-13b is of opt-13b, but .* llama-3-8b"):
        load_profile("distserve:opt-13b", model="llama-3-8b")
    assert load_profile("distserve:opt-13b", model="opt-13b", tp=2).kv_tokens == 163_008


def test_opt_66b_has_the_room_that_its_weights_leave_on_the_device_it_was_measured_on() -> None:
    assert 8_000 < (load_profile("distserve:opt-66b", tp=2).kv_tokens or 0) < 12_000


def test_kernels_of_a_known_device_leave_room_or_refuse_the_model(tmp_path: Path) -> None:
    write_kernels(tmp_path / "gpu")
    for file in list(tmp_path.iterdir()):
        file.rename(file.with_name(file.name.replace("gpu-", "h100_sxm-")))
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    profile = load_profile(str(tmp_path / "h100_sxm"), model=str(tmp_path), tp=2)
    kv_bytes_of_a_rank = 2 * 2 * 1 * 16 * 2
    assert profile.kv_tokens == pytest.approx(0.9 * 80 * 2**30 / kv_bytes_of_a_rank, rel=0.01)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4_000_000}))
    with pytest.raises(BadProfile, match="does not fit h100 at TP 2"):
        load_profile(str(tmp_path / "h100_sxm"), model=str(tmp_path), tp=2)


def test_a_measured_model_on_a_known_device_has_the_room_that_its_weights_leave(
    tmp_path: Path,
) -> None:
    named = SPLITWISE.replace("m,gpu", "bloom-176b,h100-80gb-pcap")
    profile = load_profile(
        f"{zipped(tmp_path / 'p.csv.gz', named)}#bloom-176b/h100-80gb-pcap", tp=8
    )
    assert profile.model == "bloom-176b"
    assert 60_000 < (profile.kv_tokens or 0) < 70_000


def test_dynamos_curves_name_their_model(tmp_path: Path) -> None:
    file = write_npz(tmp_path)
    assert load_profile(str(file), tp=2).model is None
    with np.load(file) as arrays:
        np.savez(file, model=np.array([["nvidia/Llama-3.1-8B-Instruct-FP8"]] * 2), **arrays)
    assert load_profile(str(file), tp=2).model == "nvidia/Llama-3.1-8B-Instruct-FP8"
    with pytest.raises(BadProfile, match=r"is of nvidia/Llama.*, but the model is llama-3-70b"):
        load_profile(str(file), model="llama-3-70b", tp=2)


def test_steps_that_all_begin_within_a_prompt_make_no_table(tmp_path: Path) -> None:
    later = tuple(row.model_copy(update={"start": 50}) for row in OWN.prefill)
    (tmp_path / "p.json").write_text(own_text(OWN.model_copy(update={"prefill": later})))
    with pytest.raises(BadProfile, match=r"p\.json: no prefill step begins at 0"):
        load_profile(str(tmp_path / "p.json"), tp=2)


def test_a_step_that_ends_before_it_begins_is_named(tmp_path: Path) -> None:
    text = OWN.model_dump_json().replace('"start":0,"end":200', '"start":300,"end":200')
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(BadProfile, match=r"prefill\.1: a step must end behind its start"):
        load_profile(str(tmp_path / "p.json"), tp=2)


@pytest.mark.parametrize("ending", ["prefill", "decode"])
def test_a_cut_npz_file_is_named(ending: str, tmp_path: Path) -> None:
    source = write_npz(tmp_path)
    file = tmp_path / f"x_{ending}.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(BadProfile, match=f"x_{ending}.npz is no profile of Dynamo's planner"):
        load_profile(str(source), tp=2)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("z_itl", [[5.0, 10, float("nan"), 20]] * 2, "z_itl has no number above 0 at 2"),
        ("z_itl", [[5.0, 10]] * 2, "differ in length at degree 2"),
        ("z_itl", [[5.0, 10, 6, 20]], "is no profile of Dynamo's planner"),
    ],
)
def test_an_npz_value_that_is_no_time_is_named(
    name: str, values: list[list[float]], message: str, tmp_path: Path
) -> None:
    source, file = write_npz(tmp_path), tmp_path / "x_decode.npz"
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, name: np.array(values)})
    with pytest.raises(BadProfile, match=message):
        load_profile(str(source), tp=2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size", "batch", "line 2: there is no batch_size"),
        ("m,gpu,2048", "m,gpu,abc", "line 4: prompt_size is 'abc', which is no number"),
        ("m,gpu,2048", "m,gpu,nan", "line 4: prompt_size is nan"),
        ("m,gpu,2048,1", "m,gpu,2048,0", "line 4: batch_size is 0, but should be 1 or more"),
    ],
)
def test_a_broken_row_of_splitwise_is_named(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    file = zipped(tmp_path / "perf_model.csv.gz", SPLITWISE.replace(old, new))
    with pytest.raises(BadProfile, match=rf"perf_model\.csv\.gz, {message}"):
        load_profile(f"{file}#m/gpu", tp=8)


def test_a_column_that_llmservingsim_needs_is_named(tmp_path: Path) -> None:
    file = zipped(tmp_path / "g-attention.csv.gz", "prefill_chunk,kv_prefill\n16,0\n")
    with pytest.raises(BadProfile, match=r"g-attention\.csv\.gz, line 2: there is no n_decode"):
        load_profile(str(file), model="llama-3-8b")


def test_kernels_in_a_damaged_gzip_file_are_named(tmp_path: Path) -> None:
    write_kernels(tmp_path / "gpu")
    file = tmp_path / "gpu-gemm_perf.csv.gz"
    raw = bytearray(file.read_bytes())
    raw[12:40] = b"\xff" * 28
    file.write_bytes(raw)
    with pytest.raises(BadProfile, match=r"cannot read .*gpu-gemm_perf\.csv\.gz"):
        load_profile(str(tmp_path / "gpu"), model="llama-3-8b")
