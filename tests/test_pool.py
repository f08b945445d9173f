"""Who gets work, who hangs, what is copied, which node or device is benched: values in, values out."""

from __future__ import annotations

import pyarrow as pa
import pytest

from renderfarm.pool import DEVICE_LOSSES, HUNG_AT_FIRST_S, HUNG_S, LATE_S, NODE_LOSSES, Pool
from renderfarm.records import Lease, Part, WorkerReady


def lease(number: int, **about: object) -> Lease:
    return Lease(number=number, parts=(Part(number, number, number + 1),), rows=pa.table({}), **about)  # type: ignore[arg-type]


def pool_of(*workers: str, now: float = 0.0) -> Pool:
    """`a@n0`: worker a on node n0."""
    pool = Pool()
    for worker in workers:
        name, _, node = worker.partition("@")
        pool.starting.add(name)
        pool.join(name, WorkerReady(name, "", "cpu", 0.0, 8, node or "n0"), now)
    return pool


def ready(name: str, node: str, *devices: str) -> WorkerReady:
    return WorkerReady(name, "", "cuda", 0.0, 8, node, devices)


def finish(pool: Pool, worker: str, one: Lease, now: float) -> None:
    silent = pool.give_back(worker, one, now)
    assert silent is not None
    pool.rendered(worker, silent)


def test_the_worker_that_holds_least_is_filled_until_all_have_their_share() -> None:
    pool = pool_of("a", "b")
    given = []
    while (worker := pool.next_to_fill(2)) is not None:
        given.append(worker)
        pool.take(worker, lease(len(given)), 0.0)
    assert given == ["a", "b", "a", "b"]
    assert len(pool.in_flight()) == 4


def test_a_worker_whose_node_goes_away_gets_nothing_more_and_is_let_go_when_it_has_finished() -> None:
    pool, one = pool_of("a", "b"), lease(1)
    pool.take("a", one, 0.0)
    pool.members["a"].leaving = True
    assert pool.next_to_fill(3) == "b"
    assert pool.empty_handed() == []
    finish(pool, "a", one, 5.0)
    assert pool.empty_handed() == ["a"]


def test_an_answer_of_somebody_who_does_not_hold_the_lease_counts_for_nothing() -> None:
    pool, one = pool_of("a"), lease(1)
    assert pool.give_back("a", one, 1.0) is None
    assert pool.give_back("gone", one, 1.0) is None
    pool.take("a", one, 1.0)
    assert pool.give_back("a", lease(1), 2.0) is None, "an equal one is another one"
    assert pool.give_back("a", one, 4.0) == 3.0


def test_silence_is_what_hangs_and_leases_that_wait_behind_others_do_not() -> None:
    pool, leases = pool_of("a"), [lease(k) for k in range(3)]
    for one in leases:
        pool.take("a", one, 0.0)
    for k, one in enumerate(leases[:2]):
        assert pool.hung(10.0 * k + 9, 10) == []
        finish(pool, "a", one, 10.0 * k + 9)
    assert pool.hung(28.0, 10) == []
    assert pool.hung(30.0, 10) == ["a"]
    finish(pool, "a", leases[2], 30.0)
    assert pool.hung(1e9, 10) == [], "who holds nothing may be silent"


def test_without_a_deadline_the_longest_silence_so_far_decides() -> None:
    pool, one, other = pool_of("a"), lease(1), lease(2)
    pool.take("a", one, 0.0)
    assert pool.hung(HUNG_AT_FIRST_S - 1, None) == []
    assert pool.hung(HUNG_AT_FIRST_S + 1, None) == ["a"]
    finish(pool, "a", one, 100.0)
    pool.take("a", other, 100.0)
    assert pool.hung(100 + 1999, None) == [], "twenty times 100 s"
    assert pool.hung(100 + 2001, None) == ["a"]
    assert HUNG_S < 2000


def test_row_by_row_each_row_has_the_deadline() -> None:
    pool = pool_of("a")
    pool.take("a", lease(1, losses=2, announce_as="x"), 0.0)
    assert pool.hung(11.0, 10) == ["a"]
    assert pool.is_further("a", frozenset({4}), 11.0)
    assert pool.hung(20.0, 10) == []
    assert pool.hung(22.0, 10) == ["a"]
    assert not pool.is_further("a", frozenset({4}), 22.0), "it is where it was"
    assert pool.is_further("a", frozenset({5}), 22.0)


def test_a_slow_workers_oldest_lease_gets_one_copy_when_somebody_is_idle() -> None:
    pool, leases = pool_of("a", "b"), [lease(k) for k in range(4)]
    for one in leases[:3]:
        pool.take("a", one, 0.0)
    pool.take("b", leases[3], 0.0)
    nobody = lambda _: False  # noqa: E731
    assert pool.late(1e6, nobody) is None, "nobody is idle, and nothing says what is usual"
    finish(pool, "b", leases[3], 10.0)
    assert pool.late(19.0, nobody) is None
    assert pool.late(21.0, nobody) == ("b", leases[0])
    pool.take("b", leases[0], 21.0)
    assert pool.holders(leases[0]) == ["a", "b"]
    finish(pool, "b", leases[0], 30.0)
    assert pool.late(60.0, lambda one: one is leases[0]) == ("b", leases[1]), "the next one, and never the same again"


def test_neither_suspects_nor_what_is_quick_is_copied() -> None:
    pool, quick, suspect = pool_of("a", "b"), lease(1), lease(2, losses=1)
    pool.take("b", quick, 0.0)
    finish(pool, "b", quick, 0.1)
    pool.take("a", suspect, 0.0)
    assert pool.late(1e6, lambda _: False) is None
    assert pool.remove("a") == [suspect]
    pool.join("a", WorkerReady("a", "", "cpu", 0.0, 8, "n0"), 1e6)
    pool.take("a", quick, 1e6)
    assert pool.late(1e6 + LATE_S / 2, lambda _: False) is None


def test_a_node_that_loses_workers_again_and_again_is_benched_unless_it_is_the_last() -> None:
    pool = pool_of("a@n1")
    assert [pool.lost_on("n0") for _ in range(NODE_LOSSES)] == [False, False, True]
    assert pool.benched == {"n0"}
    assert [pool.lost_on("n1") for _ in range(9)] == [False] * 9, "no other node works"


def test_a_lease_that_is_finished_there_clears_a_node() -> None:
    pool, one = pool_of("a@n0", "b@n1"), lease(1)
    assert not pool.lost_on("n0")
    assert not pool.lost_on("n0")
    pool.take("a", one, 0.0)
    finish(pool, "a", one, 1.0)
    assert not pool.lost_on("n0")


def test_a_device_whose_context_breaks_twice_is_benched_unless_it_is_the_last() -> None:
    pool, bad, good = pool_of("a@n0"), ("1",), ready("b", "n0", "0")
    assert not pool.broke_on("n0", ()), "who computes on the CPU has no device to lose"
    assert [pool.broke_on("n0", bad) for _ in range(DEVICE_LOSSES)] == [False, True]
    assert pool.is_benched(ready("c", "n0", "1"))
    assert not any(pool.is_benched(other) for other in (good, ready("c", "n1", "1"), ready("c", "n0"))), "its number on another node"
    alone = Pool()
    alone.join("b", good, 0.0)
    assert [alone.broke_on("n0", ("0",)) for _ in range(9)] == [False] * 9, "no other device works"
    pool.pardon()
    assert not pool.is_benched(ready("c", "n0", "1"))


def test_a_lease_that_is_finished_there_clears_a_device() -> None:
    pool, one = pool_of("b@n1"), lease(1)
    pool.join("a", ready("a", "n0", "1"), 0.0)
    assert not pool.broke_on("n0", ("1",))
    pool.take("a", one, 0.0)
    finish(pool, "a", one, 1.0)
    assert not pool.broke_on("n0", ("1",))
    assert pool.broke_on("n0", ("1",))


@pytest.mark.parametrize("name", ["a", "b"])
def test_who_is_gone_leaves_its_leases(name: str) -> None:
    pool, one = pool_of("a", "b"), lease(1)
    pool.take("a", one, 0.0)
    pool.take("b", one, 0.0)
    assert pool.remove(name) == [one]
    assert len(pool.holders(one)) == 1


def test_a_suspect_keeps_its_worker_to_itself_and_no_other_waits_for_it() -> None:
    pool = pool_of("a", "b")
    pool.take("a", lease(1, losses=1), 0.0)
    pool.take("b", lease(2), 0.0)
    assert pool.next_to_fill(3) == "b"
