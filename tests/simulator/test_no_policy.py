"""The simulator decides nothing itself: each choice is a call of the production function.

A rule that was copied shows in three ways: by a production rule's name, by a setting that is
compared here and not passed on, and by the production function that no run calls any more.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from inspect import getmembers, isfunction
from pathlib import Path
from types import CodeType, FrameType, ModuleType

from pydantic import BaseModel

import router.admission
import router.freeness
import router.local
import router.outliers
from core.step import StepBudget
from decode_worker import headroom
from decode_worker import policy as decode_policy
from decode_worker.config import DecodeConfig
from engine import planner
from kv_transfer.config import TransferConfig
from kv_transfer.leases import LeaseTable
from prefill_worker import policy as prefill_policy
from prefill_worker.config import PrefillConfig
from router.chooser import Chooser
from router.config import RouterConfig
from router.policies.base import Slo
from router.rebalancer import Rebalancer
from simulator.cluster import Cluster
from simulator.spec import PoolRole, SimSpec
from tests.simulator.clusters import WORKER, ask, pool, split

SIMULATOR = Path(__file__).parents[2] / "simulator"
RULES = (router.admission, router.freeness, router.local, headroom, decode_policy, prefill_policy)
"""Modules of pure rules."""
METHODS = {"choose", "placed", "choose_moves", "weigh", "consider", "place_locally", "for_decode"}
ORDER_OF_HOPS = {
    ("cluster.py", "worker_silence_s"),  # when routers hear of a death, which is no choice
    ("router.py", "max_forwards"),
    ("router.py", "request_timeout_s"),  # a moment told to prefill_worker/sources.py
    ("migration.py", "migration_stop_s"),  # a moment, told to decode_worker/migration.py
}
"""Settings that are used here all the same."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    files = sorted(SIMULATOR.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        yield file.name, ast.parse(file.read_text("utf-8"))


def rules_of(module: ModuleType) -> set[str]:
    found = getmembers(module, isfunction)
    return {name for name, rule in found if rule.__module__ == module.__name__ and name[0] != "_"}


def test_nothing_in_the_simulator_has_the_name_of_a_production_rule() -> None:
    names = METHODS.union(*map(rules_of, RULES))
    assert {"judge", "is_full", "refuse_prompt", "judge_local"} <= names
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.name not in names, f"{file}: {node.name}"


def thresholds(*configs: type[BaseModel]) -> set[str]:
    fields = [item for config in configs for item in config.model_fields.items()]
    return {name for name, field in fields if field.annotation in (int, float)}


def used_settings(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Those that are more than handed to a call. Their sections are named as in the spec."""
    handed = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            handed |= {*node.args, *(keyword.value for keyword in node.keywords)}
        if isinstance(node, ast.Attribute) and node.attr in names and node not in handed:
            owner = ast.unparse(node.value)
            if owner.endswith(("router", "transfer", "config", "spec", "Config()")):
                yield node.attr


def test_settings_of_production_rules_are_passed_on_and_not_compared() -> None:
    names = thresholds(RouterConfig, PrefillConfig, DecodeConfig, TransferConfig)
    assert {"admission_max_tokens", "max_forwards", "max_sequences"} <= names
    used = {(file, name) for file, tree in trees() for name in used_settings(tree, names)}
    assert used == ORDER_OF_HOPS


def test_a_copied_rule_is_noticed_by_the_setting_it_compares() -> None:
    copied = "full = tokens > config.admission_max_tokens"
    assert list(used_settings(ast.parse(copied), {"admission_max_tokens"}))
    passed = "bounds = QueueBounds(prompt_tokens=config.admission_max_tokens)"
    assert not list(used_settings(ast.parse(passed), {"admission_max_tokens"}))


DECISIONS: Sequence[Callable[..., object]] = (
    router.admission.judge,
    router.admission.decide_decode,
    router.admission.is_full,
    router.freeness.pair_rooms,
    router.local.judge_local,
    router.local.judge_stay,
    router.outliers.Outliers.failed,
    Chooser.consider,
    Chooser.place,
    Chooser.place_locally,
    Chooser.for_decode,
    Chooser.has_prefill,
    Rebalancer.look,
    prefill_policy.refuse_prompt,
    prefill_policy.judge_fetch,
    decode_policy.refuse_sequence,
    decode_policy.pull_headroom_blocks,
    headroom.limit_headroom_blocks,
    headroom.predicted_headroom_blocks,
    planner.share_step,
    planner.plan_step,
    StepBudget.saw,
    LeaseTable.close,
)


def busy(spec: SimSpec) -> None:
    """Prompts with and without a past, more than all workers can take in."""
    turns = [ask(0.02 * i, 160 + 16 * (i % 9), 20 + i % 50, family=i % 5) for i in range(300)]
    Cluster(spec).run(turns)


def specs() -> Iterator[SimSpec]:
    admitting = RouterConfig(admission_max_requests=5)
    live = replace(split(3, 3), router=admitting, slo=Slo(ttft_s=0.5, tpot_s=0.05))
    yield live
    anywhere = RouterConfig(admission="off", local_prefill=False, prefill_policy="round_robin")
    yield replace(split(2, 1), router=anywhere, transfer=TransferConfig())
    full = replace(split(3, 1), max_queued_tokens=200, report_s=0.2)
    yield replace(full, router=RouterConfig(admission="off", request_timeout_s=1.0))
    for kind in ("limit", "peak"):
        tight = replace(WORKER, kv_blocks=60, max_batch=4, headroom=kind)
        pools = (pool(PoolRole.PREFILL, 2), pool(PoolRole.DECODE, 2, tight))
        yield replace(live, pools=pools, moves_answers=True, max_tokens=100)


def test_every_decision_of_a_run_is_a_call_of_the_production_function() -> None:
    called = set[CodeType]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        for spec in specs():
            busy(spec)
    finally:
        sys.setprofile(before)
    missing = [rule.__qualname__ for rule in DECISIONS if rule.__code__ not in called]
    assert not missing
