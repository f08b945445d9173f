"""Who works on what: workers, the leases they hold, late ones that are worth a copy, workers that hang, nodes that kill.

Values only: the time is given, and nobody is started, asked or killed here. `driver` does what this says.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from renderfarm.records import Lease, Part, WorkerReady

LATE = 2.0
"""A worker that is silent for so many times the usual is slow: its last lease gets a copy, once another has nothing else to do."""
LATE_S = 5.0  # at least: a copy costs a part's rendering
REMEMBERED = 64  # answers that say what is usual
HUNG = 20.0
"""A worker that is silent for so many times the longest silence so far hangs."""
HUNG_S = 600.0  # at least
HUNG_AT_FIRST_S = 7200.0  # while nobody knows how long a lease takes
NODE_LOSSES = 3
"""Workers lost on a node, with no lease finished there in between, before it gets no more of them."""
DEVICE_LOSSES = 2
"""Contexts that broke on a device, with no lease finished there in between, before it gets no more work."""

Place = tuple[str, tuple[str, ...]]
"""A node and the devices of it that a worker has."""


@dataclass
class Held:
    lease: Lease
    since: float


@dataclass
class Member:
    """A worker that is ready. `heard`: when it last finished anything."""

    node: str
    batch_size: int
    heard: float
    held: list[Held] = field(default_factory=list)
    at: frozenset[int] = frozenset()
    """The rows that it was at when somebody last asked."""
    leaving: bool = False
    """Its node goes away: it finishes what it holds, and gets nothing more."""
    devices: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        return self.node, self.devices


class Pool:
    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.starting: set[str] = set()
        self.benched: set[str] = set()
        """Nodes that get no more workers."""
        self.benched_devices: set[Place] = set()
        self._copied: set[tuple[Part, ...]] = set()
        self._losses = Counter[str]()  # by node
        self._broken = Counter[Place]()
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._longest = 0.0

    def __len__(self) -> int:
        return len(self.members) + len(self.starting)

    # ---------------------------------------------------------------------------------------------- workers

    def join(self, name: str, info: WorkerReady, now: float) -> None:
        self.starting.discard(name)
        self.members[name] = Member(info.node, info.batch_size, now, devices=info.accelerators)

    def remove(self, name: str) -> list[Lease]:
        """The leases that it held; others may hold copies of them."""
        return [held.lease for held in self.members.pop(name).held]

    def lost_on(self, node: str) -> bool:
        """Count a worker lost on a node; whether that benches it. The last node that works is never benched: what dies
        everywhere dies of its rows, and those are found one by one."""
        self._losses[node] += 1
        others = {member.node for member in self.members.values()} - {node}
        if self._losses[node] < NODE_LOSSES or node in self.benched or not others:
            return False
        self.benched.add(node)
        return True

    def broke_on(self, node: str, devices: tuple[str, ...]) -> bool:
        """Count a context that broke on a worker's devices, if it has any; whether that benches them. As with nodes, the last ones that
        work never are."""
        place = node, devices
        self._broken[place] += 1
        others = {member.place for member in self.members.values()} - {place}
        if not devices or self._broken[place] < DEVICE_LOSSES or place in self.benched_devices or not others:
            return False
        self.benched_devices.add(place)
        return True

    def is_benched(self, info: WorkerReady) -> bool:
        return info.node in self.benched or self.is_on_benched_device(info)

    def is_on_benched_device(self, info: WorkerReady) -> bool:
        return (info.node, info.accelerators) in self.benched_devices

    def pardon(self) -> None:
        """Where nobody is left, the only one who can work may be among those that were benched."""
        self.benched.clear()
        self.benched_devices.clear()

    def empty_handed(self) -> list[str]:
        """Workers on nodes that go away, with nothing left to finish."""
        return [name for name, member in self.members.items() if member.leaving and not member.held]

    def hung(self, now: float, deadline_s: float | None) -> list[str]:
        """Workers that hold leases and have finished none for too long. `deadline_s` None: judged by the other leases."""
        if deadline_s is None:
            deadline_s = max(HUNG_S, HUNG * self._longest) if self._longest else HUNG_AT_FIRST_S
        return [name for name, member in self.members.items() if member.held and now - _last_sign(member) > deadline_s]

    def excuse(self, now: float) -> None:
        """Who waits for a store that is away does not hang."""
        for member in self.members.values():
            member.heard = now

    def is_further(self, name: str, at: frozenset[int], now: float) -> bool:
        """Whether a worker that seems to hang goes on row by row: it is at other rows than when this was last asked."""
        member = self.members[name]
        if at == member.at:
            return False
        member.at, member.heard = at, now
        return True

    # ----------------------------------------------------------------------------------------------- leases

    def take(self, name: str, lease: Lease, now: float) -> None:
        self.members[name].held.append(Held(lease, now))

    def give_back(self, name: str, lease: Lease, now: float) -> float | None:
        """A worker answers for a lease: seconds since its last sign of life, None where it was not known to hold it."""
        member = self.members.get(name)
        if member is None or all(held.lease is not lease for held in member.held):
            return None
        silent = now - _last_sign(member)
        member.held = [held for held in member.held if held.lease is not lease]
        member.heard = now
        return silent

    def rendered(self, name: str, silent: float) -> None:
        """A lease was finished, so many seconds after its worker's last sign of life: the others waited behind it."""
        self._seconds.append(silent)
        self._longest = max(self._longest, silent)
        member = self.members[name]
        self._losses[member.node] = self._broken[member.place] = 0

    def in_flight(self) -> list[Lease]:
        return [held.lease for member in self.members.values() for held in member.held]

    def holders(self, lease: Lease) -> list[str]:
        return [name for name, member in self.members.items() if any(held.lease.parts == lease.parts for held in member.held)]

    def next_to_fill(self, share: int) -> str | None:
        """The worker that holds least, and less than its share."""
        open_ = [
            name for name, member in self.members.items() if not member.leaving and len(member.held) < share and not _is_suspect(member)
        ]
        return min(open_, key=lambda name: len(self.members[name].held), default=None)

    def late(self, now: float, is_done: Callable[[Lease], bool]) -> tuple[str, Lease] | None:
        """An idle worker, and the oldest lease that is worth a copy: of a slow worker, with nobody else, and blamed for nothing."""
        idle = [name for name, member in self.members.items() if not member.held and not member.leaving]
        if not idle or not self._seconds:
            return None
        limit = max(LATE_S, LATE * median(self._seconds))
        slow = [member for member in self.members.values() if member.held and now - _last_sign(member) > limit]
        out = [held for member in slow for held in member.held if not held.lease.losses and not is_done(held.lease)]
        alone = [held for held in out if held.lease.parts not in self._copied]  # one copy: it may be the lease that is slow
        if not alone:
            return None
        lease = min(alone, key=lambda held: held.since).lease
        self._copied.add(lease.parts)
        return idle[0], lease


def _is_suspect(member: Member) -> bool:
    """A suspect runs alone, so that it takes no mates with it."""
    return any(held.lease.losses for held in member.held)


def _last_sign(member: Member) -> float:
    """Leases wait within a worker, so that only silence tells, never one lease's age."""
    return max(member.heard, min(held.since for held in member.held))
