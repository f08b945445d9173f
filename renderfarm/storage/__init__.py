"""The one boundary to where bytes live. Foreign errors become renderfarm's here. What a store promises: `base`."""

from __future__ import annotations

import os
import uuid

from renderfarm.errors import AlreadyExists, Fatal, InvalidJob
from renderfarm.storage.base import OURS, TEMPORARY, Store, Stored
from renderfarm.storage.local import LocalStore
from renderfarm.storage.memory import MemoryStore

__all__ = ["OURS", "TEMPORARY", "LocalStore", "MemoryStore", "Store", "Stored", "open_store", "probe"]


def open_store(url: str) -> Store:
    """The store behind a path or URL. Creates nothing."""
    if url.startswith("memory://"):
        return MemoryStore(url)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" in url:
        scheme = url.partition("://")[0]
        raise InvalidJob(f"output {url}: {scheme}:// is not supported yet; write to a local path (or memory:// with --engine inline)")
    return LocalStore(os.path.abspath(url))


def probe(store: Store) -> None:
    """Prove that the store can be written and honours create-if-absent. Raises Fatal or InvalidJob."""
    key = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
    store.put_if_absent(key, b"1")
    try:
        store.put_if_absent(key, b"2")
    except AlreadyExists:
        return
    finally:
        store.delete(key)
    raise Fatal(f"{store.url} does not honour create-if-absent: two writers could both believe that they committed a part")
