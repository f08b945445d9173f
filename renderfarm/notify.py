"""A job's `notify`: one POST of JSON when its run has ended, however it did. What fails here is a warning and never the run's end."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from renderfarm.config import Notify, expand_env
from renderfarm.errors import InvalidJob

TIMEOUT_S, AT_ONCE_S = 10.0, 2.0
ATTEMPTS = 2
PAUSE_S = 1.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """It would turn the POST into a GET, and carry headers elsewhere."""

    def redirect_request(self, *args: Any) -> None:
        return None


def check(notify: Notify | None) -> None:
    """Raises InvalidJob for what could not be sent at the end; nothing of an expanded URL is shown, which may be a secret."""
    if notify is None:
        return
    for text in notify.headers.values():
        if not expand_env(text).isprintable():
            raise InvalidJob("notify.headers: an environment variable holds a line break or the like; set it without")
    if (reason := _unfit(expand_env(notify.url))) is not None:
        raise InvalidJob(f"notify.url: {reason}; give the https:// or http:// URL that takes a POST")


def _unfit(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "it is no URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "it does not begin with https:// or http:// and a host"
    return "it holds a space or a control character" if any(sign.isspace() or not sign.isprintable() for sign in url) else None


def send(notify: Notify | None, body: dict[str, Any], *, at_once: bool = False) -> str | None:
    """What went wrong, for a person; None where it was taken, or nobody wants to be told. `at_once`: somebody waits for our end."""
    if notify is None:
        return None
    url = expand_env(notify.url)
    headers = {"Content-Type": "application/json", "User-Agent": "renderfarm"}
    headers |= {name: expand_env(text) for name, text in notify.headers.items()}
    request = urllib.request.Request(url, json.dumps(body, ensure_ascii=False).encode(), headers, method="POST")  # noqa: S310 - checked
    opener = urllib.request.build_opener(_NoRedirects)
    reason = ""
    for attempt in range(1 if at_once else ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S)
        try:
            with opener.open(request, timeout=AT_ONCE_S if at_once else TIMEOUT_S):
                return None
        except urllib.error.HTTPError as error:
            reason = f"it answered {error.code}"
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                break
        except urllib.error.URLError as error:
            why = error.reason.strerror if isinstance(error.reason, OSError) else None
            reason = f"it cannot be reached{f' ({why})' if why else ''}"
        except (OSError, http.client.HTTPException) as error:
            reason = f"{type(error).__name__} while it was told"
    return f"notify: {urlsplit(url).hostname} was not told of the run's end: {reason}"
