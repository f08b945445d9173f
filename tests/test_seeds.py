"""Seeds depend on identity only."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from renderfarm.seeds import MAX_SEED, SeedPolicy, sample_seed

POLICIES = st.sampled_from(["derive", "same"])
SEEDS = st.integers(0, MAX_SEED - 10_000)
IDS = st.text(max_size=40)
INDICES = st.integers(0, 9_999)


@given(policy=POLICIES, job_seed=SEEDS, row_id=IDS, row_seed=SEEDS, image=INDICES)
def test_a_rows_own_seed_counts_up_per_image_whatever_the_job_says(
    policy: SeedPolicy, job_seed: int, row_id: str, row_seed: int, image: int
) -> None:
    assert sample_seed(policy, job_seed, row_id, row_seed, image) == row_seed + image


@given(job_seed=SEEDS, row_id=IDS, other=IDS, image=INDICES)
def test_the_policy_same_gives_every_row_the_jobs_seed(job_seed: int, row_id: str, other: str, image: int) -> None:
    seed = sample_seed("same", job_seed, row_id, None, image)
    assert seed == sample_seed("same", job_seed, other, None, image) == job_seed + image


@given(job_seed=SEEDS, row_id=IDS, image=INDICES)
def test_a_derived_seed_is_the_first_32_bits_of_the_identitys_sha256(job_seed: int, row_id: str, image: int) -> None:
    text = str(job_seed).encode() + b"\x00" + row_id.encode() + b"\x00" + str(image).encode()
    assert sample_seed("derive", job_seed, row_id, None, image) == int(hashlib.sha256(text).hexdigest()[:8], 16)


def test_a_derived_seed_never_changes_between_versions() -> None:
    assert [sample_seed("derive", 0, "p0", None, k) for k in range(3)] == [1215550114, 1970846831, 1270576507]
    assert sample_seed("derive", 7, "круг", None, 0) == 1413318040


def test_ten_thousand_identities_get_different_noise_but_for_chance() -> None:
    seeds = {sample_seed("derive", job, f"p{row}", None, k) for job in (0, 1) for row in range(1000) for k in range(5)}
    assert len(seeds) > 9_990  # 32 bits: about 0.01 collisions are expected
