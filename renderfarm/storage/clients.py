"""fsspec's clients for stores: how each is made, and what its errors mean.

Credentials come from each client's own chain (environment, profile files, instance roles), read anew with every client.
Retries are ours alone (`cloud`): a client that retries by itself multiplies the waiting.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from renderfarm.errors import AlreadyExists, Expired, Fatal, InvalidJob, RenderfarmError, Transient

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
CONNECT_S, ANSWER_S = 10, 60

_S3: dict[str, Any] = {
    "use_listings_cache": False,  # it hides what others wrote
    "config_kwargs": {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": CONNECT_S,
        "read_timeout": ANSWER_S,
        "max_pool_connections": 64,
    },
}
_AZURE: dict[str, Any] = {"use_listings_cache": False, "connection_timeout": CONNECT_S, "read_timeout": ANSWER_S}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3, "az": _AZURE, "abfs": _AZURE, "abfss": _AZURE}


def _google() -> dict[str, Any]:
    """Without it, a request that is never answered is waited for without end."""
    from aiohttp import ClientTimeout

    return {"use_listings_cache": False, "requests_timeout": ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=ANSWER_S)}


# What the stores call it: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and
# https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
_OLD_CREDENTIALS = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidAuthenticationInfo"}
_OLD_CREDENTIALS |= {"RefreshError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError", "CredentialRetrievalError"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed", "AuthorizationFailure", "403", "401"}
# a shared access signature; no bucket's or role's name, which such texts hold, too
_SIGNATURE_EXPIRED = re.compile(r"(token|request|signature|credentials?) (has |have |is )?expired|specified time frame", re.IGNORECASE)
REFUSED = "refused with the credentials of this environment ({}); give rights to it, or other credentials"
_MEANINGS: tuple[tuple[set[str], type[RenderfarmError], str], ...] = (
    (_OLD_CREDENTIALS, Expired, "the credentials have expired ({}); renew them"),
    (
        {"NoSuchBucket", "ContainerNotFound", "AccountNotFound"},
        InvalidJob,
        "there is no such bucket or container ({}); create it, or correct the URL",
    ),
    (
        {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"},
        InvalidJob,
        "the bucket is in another region ({}); set AWS_DEFAULT_REGION to it",
    ),
    ({"RequestTimeTooSkewed"}, Fatal, "this machine's clock is wrong ({}); set it, and run again"),
    (
        {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"},
        Fatal,
        "the store is full ({}); free some space and run again (nothing committed is lost)",
    ),
    (
        {"InvalidBucketName", "ParamValidationError", "InvalidResourceName", "InvalidUri"},
        InvalidJob,
        "the URL names no possible place ({}); correct it",
    ),
    ({"PreconditionFailed", "BlobAlreadyExists", "ConditionNotMet", "412"}, AlreadyExists, "it exists ({})"),
    (_DENIED, Fatal, REFUSED),
    (
        {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError"},
        InvalidJob,
        "there are no credentials in this environment ({}); set the store's usual variables or profile",
    ),
    ({"NotImplemented", "MethodNotAllowed", "501"}, Fatal, "the store does not know this request ({})"),
)


def make_client(url: str) -> tuple[Any, str]:
    """A fresh fsspec file system, and the path in it. Raises InvalidJob for one that is not installed."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        options = _google() if scheme in ("gs", "gcs") else _OPTIONS.get(scheme, {})
        client, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        advice = f"pip install 'renderfarm[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        raise InvalidJob(f"{scheme}:// needs another package: {advice}") from error
    except ValueError as error:
        if scheme not in EXTRAS:
            raise InvalidJob(_line(error)) from error
        raise InvalidJob(  # adlfs asks for an account at once, the others at the first request
            f"{url} cannot be opened with the settings of this environment ({_line(error)}); set the store's usual variables or profile"
        ) from error
    client.retries = 1
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback for each error that it also raises
    if scheme in ("s3", "s3a"):
        client.cat_file = partial(client.cat_file, max_concurrency=1)  # else it asks for the size first, each time
    return client, path.rstrip("/")


def translated(error: Exception, doing: str) -> RenderfarmError | KeyError:
    """What a client's error means. KeyError: there is no such key.

    `doing`: "write a/b in s3://bucket/out".
    """
    if isinstance(error, RenderfarmError):
        return error
    words, said = set(_words(error)), _line(error)
    if words & _DENIED and _SIGNATURE_EXPIRED.search(str(error)):
        words |= _OLD_CREDENTIALS
    if "NoSuchUpload" in words:  # aborted behind our back, or by the client itself after a lost reply: what is stored shows at the next try
        return Transient(f"cannot {doing}: {said}")
    for names, kind, meaning in _MEANINGS:
        if words & names:
            return kind(f"cannot {doing}: {meaning.format(said)}")
    if isinstance(error, FileExistsError):
        return AlreadyExists(f"cannot {doing}: it exists")
    if isinstance(error, FileNotFoundError) or words & {"404", "NoSuchKey", "BlobNotFound"}:
        return KeyError(doing)
    if isinstance(error, PermissionError):
        return Fatal(f"cannot {doing}: {REFUSED.format(said)}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fatal(f"cannot {doing}: {said}; free some space and run again (nothing committed is lost)")
    return Transient(f"cannot {doing}: {said}")


def _words(error: BaseException | None) -> Iterator[str]:
    """All by which an error and its causes say what they are: class names, codes, HTTP statuses."""
    seen = set[int]()
    # one of ours is what was being handled when this request was made, and no cause of it
    while error is not None and not isinstance(error, RenderfarmError) and id(error) not in seen:
        seen.add(id(error))
        yield type(error).__name__
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore's ClientError
            yield str(response.get("Error", {}).get("Code"))
            yield str(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for name in ("status_code", "code", "status", "error_code"):  # azure-core, gcsfs, aiohttp
            value = getattr(error, name, None)
            yield str(getattr(value, "value", value))
        if str(error).startswith("Forbidden: "):  # gcsfs
            yield "403"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _line(error: BaseException) -> str:
    """One line, without what a signed URL or a header would give away."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"(\w+://[^\s?]+)\?\S+", r"\1?…", lines[0] if lines else "")
    return text[:300] or type(error).__name__
