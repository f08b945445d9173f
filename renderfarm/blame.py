"""What a worker's death says of the leases that it held: whose fault it may be, and how each is tried again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from renderfarm.errors import Fatal, NodeLost, WorkerLost
from renderfarm.records import Lease, Part

LOSSES_BEFORE_ANNOUNCING = 2
NODE_LOSSES_A_LEASE = 5  # nodes that go away under one lease before its rows may be to blame


class Blame:
    """Of one run. After two deaths a lease is rendered row by row, announced, so that the next death names the row."""

    def __init__(self, run_id: str, allowed: int) -> None:
        """`allowed`: deaths on one lease of which no row can be named (failure.attempts)."""
        self.run_id, self.allowed = run_id, allowed
        self.attempts = 0
        self._died_before: Counter[tuple[Part, ...]] = Counter()

    def remember(self, lease: Lease, error: WorkerLost) -> None:
        """One who had the lease has died, and a copy of it goes on: this counts if that one dies, too."""
        self._died_before[lease.parts] += not isinstance(error, NodeLost)

    def suspect(self, lease: Lease, error: WorkerLost, announced: frozenset[int]) -> Lease:
        """The lease as it is tried next. `announced`: the rows that the dead worker was at, where it said so. Raises Fatal where too many
        have died and no row can be named."""
        if isinstance(error, NodeLost) and lease.node_losses < NODE_LOSSES_A_LEASE:
            return self.anew(replace(lease, node_losses=lease.node_losses + 1))
        rows = {row for row in announced if any(part.start <= row < part.stop for part in lease.parts)}
        lease = replace(lease, killers=lease.killers | rows)
        losses = lease.losses + self._died_before.pop(lease.parts, 0) + 1
        if losses > self.allowed + len(lease.killers):
            rows_text = f"rows {lease.parts[0].start} to {lease.parts[-1].stop - 1}"
            raise Fatal(
                f"{losses} workers died on {rows_text} and no row could be named ({error}); "
                "look at the workers' memory and logs, then run again"
            )
        return self.anew(replace(lease, losses=losses))

    def anew(self, lease: Lease) -> Lease:
        """To be handed out once more. What an attempt announces must never be taken for what a later one did."""
        self.attempts += 1
        return replace(lease, announce_as=f"{self.run_id}.{self.attempts}" if lease.losses >= LOSSES_BEFORE_ANNOUNCING else None)
