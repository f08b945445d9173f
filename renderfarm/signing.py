"""C2PA (Content Credentials): a file signed as the last thing that happens to it, and what a signature is worth."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from renderfarm.config import C2pa
from renderfarm.errors import Fatal, InvalidJob

# No picture in the signature: it would cost ten times the time and 190 KB a file. And nothing is fetched from anywhere.
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
_BOX = b"jumdc2pa"  # how the description of a C2PA manifest store begins, in every kind of file

Sign = Callable[[bytes, str, str], bytes]


def library() -> Any:
    """c2pa-python. Raises InvalidJob where it is missing."""
    try:
        import c2pa
    except ImportError:
        raise InvalidJob("output.c2pa needs the package c2pa-python: pip install 'renderfarm[c2pa]'") from None
    return c2pa


def signer(given: C2pa) -> Sign:
    """What signs a file: its bytes, its MIME type and the IPTC digital source type of its picture → the signed bytes.

    Threads may share it. Raises Fatal for a certificate or key with which nothing can be signed; it never says what is in a key.
    """
    c2pa = library()
    chain, key = _read("certificate", given.certificate), _read("private_key", given.private_key)
    try:
        context = c2pa.Context.from_dict(_SETTINGS)
        credentials = c2pa.Signer.from_info(c2pa.C2paSignerInfo(given.algorithm, chain, key, None))
    except c2pa.C2paError as error:
        raise _unusable(given, error) from None

    def sign(data: bytes, mime: str, source_type: str) -> bytes:
        created = {"action": "c2pa.created", "digitalSourceType": source_type}
        manifest = {
            "claim_generator_info": [{"name": "renderfarm"}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
        signed = io.BytesIO()
        try:
            c2pa.Builder.from_json(json.dumps(manifest), context=context).sign(credentials, mime, io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise _unusable(given, error) from None
        return signed.getvalue()

    trial = io.BytesIO()
    Image.new("RGB", (8, 8)).save(trial, "PNG")
    sign(trial.getvalue(), "image/png", "")  # a key that is not the certificate's shows itself only here
    return sign


def _read(what: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Fatal(f"output.c2pa.{what}: {path} cannot be read: {error.strerror}; every worker needs the file") from None


def _unusable(given: C2pa, error: Exception) -> Fatal:
    return Fatal(
        f"output.c2pa: cannot sign with {given.certificate} and its key ({error}); give the signing certificate first, then those up to "
        f"its root, the certificate's own key, and its algorithm (here {given.algorithm})"
    )


def signature(data: bytes, mime: str) -> dict[str, Any] | None:
    """Who signed a file and whether its bytes are still those: None where nobody did. Trust in the signer is nobody's to say here."""
    if _BOX not in data:
        return None
    try:
        c2pa = library()
    except InvalidJob:
        return {"state": "not checked (needs renderfarm[c2pa])"}
    try:
        reader = c2pa.Reader(mime, io.BytesIO(data), context=c2pa.Context.from_dict(_SETTINGS))
        said = (reader.get_active_manifest() or {}).get("signature_info") or {}
        return {"state": reader.get_validation_state(), "signed_by": said.get("common_name"), "issuer": said.get("issuer")}
    except c2pa.C2paError as error:
        return {"state": f"unreadable ({error})"}
