"""What a store does wrong, between a real client and a real server: busy, away, mute, deaf, expired, elsewhere, full."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from servers import FaultProxy, lose_reply, s3_error

from renderfarm.errors import AlreadyExists, Expired, Fatal, InvalidJob, Transient
from renderfarm.storage import CloudStore, clients, cloud, open_store, probe

Forward = Callable[[], Awaitable[web.Response]]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(cloud, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def store(s3: str, faults: FaultProxy) -> CloudStore:
    made = open_store(f"{s3}/out")
    made.exists("x")  # it has answered once
    faults.seen.clear()
    return made


def times(number: int, reply: Callable[[web.Request], web.Response], of: Callable[[web.Request], bool] = lambda request: True):
    """A fault that happens `number` times."""
    left = [number]

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        if left[0] and of(request):
            left[0] -= 1
            return reply(request)
        return await forward()

    return fault


@pytest.mark.parametrize(
    "reply",
    [
        lambda request: s3_error(503, "SlowDown"),
        lambda request: s3_error(500, "InternalError"),
        lambda request: s3_error(409, "ConditionalRequestConflict"),
        lambda request: s3_error(400, "RequestTimeout"),
        lambda request: web.Response(status=502, text="<html>bad gateway</html>"),
        lambda request: web.Response(status=429),
        lose_reply,
    ],
    ids=["503", "500", "409", "request timeout", "502 of a proxy", "429", "reset"],
)
def test_what_may_pass_is_tried_again_until_it_has_passed(store: CloudStore, faults: FaultProxy, reply) -> None:
    for begin in (
        lambda: store.put("a/k", b"1"),
        lambda: store.put_if_absent("a/new", b"2"),
        lambda: store.read("a/k"),
        lambda: store.exists("a/k"),
        lambda: store.list("a"),
        lambda: store.names(),
        lambda: store.open("a/k").read(),
    ):
        faults.fault = times(3, reply)
        faults.seen.clear()
        begin()
        assert len(faults.seen) >= 4, "three that failed and one that did not"
    faults.fault = None
    assert store.list("a") == ["a/k", "a/new"]


def test_a_client_does_not_try_again_by_itself(s3: str, faults: FaultProxy) -> None:
    hasty = open_store(f"{s3}/out", patience_s=0)
    faults.fault = times(1, lambda request: s3_error(503, "SlowDown"))
    with pytest.raises(Transient, match=r"cannot write a/k in s3://\w+/out: .*said by the test"):
        hasty.put("a/k", b"1")
    assert len(faults.seen) == 1


def test_a_store_that_never_answers_is_not_waited_for_as_long_as_one_that_did(
    s3: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch, store: CloudStore
) -> None:
    monkeypatch.setattr(cloud, "FIRST_ANSWER_S", 0.3)
    faults.fault = times(10**6, lambda request: s3_error(503, "SlowDown"))
    began = time.monotonic()
    with pytest.raises(Transient):
        open_store(f"{s3}/out").read("a/k")
    assert time.monotonic() - began < 60, "the patience for a store that did answer is two minutes and more"
    threading.Timer(1.0, lambda: setattr(faults, "fault", None)).start()
    with pytest.raises(KeyError):
        store.read("a/k")


def test_a_create_whose_reply_is_lost_is_there_once_with_our_bytes(store: CloudStore, faults: FaultProxy) -> None:
    async def fault(request: web.Request, forward: Forward) -> web.Response:
        await forward()
        faults.fault = None
        return lose_reply(request)

    faults.fault = fault
    with pytest.raises(AlreadyExists):  # our own: whoever creates reads back
        store.put_if_absent("a/k", b"ours")
    assert store.read("a/k") == b"ours"


def test_the_probe_is_not_deceived_by_a_lost_reply(store: CloudStore, faults: FaultProxy) -> None:
    lost = [True]

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        reply = await forward()
        return lose_reply(request) if request.method == "PUT" and lost and lost.pop() else reply

    faults.fault = fault
    probe(store)
    assert store.list("") == []


def test_a_server_that_does_not_answer_in_time_is_asked_again(s3: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clients._S3["config_kwargs"], "read_timeout", 0.5)

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        faults.fault = None
        await asyncio.sleep(120)
        return await forward()

    faults.fault = fault
    store = open_store(f"{s3}/out")
    began = time.monotonic()
    store.put("a/k", b"1")
    assert time.monotonic() - began < 100
    assert store.read("a/k") == b"1"


def test_a_multipart_create_whose_last_reply_is_lost_is_there_once(
    store: CloudStore, faults: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client then tries to abort what is complete, and hears that there is no such upload."""
    monkeypatch.setattr(cloud, "PIECE_BYTES", 50 << 20)
    (tmp_path / "big").write_bytes(bytes(101 << 20))
    lost = [True]

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        reply = await forward()
        ends = request.method == "POST" and "uploadId" in request.query
        return lose_reply(request) if ends and lost and lost.pop() else reply

    faults.fault = fault
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a/big", tmp_path / "big")
    assert lost == []
    assert store.read_range("a/big", (101 << 20) - 1, 101 << 20) == b"\0"


def test_a_part_of_usual_size_is_one_request_and_a_larger_object_one_for_each_piece(
    store: CloudStore, faults: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "PIECE_BYTES", 6 << 20)
    for size, requests in ((0, 1), ((12 << 20) - 1, 1), (12 << 20, 4), (13 << 20, 5)):
        data = random.Random(size).randbytes(size)
        (tmp_path / "big").write_bytes(data)
        for given in (data, tmp_path / "big"):
            store.delete("a/big")
            faults.seen.clear()
            store.put_if_absent("a/big", given)
            assert len(faults.seen) == requests, faults.seen
            assert store.read("a/big") == data
            with pytest.raises(AlreadyExists):
                store.put_if_absent("a/big", given)


def test_a_folder_that_somebody_made_in_the_console_is_empty(s3: str) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket=s3.removeprefix("s3://"), Key="out/")
    boto3.client("s3").put_object(Bucket=s3.removeprefix("s3://"), Key="out/errors/")
    store = open_store(f"{s3}/out")
    assert store.names() == ["errors"]
    assert store.list("") == []
    boto3.client("s3").delete_object(Bucket=s3.removeprefix("s3://"), Key="out/errors/")
    assert store.names() == []


# ---------------------------------------------------------------------------------------------- credentials


def test_expired_credentials_are_waited_for_and_read_anew(
    s3: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server refuses the first key from some moment on; somebody writes another into the profile file."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    profile = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))

    def write(key: str) -> None:
        profile.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")

    write("FIRSTKEY")
    store = open_store(f"{s3}/out")
    store.put("a/k", b"1")
    store_that_has_answered = open_store(f"{s3}/out", patience_s=0.5)
    store_that_has_answered.read("a/k")

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        if "FIRSTKEY" in request.headers["Authorization"]:
            return (
                web.Response(status=400) if request.method == "HEAD" else s3_error(400, "ExpiredToken", "The provided token has expired.")
            )
        return await forward()

    faults.fault = fault
    for brief in (store_that_has_answered, open_store(f"{s3}/out", patience_s=0.5)):
        with pytest.raises(Expired):
            brief.read("a/k")  # who is to go on soon does not wait for people
    hasty = open_store(f"{s3}/out", patience_s=0)
    with pytest.raises(Expired, match=r"the credentials have expired .*; renew them"):
        hasty.read("a/k")
    threading.Timer(1.0, write, ["SECONDKEY"]).start()
    assert store.exists("a/k")  # a HEAD, whose answers say no reason
    assert store.read("a/k") == b"1"
    assert hasty.read("a/k") == b"1", "it makes a new client, too"
    said = [text for record in caplog.records if "3600 s" in (text := record.getMessage())]
    assert len(said) == 1
    assert "expired" in said[0]
    assert "trying again for 3600 s" in said[0]


def test_a_bucket_that_is_named_for_what_expires_is_denied_at_once(store: CloudStore, faults: FaultProxy) -> None:
    text = "User: arn:aws:iam::1:user/me is not authorized on resource arn:aws:s3:::scratch-expires-30d"
    faults.fault = times(10**6, lambda request: s3_error(403, "AccessDenied", text))
    with pytest.raises(Fatal, match="refused with the credentials"):
        store.put("a/k", b"1")
    faults.fault = times(10**6, lambda request: s3_error(403, "AccessDenied", "Request has expired"))
    with pytest.raises(Expired):
        open_store(store.url, patience_s=0).put("a/k", b"1")


def test_there_is_no_waiting_for_credentials_that_a_job_begins_without(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InvalidJob, match="there are no credentials in this environment"):
        probe(open_store(f"{s3}/out"))


def test_azure_without_an_account_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_STORAGE")]:
        monkeypatch.delenv(name)
    with pytest.raises(InvalidJob, match=r"^az://c/out cannot be opened .*account_name.*; set the store's usual variables or profile$"):
        probe(open_store("az://c/out"))


# ---------------------------------------------------------------------------------------------- what no time mends


def moved(request: web.Request) -> web.Response:
    reply = s3_error(301, "PermanentRedirect")
    reply.headers["x-amz-bucket-region"] = "eu-west-1"  # without it, botocore asks for ever
    return reply


@pytest.mark.parametrize(
    ("reply", "error", "says"),
    [
        (lambda request: s3_error(403, "AccessDenied"), Fatal, "refused with the credentials of this environment"),
        (lambda request: s3_error(403, "InvalidAccessKeyId"), Fatal, "refused with the credentials"),
        (lambda request: s3_error(404, "NoSuchBucket"), InvalidJob, "no such bucket or container"),
        (moved, InvalidJob, "another region .*AWS_DEFAULT_REGION"),
        (lambda request: s3_error(400, "AuthorizationHeaderMalformed"), InvalidJob, "another region"),
        (lambda request: s3_error(403, "RequestTimeTooSkewed"), Fatal, "clock is wrong"),
        (lambda request: s3_error(507, "XMinioStorageFull"), Fatal, "the store is full .*nothing committed is lost"),
        (lambda request: s3_error(501, "NotImplemented"), Fatal, "does not know this request"),
    ],
    ids=["denied", "unknown key", "no bucket", "moved", "region", "clock", "full", "unknown request"],
)
def test_what_no_time_mends_is_said_at_once(store: CloudStore, faults: FaultProxy, reply, error: type[Exception], says: str) -> None:
    faults.fault = times(10**6, reply)
    began = time.monotonic()
    with pytest.raises(error, match=says):
        store.put_if_absent("a/k", b"1")
    with pytest.raises(error, match=says):
        store.read("a/k")
    assert time.monotonic() - began < 100


def test_a_bucket_that_does_not_exist_is_named_by_every_way_to_it(s3: str) -> None:
    store = open_store(f"{s3}none/out")
    for begin in (lambda: store.put("a", b""), lambda: store.put_if_absent("a", b""), lambda: probe(store)):
        with pytest.raises(InvalidJob, match="no such bucket or container"):
            begin()


@pytest.mark.parametrize("url", ["s3://bucket/a/../b", "s3://bucket//a", "s3://", "s3://bucket/a?versionId=1", "s3://bucket/#a"])
def test_a_url_that_is_not_plain_is_refused(url: str) -> None:
    with pytest.raises(InvalidJob):
        open_store(url)


def test_messages_hold_no_signature(store: CloudStore, faults: FaultProxy) -> None:
    faults.fault = times(10**6, lambda request: s3_error(403, "AccessDenied", "no: https://host/key?X-Amz-Signature=canary"))
    with pytest.raises(Fatal, match="https://host/key") as caught:
        store.read("a")
    assert "canary" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- stores without create-if-absent


async def _ignore_condition(request: web.Request, forward: Forward) -> web.Response:
    headers = request.headers.copy()
    headers.pop("If-None-Match", None)
    request._cache["headers"] = request._headers = headers  # type: ignore[attr-defined]
    return await forward()


def test_a_store_that_overwrites_is_refused_unless_the_job_says_that_nobody_else_writes(s3: str, faults: FaultProxy) -> None:
    faults.fault = _ignore_condition
    with pytest.raises(Fatal, match=r"does not honour create-if-absent.*output.single_writer: true"):
        probe(open_store(f"{s3}/out"))
    alone = open_store(f"{s3}/out", single_writer=True)
    alone.put_if_absent("a/k", b"1")
    with pytest.raises(AlreadyExists):
        alone.put_if_absent("a/k", b"2")
    assert alone.read("a/k") == b"1"


def test_a_conflict_that_names_no_condition_is_a_conflict(store: CloudStore, faults: FaultProxy) -> None:
    """As radosgw answers."""
    faults.fault = times(1, lambda request: s3_error(412, "PreconditionFailed"))
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a/k", b"1")


def test_a_store_travels_to_another_process(store: CloudStore) -> None:
    store.put("a/k", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a/k") == b"1"  # noqa: S301


def test_a_reader_goes_on_where_the_connection_broke(store: CloudStore, faults: FaultProxy) -> None:
    data = random.Random(0).randbytes(5 << 20)
    store.put("a/k", data)
    with store.open("a/k") as file:
        first = file.read(100)
        faults.fault = times(2, lose_reply)
        assert first + file.read() == data
        assert file.seek(-10, io.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]


# ---------------------------------------------------------------------------------------------- uploads


@pytest.mark.chaos
def test_a_writer_that_is_killed_in_mid_upload_leaves_nothing_that_a_reader_sees(s3: str, faults: FaultProxy, tmp_path: Path) -> None:
    """120 MB go up in parts; the process dies behind the first of them."""
    uploaded = threading.Event()

    async def fault(request: web.Request, forward: Forward) -> web.Response:
        reply = await forward()
        if "partNumber" in request.query:
            uploaded.set()
            await asyncio.sleep(60)
        return reply

    faults.fault = fault
    big = tmp_path / "big"
    big.write_bytes(bytes(120 << 20))
    program = """if True:
        import sys; from pathlib import Path; from renderfarm.storage import cloud, open_store
        cloud.PIECE_BYTES = 50 << 20
        open_store(sys.argv[1]).put_if_absent("data/k", Path(sys.argv[2]))"""
    process = subprocess.Popen([sys.executable, "-c", program, f"{s3}/out", str(big)], env=os.environ)
    try:
        assert uploaded.wait(60)
    finally:
        process.kill()
        process.wait(60)
    faults.fault = None
    store = open_store(f"{s3}/out")
    assert store.list("") == []
    assert not store.exists("data/k")
    store.put_if_absent("data/k", b"another's")
    (left,) = store.unfinished()
    assert left.key.startswith("data/k?uploadId=")
    assert list(open_store(f"{s3}/other").unfinished()) == []
    store.discard(left)
    store.discard(left)
    assert list(store.unfinished()) == []
    assert store.read("data/k") == b"another's"
    assert re.match("POST .*uploads", next(seen for seen in faults.seen if "uploads" in seen))
