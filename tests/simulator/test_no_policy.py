"""The simulator decides nothing itself: who is chosen is said in the router's policies alone."""

import ast
from pathlib import Path

SIMULATOR = Path(__file__).parents[2] / "simulator"
DECIDING = {
    "choose",
    "placed",
    "decide",
    "decide_decode",
    "pair_rooms",
    "pick_answer",
    "plan_step",
    "share_step",
    "judge_local",
    "choose_moves",
    "judge_fetch",
    "fetch_patience_s",
    "weigh",
}


def test_nothing_in_the_simulator_defines_a_decision_of_the_production_code() -> None:
    files = sorted(SIMULATOR.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.name not in DECIDING, f"{file.name}: {node.name}"
