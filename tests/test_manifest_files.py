"""Manifests as files: which are read and in what order, how a broken one is named, what tells a manifest from another."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opening import Write, opened, refusal, rows, table

from renderfarm.errors import Fatal, InvalidJob
from renderfarm.manifest import BATCH_ROWS, EXTRA, ROW

# --------------------------------------------------------------------------------------------------- which files


def test_one_file_gives_its_rows_with_ordinals_arguments_and_own_columns(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["a", "b"], "seed": [7, None], "mood": ["x", None]})
    assert rows(path) == {ROW: [0, 1], "prompt": ["a", "b"], "seed": [7, None], EXTRA + "mood": ["x", None]}


def test_a_folder_is_read_in_order_of_paths_without_hidden_and_foreign_files(write_manifest: Write, tmp_path: Path) -> None:
    for name in ("m/b.parquet", "m/a.parquet", "m/sub/c.parquet", "m/_temporary/x.parquet", "m/.hidden.parquet", "m/_metadata.parquet"):
        write_manifest({"prompt": [name]}, name)
    (tmp_path / "m/notes.txt").write_text("not a table")
    assert rows(tmp_path / "m")["prompt"] == ["m/a.parquet", "m/b.parquet", "m/sub/c.parquet"]


def test_a_glob_and_a_list_are_read_in_their_order(write_manifest: Write, tmp_path: Path) -> None:
    for name in ("m-2.parquet", "m-10.parquet", "other.parquet"):
        write_manifest({"prompt": [name]}, name)
    assert rows(tmp_path / "m-*.parquet")["prompt"] == ["m-10.parquet", "m-2.parquet"]
    assert rows([tmp_path / "other.parquet", tmp_path / "m-*.parquet"])["prompt"] == ["other.parquet", "m-10.parquet", "m-2.parquet"]


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "what?.parquet", "star*.parquet", "mit leerzeichen ü.parquet", "%20.parquet", "#1.parquet"]
)
def test_a_file_whose_own_name_looks_like_a_pattern_is_found(write_manifest: Write, name: str) -> None:
    assert rows(write_manifest({"prompt": ["a"]}, name))["prompt"] == ["a"]


def test_a_manifest_may_lie_on_any_fsspec_url(write_manifest: Write) -> None:
    folder = f"memory://{uuid.uuid4().hex}"
    for name in ("b", "a"):
        with fsspec.open(f"{folder}/{name}.parquet", "wb") as file:
            pq.write_table(pa.table({"prompt": [name]}), file)
    assert rows(folder)["prompt"] == ["a", "b"]
    assert rows(f"{folder}/*.parquet")["prompt"] == ["a", "b"]
    assert "no such file" in refusal(f"{folder}/c.parquet")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no.parquet")
    assert message == f"manifest {tmp_path}/no.parquet: no such file; paths are relative to the job file"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"manifest {tmp_path}: the folder holds no .parquet file; give the folder that does"


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    assert f"manifest {tmp_path}/*.parquet: no file matches" in refusal(tmp_path / "*.parquet")


def test_one_missing_file_of_a_list_is_named(write_manifest: Write, tmp_path: Path) -> None:
    assert f"{tmp_path}/no.parquet" in refusal([write_manifest(), tmp_path / "no.parquet"])


def test_a_glob_that_matches_a_folder_is_refused_at_once(write_manifest: Write, tmp_path: Path) -> None:
    (tmp_path / "m.parquet").mkdir()
    assert refusal(tmp_path / "m*.parquet") == f"manifest {tmp_path}/m.parquet: Is a directory; give Parquet files that you may read"


@pytest.mark.parametrize("url", ["nonsense://bucket/x.parquet", "://x"])
def test_an_unknown_scheme_is_refused(url: str) -> None:
    assert refusal(url).startswith(f"manifest {url}: ")


def test_a_path_below_a_file_is_no_such_file(write_manifest: Write) -> None:
    path = write_manifest() / "below.parquet"
    assert f"manifest {path}: no such file" in refusal(path)


def test_an_unset_environment_variable_in_the_path_is_named(monkeypatch: pytest.MonkeyPatch, write_manifest: Write, tmp_path: Path) -> None:
    write_manifest({"prompt": ["a"]})
    monkeypatch.setenv("WHERE_PROMPTS_ARE", str(tmp_path))
    assert rows("${WHERE_PROMPTS_ARE}/prompts.parquet")["prompt"] == ["a"]
    monkeypatch.delenv("WHERE_PROMPTS_ARE")
    assert "${WHERE_PROMPTS_ARE}" in refusal("${WHERE_PROMPTS_ARE}/prompts.parquet")


# ---------------------------------------------------------------------------------------------------- broken files


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "an empty file": lambda good: b"",
    "a text file": lambda good: b"id,prompt\n0,a red circle\n",
    "a short file": lambda good: b"PAR1",
    "only the magic words": lambda good: b"PAR1PAR1",
    "the first half": lambda good: good[: len(good) // 2],
    "all but the last byte": lambda good: good[:-1],
    "a footer length beyond the file": lambda good: good[:-8] + b"\xff\xff\xff\x7fPAR1",
    "a footer length of zero": lambda good: good[:-8] + b"\x00\x00\x00\x00PAR1",
    "a footer of zeros": lambda good: good[:-200] + bytes(192) + good[-8:],
    "a flipped byte in the footer's head": lambda good: _flipped(good, len(good) - 8 - int.from_bytes(good[-8:-4], "little")),
    "a png": lambda good: b"\x89PNG\r\n\x1a\n" + good[8:-8],
    "zeros": lambda good: bytes(len(good)),
    "another row count in the file than in its groups": lambda good: good.replace(b"\x16\xd8\x12\x19", b"\x16\xd6\x12\x19"),
}


def _flipped(data: bytes, place: int, mask: int = 0xFF) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_no_parquet_is_named_and_to_be_written_again(write_manifest: Write, how: str) -> None:
    path = write_manifest({"prompt": [f"a red circle {k}" for k in range(1196)]})
    good = path.read_bytes()
    path.write_bytes(BROKEN[how](good))
    assert path.read_bytes() != good
    assert refusal([path]).startswith(f"manifest {path}: not a readable Parquet file (")
    assert refusal([path]).endswith("write it again")


def test_a_bad_file_among_good_ones_is_the_one_that_is_named(write_manifest: Write, tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        write_manifest(name=f"m/{name}")
    (tmp_path / "m/b.parquet").write_bytes(b"PAR1 is how it begins")
    assert refusal(tmp_path / "m").startswith(f"manifest {tmp_path}/m/b.parquet: not a readable Parquet file")


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_anywhere_in_the_footer_loses_no_row_in_silence(place: float, mask: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.parquet"
        pq.write_table(pa.table({"prompt": [f"p{k}" for k in range(20)], "n": ["a", None] * 10}), path, row_group_size=7)
        good = path.read_bytes()
        footer = int.from_bytes(good[-8:-4], "little") + 8
        path.write_bytes(_flipped(good, len(good) - footer + int(place * footer), mask))
        try:
            outcome = f"{path}: {table(opened(path)).num_rows} rows"
        except (InvalidJob, Fatal) as error:
            outcome = str(error)
        assert str(path) in outcome
        assert outcome.endswith((" 20 rows", "write it again", "run again", "cast the column")) or "no column" in outcome, outcome


def test_a_data_page_damaged_under_a_checksum_stops_the_job_with_file_and_place(write_manifest: Write) -> None:
    path = write_manifest(
        {"prompt": [f"a red circle {k}" for k in range(50)]}, compression="none", use_dictionary=False, write_page_checksum=True
    )
    good = path.read_bytes()
    path.write_bytes(_flipped(good, good.index(b"circle 7"), 1))
    manifest = opened(path)
    with pytest.raises(Fatal) as caught:
        table(manifest)
    assert str(caught.value).startswith(f"{path}: damaged near row 0: ")
    assert str(caught.value).endswith("restore the file and run again")


def test_a_file_that_lost_its_head_stops_the_job(write_manifest: Write) -> None:
    path = write_manifest({"prompt": [f"a red circle {k}" for k in range(50)]})
    path.write_bytes(path.read_bytes()[100:])
    manifest = opened(path)
    with pytest.raises(Fatal, match=rf"{path}: damaged near row 0: .*; restore the file and run again"):
        table(manifest)


def test_a_damaged_compressed_page_stops_the_job_where_it_lies(write_manifest: Write) -> None:
    prompts = [f"{k:09d}" for k in range(2 * BATCH_ROWS)]
    path = write_manifest({"prompt": prompts}, row_group_size=BATCH_ROWS, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start + 30 : start + column.total_compressed_size] = bytes(column.total_compressed_size - 30)
    path.write_bytes(data)
    manifest = opened(path)
    stream = manifest.stream([(0, BATCH_ROWS), (BATCH_ROWS, 2 * BATCH_ROWS)])
    assert next(stream).column("prompt").to_pylist() == prompts[:BATCH_ROWS]
    with pytest.raises(Fatal, match=rf"prompts\.parquet: damaged near row {BATCH_ROWS}: "):
        next(stream)


def test_rows_that_hold_pictures_are_read_a_few_at_a_time(write_manifest: Write) -> None:
    columns = {"prompt": [str(k) for k in range(80)], "photo": [bytes([k]) * 2_000_000 for k in range(80)]}
    manifest = opened(write_manifest(columns, row_group_size=8, use_dictionary=False))
    before = pa.total_allocated_bytes()
    stream = manifest.stream([(0, 1), (1, 80)])
    first = next(stream)
    assert pa.total_allocated_bytes() - before < 80 << 20, "160 MB in all"
    found = pa.concat_tables([first, *stream])
    assert found.column("prompt").to_pylist() == columns["prompt"]
    assert found.column(EXTRA + "photo").to_pylist() == columns["photo"]


def test_a_file_that_vanished_or_shrank_after_it_was_opened_is_named(write_manifest: Write) -> None:
    path = write_manifest({"prompt": ["a"] * 10})
    manifest = opened(path)
    write_manifest({"prompt": ["a"] * 5})
    with pytest.raises(Fatal, match="ends before its footer says; it was changed or damaged: restore it and run again"):
        table(manifest)
    path.unlink()
    with pytest.raises(InvalidJob, match=f"manifest {path}: the file is gone"):
        table(manifest)


def test_a_manifest_without_rows_is_refused(write_manifest: Write) -> None:
    path = write_manifest({"prompt": pa.array([], pa.string())})
    assert refusal(path) == f"{path}: the manifest has no rows; write at least one prompt"


def test_files_and_row_groups_without_rows_are_passed_over(tmp_path: Path) -> None:
    schema, paths = pa.schema([("prompt", pa.string())]), [tmp_path / f"{k}.parquet" for k in range(5)]
    for path, groups in zip(paths, ([], [["a"], [], ["b"]], [[]], [["c"], []], []), strict=True):
        with pq.ParquetWriter(path, schema) as writer:
            for group in groups:
                writer.write_table(pa.table({"prompt": group}, schema))
    assert rows(paths)["prompt"] == ["a", "b", "c"]


# --------------------------------------------------------------------------------------------------------- identity


def test_the_fingerprint_knows_content_and_names_but_not_folders(write_manifest: Write) -> None:
    first = opened(write_manifest({"prompt": ["a", "b"]}, "here/m.parquet")).fingerprint()
    assert first == opened(write_manifest({"prompt": ["a", "b"]}, "there/m.parquet")).fingerprint()
    assert first != opened(write_manifest({"prompt": ["a", "c"]}, "here/m.parquet")).fingerprint()
    assert first != opened(write_manifest({"prompt": ["a", "b"]}, "here/n.parquet")).fingerprint()
    assert [(entry["path"], entry["rows"]) for entry in first] == [("m.parquet", 2)]


def test_a_row_is_told_by_its_file_and_its_place_in_it(write_manifest: Write) -> None:
    manifest = opened([write_manifest({"prompt": ["x"] * count}, f"{count}.parquet") for count in (3, 1, 2)])
    assert [manifest.where_is(k) for k in range(6)] == [
        "3.parquet, row 0",
        "3.parquet, row 1",
        "3.parquet, row 2",
        "1.parquet, row 0",
        "2.parquet, row 0",
        "2.parquet, row 1",
    ]


def test_columns_that_look_like_arguments_are_pointed_out_and_the_others_are_not(write_manifest: Write) -> None:
    names = ("prompt", "steps", "cfg_scale", "samplr", "Seed", "category", "notes")
    found = opened(write_manifest({name: ["x"] for name in names})).hints()
    assert [hint.split("'")[1] for hint in found] == ["steps", "cfg_scale", "samplr", "Seed"]
    assert "columns: {num_inference_steps: steps}" in found[0]
    assert opened(write_manifest({"prompt": ["x"], "num_inference_steps": [3], "steps": [4]}, "b.parquet")).hints() == []
