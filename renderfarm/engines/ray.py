"""The engine on Ray core: one threaded actor per worker. Only this module, `ray_metrics` and `submit` import ray.

Actors and calls are never retried by Ray (`max_restarts=0`, `max_task_retries=0`): a lost call is not a lost part, so
the driver decides. An actor that was asked for waits within Ray until a node has room for it: so the pool grows when nodes
join, and an autoscaler sees what is wanted. `ray.data` must not be imported (it registers Arrow types that run code from a
Parquet file).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.exceptions

from renderfarm.config import Job
from renderfarm.engines.base import Done, Event, Failed, Leaving, Ready
from renderfarm.engines.ray_metrics import RayMetrics
from renderfarm.errors import Fatal, Interrupted, NodeLost, RenderFailed, RenderfarmError, WorkerLost
from renderfarm.records import Lease, Receipt, WorkerReady
from renderfarm.worker import MOST_LEASES, Worker, WorkerSpec

DRAIN_POLL_S = 2.0
HEAD_AWAY_S = 45.0  # Ray itself ends this process without a word when it has not reached the head for 60 s
CONNECT_S = 2.0
REACH_S = 30.0  # of a cluster that is to be joined, which may lie behind a slow network
_ONE_AT_A_TIME = threading.Lock()  # joins Ray or leaves it: a process has one
NODE_DIED = "node has died"  # in Ray's words for an actor that went with its node


class _Actor:
    """A worker in an actor; `max_concurrency` threads call it, one per lease in flight."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.worker = Worker(spec)

    def ready(self) -> WorkerReady:
        here = ray.get_runtime_context()
        return replace(self.worker.ready(), node=here.get_node_id(), accelerators=tuple(here.get_accelerator_ids().get("GPU", ())))

    def render(self, lease: Lease) -> Receipt:
        return self.worker.render(lease)


class RayEngine:
    """`address` None starts a private Ray on this machine; else it joins that cluster."""

    def __init__(self, spec: WorkerSpec, address: str | None = None) -> None:
        self.spec, self.job = spec, spec.job
        self.max_workers = self.job.workers.max
        self._folder: str | None = None
        self._actors: dict[str, Any] = {}
        self._calls: dict[Any, tuple[str, Lease | None]] = {}
        self._nodes: dict[str, str] = {}  # of ready workers
        self._leaving: set[str] = set()  # nodes that the driver knows to go away
        self._asked = 0.0
        self._head_away: float | None = None
        """Since when a cluster's head has not answered."""
        self._own = False
        self._fixed = address is None
        """Whether the nodes are what they are; a cluster that was joined may get others."""
        try:
            with _ONE_AT_A_TIME:
                self._own = not ray.is_initialized()
                if self._own:
                    self._connect(address)
            self._options = self._options_of_a_worker()
            if self._fixed:
                self._check_room()
            self._metrics = RayMetrics(self.job.name, spec.usual.images_per_row)
        except BaseException:  # else the process's next run would take this Ray for its user's
            self._leave()
            raise

    def _options_of_a_worker(self) -> dict[str, float]:
        gpu = _uses_gpu(self.job)
        if gpu is None and self._fixed:
            raise Fatal("workers.device is cuda, but no node of this Ray has a GPU; use device: auto or cpu")
        if gpu is False:
            return {"num_gpus": 0, "num_cpus": self.job.workers.threads}
        return {"num_gpus": self.job.workers.devices_per_worker, "num_cpus": 1}

    def _connect(self, address: str | None) -> None:
        common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            if address is not None:
                _reach(address)
                with _signals_kept():
                    ray.init(address=address, **common)
                return
            self._folder = tempfile.mkdtemp(prefix="rf-")
            with _stops_are_ours(), _signals_kept():  # so what came meanwhile is heard by the right handler
                ray.init(
                    address="local",
                    _temp_dir=self._folder,
                    include_dashboard=False,
                    num_cpus=max(os.cpu_count() or 1, self.job.workers.max * self.job.workers.threads),
                    object_store_memory=256 << 20,  # rows of leases only; no image enters it
                    **common,
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise Fatal(f"cannot start or join Ray at {address or 'local'}: {error}; is the address right?") from error

    def _check_room(self) -> None:
        """A worker is on one node, so one of them must have room for it; what all have together does not help."""
        nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = {"GPU": self._options["num_gpus"], "CPU": self._options["num_cpus"]}
        if not any(all(node.get(key, 0) >= value for key, value in needs.items()) for node in nodes):
            best = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
            wanted, have = (", ".join(f"{place.get(key, 0):g} {key}" for key in needs) for place in (needs, best))
            raise Fatal(
                f"a worker needs {wanted} on one node, but no node of this Ray has them (the largest: {have}); "
                "lower workers.devices_per_worker or workers.threads, or add nodes"
            )

    def start_worker(self, name: str, avoid: frozenset[str] = frozenset()) -> None:
        actor_class: Any = ray.remote(_Actor)
        elsewhere = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}} if avoid else {}
        actor = actor_class.options(
            max_concurrency=MOST_LEASES,
            max_restarts=0,
            max_task_retries=0,
            enable_task_events=False,
            **self._options,
            **elsewhere,
        ).remote(replace(self.spec, name=name))
        self._actors[name] = actor
        self._calls[actor.ready.remote()] = (name, None)

    def submit(self, worker: str, lease: Lease) -> None:
        self._calls[self._actors[worker].render.remote(lease)] = (worker, lease)
        self._metrics.given(worker, lease)

    def stop_worker(self, worker: str) -> None:
        self._metrics.stopped(worker, [lease for name, lease in self._calls.values() if name == worker and lease is not None])
        self._kill(worker)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}

    def next_events(self, timeout_s: float) -> list[Event]:
        if leaving := self._newly_leaving():
            return leaving
        if not self._calls:
            time.sleep(timeout_s)
            return []
        done, waiting = ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if done and waiting:  # one look costs as much as there are calls, so all that is known is taken with it
            done += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        events = [self._event(ref) for ref in done]
        late = [event.worker for event in events if isinstance(event, Ready) and event.info.node in self._leaving]
        return [*events, *(Leaving(worker) for worker in late)]  # it was on its way when its node's end was said

    def _newly_leaving(self) -> list[Event]:
        """Workers whose nodes are being drained. Ray starts nothing new there, and kills them when the node's time is over."""
        if self._fixed or time.monotonic() < self._asked + DRAIN_POLL_S:
            return []
        self._asked = time.monotonic()
        if self._is_head_away():  # what is asked of it now would be waited for
            return []
        new = _draining() - self._leaving
        self._leaving |= new
        driver = [Leaving(None)] if ray.get_runtime_context().get_node_id() in new else []
        return [*driver, *(Leaving(worker) for worker, node in self._nodes.items() if node in new)]

    def _is_head_away(self) -> bool:
        """Raises Interrupted once it has been away for so long that it will not come back in time."""
        address = ray.get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            self._head_away = self._head_away or time.monotonic()
            if time.monotonic() - self._head_away > HEAD_AWAY_S:
                raise Interrupted(
                    f"the head of the Ray cluster ({address}) has not answered for {HEAD_AWAY_S:.0f} s ({error}), and Ray does not go on "
                    "without it; what is committed stays: run the same command again when there is a cluster"
                ) from None
            return True
        self._head_away = None
        return False

    def _event(self, ref: Any) -> Event:
        worker, lease = self._calls.pop(ref)
        try:
            answer = ray.get(ref)
        except (ray.exceptions.RayError, RenderfarmError) as error:
            ours = _ours(error)
            if lease is not None:
                self._metrics.failed(worker, lease, ours)
            if lease is None or isinstance(ours, WorkerLost):  # one that could not start would keep its device from the next
                self._kill(worker)
            return Failed(worker, lease, ours)
        if lease is not None:
            self._metrics.answered(worker, lease, answer)
            return Done(worker, lease, answer)
        self._nodes[worker] = answer.node
        self._metrics.ready(worker, answer)
        return Ready(worker, answer)

    def _kill(self, worker: str) -> None:
        """Make sure that a worker called lost is gone: Ray's "dead" may still be running."""
        actor = self._actors.pop(worker, None)
        self._nodes.pop(worker, None)
        self._metrics.gone(worker)
        if actor is not None:
            with contextlib.suppress(Exception):  # it is gone already, which is what was wanted
                ray.kill(actor)

    def shutdown(self) -> None:
        if self._head_away is not None:  # Ray would wait for it, now and when this process ends; workers end with their nodes
            atexit.unregister(ray.shutdown)
            return
        for worker in list(self._actors):
            self._kill(worker)
        self._metrics.close()
        self._leave()

    def _leave(self) -> None:
        if self._own:
            with _ONE_AT_A_TIME, _signals_kept() as hear_again:
                if self._folder is not None:
                    _end_at_once(hear_again)
                ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _draining() -> set[str]:
    """Ids of the nodes that are being drained. Ray offers them to its own libraries only (2.60); without them, a node's end is
    seen when it comes."""
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except Exception:  # a private name may go at any release, and the cluster's head may be away
        return set()


@contextlib.contextmanager
def _signals_kept() -> Iterator[Callable[[], None]]:
    """ray.init puts its own handlers in place, and ray.shutdown the system's: with either, a SIGTERM would end this process without
    finishing what it is at, be it ours or a server's that renders in one of its threads. Gives what puts the right ones back earlier.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()  # which alone may set Python's, and is here meanwhile
    python, system = ({number: look(number) for number in numbers} for look in (signal.getsignal, _system_handler))

    def hear_again() -> None:
        for number in numbers:
            if in_main and python[number] is not None:  # None is one that was set from C
                signal.signal(number, python[number])
            if signal.getsignal(number) is python[number]:  # else the main thread has set another one meanwhile
                _system_handler(number, system[number])

    try:
        with _ray_sets_none():
            yield hear_again
    finally:
        hear_again()


def _system_handler(number: int, wanted: Any = None) -> Any:
    """What lies under Python's handler of a signal (sigaction(2)), after setting it to `wanted` if given; None where nobody can say."""
    found = ctypes.create_string_buffer(256)  # struct sigaction has 152 bytes, or fewer
    try:
        ctypes.CDLL(None).sigaction(number, wanted, found)
    except (AttributeError, OSError, TypeError):
        return None
    return found


@contextlib.contextmanager
def _ray_sets_none() -> Iterator[None]:
    """A SIGTERM while Ray starts would be its handler's: sys.exit(15). Without this private name (2.60) it is so again."""
    place: Any = getattr(ray._private, "utils", None)
    if (setter := getattr(place, "set_sigterm_handler", None)) is None:
        yield
        return
    place.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        place.set_sigterm_handler = setter


def _reach(address: str) -> None:
    """Ray itself would try a wrong address for many minutes. Raises ConnectionError or OSError where nobody listens, ValueError for what
    is no host and port."""
    scheme, _, place = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ValueError("that is a dashboard's, for `renderfarm submit`; give HOST:6379, or ray://HOST:10001, or auto on a node")
    host, port = urlsplit(f"//{place}").hostname, urlsplit(f"//{place}").port
    if host is not None and port is not None:
        socket.create_connection((host, port), timeout=REACH_S).close()


@contextlib.contextmanager
def _stops_are_ours() -> Iterator[None]:
    """Processes that are started meanwhile, and theirs, never hear SIGTERM: they inherit this thread's mask.

    Service managers and `timeout` signal a whole group. A raylet that hears it drains its node, and its workers with
    what they are rendering are gone before the driver has let them finish. Ray itself ends with SIGKILL what does not listen.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_at_once(first: Callable[[], None]) -> None:
    """Make the next ray.shutdown call `first` once this process has left Ray, and then kill Ray's own processes: they would be asked to
    end by a signal that they do not hear here, and each would be waited for, a second long. Without these private names (2.60), or
    without /proc, that is how they end. What the raylet has started ends with it: it would look for a head that is gone, a minute long."""
    with contextlib.suppress(AttributeError, LookupError, OSError):
        node = ray._private.worker._global_node
        kill, (raylet,) = node.kill_all_processes, node.all_processes["raylet"]

        def at_once(**how: Any) -> None:
            first()
            left = _children(raylet.process.pid) if raylet.process.poll() is None else []
            kill(**{**how, "allow_graceful": not left and how.get("allow_graceful", False)})
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

        node.kill_all_processes = at_once


def _children(pid: int) -> list[int]:
    """Processes that this one has started, where /proc tells."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a thread that has ended meanwhile
            found += map(int, task.read_text(encoding="ascii").split())
    return found


def _uses_gpu(job: Job) -> bool | None:
    """Whether workers take a GPU; None: asked for, and there is none yet."""
    has = bool(ray.cluster_resources().get("GPU", 0))
    if job.workers.device == "cuda":
        return True if has else None
    return has and job.workers.device == "auto"


def _last_line(text: str) -> str:
    """The line that holds the reason, without colours: Ray puts the remote traceback before it."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    return next((line for line in reversed(lines) if line), "the worker died")


def _ours(error: Exception) -> RenderfarmError:
    """Ray's errors as ours, most specific first."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, RenderfarmError):
            return cause
        return RenderFailed(f"{type(cause).__name__}: {cause}")
    if isinstance(error, RenderfarmError):
        return error
    if isinstance(error, ray.exceptions.RayActorError) and (error.preempted or NODE_DIED in str(error)):
        return NodeLost(_last_line(str(error)))
    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError | ray.exceptions.OutOfMemoryError):
        return WorkerLost(_last_line(str(error)))
    return RenderFailed(f"{type(error).__name__}: {error}")
