"""`renderfarm init`: each job file that it writes runs as it is printed."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

import renderfarm
from renderfarm.config import Job
from renderfarm.errors import InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.starters import TEMPLATES, write_starter

IMAGES = {"t2i": 6, "sweep": 27, "dataset": 16, "img2img": 2}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_starter_runs_as_it_is(template: str, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "my first.yaml"
    written = write_starter(template, file)
    assert written[0] == file
    text = file.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=job.schema.json"
    schema = json.loads((file.parent / "job.schema.json").read_text())
    assert schema == Job.model_json_schema()
    jsonschema.validate(yaml.safe_load(text), schema)
    summary = renderfarm.run(load_job(file), engine="inline")
    assert (summary.images, summary.errors, summary.job) == (IMAGES[template], 0, "my-first")
    assert Path(summary.out) == file.parent / "out/my-first"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    (tmp_path / "starter.png").write_bytes(b"mine, too")
    with pytest.raises(InvalidJob, match="exists, and is left as it is; name another file: renderfarm init --template t2i FILE"):
        write_starter("t2i", tmp_path / "job.yaml")
    assert [path.name for path in write_starter("img2img", tmp_path / "other.yaml")] == ["other.yaml", "job.schema.json"]
    assert write_starter("t2i", tmp_path / "third.yaml") == [tmp_path / "third.yaml"]
    assert ((tmp_path / "job.yaml").read_text(), (tmp_path / "starter.png").read_bytes()) == ("mine", b"mine, too")
    with pytest.raises(InvalidJob, match="cannot be written: "):
        write_starter("t2i", tmp_path / "job.yaml" / "below.yaml")
