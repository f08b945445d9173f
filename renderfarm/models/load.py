"""From a model's description to the loaded model. The family's module is imported only here."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import replace
from pathlib import Path

from renderfarm.adapters import check_sha256, read_weights
from renderfarm.config import Workers, is_url
from renderfarm.errors import Fatal
from renderfarm.models.base import SlotModel
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.files import SAFETY
from renderfarm.models.fingerprint import cache_folder, companion_hashes, damaged_blobs, file_sha256, model_sha256, weight_hashes
from renderfarm.models.sources import find_beside, find_model
from renderfarm.models.stores import publish


def load_model(info: ModelInfo, workers: Workers) -> SlotModel:
    """Load the pipeline onto its device, from this machine's own copy of the model. Raises Fatal when it cannot be loaded,
    and Transient where another attempt may fetch it.

    Nothing else may use torch in this process meanwhile (a `SlotLoop` sees to it): until diffusers has loaded, every
    torch module that is made has no data.
    """
    prepare_libraries()
    if info.source is not None:
        beside = {name: getattr(info.source, name) for name in info.companions}
        found = {name: str(find_beside(given, f"model.{name}", weights=True)) for name, given in beside.items()}
        info = replace(info, folder=str(find_model(info.source, weights=True)), companions=found)
        info = replace(info, adapters={name: _local(info, name, path) for name, path in info.adapters.items()})
        _check_files(info)
        _check_adapters(info)
        for name, folder in found.items():
            hashes = companion_hashes(Path(folder), beside[name].variant)
            _check(f"model.{name}", Path(folder), hashes, f"model.{name}.sha256", beside[name].sha256)
    module, _, name = info.adapter.partition(":")
    model: SlotModel = getattr(importlib.import_module(f"renderfarm.models.{module}"), name)(info, workers)
    return model


def prepare_libraries() -> None:
    """What must be said before diffusers and transformers are imported for the first time."""
    # transformers speaks while it is imported, of image processors that nothing here uses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for talker in ("torchao", "torch.utils._pytree"):  # of kernels for other devices, wherever torchao is installed
        logging.getLogger(talker).setLevel(logging.ERROR)
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # read when diffusers is imported: a model is data, never code


def _check_files(info: ModelInfo) -> None:
    folder = Path(str(info.folder))
    _check(f"model {info.id}", folder, weight_hashes(folder, info.variant, safety_checker=info.safety_checker), "model.sha256", info.sha256)


def _local(info: ModelInfo, name: str, path: str) -> str:
    """An adapter's file on this node; of a store's, once per node in the cache."""
    if not is_url(path):
        return path
    field, sha256 = f"model.adapters.{name}", info.adapter_sha256[name]
    file = cache_folder("adapters") / f"{sha256}.safetensors"
    if not file.is_file():
        data = read_weights(field, path)
        check_sha256(field, path, data, sha256)
        publish(file, data, field)
    return str(file)


def _check_adapters(info: ModelInfo) -> None:
    """Raise Fatal for one that is another file on this node than where the job was started."""
    for name, wanted in info.adapter_sha256.items():
        path = info.adapters[name]
        try:
            found = file_sha256(Path(path))
        except OSError as error:
            raise Fatal(f"model.adapters.{name}: {path} cannot be read on this node: {error.strerror}") from None
        if found != wanted:
            raise Fatal(f"model.adapters.{name}: {path} has the hash {found} here, and {wanted} where the job was started")


def _check(what: str, folder: Path, hashes: dict[str, str], field: str, wanted: str | None) -> None:
    """Raise Fatal for a model that is not the one that the hub or the job says."""
    if damaged := damaged_blobs(folder, hashes):
        raise Fatal(f"{what}: these files are not what the hub has; remove them and run again: {', '.join(damaged)}")
    found = model_sha256({file: sha256 for file, sha256 in hashes.items() if file.partition("/")[0] not in SAFETY})
    if wanted not in (None, found):
        raise Fatal(
            f"{what}: its files have the hash {found}, and the job asks for {wanted} ({field}): a file was changed, "
            "damaged, or not fetched to its end; fetch the model again, or give the job the hash of the one you want"
        )
