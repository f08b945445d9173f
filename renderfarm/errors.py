"""Every error that renderfarm raises, and what happens to it.

    RenderfarmError
    ├── InvalidInput        this row cannot be rendered: an error row at once, never retried
    │   ├── OutOfMemory     this shape does not fit the device; the advice is in the message
    │   ├── WorkerCrashed   the row killed the workers that rendered it
    │   ├── NonFiniteOutput the model gave NaN or infinity for this sample, or nothing but black
    │   ├── PromptTruncated the model would not see the whole prompt, and the job wants no such image
    │   └── Filtered        the model's own safety checker refused the image
    ├── RenderFailed        torch or diffusers failed on this sample in a way that nobody foresaw
    ├── Transient           may succeed later (store busy, network): retried with backoff, charged to no row
    │   ├── Expired         the store's credentials are too old: waits for new ones
    │   └── CutOff          a server ends each answer in its middle: three workers in a row may try
    ├── WorkerLost          the worker died or hangs: its lease goes to another one
    │   ├── DeviceLost      its device gives nothing but errors from now on: the process must end
    │   └── NodeLost        its node died or was taken away: nothing of it is charged to the lease's rows
    ├── AlreadyExists       a key that was to be created is there; read it back and adopt it
    ├── Interrupted         somebody wants the run to end now; run it again to continue (exit code 75)
    └── Fatal               the job cannot go on
        ├── InvalidJob      job file, manifest or option is wrong (exit code 2)
        └── ProfileMismatch a worker would render other pixels than the job's profile promises

Foreign errors are translated at one boundary each: torch and diffusers in `models`, files and stores in `storage`,
Parquet in `manifest`, pydantic and YAML in `config`, Ray in `engines.ray`. All of them survive pickling.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_ROWS_FAILED = 3
EXIT_STOPPED = 4
EXIT_STOPPED_BY_USER = 5
EXIT_TIMED_OUT = 6
EXIT_INTERRUPTED = 75


class RenderfarmError(Exception):
    """Base of all; `str(error)` is one message for a person, saying what to do."""

    exit_code = EXIT_INTERNAL
    retryable = True


class InvalidInput(RenderfarmError):
    """This row cannot be rendered, now or later."""

    retryable = False


class OutOfMemory(InvalidInput):
    """The slot group does not fit the device at the job's batch size."""

    retryable = True


class NonFiniteOutput(InvalidInput):
    """The model gave NaN, infinity, or a wholly black picture, which is what those become when they are cast."""


class PromptTruncated(InvalidInput):
    """The prompt has more tokens than the model reads, and the job says `on_truncation: error`."""


class Filtered(InvalidInput):
    """The model's safety checker refused this image. Nothing is rendered in its place."""


class WorkerCrashed(InvalidInput):
    """This row killed the process that rendered it, again and again."""

    retryable = True


class RenderFailed(RenderfarmError):
    """An unforeseen failure while rendering; the message carries the original error."""


class Transient(RenderfarmError):
    """May succeed when tried again."""


class Expired(Transient):
    """The credentials have expired; somebody or something renews them."""


class CutOff(Transient):
    """A server that is there ended its answers too early, again and again."""


class WorkerLost(RenderfarmError):
    """A worker died; nothing is known of the lease but what the store shows."""


class DeviceLost(WorkerLost):
    """The device's context is broken: whatever this process asks of it from now on fails, too."""


class NodeLost(WorkerLost):
    """The worker's node died, or was taken away."""


class AlreadyExists(RenderfarmError):
    """The key exists: someone else's bytes, or our own whose reply was lost."""


class Interrupted(RenderfarmError):
    """A second Ctrl-C or SIGTERM: end now, without waiting for what is in flight."""

    exit_code = EXIT_INTERRUPTED


class Fatal(RenderfarmError):
    """The job stops."""

    exit_code = EXIT_STOPPED


class InvalidJob(Fatal):
    """A job file, manifest, option or output that cannot work as given."""

    exit_code = EXIT_USAGE


class ProfileMismatch(Fatal):
    """This worker's render profile differs from the job's frozen one."""
