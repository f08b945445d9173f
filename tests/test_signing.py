"""Signed files: valid for C2PA's own reader, signed after everything else is in them, and no key where it does not belong."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import c2pa
import certificates
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from test_encode import ALL, picture, seen_elsewhere

import renderfarm
from renderfarm.config import C2pa, Output
from renderfarm.encode import FORMATS, encode
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.marks import PAINTED, PAINTED_INTO, read
from renderfarm.preparation import prepare
from renderfarm.signing import signature, signer
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> C2pa:
    chain, key = certificates.make(tmp_path_factory.mktemp("certificates"))
    return C2pa(certificate=str(chain), private_key=str(key))


@pytest.mark.parametrize("format_", FORMATS)
def test_c2pas_own_reader_finds_a_signed_file_valid_and_its_pixels_and_marks_whole(format_: str, given: C2pa) -> None:
    pixels = picture()
    plain, signed = encode(pixels, format_, marks=ALL), encode(pixels, format_, marks=ALL, sign=signer(given))
    reader = c2pa.Reader(FORMATS[format_].mime, io.BytesIO(signed.data))
    assert reader.get_validation_state() == "Valid"
    manifest = reader.get_active_manifest()
    assert manifest is not None
    (actions,) = [one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
    assert [(action["action"], action["digitalSourceType"]) for action in actions] == [("c2pa.created", PAINTED)]
    assert "thumbnail" not in manifest
    assert len(signed.data) - len(plain.data) < 8192, "no picture in the signature"
    assert (seen_elsewhere(signed.data) == seen_elsewhere(plain.data)).all()
    found = read(signed.data)
    assert found["c2pa"] == {"state": "Valid", "signed_by": "Test signer", "issuer": "renderfarm's tests"}
    assert {**found, "c2pa": None} == read(plain.data)
    assert signed.pixel_sha256 == plain.pixel_sha256


@pytest.mark.parametrize("format_", ["png", "jpeg"])
def test_a_byte_that_was_changed_after_signing_is_seen(format_: str, given: C2pa) -> None:
    data = bytearray(encode(picture(), format_, marks=ALL, sign=signer(given)).data)
    place = data.index(b"trainedAlgorithmicMedia")  # in what the file says of itself, before the signature or behind it
    data[place] ^= 1
    assert (signature(bytes(data), FORMATS[format_].mime) or {})["state"] == "Invalid"


def test_a_signature_says_what_kind_of_picture_it_is(given: C2pa) -> None:
    data = encode(picture(), marks=dataclasses.replace(ALL, source_type=PAINTED_INTO), sign=signer(given)).data
    assert PAINTED_INTO in json.dumps(c2pa.Reader("image/png", io.BytesIO(data)).get_active_manifest())


def test_threads_share_a_signer(given: C2pa) -> None:
    sign = signer(given)
    with ThreadPoolExecutor(2) as threads:
        files = list(threads.map(lambda _: encode(picture(), marks=ALL, sign=sign).data, range(16)))
    assert {(signature(data, "image/png") or {})["state"] for data in files} == {"Valid"}
    assert len(set(files)) == 16, "each signature is another one"


def test_a_job_signs_every_file_and_verifies(given: C2pa, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    output = {"c2pa": given.model_dump(), "metadata": {"parameters": False}}
    manifest = write_manifest()
    summary = renderfarm.run(write_job(manifest, output=output), engine="inline")
    assert (summary.images, summary.errors) == (8, 0)
    for path in (tmp_path / "out").glob("data/*/*.png"):
        assert (signature(path.read_bytes(), "image/png") or {})["state"] == "Valid"
    rows = [row for table in (tmp_path / "out").glob("data/*/*.parquet") for row in pq.read_table(table).to_pylist()]
    assert all(row["file_sha256"][:8] in row["file_name"] for row in rows), "another attempt's signature gets another name"
    assert verify(str(tmp_path / "out"), Choice(all=True)).ok
    again = write_job(manifest, output={**output, "path": str(tmp_path / "again")})
    assert renderfarm.run(again, engine="inline").images == 8
    others = [row for table in (tmp_path / "again").glob("data/*/*.parquet") for row in pq.read_table(table).to_pylist()]
    key = {(row["row"], row["pixel_sha256"]) for row in rows}
    assert key == {(row["row"], row["pixel_sha256"]) for row in others}
    assert not {row["file_sha256"] for row in rows} & {row["file_sha256"] for row in others}
    with pytest.raises(InvalidJob, match="signed: true there, null now"):
        renderfarm.run(write_job(manifest, output={"metadata": {"parameters": False}}), engine="inline")
    frozen = (tmp_path / "out/_renderfarm/job.json").read_text()
    assert "chain.pem" not in frozen
    assert "key.pem" not in frozen


def test_what_cannot_sign_stops_the_job_with_the_reason_and_without_the_key(
    given: C2pa, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    secret = Path(given.private_key).read_text()
    (tmp_path / "other").mkdir()
    other = certificates.make(tmp_path / "other")[1]
    (tmp_path / "nonsense.pem").write_text("nonsense")
    cases = [
        ({"private_key": str(tmp_path / "nonsense.pem")}, "cannot sign"),
        ({"certificate": str(tmp_path / "nonsense.pem")}, "cannot sign"),
        ({"private_key": str(other)}, "cannot sign"),
        ({"algorithm": "ps256"}, "cannot sign"),
        ({"private_key": str(tmp_path / "gone.pem")}, "private_key: .*gone.pem cannot be read: No such file"),
    ]
    for changed, message in cases:
        job = write_job(write_manifest(), output={"c2pa": given.model_dump() | changed})
        with pytest.raises(Fatal, match=message) as error:
            signer(load_job(job).output.c2pa)
        assert not any(line in str(error.value) for line in secret.splitlines()[1:-1])
    with pytest.raises(Fatal, match=message):
        renderfarm.run(job, engine="inline")
    assert not (tmp_path / "out/data").exists()


def test_a_variable_that_holds_the_key_itself_is_refused_and_not_repeated(
    given: C2pa, write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = Path(given.private_key).read_text()
    monkeypatch.setenv("SIGNING_KEY", secret)
    job = write_job(write_manifest(), output={"c2pa": given.model_dump() | {"private_key": "${SIGNING_KEY}"}})
    with pytest.raises(InvalidJob, match=r"output.c2pa.private_key: the environment variable holds no path") as error:
        renderfarm.run(job, engine="inline")
    assert not any(line in str(error.value) for line in secret.splitlines())
    assert not (tmp_path / "out").exists()


def test_a_key_in_a_job_is_refused_and_not_repeated(write_manifest: Write, write_job: Write) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEA\n-----END PRIVATE KEY-----\n"
    with pytest.raises(ValidationError):
        Output(path="out", c2pa=C2pa(certificate="chain.pem", private_key=key))
    with pytest.raises(InvalidJob, match="give the path of a PEM file") as error:
        load_job(write_job(write_manifest(), output={"c2pa": {"certificate": "chain.pem", "private_key": key}}))
    assert "MIGH" not in str(error.value)


def test_paths_start_at_the_job_file_and_variables_are_expanded_late(
    given: C2pa, write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(write_job(write_manifest(), output={"c2pa": {"certificate": "chain.pem", "private_key": "${RENDERFARM_TEST_KEY}"}}))
    assert job.output.c2pa == C2pa(certificate=str(tmp_path / "chain.pem"), private_key="${RENDERFARM_TEST_KEY}")
    with pytest.raises(InvalidJob, match="RENDERFARM_TEST_KEY"):
        prepare(job)
    monkeypatch.setenv("RENDERFARM_TEST_KEY", given.private_key)
    assert prepare(job).job.output.c2pa == C2pa(certificate=str(tmp_path / "chain.pem"), private_key=given.private_key)


def test_without_its_package_a_job_is_refused_and_a_signed_file_is_still_recognised(
    given: C2pa, write_manifest: Write, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(picture(), sign=signer(given)).data
    job = load_job(write_job(write_manifest(), output={"c2pa": given.model_dump()}))
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(InvalidJob, match=r"c2pa-python: pip install 'renderfarm\[c2pa\]'"):
        prepare(job)
    assert signature(data, "image/png") == {"state": "not checked (needs renderfarm[c2pa])"}
    assert signature(encode(picture()).data, "image/png") is None
