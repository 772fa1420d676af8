"""Client windows: rates, irregularity and lengths of each client in the composed workload."""

from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest

from simulator.workload.build import Shaping
from simulator.workload.load import load_workload, read_trace
from simulator.workload.records import BadTrace

ARRIVALS = """client,window_start_s,rate_rps,iat_cv,dist,param1,param2
a,0,2.0,2.0,Gamma,0.25,9
a,600,8.0,2.0,Gamma,0.25,9
b,600,2.0,1.0,Weibull,1.0,9
"""
HEADER = "client,window_start_s,field,mean,p1,p5,p10,p25,p50,p75,p90,p95,p99,max\n"
LENGTHS = f"""{HEADER}a,600,input_tokens,150,100,100,100,100,100,100,100,100,100,10100
a,600,output_tokens,20,20,20,20,20,20,20,20,20,20,20
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    (tmp_path / "m-lengths.csv").write_text(LENGTHS)
    file = tmp_path / "m-arrivals.csv"
    file.write_text(ARRIVALS)
    return file


def test_the_busiest_window_is_composed_at_its_rate(trace: Path) -> None:
    loaded = load_workload(trace)
    assert len(loaded.workload.requests) == pytest.approx(6000, rel=0.1)
    assert loaded.workload.horizon_s == pytest.approx(600, rel=0.02)
    assert loaded.notes == ("1 x borrowed lengths",)


def test_requests_asked_for_take_a_window_and_not_the_moment_in_which_so_many_were_recorded(
    trace: Path,
) -> None:
    workload = load_workload(trace, Shaping(requests=300)).workload
    assert len(workload.requests) == 300
    assert workload.horizon_s > 300  # recorded at 10 per second
    gaps = [b.at_s - a.at_s for a, b in pairwise(workload.requests)]
    assert stdev(gaps) / fmean(gaps) > 1.3  # and still in bursts


def test_each_seed_is_asked_another_window_of_the_whole_recording(tmp_path: Path) -> None:
    rows = [f"a,{600 * i},2.0,1.0,Gamma,1.0,9\n" for i in range(100)]
    rows[70] = "a,42000,3.0,1.0,Gamma,1.0,9\n"
    file = tmp_path / "m-arrivals.csv"
    file.write_text(ARRIVALS.splitlines(keepends=True)[0] + "".join(rows))
    (tmp_path / "m-lengths.csv").write_text(LENGTHS)
    begun_s = [read_trace(file, Shaping(seed=i, requests=50)).records[0].at_s for i in range(5)]
    places = [int(at_s // 600) for at_s in begun_s]
    assert places[0] == 70  # the busiest
    assert min(b - a for a, b in pairwise(sorted(places))) > 10
    assert max(places) - min(places) > 50
    again = read_trace(file, Shaping(seed=3, requests=50)).records[0].at_s
    assert again == begun_s[3]


def test_a_whole_window_of_too_many_requests_is_refused_with_the_flag_that_asks_for_fewer(
    trace: Path,
) -> None:
    trace.write_text(ARRIVALS.replace("8.0", "8000.0"))
    with pytest.raises(BadTrace, match="ask for fewer with --requests"):
        load_workload(trace)


def test_clients_keep_their_irregularity_at_another_rate(trace: Path) -> None:
    workload = load_workload(trace, Shaping(start_s=0, rate_rps=20, requests=12_000)).workload
    gaps = [b.at_s - a.at_s for a, b in pairwise(workload.requests)]
    assert 1 / fmean(gaps) == pytest.approx(20, rel=0.15)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(2.0, rel=0.15)


def test_lengths_have_the_recorded_mean_though_the_tail_is_long(trace: Path) -> None:
    requests = load_workload(trace, Shaping(requests=5000)).workload.requests
    assert fmean(request.prompt_tokens for request in requests) == pytest.approx(150, rel=0.2)
    assert {request.output_tokens for request in requests} == {20}


def test_windows_without_lengths_beside_them_are_refused(trace: Path) -> None:
    (trace.parent / "m-lengths.csv").unlink()
    with pytest.raises(BadTrace, match="lengths"):
        load_workload(trace)


def test_a_window_without_a_rate_is_refused_with_its_line(trace: Path) -> None:
    trace.write_text(ARRIVALS + "b,600,none,1.0,Gamma,1,1\n")
    with pytest.raises(BadTrace, match="line 5"):
        load_workload(trace)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ("", "m-lengths.csv is empty"),
        (LENGTHS.rsplit("a,600,output", 1)[0], "m-lengths.csv has no output_tokens of client a"),
    ],
)
def test_lengths_that_lack_something_are_refused(trace: Path, lengths: str, said: str) -> None:
    (trace.parent / "m-lengths.csv").write_text(lengths)
    with pytest.raises(BadTrace, match=said):
        load_workload(trace)


def test_arrivals_of_a_header_alone_are_refused(trace: Path) -> None:
    trace.write_text(ARRIVALS.splitlines()[0] + "\n")
    with pytest.raises(BadTrace, match=r"m-arrivals.csv holds no windows"):
        load_workload(trace)


def test_a_time_without_clients_is_refused(trace: Path) -> None:
    with pytest.raises(BadTrace, match="no clients at 9000 s"):
        load_workload(trace, Shaping(start_s=9000))
