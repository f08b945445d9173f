"""The error tree: what its docstring draws, and that every error survives the way between processes."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from renderfarm import errors
from renderfarm.errors import Fatal, InvalidInput, InvalidJob, RenderfarmError

CLASSES = sorted(
    (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RenderfarmError)),
    key=lambda kind: kind.__name__,
)


def drawn_tree(docstring: str) -> dict[str, str]:
    """Class name → its parent's, as the docstring draws them."""
    parents: dict[str, str] = {}
    above: dict[int, str] = {}
    for line in docstring.splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(  |$| [a-z])", line)
        if match and (match[1] or match[2] == "RenderfarmError"):
            depth = len(match[1]) // 4
            above[depth] = match[2]
            if depth:
                parents[match[2]] = above[depth - 1]
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert drawn_tree(errors.__doc__ or "") == {
        kind.__name__: kind.__bases__[0].__name__ for kind in CLASSES if kind is not RenderfarmError
    }


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling_with_its_message(kind: type[RenderfarmError], protocol: int) -> None:
    error = kind("shot 7: „quer“ is not a sampler\nuse euler")
    there = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301  our own bytes
    assert type(there) is kind
    assert (str(there), there.args) == (str(error), error.args)
    assert (there.exit_code, there.retryable) == (kind.exit_code, kind.retryable)
    assert str(copy.deepcopy(error)) == str(error)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_says_in_its_docstring_what_it_means(kind: type[RenderfarmError]) -> None:
    assert kind.__doc__
    assert kind.__doc__.endswith(".") or '"' in kind.__doc__


def test_exit_codes_tell_a_wrong_job_from_a_stopped_one() -> None:
    assert InvalidJob.exit_code == errors.EXIT_USAGE == 2
    assert Fatal.exit_code == errors.ProfileMismatch.exit_code == errors.EXIT_STOPPED == 4
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert len(set(codes)) == len(codes)


def test_a_wrong_row_is_not_retried_but_one_that_the_machine_failed_may_be() -> None:
    assert not InvalidInput.retryable
    assert not errors.NonFiniteOutput.retryable
    assert errors.OutOfMemory.retryable
    assert errors.WorkerCrashed.retryable
    assert errors.RenderFailed.retryable
