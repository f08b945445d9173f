"""The one boundary to where bytes live. Foreign errors become renderfarm's here. What a store promises: `base`."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from typing import BinaryIO

from renderfarm.errors import AlreadyExists, Fatal, InvalidJob
from renderfarm.storage.base import OURS, TEMPORARY, Store, Stored
from renderfarm.storage.clients import EXTRAS, make_client, translated
from renderfarm.storage.cloud import PATIENCE_S, CloudStore
from renderfarm.storage.local import LocalStore
from renderfarm.storage.memory import MemoryStore

__all__ = [
    "OURS",
    "PATIENCE_S",
    "TEMPORARY",
    "CloudStore",
    "LocalStore",
    "MemoryStore",
    "Store",
    "Stored",
    "find_files",
    "is_store",
    "open_file",
    "open_store",
    "probe",
]


def open_store(url: str, *, single_writer: bool = False, patience_s: float = PATIENCE_S) -> Store:
    """The store behind a path or URL. Creates nothing, and asks for nothing yet. The options are those of `CloudStore`."""
    if url.startswith("memory://"):
        return MemoryStore(url)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return LocalStore(os.path.abspath(rest if separator else url))
    if scheme not in EXTRAS:
        raise InvalidJob(f"{url}: {scheme}:// cannot be written; give a folder, or {', '.join(f'{name}://' for name in EXTRAS)}")
    if "?" in url or "#" in url:
        raise InvalidJob(f"{re.split('[?#]', url)[0]}: a store's URL has no query; leave it out")
    if any(step in ("", ".", "..") for step in rest.rstrip("/").split("/")):
        raise InvalidJob(f"{url}: name a bucket and a folder in it, without `.`, `..` or empty names")
    return CloudStore(url, single_writer=single_writer, patience_s=patience_s)


def is_store(url: str) -> bool:
    """Whether it is a store's URL, and not a path or a URL of the web."""
    return "://" in url and url.partition("://")[0] in EXTRAS


def open_file(url: str, patience_s: float = PATIENCE_S) -> BinaryIO:
    """A file that seeks, to read, by a path or any URL that fsspec knows; from a store with so much patience for each request.

    Raises KeyError where there is none, OSError for what a local file does not allow.
    """
    if "://" not in url:
        try:
            return open(url, "rb")
        except FileNotFoundError:
            raise KeyError(url) from None
    folder, _, name = url.rpartition("/")
    return CloudStore(folder, patience_s=patience_s).open(name)


def find_files(url: str) -> tuple[list[str], bool]:
    """The paths or URLs of all files at or below `url`, or that it matches as a pattern (`*?[`), sorted; and whether it is a folder.
    Below a folder, what begins with `.` or `_` is left out, as other readers of datasets do.

    Raises what `translated` says: InvalidJob, Fatal, Transient.
    """
    try:
        client, path = make_client(url)
        if client.isdir(path):
            found, is_folder = [name for name in client.find(path) if not re.search("/[._]", name.removeprefix(path))], True
        elif client.exists(path):  # before the glob: a file's own name may hold `[`
            found, is_folder = [path], False
        else:
            found, is_folder = (client.glob(path) if any(sign in path for sign in "*?[") else []), False
    except Exception as error:  # each store's package has errors of its own
        if "://" not in url and isinstance(error, OSError):
            raise InvalidJob(f"cannot be read: {error.strerror or error}") from error
        meant = translated(error, f"read {url}")
        if isinstance(meant, KeyError):
            return [], False
        raise meant from error
    return sorted(client.unstrip_protocol(name) if "://" in url else name for name in found), is_folder


def probe(store: Store) -> None:
    """Prove that the store can be written and honours create-if-absent. Raises Fatal or InvalidJob."""
    key = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
    with contextlib.suppress(AlreadyExists):  # our own, whose reply was lost: nobody else knows this name
        store.put_if_absent(key, b"1")
    try:
        store.put_if_absent(key, b"2")
    except AlreadyExists:
        if store.read(key) == b"1":
            return
    finally:
        store.delete(key)
    raise Fatal(
        f"{store.url} does not honour create-if-absent: two writers could both believe that they committed a part; use another store, or, "
        "if nothing else will ever write there at the same time, say so: output.single_writer: true"
    )
