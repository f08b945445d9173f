"""A Ray cluster of several nodes on this machine, and a run that joins it. A process of its own: whoever calls it kills what it wants.

    RAY_TMPDIR=FOLDER python tests/cluster_run.py FOLDER NODES

prints one JSON line with the address, then takes lines of words: `add`, `remove K` (the node dies), `drain K`, `head` (its GCS server
dies), `end`. It answers each with one line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2


def main(folder: str, nodes: str) -> None:
    Path(folder, "ray").mkdir(exist_ok=True)  # Ray writes its address there without asking
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    added = [cluster.add_node(num_cpus=1) for _ in range(int(nodes))]
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "end":
            break
        print(json.dumps(_do(cluster, added, word, rest)), flush=True)
    cluster.shutdown()


def _do(cluster: Cluster, added: list[Any], word: str, rest: list[str]) -> Any:
    if word == "add":
        added.append(cluster.add_node(num_cpus=1))
        return added[-1].node_id
    if word == "head":
        pid = cluster.head_node.all_processes["gcs_server"][0].process.pid
        os.kill(pid, signal.SIGKILL)
        return [pid]
    node = added[int(rest[0])]
    if word == "remove":
        cluster.remove_node(node, allow_graceful=False)
        return node.node_id
    assert word == "drain"
    client = ray._raylet.GcsClient(address=cluster.address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    return [node.node_id, *client.drain_node(node.node_id, reason, "the test says so", int((time.time() + 120) * 1000))]


if __name__ == "__main__":
    main(*sys.argv[1:])
