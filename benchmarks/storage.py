"""What a layout costs on its way to a store, beside a plain loop over fsspec that only puts.

    python benchmarks/storage.py [--images 2000] [--rounds 4] [--stores local,s3] [--folder FOLDER]

`ours` is the layout through its writer and the package's own commit, from as many threads as a worker has. `loop` puts the same number of
bytes in objects of the same sizes, `loop of pictures` each picture as a file of its own, whatever the layout: both by `pipe_file` of
fsspec's client with the options that the package gives it, from as many threads. s3fs cuts what is larger than 100 MB into pieces of 50 MB,
which moto, and so the loop, is slow with; `loop in one` puts each object by the one request that the package makes of it. Images are 1024²
PNGs, encoded before the clock starts. S3 is moto in a process of its own. Variants take turns, each round begins with another one, and
before each the disk is left to finish what was removed. Local files are made durable (fsync) by the package, and so they are by
`loop+fsync` and, there, by `loop of pictures`.

A ratio of 1.00 is that loop's speed, in the same round; the median round is shown. CPU is of this process, by image.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from renderfarm import commit
from renderfarm.encode import EncodedImage, encode
from renderfarm.layouts import LAYOUTS
from renderfarm.layouts.base import name_of
from renderfarm.records import Part, SampleKey
from renderfarm.schema import ERROR_COLUMNS, IMAGE_COLUMNS
from renderfarm.storage import open_store
from renderfarm.storage.clients import make_client
from renderfarm.storage.cloud import PIECE_BYTES
from renderfarm.worker import ENCODERS, LEASES_IN_FLIGHT

PART_IMAGES = 64
DIFFERENT = 16  # pictures, over and over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="of each variant, over all rounds")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--stores", default="local,s3")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder otherwise")
    given = parser.parse_args()
    pictures = [picture(seed) for seed in range(DIFFERENT)]
    size = sum(len(one.data) for one in pictures) / DIFFERENT
    print(f"{given.images} images of {size / 1e6:.2f} MB, {given.rounds} rounds, parts of {PART_IMAGES}, {os.cpu_count()} cores\n")
    print("store  layout      variant             MB/s   ratio   CPU ms/image")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, ThreadPoolExecutor(ENCODERS) as encoders:
        for store in given.stores.split(","):
            with s3_server(Path(folder)) if store == "s3" else contextlib.nullcontext(folder) as place:
                for layout in LAYOUTS:
                    show(store, layout, measure(place, layout, pictures, given.images // given.rounds, given.rounds, encoders))


def measure(
    place: str, layout: str, pictures: list[EncodedImage], images: int, rounds: int, encoders: ThreadPoolExecutor
) -> dict[str, list[tuple[float, float]]]:
    """(MB/s, CPU seconds an image) of each variant in each round."""
    found: dict[str, list[tuple[float, float]]] = {}
    write(f"{place}/sizes", layout, pictures, images, encoders)  # and what is imported at the first use
    sizes = {stored.key: stored.size for stored in open_store(f"{place}/sizes").stored("data")}
    remove(f"{place}/sizes")
    ballast = b"".join(one.data for one in pictures) * (1 + max(sizes.values()) // sum(len(one.data) for one in pictures))
    by_size = {size: ballast[:size] for size in set(sizes.values())}
    same = {key: by_size[size] for key, size in sizes.items()}
    loose = {f"data/{row:010d}.png": pictures[row % len(pictures)].data for row in range(images)}
    local = "://" not in place
    loops: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {"loop": (same, {}), "loop of pictures": (loose, {"sync": local})}
    if local:
        loops["loop+fsync"] = same, {"sync": True}
    elif max(sizes.values()) > 100e6:
        loops["loop in one"] = same, {"chunksize": PIECE_BYTES}
    variants = ["ours", *loops]
    for round_ in range(rounds):
        for variant in (*variants[round_ % len(variants) :], *variants[: round_ % len(variants)]):
            url = f"{place}/{variant.replace(' ', '-')}"
            os.sync()
            wall, cpu = time.perf_counter(), cpu_seconds()
            if variant in loops:
                plain(url, loops[variant][0], **loops[variant][1])
            else:
                write(url, layout, pictures, images, encoders)
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            found.setdefault(variant, []).append((sum(sizes.values()) / 1e6 / wall, cpu / images))
            remove(url)
    return found


def write(url: str, name: str, pictures: list[EncodedImage], images: int, encoders: ThreadPoolExecutor) -> None:
    """As a worker does it: pictures from its encoder threads, a few parts in flight, one commit a part."""
    store, layout = open_store(url), LAYOUTS[name]

    def part(start: int) -> None:
        part, rows = Part(start // PART_IMAGES, start, min(images, start + PART_IMAGES)), []
        with layout.writer(store, part) as writer:
            done = []
            for row in range(part.start, part.stop):
                image = pictures[row % len(pictures)]
                rows.append(record(row, image, name_of(SampleKey(row, 0), image.pixel_sha256, "png")))
                done.append(encoders.submit(writer.add, rows[-1]["file_name"], image.data))
            for one in done:
                one.result()
            table = pa.Table.from_pylist(rows, schema=IMAGE_COLUMNS)
            commit.publish(store, layout, part, writer, table, ERROR_COLUMNS.empty_table())

    with ThreadPoolExecutor(LEASES_IN_FLIGHT) as leases:
        list(leases.map(part, range(0, images, PART_IMAGES)))


def plain(url: str, objects: dict[str, bytes], sync: bool = False, **options: int) -> None:
    """These objects, put one by one."""
    client, root = make_client(url)

    def put(key: str) -> None:
        path = f"{root}/{key}"
        if "://" not in url:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        client.pipe_file(path, objects[key], **options)
        if sync:
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    small = max(map(len, objects.values())) < 10e6  # as many puts at once as the package makes of such
    with ThreadPoolExecutor(ENCODERS if small else LEASES_IN_FLIGHT) as pool:
        list(pool.map(put, objects))


def show(store: str, layout: str, found: dict[str, list[tuple[float, float]]]) -> None:
    for variant, rounds in found.items():
        speed, cpu = (statistics.median(one[what] for one in rounds) for what in (0, 1))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found["ours"], rounds, strict=True))
        print(
            f"{store:6} {layout:11} {variant:16} {speed:7.0f}  {'' if variant == 'ours' else f'{ratio:.2f}':>6} {1e3 * cpu:14.1f}",
            flush=True,
        )


def picture(seed: int) -> EncodedImage:
    """A smooth picture with some grain: about as large as a photograph's PNG."""
    noise = np.random.default_rng(seed)
    smooth = Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8), "RGB").resize((1024, 1024), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(smooth, np.int16) + noise.integers(-6, 7, (1024, 1024, 3)), 0, 255).astype(np.uint8)
    return encode(pixels)


def record(row: int, image: EncodedImage, name: str) -> dict[str, object]:
    values: dict[str, object] = {
        field.name: {"int64": row, "int32": 1, "double": 5.0, "bool": False}.get(str(field.type), "a red circle on a white background")
        for field in IMAGE_COLUMNS
    }
    hashes = {"file_sha256": image.file_sha256, "pixel_sha256": image.pixel_sha256}
    return values | hashes | {"row": row, "image_index": 0, "file_name": name, "format": "png", "bytes": len(image.data)}


def remove(url: str) -> None:
    if "://" in url:
        client, root = make_client(url)
        client.rm(root, recursive=True)
    else:
        shutil.rmtree(url)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """moto on a port of its own, and a bucket in it."""
    import boto3

    port = 5600 + os.getpid() % 1000
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    with (folder / "moto.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - this interpreter
        try:
            for _ in range(100):
                with contextlib.suppress(Exception):  # not up yet
                    boto3.client("s3").create_bucket(Bucket="benchmark")
                    break
                time.sleep(0.2)
            yield "s3://benchmark"
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
