"""renderfarm: a Parquet table of prompts in, a verified image dataset out.

>>> import renderfarm
>>> summary = renderfarm.run("jobs/demo.yaml")          # doctest: +SKIP
>>> for image, record in renderfarm.open(summary.out):  # doctest: +SKIP
...     print(record["prompt"], image.size)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from renderfarm.api import run as run
    from renderfarm.reading import open as open


def __getattr__(name: str) -> Any:
    # heavy imports wait until they are used, so that `renderfarm --help` answers at once
    if name == "run":
        from renderfarm.api import run

        return run
    if name == "open":
        from renderfarm.reading import open as open_

        return open_
    raise AttributeError(f"module 'renderfarm' has no attribute {name!r}")
