"""renderfarm: a Parquet table of prompts in, a verified image dataset out.

>>> import renderfarm
>>> job = renderfarm.Job.load("jobs/demo.yaml")         # doctest: +SKIP
>>> summary = job.run()                                 # doctest: +SKIP
>>> for image, record in renderfarm.open(summary.out):  # doctest: +SKIP
...     print(record["prompt"], image.size)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from renderfarm import errors as errors

__version__ = "0.1.0"
__all__ = ["Job", "Output", "errors", "open", "run"]

if TYPE_CHECKING:
    from renderfarm.api import run as run
    from renderfarm.jobs import Job as Job
    from renderfarm.outputs import Output as Output
    from renderfarm.outputs import open as open

# heavy imports wait until they are used, so that `renderfarm --help` answers at once
_LATER = {"run": "api", "Job": "jobs", "Output": "outputs", "open": "outputs"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"renderfarm.{_LATER[name]}"), name)
    raise AttributeError(f"module 'renderfarm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
