"""Models in a store (`s3://…`, `gs://…`, any URL that fsspec opens): fetched once per node into the user's cache.

What a store holds is known by its listing: names, sizes, and the checksums or dates that it tells. Another listing is
another folder in the cache, so that a model that changes is never mixed with what it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from renderfarm.errors import Fatal, InvalidJob, RenderfarmError, Transient
from renderfarm.models.files import Place
from renderfarm.models.fingerprint import cache_folder
from renderfarm.storage.clients import make_client, translated

FETCHED_AT_A_TIME = 8
CHECKSUMS = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "LastModified", "last_modified", "updated", "mtime", "created")

Listing = dict[str, list[Any]]  # size and checksums of each file, by its name


def in_store(url: str, what: str, *, offline: bool) -> Place:
    """`offline`: a store that does not answer is no obstacle where the files were fetched before."""
    if "?" in url or "#" in url:
        raise InvalidJob(
            f"{re.split('[?#]', what)[0]}: a store's URL has no query; leave it out, and use the environment's own credentials"
        )
    try:
        files = make_client(url)
    except InvalidJob as error:
        raise InvalidJob(f"{what}: {error}") from error
    note = cache_folder("stores") / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    try:
        listing = _listed(*files)
    except Exception as error:  # each store's package has errors of its own
        if not offline or not note.is_file():
            raise _meant(error, what) from error
        listing = json.loads(note.read_text())
    else:
        if not listing:
            raise InvalidJob(f"{what}: there is nothing at {url}; correct the URL")
        publish(note, json.dumps(listing).encode(), what)
    for name in listing:  # a store keeps them as they were written
        if any(step in ("", ".", "..") for step in name.split("/")):
            raise InvalidJob(f"{what}: the store has a file named {name!r}, which would lie elsewhere here; remove it")
    folder = note.with_suffix("") / hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:32]

    def get(wanted: Iterable[str]) -> Path:
        missing = [file for file in wanted if not (folder / file).is_file()]
        if missing:
            _fetch(missing, listing, folder, *files, what)
        return folder

    return Place(list(listing), get)


def _listed(system: Any, root: str) -> Listing:
    found: Listing = {}
    for path, info in system.find(root, detail=True).items():
        if info.get("size") is None:  # web servers list names only
            info = system.info(path)
        found[path.removeprefix(root).lstrip("/")] = [info.get("size"), *(str(info[key]) for key in CHECKSUMS if info.get(key))]
    if not found:
        system.ls(root)  # says why, where `find` takes an error for nothing
    return dict(sorted(found.items()))


def _fetch(missing: list[str], listing: Listing, folder: Path, system: Any, root: str, what: str) -> None:
    """Each file whole or not at all; workers of one node wait for the first of them."""
    from filelock import FileLock

    def fetch(file: str) -> None:
        if (folder / file).is_file():
            return
        temporary = folder / f"{file}.{uuid.uuid4().hex}.part"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            system.get_file(f"{root.rstrip('/')}/{file}", str(temporary))
            if listing[file][0] not in (None, size := temporary.stat().st_size):
                raise TimeoutError(f"{file} ended after {size:,} of {listing[file][0]:,} bytes")
            temporary.replace(folder / file)
        finally:
            temporary.unlink(missing_ok=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"), ThreadPoolExecutor(FETCHED_AT_A_TIME, thread_name_prefix="fetch") as pool:
            list(pool.map(fetch, missing))
    except Exception as error:  # as above
        raise _meant(error, what) from error


def _meant(error: Exception, what: str) -> RenderfarmError:
    meant = translated(error, f"fetch {what}")
    if isinstance(meant, KeyError):
        return InvalidJob(f"{what}: does not exist, or not any more: {error}")
    return Transient(f"{meant}; run again to go on") if type(meant) is Transient else meant


def publish(path: Path, data: bytes, what: str) -> None:
    """A file of the cache: whole, or not there."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise Fatal(f"{what}: {path.parent} cannot be written: {error.strerror}; XDG_CACHE_HOME names another place") from error
