from core.ids import BlockHash
from router.policies.hotness import HotnessTree
from tests.router.views import BLOCK, Workers

LEVEL = 512 // BLOCK


def prompt(*branches: int) -> list[BlockHash]:
    """One level per branch; equal beginnings have equal hashes."""
    hashes: list[BlockHash] = []
    for depth in range(len(branches)):
        path = bytes(branches[: depth + 1])
        hashes += [BlockHash((path + bytes([0, i])).ljust(16, b"\0")) for i in range(LEVEL)]
    return hashes


class Traffic:
    def __init__(self, workers: int = 8) -> None:
        self.workers = Workers()
        for i in range(workers):
            self.workers.add(f"w{i}")
        self.tree = HotnessTree()

    def saw(self, *branches: int, now_s: float = 0.0, times: int = 1) -> None:
        for _ in range(times):
            self.tree.saw(self.workers.prefill(hashes=prompt(*branches), now_s=now_s))

    def key_level(self, *branches: int) -> int:
        """How many levels the key of such a prompt covers."""
        hashes = prompt(*branches)
        key = self.tree.key(self.workers.prefill(hashes=hashes))
        assert key is not None
        return (hashes.index(key) + 1) // LEVEL


def test_a_key_is_two_levels_deep_at_first() -> None:
    assert Traffic().key_level(1, 2, 3, 4) == 2


def test_prompts_with_the_same_two_levels_have_one_key() -> None:
    traffic = Traffic()
    keys = {
        traffic.tree.key(traffic.workers.prefill(hashes=prompt(1, 2, last))) for last in range(5)
    }
    assert len(keys) == 1


def test_a_short_prompts_key_is_all_of_it() -> None:
    traffic, short = Traffic(), prompt(1)[:3]
    assert traffic.tree.key(traffic.workers.prefill(hashes=short)) == short[-1]
    assert traffic.tree.key(traffic.workers.prefill(hashes=())) is None


def test_a_hot_prefix_is_split_where_prompts_part() -> None:
    traffic = Traffic(workers=8)
    for i in range(100):
        traffic.saw(1, 2, i)  # all of the traffic shares two levels, 1 % each goes on
    assert traffic.key_level(1, 2, 50) == 3


def test_a_node_is_merged_only_well_below_where_it_was_split() -> None:
    traffic = Traffic(workers=8)
    traffic.saw(1, 2, 3, times=30)
    for i in range(90):
        traffic.saw(9, i, 0)
    assert traffic.key_level(1, 2, 3) == 3  # 30 of 120 passed: exactly 2/8, and split before
    for i in range(100):
        traffic.saw(8, i, 0)
    traffic.saw(1, 2, 3)
    assert traffic.key_level(1, 2, 3) == 3  # 31 of 221: above 1/8
    for i in range(50):
        traffic.saw(7, i, 0)
    traffic.saw(1, 2, 3)
    assert traffic.key_level(1, 2, 3) == 2  # 32 of 272: below


def test_what_is_older_than_the_window_counts_no_more() -> None:
    traffic = Traffic()
    traffic.saw(1, 2, 3, times=50)
    assert traffic.key_level(1, 2, 3) == 3
    for i in range(5):
        traffic.saw(9, i, now_s=31.0)
    assert traffic.key_level(1, 2, 3) == 2


def test_memory_is_bounded_whatever_the_rate() -> None:
    traffic = Traffic(workers=1)
    query = traffic.workers.prefill(hashes=prompt(1, 2))
    for _ in range(20_000):
        traffic.tree.saw(query)
    assert len(traffic.tree._window) <= 16_384
