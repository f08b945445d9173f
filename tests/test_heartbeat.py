"""progress.json where two runs share an output: whoever ends, the file speaks of the one that lives."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from own_time import own_time

from renderfarm import commit, control, heartbeat
from renderfarm.heartbeat import STALE_S, Heartbeat, is_alive, run_key
from renderfarm.storage import Store, open_store


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def beating(store: Store) -> Callable[..., Heartbeat]:
    """A run's heart that has beaten."""

    def begin(run_id: str, age_s: float = 0.0) -> Heartbeat:
        heart = Heartbeat(store.url, lambda _: "run")
        beat(heart, run_id, age_s)
        return heart

    return begin


def said(run_id: str, state: str = "RUNNING", age_s: float = 0.0) -> dict[str, Any]:
    return {"run_id": run_id, "state": state, "updated": time.time() - age_s}


def beat(heart: Heartbeat, run_id: str, age_s: float = 0.0) -> None:
    assert heart.beat(said(run_id, age_s=age_s)) is None
    heart.put.result()


def end(heart: Heartbeat, run_id: str, state: str = "SUCCEEDED") -> None:
    heart.close(said(run_id, state), {"state": state})


def test_a_run_that_is_alone_says_how_it_ended(store: Store, beating: Callable[..., Heartbeat]) -> None:
    end(beating("a"), "a", "FAILED")
    assert commit.read_progress(store)["state"] == "FAILED"
    assert commit.read_json(store, run_key("a")) == {"state": "FAILED"}


@pytest.mark.parametrize("last", ["a", "b"])
def test_whoever_ends_first_leaves_the_file_to_the_other(last: str, store: Store, beating: Callable[..., Heartbeat]) -> None:
    hearts = {"a": beating("a"), "b": beating("b")}
    beat(hearts["a"], "a")  # each has seen the other now
    beat(hearts["b"], "b")
    beat(hearts["a"], "a")  # and that it goes on
    beat(hearts["b"], "b")
    beat(hearts[last], last)
    end(hearts["a"], "a")
    assert commit.read_progress(store)["run_id"] == "b"
    assert is_alive(commit.read_progress(store))
    assert control.ask(store, "pause").run_id == "b"
    assert commit.read_json(store, run_key("a"))["state"] == "SUCCEEDED"
    end(hearts["b"], "b", "PARTIAL")
    assert (commit.read_progress(store)["run_id"], commit.read_progress(store)["state"]) == ("b", "PARTIAL")


def test_a_run_that_has_ended_or_is_dead_hides_nobodys_end(store: Store, beating: Callable[..., Heartbeat]) -> None:
    dead = beating("dead", age_s=STALE_S + 1)
    one = beating("a")
    end(one, "a")
    assert commit.read_progress(store)["run_id"] == "a"
    one, other = beating("b"), beating("c")
    beat(one, "b")
    store.put(run_key("c"), b"{}")  # it is about to say so here
    end(one, "b")
    assert commit.read_progress(store)["run_id"] == "b"
    for heart in (dead, other):
        heart.thread.shutdown()


def test_the_end_of_a_run_that_came_right_after_a_death_is_seen(
    store: Store, beating: Callable[..., Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "QUIET_S", 0.2)
    monkeypatch.setattr(heartbeat, "LOOK_S", 0.01)
    killed = beating("killed")  # it seems to be alive for a minute
    one = beating("a")
    end(one, "a")
    assert (commit.read_progress(store)["run_id"], commit.read_progress(store)["state"]) == ("a", "SUCCEEDED")
    killed.thread.shutdown()


def test_who_ends_at_once_waits_to_see_whether_the_other_one_lives(
    store: Store, beating: Callable[..., Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "QUIET_S", 60.0)
    other, one = beating("b"), beating("a")

    def sleep(seconds: float) -> None:
        other.store.put(commit.PROGRESS, commit.to_json(said("b")))

    own_time(monkeypatch, "renderfarm.heartbeat", sleep=sleep)
    end(one, "a")
    assert commit.read_progress(store)["run_id"] == "b"
    other.thread.shutdown()
