"""The values that travel: rows, samples, parts, leases, receipts. Frozen, ordered where order means something."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, order=True)
class SampleKey:
    """One image to make. Seed and name derive from this alone, never from worker, attempt, time or batch place."""

    row: int
    image_index: int


IMAGE_ARGUMENTS = ("image", "mask_image", "control_image")


@dataclass(frozen=True)
class InputImage:
    """An image that a row gives. `source`: the path or URL as the manifest has it, None where it is embedded.
    `data`: the file's bytes, None until they are fetched, and again once the output keeps them under `kept_as`."""

    source: str | None
    data: bytes | None = field(default=None, repr=False)
    picture: Any = field(default=None, repr=False, compare=False)
    """Decoded, at the sample's size; None: whoever needs it decodes it."""
    kept_as: str | None = field(default=None, repr=False, compare=False)
    """The SHA-256 of the file, by which the output keeps it."""

    @property
    def sha256(self) -> str:
        if self.kept_as is not None:
            return self.kept_as
        assert self.data is not None
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Sample:
    """A sample with every argument resolved (row > job > family default); names are diffusers'.

    `height`, `width`: 0 where an input image decides them, until it is fetched. `resize`: how an input image gets to them.
    """

    key: SampleKey
    row_id: str
    prompt: str
    negative_prompt: str | None
    seed: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    prompt_2: str | None = None
    prompt_3: str | None = None
    negative_prompt_2: str | None = None
    negative_prompt_3: str | None = None
    true_cfg_scale: float | None = None
    seed_b: int | None = None
    blend: float | None = None
    adapters: str | None = None
    """LoRA adapters that are on: `name:weight` by name, with commas; see `adapters`."""
    strength: float | None = None
    resize: str | None = None
    image: InputImage | None = None
    mask_image: InputImage | None = None
    control_image: InputImage | None = None
    controlnet_conditioning_scale: float | None = None
    control_guidance_start: float | None = None
    control_guidance_end: float | None = None
    denoising_end: float | None = None


@dataclass(frozen=True)
class RowError:
    """How a sample ended that has no image: one row of the error table."""

    key: SampleKey
    row_id: str
    error_class: str
    error_message: str
    retryable: bool
    prompt_sha256: str | None


@dataclass(frozen=True, order=True, slots=True)
class PartId:
    """Which part of the grid, and which rendering of it. `retry`: 0 for the first one, of all its rows; each later one is a part of its
    own, of samples that had ended as errors (`Retry`)."""

    index: int
    retry: int = 0

    @property
    def name(self) -> str:
        """`part-00000012`, `part-00000012.r1`: what every key of a part derives from."""
        return f"part-{self.index:08d}" + (f".r{self.retry}" if self.retry else "")

    def __str__(self) -> str:
        """For people: `12`, `12.r1`."""
        return f"{self.index}" + (f".r{self.retry}" if self.retry else "")


@dataclass(frozen=True)
class Part:
    """`stop - start` consecutive manifest rows: the unit of commit."""

    index: int
    start: int
    stop: int
    retry: int = 0

    @property
    def id(self) -> PartId:
        return PartId(self.index, self.retry)

    @property
    def name(self) -> str:
        return self.id.name


@dataclass(frozen=True)
class Retry:
    """Somebody wants these samples rendered again, as that part; they had ended as errors in the renderings before it."""

    part: PartId
    samples: frozenset[SampleKey]


@dataclass(frozen=True)
class Lease:
    """Whole consecutive parts for one worker, with their manifest rows (canonical column names, `row` first).

    `losses`: workers that died on it; `node_losses`: nodes that went away under it. `announce_as`: render one row at a time
    and say which under this token, so that the next death names its row. `killers`: rows so named; they end as errors.
    `only`: of a retry, the samples that are asked for.
    """

    number: int
    parts: tuple[Part, ...]
    rows: pa.Table
    losses: int = 0
    node_losses: int = 0
    transient_failures: int = 0
    announce_as: str | None = None
    killers: frozenset[int] = frozenset()
    only: frozenset[SampleKey] | None = None


@dataclass(frozen=True)
class PartReceipt:
    """What a committed part holds. `adopted`: somebody had committed it before us. `superseded`: of a retry, the classes of the
    errors that it has taken the place of. `seconds`: how long it took, by stage (`stages`), where we committed it."""

    part: int
    images: int
    errors: int
    bytes: int
    adopted: bool = False
    error_classes: dict[str, int] = field(default_factory=dict)
    retry: int = 0
    superseded: dict[str, int] = field(default_factory=dict)
    failed: tuple[tuple[int, int, str, str], ...] = field(default=(), compare=False)
    """Of its errors the first ones: row, image index, row id, class."""
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def id(self) -> PartId:
        return PartId(self.part, self.retry)


@dataclass(frozen=True)
class Receipt:
    """A worker's small answer to a lease. The slots are counted since the worker began."""

    lease: int
    parts: tuple[PartReceipt, ...]
    seconds: float
    denoiser_calls: int = 0
    useful_slots: int = 0
    total_slots: int = 0
    slot_groups: int = 1
    """The most that had work at once."""


@dataclass(frozen=True)
class WorkerReady:
    """What a worker says of itself when its pipeline is loaded."""

    worker: str
    profile_sha256: str
    device: str
    load_seconds: float
    batch_size: int
    node: str = ""
    """Where it runs; empty in one process."""
    accelerators: tuple[str, ...] = ()
    """The devices of its node that it was given, as Ray names them; none where it computes on the CPU, or takes what it sees."""
    seconds_per_image: float | None = None
    """Measured where `part_rows: auto` is not frozen yet; None, too, where the device has no room for the usual sample."""
