"""What is said of the rounds: medians, ratios, and rows of peers that did not run."""

from benchmarks.router.loops import Loop, median_loop
from benchmarks.router.peers.catalog import catalog
from benchmarks.router.peers.report import finding
from benchmarks.router.peers.rounds import CLIENTS, Outcome

PEERS = {peer.name: peer for peer in catalog()}


def loop(clients: int, cpu_us: float, *, tokens: int = 128, stalls: int = 0) -> Loop:
    return Loop(
        clients=clients,
        answer_tokens=tokens,
        answers=100,
        answers_per_s=100.0,
        cpu_us_per_answer=cpu_us,
        workers_us_per_answer=cpu_us,
        ttft_ms_p50=1.0,
        ttft_ms_p99=2.0,
        events_per_answer=tokens,
        coalesced_share=0.0,
        stalls=stalls,
    )


def outcome(name: str, *cpu_us: float, tokens: int = 128) -> Outcome:
    """Rounds that cost so much, at every number of clients alike."""
    return Outcome(
        name=name,
        peer=PEERS.get(name),
        loops={clients: [loop(clients, us, tokens=tokens) for us in cpu_us] for clients in CLIENTS},
        stall=loop(4, 1.0, stalls=3),
    )


def test_a_median_is_taken_of_each_number_and_pauses_add_up() -> None:
    loops = [loop(32, 300.0, stalls=1), loop(32, 100.0), loop(32, 200.0, stalls=2)]
    middle = median_loop(loops)
    assert middle.cpu_us_per_answer == 200.0
    assert middle.answers_per_cpu_s == 5000.0
    assert middle.tokens_per_cpu_s == 5000.0 * 128
    assert middle.answers_per_cpu_s_with_workers == 2500.0
    assert (middle.stalls, middle.answers) == (3, 300)


def test_baton_is_held_against_the_best_gateway_and_dynamos_frontend() -> None:
    found = finding(
        [
            outcome("baton", 100.0),
            outcome("smg", 160.0),
            outcome("vllm-router", 200.0),
            outcome("dynamo", 390.0),
        ],
        128,
    )
    gateway, dynamo = found.targets
    assert gateway.promise.endswith("at least 1.5 x the best gateway's")
    assert gateway.measured == "1.60 at 32, 1.60 at 256"
    assert gateway.held
    assert dynamo.measured == "3.90 at 32, 3.90 at 256"
    assert not dynamo.held
    assert found.keys["peers"] == {"smg": 800_000, "vllm-router": 640_000, "dynamo": 328_205}


def test_dynamo_has_a_row_with_its_mock_engine() -> None:
    found = finding([outcome("baton", 100.0), outcome("dynamo", 390.0)], 128)
    notes = [(row[0], row[1]) for row in found.tables[0].rows]
    assert notes.count(("dynamo", "with mockers")) == len(CLIENTS)
    assert notes.count(("dynamo", "1.6.1")) == len(CLIENTS)


def test_a_peer_that_did_not_run_is_a_row_that_says_why_and_no_number() -> None:
    missing = Outcome(name="smg", peer=PEERS["smg"], reason="not installed: make peers")
    half = outcome("vllm-router", 100.0)
    half.reason = "failed in round 3: it closed the connection\n  with a log"
    found = finding([outcome("baton", 100.0), missing, half], 128)
    rows = found.tables[0].rows
    assert ("smg", "not installed: make peers") in [row[:2] for row in rows]
    assert ("vllm-router", "failed in round 3: it closed the connection") in [r[:2] for r in rows]
    assert len({len(row) for row in rows} | {len(found.tables[0].columns)}) == 1
    assert found.keys["peers"] == {}
    assert found.targets == ()


def test_short_answers_have_a_key_of_their_own() -> None:
    found = finding([outcome("baton", 100.0, tokens=16), outcome("smg", 80.0, tokens=16)], 16)
    cells = found.keys["peers_16"]
    assert isinstance(cells, list)
    assert len(cells) == 2 * len(CLIENTS)
    assert "peers" not in found.keys
    assert found.targets[0].held, "0.8 of the best gateway's, 0.75 is asked for"
