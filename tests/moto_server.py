"""moto's S3 as a process, `python moto_server.py -H HOST -p PORT`, whose create-if-absent is one step, as that of S3 is: moto looks
whether the key is there and then stores it, and on a busy machine another request's thread comes in between."""

from __future__ import annotations

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

ONE_AT_A_TIME = threading.RLock()


def alone(name: str) -> None:
    handle = getattr(S3Response, name)

    def handled(self: S3Response, *given: Any, **named: Any) -> Any:
        with ONE_AT_A_TIME:
            return handle(self, *given, **named)

    setattr(S3Response, name, handled)


if __name__ == "__main__":
    alone("_key_response_put")
    alone("_key_response_post")
    main()
