"""The one boundary to where bytes live. Foreign errors become renderfarm's here. What a store promises: `base`."""

from __future__ import annotations

import contextlib
import os
import uuid

from renderfarm.errors import AlreadyExists, Fatal, InvalidJob
from renderfarm.storage.base import OURS, TEMPORARY, Store, Stored
from renderfarm.storage.clients import EXTRAS
from renderfarm.storage.cloud import PATIENCE_S, CloudStore
from renderfarm.storage.local import LocalStore
from renderfarm.storage.memory import MemoryStore

__all__ = ["OURS", "TEMPORARY", "CloudStore", "LocalStore", "MemoryStore", "Store", "Stored", "open_store", "probe"]


def open_store(url: str, *, single_writer: bool = False, patience_s: float = PATIENCE_S) -> Store:
    """The store behind a path or URL. Creates nothing, and asks for nothing yet. The options are those of `CloudStore`."""
    if url.startswith("memory://"):
        return MemoryStore(url)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return LocalStore(os.path.abspath(rest if separator else url))
    if scheme not in EXTRAS:
        raise InvalidJob(f"{url}: {scheme}:// cannot be written; give a folder, or {', '.join(f'{name}://' for name in EXTRAS)}")
    return CloudStore(url, single_writer=single_writer, patience_s=patience_s)


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
