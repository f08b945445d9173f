"""A view does not fail for what is gone or damaged, which `verify` names. A store that is away is neither: it says nothing of what it
holds, and whoever waits for the view would wait for each of its requests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pyarrow as pa

from renderfarm.errors import RenderfarmError, Transient

GONE = (KeyError, RenderfarmError, pa.ArrowException, OSError, ValueError, TypeError, AttributeError)


@contextlib.contextmanager
def left_out(*others: type[Exception], say: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What is gone or damaged, or raises one of `others`, ends the block; `say` is told. Raises Transient."""
    try:
        yield
    except Transient:
        raise
    except (*GONE, *others):
        say()
