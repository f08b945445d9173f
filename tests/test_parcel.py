"""What goes with a job that is submitted, and what must be there: a folder that holds it renders what the job's own folder would."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures_given import encoded, picture

import renderfarm
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.parcel import JOB_FILE, Parcel, pack

Write = Callable[..., Path]
ROOM = 1 << 20


def unpacked(parcel: Parcel, folder: Path) -> Path:
    """The job file, in a folder that has nothing but what was sent."""
    folder.mkdir()
    (folder / JOB_FILE).write_text(parcel.text)
    for name, path in parcel.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return folder / JOB_FILE


def test_a_job_with_its_manifest_and_lists_of_words_goes_on_elsewhere(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    here = tmp_path / "here"
    write_manifest({"prompt": ["a __shades/warm__ circle", "{a|b} {c|d}"]}, "here/prompts.parquet")
    (here / "lists/shades").mkdir(parents=True)
    (here / "lists/shades/warm.txt").write_text("red\norange\npink\n")
    prompts = {"templates": "combinatorial", "wildcards": "lists"}
    job = load_job(write_job(Path("prompts.parquet"), "here/job.yaml", prompts=prompts))
    begun = renderfarm.run(job, engine="inline")
    assert (begun.images, begun.errors) == (7, 0)

    parcel = pack(job, ROOM)
    assert sorted(parcel.files) == ["manifest/0/prompts.parquet", "wildcards/shades/warm.txt"]
    assert parcel.there == {"output.path": str(tmp_path / "out")}
    sent = unpacked(parcel, tmp_path / "there")
    here.rename(tmp_path / "gone")
    again = renderfarm.run(load_job(sent), engine="inline")
    assert (again.new_images, again.images) == (0, 7), "the same output, by the same names"
    other = renderfarm.run(load_job(sent, out=str(tmp_path / "other")), engine="inline")
    assert (other.new_images, other.errors) == (7, 0)


@pytest.mark.parametrize("named", ["folder", "pattern", "list"])
def test_manifests_keep_their_order_and_their_names(named: str, write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    for folder, prompt in (("a", "first"), ("b", "second")):
        write_manifest({"prompt": [f"{prompt} {k}" for k in range(2)]}, f"m/{folder}/rows.parquet")
    path = {"folder": str(tmp_path / "m"), "pattern": str(tmp_path / "m/*/rows.parquet")}.get(named)
    job = load_job(write_job({"path": path or [str(tmp_path / f"m/{k}/rows.parquet") for k in "ba"]}))
    sent = load_job(unpacked(pack(job, ROOM), tmp_path / "there"), out=str(tmp_path / "sent"))
    renderfarm.run(job, engine="inline")
    assert renderfarm.run(sent, engine="inline").images == 4
    prompts = [[record["prompt"] for _, record in renderfarm.open(out)] for out in (tmp_path / "out", tmp_path / "sent")]
    assert prompts[0] == prompts[1]
    assert renderfarm.run(sent.model_copy(update={"output": job.output}), engine="inline").new_images == 0


def test_text_is_sent_as_it_is_and_what_is_too_large_or_elsewhere_is_named(write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,seed\na circle,1\n")
    job = load_job(write_job(tmp_path / "rows.csv"))
    assert list(pack(job, ROOM).files) == ["manifest/0/rows.csv"]
    for parcel in (pack(job, 10), pack(load_job(write_job(Path("/nowhere/rows.csv"))), ROOM)):
        assert parcel.files == {}
        assert parcel.job["manifest"]["path"] == parcel.there["manifest.path"]
        assert any("manifest.path: " in note and "must be under this path on every node, or in a store" in note for note in parcel.notes())
    stores = load_job(write_job({"path": "s3://bucket/rows.csv"}, output={"path": "s3://bucket/out"}))
    assert (pack(stores, ROOM).there, pack(stores, ROOM).notes()) == ({}, [])


def test_a_jobs_own_rows_are_sent_sign_by_sign(write_job: Write, tmp_path: Path) -> None:
    texts = ["a\x85b", "a\u2028b", "\ufeffa", "a\r\nb", "\t'a\" : {x} #", "😀\x7f", "- a\n\n  b\n"]
    job = load_job(write_job({"rows": [{"prompt": text} for text in texts]}))
    sent = load_job(unpacked(pack(job, ROOM), tmp_path / "there"))
    assert sent.manifest.rows == job.manifest.rows
    assert sent.key == job.key


def test_pictures_stay_where_they_are_and_their_folder_is_named(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(1)))
    pictures = write_manifest({"prompt": ["x"], "image": ["a.png"]}, "pictures.parquet")
    parcel = pack(load_job(write_job(pictures)), ROOM)
    assert parcel.job["inputs"]["folder"] == parcel.there["inputs.folder"] == str(tmp_path)
    assert "inputs.folder" not in pack(load_job(write_job(write_manifest())), ROOM).there, "no row of it names a picture"
    assert "inputs.folder" not in pack(load_job(write_job({"path": str(pictures), "columns": {"image": None}})), ROOM).there
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "image": "a.png"}\n')
    assert pack(load_job(write_job(tmp_path / "rows.jsonl")), ROOM).there["inputs.folder"] == str(tmp_path)
    rows: dict[str, Any] = {"rows": ["x", {"prompt": "y", "mask_image": "a.png"}]}
    assert pack(load_job(write_job(rows)), ROOM).there["inputs.folder"] == str(tmp_path)
    assert "inputs.folder" not in pack(load_job(write_job({"rows": ["x"]})), ROOM).there


def test_networks_go_along_and_models_adapters_and_keys_do_not(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    for name in ("x4.safetensors", "detail.safetensors", "chain.pem", "key.pem"):
        (tmp_path / name).write_bytes(b"some bytes")
    job = load_job(
        write_job(
            write_manifest(),
            model={"id": "./model", "adapters": {"detail": "./detail.safetensors"}},
            after=[{"upscale": {"weights": "./x4.safetensors"}}],
            output={"c2pa": {"certificate": "./chain.pem", "private_key": "./key.pem"}},
        )
    )
    parcel = pack(job, ROOM)
    assert parcel.files["after/0/x4.safetensors"] == tmp_path / "x4.safetensors"
    places = {"model.id", "model.adapters.detail", "output.c2pa.certificate", "output.c2pa.private_key", "output.path"}
    assert parcel.there.keys() == places
    assert load_job(unpacked(parcel, tmp_path / "there")).after[0].upscale.weights == str(tmp_path / "there/after/0/x4.safetensors")  # type: ignore[union-attr]


def test_the_environments_variables_are_named_and_nothing_of_them_is_sent(
    write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "canary5d1f")
    notify = {"url": "${HOOK}", "headers": {"Authorization": "Bearer ${HOOK_TOKEN}"}}
    job = load_job(write_job({"path": "${BUCKET}/rows.parquet"}, output={"path": "s3://${BUCKET}/out"}, notify=notify))
    parcel = pack(job, ROOM)
    assert parcel.variables == ("BUCKET", "HOOK", "HOOK_TOKEN")
    assert parcel.notes()[-1].endswith("must be set there: BUCKET, HOOK, HOOK_TOKEN")
    assert "canary" not in parcel.text


def test_a_hook_that_is_written_out_is_refused_and_a_list_that_lies_elsewhere_stays_there(
    write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    hook = load_job(write_job(write_manifest(), notify={"url": "https://hooks.example.org/T0/canary5d1f"}))
    with pytest.raises(InvalidJob, match=r"notify\.url is written out.* put it into an environment variable there") as caught:
        pack(hook, ROOM)
    assert "canary" not in str(caught.value)
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards/colours.txt").write_text("red\n")
    (tmp_path / "elsewhere.txt").write_text("canary5d1f\n")
    (tmp_path / "wildcards/out.txt").symlink_to(tmp_path / "elsewhere.txt")
    parcel = pack(load_job(write_job(write_manifest(), prompts={"templates": "combinatorial"})), ROOM)
    assert [name for name in parcel.files if name.startswith("wildcards/")] == ["wildcards/colours.txt"]


def test_lists_of_words_that_are_too_many_are_refused(write_manifest: Write, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards/long.txt").write_text("word\n" * 100)
    job = load_job(write_job(write_manifest(), prompts={"templates": "combinatorial"}))
    with pytest.raises(InvalidJob, match="holds more than can be sent with a job; leave only the lists that it needs"):
        pack(job, 400)
