"""Manifests that are text: what becomes of each cell, and which line each mistake is on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import renderfarm
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.preparation import prepare
from renderfarm.text_tables import convert, convert_rows, place_of

Write = Callable[..., Path]


def table(folder: Path, name: str, data: bytes | str, texts: tuple[str, ...] = ("id", "prompt")) -> pa.Table:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    convert([str(folder / name)], folder / "converted.parquet", texts)
    return pq.read_table(folder / "converted.parquet")


def test_a_csv_keeps_what_is_written_and_each_column_has_the_type_of_all_its_cells(tmp_path: Path) -> None:
    text = '\ufeffid,prompt,steps,cfg,ok,postcode,long\n007,"a, ""b""\nand c",5,1,true,01234,9007199254740993\n\n8,1984,,2.5,False,5,1\n'
    found = table(tmp_path, "p.csv", text)
    assert {field.name: str(field.type) for field in found.schema} == {
        "id": "string", "prompt": "string", "steps": "int64", "cfg": "double", "ok": "bool", "postcode": "string", "long": "int64",
    }  # fmt: skip
    assert found.to_pylist() == [
        {"id": "007", "prompt": 'a, "b"\nand c', "steps": 5, "cfg": 1.0, "ok": True, "postcode": "01234", "long": 2**53 + 1},
        {"id": "8", "prompt": "1984", "steps": None, "cfg": 2.5, "ok": False, "postcode": "5", "long": 1},
    ]


def test_a_type_is_that_of_all_rows_wherever_they_are(tmp_path: Path) -> None:
    many = "prompt,n,x\n" + "a,1,1\n" * 9000
    found = table(tmp_path, "p.csv", many + "a,2.5,word\n")
    assert (found.schema.field("n").type, found.schema.field("x").type, len(found)) == (pa.float64(), pa.string(), 9001)
    assert found.column("x")[0].as_py() == "1"
    assert table(tmp_path, "p.csv", many + "a,0.5,12345678901234567\n").schema.field("x").type == pa.int64()


def test_json_lines_have_the_columns_of_all_lines(tmp_path: Path) -> None:
    found = table(tmp_path, "p.jsonl", '{"prompt": "x", "n": 1}\n\n{"prompt": "", "n": 2.5, "tags": ["a"]}\n')
    assert found.to_pylist() == [{"prompt": "x", "n": 1.0, "tags": None}, {"prompt": "", "n": 2.5, "tags": ["a"]}]


def test_of_plain_text_each_line_is_a_prompt(tmp_path: Path) -> None:
    assert table(tmp_path, "p.txt", b"\xef\xbb\xbfa cat\r\n\r\n a dog \n# no remark").column("prompt").to_pylist() == [
        "a cat",
        "a dog",
        "# no remark",
    ]
    assert table(tmp_path, "p.tsv", "prompt\tn\na, b\t5\n").to_pylist() == [{"prompt": "a, b", "n": 5}]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("p.csv", b"prompt,n\na,1\nb\n", "p.csv, line 3: 1 cells, and the first line names 2 columns"),
        ("p.csv", b'prompt,n\n"a\nb",1\nc,"x"y\n', "p.csv, line 4: not valid CSV"),
        ("p.csv", b'prompt\n"never closed\n', "not valid CSV: unexpected end of data"),
        ("p.csv", b"prompt\nfine\ncaf\xe9\n", "p.csv, line 3: not UTF-8; save the file as UTF-8"),
        ("p.csv", "prompt\na\n".encode("utf-16"), "p.csv, line 1: not UTF-8"),
        ("p.csv", b"", "p.csv, line 1: the file is empty"),
        ("p.csv", b"prompt\n", "p.csv: no rows; write at least one prompt"),
        ("p.csv", b"prompt,prompt\na,b\n", "two columns have the name 'prompt'"),
        ("p.csv", b",prompt\n0,a\n", "column 1 has no name; give it one (pandas: to_csv"),
        ("p.csv", b"prompt;n\na;1\n", "separate cells by commas"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": }\n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b'["a"]\n', "p.jsonl, line 1: not an object"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "a name is given twice"),
        (
            "p.jsonl",
            b'{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "two"}\n',
            'p.jsonl, line 2: n is "two"; before it are values of type int64',
        ),
        ("p.jsonl", b'{"prompt": "a", "n": 99999999999999999999}\n', "p.jsonl, line 1: n is 99999999999999999999"),
        ("p.txt", b"\n \n", "p.txt: no rows"),
    ],
)
def test_each_mistake_is_named_with_its_line(name: str, data: bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob) as caught:
        table(tmp_path, name, data)
    assert told in str(caught.value)


def test_files_of_one_manifest_are_of_one_kind_and_share_their_columns(tmp_path: Path) -> None:
    for name, text in {"a.csv": "prompt,n\na,1\n", "b.csv": "n,prompt\n2,b\n", "c.csv": "prompt\nc\n", "d.txt": "d\n"}.items():
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv", "c.csv", "d.txt")]
    convert(files[:2], tmp_path / "o.parquet", ("prompt",))
    assert pq.read_table(tmp_path / "o.parquet").to_pylist() == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    assert place_of(files[:2], 1) == "b.csv, line 2"
    with pytest.raises(InvalidJob, match=r"c\.csv: other columns than in a\.csv \('n'\)"):
        convert([files[0], files[2]], tmp_path / "o.parquet", ())
    with pytest.raises(InvalidJob, match=r"d\.txt: files of one manifest are of one kind"):
        convert([files[0], files[3]], tmp_path / "o.parquet", ())


def test_rows_in_the_job_are_prompts_or_columns(tmp_path: Path) -> None:
    convert_rows(["a", {"prompt": "b", "seed": 5}], tmp_path / "o.parquet")
    assert pq.read_table(tmp_path / "o.parquet").to_pylist() == [{"prompt": "a", "seed": None}, {"prompt": "b", "seed": 5}]
    with pytest.raises(InvalidJob, match=r"manifest\.rows\[1\]: seed is \"x\"; before it are values of type int64"):
        convert_rows([{"prompt": "b", "seed": 5}, {"prompt": "b", "seed": "x"}], tmp_path / "o.parquet")


# ------------------------------------------------------------------------------------------- in a job

CSV = 'id,caption,num_inference_steps,mood\np0,a large red circle,2,calm\np1,"a small\nblue square",,\n'


def hashes(out: Path) -> dict[str, Any]:
    return {record["row_id"]: record["pixel_sha256"] for _, record in renderfarm.open(out)}


def test_a_csv_gives_the_pixels_of_the_same_rows_as_parquet(tmp_path: Path, write_manifest: Write, write_job: Write) -> None:
    (tmp_path / "p.csv").write_text(CSV)
    job = write_job({"path": "p.csv", "columns": {"prompt": "caption"}})
    assert renderfarm.run(job, engine="inline").state == "SUCCEEDED"
    same = write_manifest(
        {
            "id": ["p0", "p1"],
            "prompt": ["a large red circle", "a small\nblue square"],
            "num_inference_steps": pa.array([2, None], pa.int64()),
            "mood": ["calm", None],
        }
    )
    other = write_job(same, "other.yaml", output={"path": str(tmp_path / "other")})
    renderfarm.run(other, engine="inline")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "other")
    assert {record["mood"] for _, record in renderfarm.open(tmp_path / "out")} == {"calm", None}


def test_a_run_goes_on_without_the_file_and_refuses_a_changed_one(tmp_path: Path, write_job: Write) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue circle\n")
    job = write_job(tmp_path / "p.txt")
    first = renderfarm.run(job, engine="inline")
    (tmp_path / "p.txt").rename(tmp_path / "elsewhere.txt")
    assert renderfarm.run(job, engine="inline").new_images == 0
    (tmp_path / "p.txt").write_text("a red circle\na green circle\n")
    with pytest.raises(InvalidJob, match=r"manifest\.made\.from\[0\]\.sha256: "):
        renderfarm.run(job, engine="inline")
    assert first.images == 2
    (tmp_path / "p.txt").unlink()
    next((tmp_path / "out/_renderfarm/rows").iterdir()).unlink()
    with pytest.raises(renderfarm.errors.Fatal, match="is missing, and holds the rows of this output"):
        renderfarm.run(job, engine="inline")


def test_mistakes_of_rows_are_told_by_the_line_of_the_text(tmp_path: Path, write_job: Write) -> None:
    from renderfarm.validation import validate_rows

    (tmp_path / "p.csv").write_text('prompt,width\n"two\nlines",64\na circle,63\n')
    found = validate_rows(prepare(load_job(write_job(tmp_path / "p.csv"))))
    assert found.problems == ["p.csv, line 4: width is 63; it must be a multiple of 8 for this model: 56 or 64"]
    (tmp_path / "p.csv").write_text("caption\na\n")
    with pytest.raises(InvalidJob, match=r"p\.csv: no column `prompt` \(it has: caption\)"):
        prepare(load_job(write_job(tmp_path / "p.csv")))


def test_a_job_may_hold_its_rows(tmp_path: Path, write_job: Write) -> None:
    job = write_job({"rows": ["a red circle", {"prompt": "a cat", "seed": 7}]})
    assert renderfarm.run(job, engine="inline").images == 2
    assert [record["seed"] for _, record in renderfarm.open(tmp_path / "out")][1] == 7
    with pytest.raises(InvalidJob, match="give either path or rows"):
        load_job(write_job({"rows": ["a"], "path": "x.csv"}))


def test_text_may_lie_in_a_store(s3: str, tmp_path: Path, write_job: Write) -> None:
    from renderfarm.storage import open_store

    open_store(f"{s3}/prompts").put("p.csv", '\ufeffprompt,seed\na red circle,5\n"two\nlines",6\n'.encode())
    assert renderfarm.run(write_job({"path": f"{s3}/prompts/*.csv"}), engine="inline").images == 2
    assert [record["seed"] for _, record in renderfarm.open(tmp_path / "out")] == [5, 6]
