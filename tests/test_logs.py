"""What a run says of itself while it goes on: bounded, without secrets and prompts, and there after a crash."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_time import own_time
from typer.testing import CliRunner

import renderfarm
from renderfarm import commit
from renderfarm.cli import app
from renderfarm.errors import InvalidJob, RenderfarmError, Transient
from renderfarm.heartbeat import Heartbeat
from renderfarm.journal import EVERY_S, LOGS, MAX_BYTES, MAX_MESSAGE, Journal, log_key, redacted
from renderfarm.logs import Choice, line_of, read_logs
from renderfarm.shown import without_secrets
from renderfarm.storage import Store, open_store

Write = Callable[..., Path]
JOB = {"manifest": {"where": None, "files": [{"rows": 24}]}, "output": {"part_rows": 3, "layout": "files"}, "model": {}, "render": {}}


def lines(data: bytes | None) -> list[dict[str, Any]]:
    assert data is not None
    return [json.loads(line) for line in data.splitlines()]


# ------------------------------------------------------------------------------------------------ what is written


def test_an_object_stays_below_its_bound_and_says_how_much_is_gone() -> None:
    journal = Journal()
    for k in range(6000):
        journal.say("leased", routine=True, worker="w0", part=f"part-{k:08d}", rows=[k, k + 1])
        journal.say("lost", worker=f"w{k}", reason="x" * 400)
    data = journal.due(anyway=True)
    gone, *events = lines(data)
    assert len(data or b"") <= MAX_BYTES
    assert gone["left_out"] == 12_000 - len(events) > 0
    numbers = [event["n"] for event in events]
    assert numbers == sorted(numbers)
    lost = [event["n"] for event in events if event["event"] == "lost"]
    assert (lost[0], lost[-1], numbers[-1]) == (2, 12_000, 12_000), "of what went wrong the first and the last, of leases the last"
    assert [event["n"] for event in events if event["event"] == "leased"][-1] == 11_999


def test_what_went_wrong_is_put_at_once_and_leases_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    own_time(monkeypatch, "renderfarm.journal", monotonic=lambda: clock[0])
    journal = Journal()
    assert journal.due() is None, "nothing was said"
    journal.say("began")
    assert journal.due() is not None
    assert journal.due() is None
    journal.say("leased", routine=True)
    assert journal.due() is None
    assert journal.due(anyway=True) is not None
    journal.say("leased", routine=True)
    clock[0] += EVERY_S
    assert journal.due() is not None
    journal.say("lost", reason="x")
    assert journal.due() is not None


def test_a_store_that_was_away_gets_what_it_has_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, journal = open_store(f"memory://{uuid.uuid4().hex}"), Journal()
    heart = Heartbeat(store.url, lambda _: "run", journal)
    snapshot = {"run_id": "r1", "state": "RUNNING", "updated": time.time()}
    put = heart.store.put
    away = [True]

    def sometimes(key: str, data: bytes | Path) -> None:
        if away[0] and key.startswith(LOGS):
            raise Transient("away")
        put(key, data)

    monkeypatch.setattr(heart.store, "put", sometimes)
    journal.say("began")
    heart.beat(snapshot)
    heart.put.exception(timeout=60)
    away[0] = False
    assert heart.beat(snapshot) == "away"
    heart.put.result(timeout=60)
    assert [event.get("event") for event in lines(store.read(log_key("r1")))] == [None, "began"]
    heart.close(snapshot | {"state": "SUCCEEDED"})


def test_secrets_and_users_of_urls_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary5d1f/+x")
    monkeypatch.setenv("MY_KEY", "1")
    text = "cannot read\ns3://u:canary5d1f@h/k and https://h/a?X-Sig=canary5d1f&b=1 with canary5d1f/+x; was it 1? yes"
    assert redacted(text) == "cannot read s3://…@h/k and https://h/a?… with ${AWS_SECRET_ACCESS_KEY}; was it 1? yes"
    assert len(redacted("x" * 10_000)) == MAX_MESSAGE
    monkeypatch.setenv("SIGNING_KEY", "-----BEGIN-----\ncanary5d1f\n-----END-----")
    assert redacted(f"no key: {os.environ['SIGNING_KEY']}, at line 3") == "no key: ${SIGNING_KEY}, at line 3"


def test_innocent_words_stay_and_of_two_secrets_the_longer_one_goes_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYCLOAK_REALM", "portrait")
    monkeypatch.setenv("CERTIFICATE_KEY", str(tmp_path))
    monkeypatch.setenv("A_KEY", "canary5d")
    monkeypatch.setenv("B_TOKEN", "canary5d1f+rest")
    words = f"a portrait in {tmp_path}/x.png: why?a=b, abfs://container@account/x"
    assert without_secrets(words) == words
    assert without_secrets("with url: /a/b?sig=canary1&x=2 (and canary5d1f+rest)") == "with url: /a/b?… (and ${B_TOKEN})"
    long = "a/?" * 40_000 + "="  # at once, whatever it is
    assert without_secrets(long).endswith("?…")


def test_a_message_that_is_no_unicode_is_kept_as_json_escapes_it() -> None:
    journal = Journal()
    journal.say("lost", reason="cannot read \udcff.png")
    assert lines(journal.due())[1]["reason"] == "cannot read \udcff.png"


# ------------------------------------------------------------------------------------------------ a run's own


def test_a_run_says_which_worker_had_which_rows_and_which_failed(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    manifest = write_manifest({"prompt": ["a secret wish", "", "b", "c", "[error] d"], "id": [f"id-{k}" for k in range(5)]})
    first = renderfarm.run(write_job(manifest), engine="inline")
    out = str(tmp_path / "out")
    events = list(read_logs(out))
    assert {event["run"] for event in events} == {first.run_id}
    names = [event["event"] for event in events]
    assert (names[0], names[-1]) == ("began", "ended")
    assert (events[0]["key"], events[-1]["state"], events[-1]["exit_code"]) == (first.key, "PARTIAL", 3)
    assert names.index("ready") < names.index("leased") < names.index("committed")
    committed = {event["part"]: event for event in events if event["event"] == "committed"}
    assert committed["part-00000000"]["rows"] == [0, 3]
    assert committed["part-00000000"]["failed"] == [{"row": 1, "image_index": 0, "row_id": "id-1", "error_class": "InvalidInput"}]
    assert "secret wish" not in open_store(out).read(log_key(first.run_id)).decode()

    second = renderfarm.run(write_job(manifest), engine="inline")
    assert {event["run"] for event in read_logs(out)} == {first.run_id, second.run_id}
    assert {event["run"] for event in read_logs(out, Choice(run=second.run_id))} == {second.run_id}
    assert {event["part"] for event in read_logs(out, Choice(rows="4"))} == {"part-00000001"}
    about = [event for event in read_logs(out, Choice(rows="0,4", worker="w0")) if event["event"] == "committed"]
    assert {event["part"][-1]: [one["row"] for one in event.get("failed", [])] for event in about} == {"0": [], "1": [4]}
    assert list(read_logs(out, Choice(worker="w9"))) == []

    shown = CliRunner().invoke(app, ["logs", out, "--rows", "4"], catch_exceptions=False).stdout
    assert re.search(
        rf"^\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ {first.run_id} w0 committed part-00000001 rows 3-4: images 1, errors 1, bytes \d+; "
        r"row 4 \(id-4\) image 0: RenderFailed$",
        shown,
        re.MULTILINE,
    ), shown
    as_json = CliRunner().invoke(app, ["logs", out, "--rows", "4", "--json"], catch_exceptions=False).stdout
    assert [json.loads(line)["event"] for line in as_json.splitlines()] == ["leased", "committed"]


def test_a_run_that_an_error_ends_says_so(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    with pytest.raises(RenderfarmError, match="images of this run failed"):
        renderfarm.run(write_job(write_manifest({"prompt": ["", "x"]}), failure={"stop_after": 1}), engine="inline")
    *_, last = read_logs(str(tmp_path / "out"))
    assert (last["event"], last["state"]) == ("ended", "FAILED")
    assert last["reason"].startswith("Fatal: 1 images of this run failed")


@pytest.mark.chaos
def test_what_a_killed_run_has_said_is_there(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "renderfarm", "run", str(write_job(write_manifest())), "--engine", "inline"]
    process = subprocess.Popen(command, env={**os.environ, "RENDERFARM_FAKE_STEP_S": "30"}, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if (found := [*out.glob(f"{LOGS}/*.jsonl")]) and b'"ready"' in found[0].read_bytes():
                break
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    names = [event["event"] for event in read_logs(str(out))]
    assert names[0] == "began"
    assert "ready" in names
    assert "ended" not in names


# ------------------------------------------------------------------------------------------------ reading


@pytest.fixture
def store() -> Store:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put(commit.JOB, commit.to_json(JOB))
    return store


@pytest.mark.parametrize("shared", [False, True])
def test_a_log_is_followed_until_no_run_is_at_work(shared: bool, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, steps = Journal(), 0

    def heart(state: str) -> None:
        store.put(log_key("r1"), journal.due(anyway=True) or b"")
        store.put(commit.PROGRESS, commit.to_json({"run_id": "r1", "state": state, "updated": time.time()}))

    def sleep(seconds: float) -> None:
        nonlocal steps
        steps += 1
        journal.say("leased" if steps < 3 else "ended")
        heart("RUNNING" if steps < 3 else "SUCCEEDED")
        if steps == 1 and shared:  # progress is written in turns
            store.put(commit.PROGRESS, commit.to_json({"run_id": "r1+abc", "state": "RUNNING", "updated": time.time()}))

    def read(self: Store, key: str) -> bytes:
        asked.append(key)
        return read_it(self, key)

    asked, read_it = list[str](), type(store).read
    store.put(log_key("r0"), b'{"n": 1, "at": 0, "event": "ended"}')
    journal.say("began")
    heart("RUNNING")
    own_time(monkeypatch, "renderfarm.waiting", sleep=sleep)
    monkeypatch.setattr(type(store), "read", read)
    chosen = Choice(run="r1") if shared else Choice()
    found = [(event["run"], event["event"]) for event in read_logs(store.url, chosen, follow=True)]
    assert found == [*([] if shared else [("r0", "ended")]), *(("r1", what) for what in ("began", "leased", "leased", "ended"))]
    assert (steps, asked.count(log_key("r0")), asked.count(log_key("r1"))) == (3, 0 if shared else 1, 4), "old ones are read once"


def test_damaged_lines_and_other_files_say_nothing_and_dropped_ones_are_counted(store: Store) -> None:
    good = '{"n": 8, "at": 0, "event": "leased", "worker": "w0", "part": "part-00000000", "rows": [0, 3]}'
    store.put(log_key("r1"), f'{{"n": 0, "left_out": 7}}\n[]\n{{"n"\n{good}\n{{"event": "x"}}\n{{"n": 9}}\n'.encode() + b"\xff\n")
    store.put(f"{LOGS}/readme.txt", b"mine")
    assert list(map(line_of, read_logs(store.url))) == [
        "r1: 7 lines were left out",
        "1970-01-01T00:00:00Z r1 w0 leased part-00000000 rows 0-2",
    ]


def test_ids_that_hold_what_a_terminal_obeys_are_shown_without_it(store: Store) -> None:
    failed = [{"row": 0, "image_index": 0, "row_id": "\x1b[31mid\nr2 w9 lost", "error_class": "InvalidInput"}]
    event = {"n": 1, "at": 0, "event": "committed", "part": "part-00000000", "rows": [0, 3], "errors": 1, "failed": failed}
    store.put(log_key("r1"), json.dumps(event).encode())
    (line,) = CliRunner().invoke(app, ["logs", store.url], catch_exceptions=False).stdout.splitlines()
    assert line.endswith("row 0 (\ufffd[31mid r2 w9 lost) image 0: InvalidInput")


def test_a_run_that_there_is_not_and_rows_that_are_none_are_refused(store: Store) -> None:
    store.put(log_key("r1"), b"")
    with pytest.raises(InvalidJob, match=r"--run r7: .* has no log of such a run; the last ones: r1"):
        list(read_logs(store.url, Choice(run="r7")))
    with pytest.raises(InvalidJob, match="'7-' is not a range"):
        list(read_logs(store.url, Choice(rows="7-")))
    result = CliRunner().invoke(app, ["logs", store.url], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, "")
