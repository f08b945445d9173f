"""LoRA adapters: how a row says which are on, and the files that they are."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Collection, Mapping

from renderfarm.config import Adapter, expand_env
from renderfarm.errors import InvalidInput, InvalidJob
from renderfarm.storage import open_file

OFF = "none"
MAX_WEIGHT = 10.0


def parse(text: str | None, known: Collection[str]) -> dict[str, float]:
    """`detail:0.8, style` → {"detail": 0.8, "style": 1.0}, by name; nothing and `none`: empty. Raises InvalidInput.

    >>> parse("style, detail:0.8", ["detail", "style"])
    {'detail': 0.8, 'style': 1.0}
    """
    if text is None or text.strip() in ("", OFF):
        return {}
    found: dict[str, float] = {}
    for piece in text.split(","):
        name, colon, weight = (step.strip() for step in piece.partition(":"))
        if name not in known:
            raise InvalidInput(f"adapters: {name!r} is not one of the job's model.adapters ({', '.join(sorted(known)) or 'it has none'})")
        if name in found:
            raise InvalidInput(f"adapters: {name!r} is named twice; name it once")
        try:
            found[name] = float(weight) if colon else 1.0
        except ValueError:
            raise InvalidInput(f"adapters: {weight!r} is not a weight; write them as name:0.8") from None
        if not math.isfinite(found[name]) or abs(found[name]) > MAX_WEIGHT:
            raise InvalidInput(f"adapters: the weight of {name} is {weight}; it must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
    return dict(sorted(found.items()))


def written(weights: Mapping[str, float]) -> str | None:
    """The one spelling of a set, for tables and slot groups; None: no adapter is on."""
    return ",".join(f"{name}:{weight!r}" for name, weight in weights.items() if weight) or None


def read_files(adapters: Mapping[str, Adapter]) -> dict[str, bytes]:
    """The adapters' bytes. Raises InvalidJob where one cannot be an adapter, or is not the one that the job asks for."""
    found = {name: read_weights(f"model.adapters.{name}", given.weights) for name, given in adapters.items()}
    for name, given in adapters.items():
        check_sha256(f"model.adapters.{name}", given.weights, found[name], given.sha256)
    return found


def read_weights(field: str, given: str) -> bytes:
    """A `.safetensors` file's bytes. Raises InvalidJob, naming the job's `field`, where it can be none."""
    data = read_file(field, given, ".safetensors", "other formats may hold code, so convert it")
    if data[8:9] != b"{" or 8 + int.from_bytes(data[:8], "little") > len(data):
        raise InvalidJob(f"{field}: {expand_env(given)} is damaged, or no safetensors file; fetch it again")
    return data


def read_file(field: str, given: str, ending: str, advice: str) -> bytes:
    """The bytes of a file that the job names, by path or a store's URL. Raises InvalidJob where it has another ending, with advice, or
    cannot be read, and what a store raises."""
    path = expand_env(given)
    if not path.endswith(ending):
        raise InvalidJob(f"{field}: {path} is no {ending} file; {advice}")
    try:
        with open_file(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return file.read(size)  # a size, since a store gives the rest of a file in small pieces
    except KeyError:
        reason = "No such file or directory"
    except OSError as error:
        reason = error.strerror or str(error)
    raise InvalidJob(f"{field}: {path} cannot be read: {reason}; paths start at the job file") from None


def check_sha256(field: str, path: str, data: bytes, wanted: str | None) -> None:
    """Raises InvalidJob for another file than the job's hash says; None: it says none."""
    if wanted not in (None, found := sha256(data)):
        raise InvalidJob(
            f"{field}: {path} has the hash {found}, and the job asks for {wanted}: it was changed, damaged, or "
            "not fetched to its end; fetch it again, or give the job the hash of the one you want"
        )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
