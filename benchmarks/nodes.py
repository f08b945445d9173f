"""Workers on several Ray nodes: how near to linear a job gets faster with them.

    python benchmarks/nodes.py [--quick] [--seconds 40] [--rounds 3] [--json FILE]

One machine plays the nodes (`ray.cluster_utils.Cluster`), and the model is the fake one at a fixed time per denoiser call: workers sleep;
what is measured is whether driver, leases and commits keep them busy. `images/s` is from the moment that the last worker is ready to the
commit of the last part, so the end, where workers run dry one by one, is in it; of what was committed before that moment nothing counts.
`linear` is against one worker on one node in the same round, `of the sleep` against workers that do nothing but sleep. A worker holds its
cores' worth of nothing: the machine must have time left for all of them, or the last column falls for that reason alone.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from loop import write_job
from measuring import Child, Report, Round, column, not_below, options, ratios, serve, spread

B, STEPS, PART_ROWS = 8, 10, 16
PLACES = ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (3, 4))
"""(nodes, workers)"""


def main() -> None:
    given = options(
        str(__doc__).splitlines()[0],
        seconds=(float, (60.0, 20.0), "that each worker renders in each place"),
        rounds=(int, (5, 1), "of all places"),
        step=(float, 0.05, "seconds that a denoiser call sleeps"),
        nodes=(int, 1, "of a child's cluster"),
        folder=(Path, None, "where to work"),
    )
    if given.child:
        serve_cluster(given)
        return
    found: dict[tuple[int, int], list[Round]] = {place: [] for place in PLACES}
    report = Report(given)
    with tempfile.TemporaryDirectory(prefix="rf-n-", dir=given.folder) as name:
        for number in range(given.rounds):
            order = (1, 2, 3) if number % 2 == 0 else (3, 2, 1)
            for nodes in order:
                folder = Path(name) / f"{number}{nodes}"
                folder.mkdir()
                environment = {"RAY_TMPDIR": str(folder), "RENDERFARM_FAKE_STEP_S": str(given.step)}
                arguments = ["--folder", str(folder), "--nodes", str(nodes), "--step", str(given.step), "--seconds", str(given.seconds)]
                child = Child("nodes.py", "--child", "cluster", *arguments, **environment)
                try:
                    for place in (place for place in PLACES if place[0] == nodes):
                        found[place].append(child.ask(str(place[1])))
                        print(f"  round {number + 1}: {place} {found[place][-1]}", flush=True)
                finally:
                    child.close()
    show(report, given, found)
    report.end()


def show(report: Report, given: argparse.Namespace, found: dict[tuple[int, int], list[Round]]) -> None:
    lines, one = [], found[1, 1]
    for (nodes, workers), rounds in found.items():
        linear = [value / workers for value in ratios(rounds, one, "images_per_second")]
        bound = not_below(linear)
        asleep = statistics.median(column(rounds, "images_per_second")) / (workers * B / (STEPS * given.step))
        used = "+".join(str(number) for number in rounds[-1]["workers_by_node"])
        lines.append(
            [
                nodes,
                workers,
                used,
                spread(column(rounds, "images_per_second")),
                spread(linear),
                "–" if bound is None else f"{bound:.3g}",
                f"{asleep:.1%}",
            ]
        )
    title = f"B={B}, {STEPS} calls of {given.step} s an image, parts of {PART_ROWS}, {given.rounds} round(s)"
    titles = ["nodes", "workers", "on nodes", "images/s", "linear", "not below (95 %)", "of the sleep"]
    report.show(title, titles, lines, rounds={str(place): rounds for place, rounds in found.items()})


# ------------------------------------------------------------------------------------------------ one cluster


def serve_cluster(given: argparse.Namespace) -> None:
    import ray
    from ray.cluster_utils import Cluster

    (given.folder / "ray").mkdir(exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(given.nodes):
        cluster.add_node(num_cpus=4 if given.nodes == 1 else 2)
    try:
        serve(lambda line: measured(given, cluster.address, int(line)))
    finally:
        ray.shutdown()
        cluster.shutdown()


def measured(given: argparse.Namespace, address: str, workers: int) -> Round:
    """One run with so many workers."""
    import ray

    import renderfarm
    from renderfarm.jobfile import load_job

    images = int(workers * given.seconds * B / (STEPS * given.step)) // PART_ROWS * PART_ROWS
    manifest, out = given.folder / f"{workers}.parquet", given.folder / f"out-{workers}"
    pq.write_table(pa.table({"prompt": [f"a red circle {row}" for row in range(images)]}), manifest)
    said = {
        "version": 1,
        "name": "nodes",
        "manifest": str(manifest),
        "model": "builtin:fake",
        "render": {"height": 64, "width": 64, "num_inference_steps": STEPS},
        "workers": {"max": workers, "batch_size": B},
        "output": {"path": str(out), "layout": "parquet", "part_rows": PART_ROWS},
    }
    job = load_job(write_job(given.folder / f"{workers}.yaml", said))
    seen: list[tuple[float, int, int]] = []
    nodes: dict[str, str] = {}

    def observe(progress: Any) -> None:
        ready = [worker for worker in progress.workers.values() if worker.state == "ready"]
        nodes.update({name: worker.node for name, worker in progress.workers.items() if worker.node})
        seen.append((time.time(), len(ready), progress.images))

    # one connection to the cluster for all runs of this child, as the engine would make it
    if not ray.is_initialized():
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    renderfarm.run(job, address=address, observe=observe)
    shutil.rmtree(out)
    began, _, before = next(one for one in seen if one[1] == workers)
    ended = next(at for at, _, done in seen if done == images)
    counts = sorted((list(nodes.values()).count(node) for node in set(nodes.values())), reverse=True)
    return {"images_per_second": (images - before) / (ended - began), "images": images, "before": before, "workers_by_node": counts}


if __name__ == "__main__":
    main()
