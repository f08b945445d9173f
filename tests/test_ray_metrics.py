"""What runs say to Prometheus: scraped from a real Ray's own endpoint, and named by the dashboard as it comes out there."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from prometheus_client.parser import text_string_to_metric_families

import renderfarm
from renderfarm.engines.ray_metrics import COUNTERS, GAUGES, HISTOGRAMS, JOB, RayMetrics
from renderfarm.errors import NodeLost, Transient, WorkerLost
from renderfarm.records import Lease, Part, PartReceipt, Receipt, WorkerReady

Write = Callable[..., Path]
DASHBOARD = Path(__file__).parents[1] / "jobs/grafana/renderfarm.json"
KNOWN = COUNTERS | GAUGES | HISTOGRAMS
DEADLINE_S = 180.0


# ------------------------------------------------------------------------------------------------- a real endpoint


def scraped(job: str) -> dict[str, float]:
    """Of one job: values by name and labels, those of its processes together."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(opener.open(url, timeout=60).read().decode()):
        for sample in family.samples:
            if sample.labels.get(JOB) == job and not sample.name.endswith("_created"):
                own = [
                    f"{name}={value}" for name, value in sorted(sample.labels.items()) if name in ("error_class", "stage", "reason", "le")
                ]
                name = " ".join([sample.name, *own])
                found[name] = found.get(name, 0.0) + sample.value
    return found


def until(job: str, has: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Ray sends what it was told now and then, the one of the tests every two seconds."""
    began = time.monotonic()
    while not has(found := scraped(job)):
        assert time.monotonic() - began < DEADLINE_S, found
        time.sleep(0.5)
    return found


def test_a_run_is_counted_where_ray_says_what_its_nodes_do(local_ray: None, write_manifest: Write, write_job: Write) -> None:
    prompts = ["a", "", "b [nan]", "c", "d", "e", "f", "g"]
    file = write_job(write_manifest({"prompt": prompts}), workers={"batch_size": 2})
    job = "scraped"  # other tests' jobs, which this Ray has counted, have another name
    summary = renderfarm.Job.load(file, set={"name": job}).run()
    assert (summary.images, summary.errors) == (6, 2)
    found = until(job, lambda found: found.get("ray_renderfarm_parts_total") == 3 and found.get("ray_renderfarm_workers_ready") == 0)
    assert found["ray_renderfarm_images_total"] == 6
    assert found["ray_renderfarm_image_bytes_total"] == summary.bytes
    assert {name: value for name, value in found.items() if "errors_total" in name} == {
        "ray_renderfarm_errors_total error_class=InvalidInput": 1,
        "ray_renderfarm_errors_total error_class=NonFiniteOutput": 1,
    }
    assert found["ray_renderfarm_samples_in_flight"] == 0
    useful, slots = found["ray_renderfarm_useful_slots_total"], found["ray_renderfarm_slots_total"]
    assert round(useful / slots, 4) == summary.useful_slots
    assert found["ray_renderfarm_denoiser_calls_total"] == slots / 2
    for stage in ("prepare", "wait", "render", "encode", "put"):
        assert found[f"ray_renderfarm_stage_seconds_count stage={stage}"] == 3
    assert found["ray_renderfarm_stage_seconds_sum stage=put"] > 0
    assert found["ray_renderfarm_denoiser_step_seconds_count"] >= 1
    families = {re.sub(r"_(bucket|count|sum)$", "", name.partition(" ")[0]) for name in found}
    assert families == {f"ray_{name}" for name in KNOWN if name != "renderfarm_leases_lost_total"}, "none of it was lost"


def lease(number: int, rows: int = 3) -> Lease:
    return Lease(number, (Part(number, 0, rows),), pa.table({"row": list(range(rows))}))


def test_lost_leases_steps_and_what_is_in_flight(local_ray: None) -> None:
    clock = [100.0]
    metrics = RayMetrics("made-up", 2.0, lambda: clock[0])
    leases = [lease(number) for number in range(5)]
    for name in ("w0", "w1"):
        metrics.ready(name, WorkerReady(name, "", "cpu", 1.0, batch_size=4))
    for number, worker in enumerate(("w0", "w0", "w1", "w1", "w1")):
        metrics.given(worker, leases[number])
    clock[0] = 110.0
    received = PartReceipt(0, 5, 1, 50, error_classes={"InvalidInput": 1, "Nobody's": 0}, seconds={"put": 3.0})
    metrics.answered("w0", leases[0], Receipt(0, (received,), 10.0, useful_slots=60, total_slots=80))
    metrics.answered("w0", leases[1], Receipt(1, (PartReceipt(1, 6, 0, 60, adopted=True),), 0.1, useful_slots=60, total_slots=80))
    metrics.failed("w1", leases[2], WorkerLost("died"))
    metrics.gone("w1")
    metrics.failed("w1", leases[3], NodeLost("spot"))
    metrics.failed("w1", leases[4], Transient("busy"))
    last = lease(5, rows=4)  # so many samples were never in flight before
    metrics.given("w0", last)
    found = until("made-up", lambda found: found.get("ray_renderfarm_samples_in_flight") == 8)
    assert (found["ray_renderfarm_images_total"], found["ray_renderfarm_parts_total"]) == (5, 1), "what was adopted, somebody else counts"
    assert found["ray_renderfarm_denoiser_calls_total"] == 20
    steps = [found[f"ray_renderfarm_denoiser_step_seconds_bucket le={bound}"] for bound in (0.25, 0.5)]
    assert steps == [0, 1], "ten seconds for twenty; Ray's sums are of its buckets' middles"
    assert found["ray_renderfarm_stage_seconds_bucket le=5.0 stage=put"] == 1
    assert found["ray_renderfarm_workers_ready"] == 1
    assert (found["ray_renderfarm_leases_lost_total reason=worker"], found["ray_renderfarm_leases_lost_total reason=node"]) == (1, 1)
    metrics.stopped("w0", [last])
    metrics.close()
    found = until("made-up", lambda found: found["ray_renderfarm_workers_ready"] == 0)
    assert found["ray_renderfarm_leases_lost_total reason=silence"] == 1


# ------------------------------------------------------------------------------------------------- the dashboard


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in strings(inner)]
    return [text for inner in value for text in strings(inner)] if isinstance(value, list) else [value] if isinstance(value, str) else []


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def test_the_dashboard_names_every_metric_and_no_other() -> None:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    named = set()
    for name, suffix in re.findall(r"\bray_(renderfarm_\w+?)(_bucket|_sum|_count)?\b(?=\{)", " ".join(queries)):
        assert (suffix != "") == (name in HISTOGRAMS), name
        named.add(name)
    assert named == KNOWN.keys()


def test_the_dashboard_asks_for_labels_that_there_are() -> None:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            labels = {JOB, *(label for name, (_, own) in KNOWN.items() if f"{name}" in target["expr"] for label in own)}
            by = {word.strip() for words in re.findall(r"by \(([^)]*)\)", target["expr"]) for word in words.split(",")}
            assert by | set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= {*labels, "le"}, target
            assert f'{JOB}=~"$job"' in target["expr"]


def test_the_dashboard_can_be_imported_anywhere() -> None:
    found = dashboard()
    assert (found["id"], found["uid"], found["schemaVersion"] >= 36) == (None, "renderfarm", True)
    variables = {one["name"]: one for one in found["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    sources = [one["datasource"] for panel in found["panels"] for one in (panel, *panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in [*sources, variables["job"]["datasource"]])
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in found["panels"]):
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert not [text for text in strings(found) if re.search(r"https?://|^/|localhost|\d+\.\d+\.\d+\.\d+", text)]


def test_names_are_what_prometheus_wants() -> None:
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in GAUGES | HISTOGRAMS)
    assert all(name.endswith("_seconds") for name in HISTOGRAMS)
    assert all(re.fullmatch(r"renderfarm_[a-z_]+", name) for name in KNOWN)
