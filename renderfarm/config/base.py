"""What the models of a job file have in common: strict fields, places and their environment variables."""

from __future__ import annotations

import os
import re

from pydantic import BaseModel, ConfigDict

from renderfarm.errors import InvalidJob


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


SIGNED = (
    r"sig|auth|pwd|accesstoken|apikey|awsaccesskeyid|googleaccessid|x-(?:amz|goog)-[\w-]+"
    r"|(?!page_token)(?:[\w-]*[_-])?(?:token|key|secret|signature|password|passwd)"
)
"""What URLs that let their bearer in call it, in their queries: S3, Google and Azure sign them so, and hooks are told so."""


def is_path(text: str) -> bool:
    """Whether a text may be the path of a PEM file, and is not what such a file holds."""
    return "-----" not in text and "\n" not in text and len(text) < 4096


def check_credentials(place: str, text: str) -> None:
    """Raises InvalidJob for a URL with a password or a token, which would be written into the output."""
    # the secret may hold slashes, as AWS keys do; `host:9000/…@…` is a port and a path; `abfs://container@account` is a place
    if re.match(r"^([a-z0-9+.-]+://[^/@:]*:(?!\d+/)[^@]*@|https?://[^/@?#]*@)", text, re.IGNORECASE):
        raise InvalidJob(f"the URL in {place} holds credentials; remove them and use the environment's own credential chain")
    if is_url(text) and (signed := re.search(rf"[?&;#]({SIGNED})=(?!\$\{{)", text, re.IGNORECASE)):
        instead = (
            "put it into an environment variable, and write ${NAME} here"
            if place == "notify.url"
            else "give the file itself, or a store's URL (s3://…) with credentials from the environment"
        )
        raise InvalidJob(f"the URL in {place} holds credentials (its {signed[1]}), which would be kept: {instead}")


def expand_env(text: str) -> str:
    """Replace `${NAME}` by the environment's value; an unset one is an error, never an empty string."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InvalidJob(f"the job uses ${{{match[1]}}}, but that environment variable is not set; set it and run again")
        return os.environ[match[1]]

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value, text)


def is_url(text: str) -> bool:
    return re.match(r"^[a-z0-9+.-]+://", text, re.IGNORECASE) is not None
