"""Download through other packages, and report soon if their host cannot be reached.

These packages retry for half a minute, or wait without a limit, and then report no cause.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any
from urllib.parse import urlsplit

from lingua.errors import UserError

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")  # as huggingface_hub reads it
CONNECT_LIMIT = 3.0  # seconds until a host without an answer counts as out of reach
CACHE_LIMIT = 1.5  # seconds in which a call may end that needs no network


def call_online(call: Callable[[], Any], url: str, what: str) -> Any:
    """Return `call()`, which downloads `what` from the host of `url`, and raise what it raises.

    UserError if it has not ended after a few seconds, or failed, and the host cannot be reached.
    """
    start = time.monotonic()
    result, obstacle = _start(call), _start(lambda: find_obstacle(url))

    def wait_for(future: Future, limit: float) -> bool:
        wait([future], max(start + limit - time.monotonic(), 0))
        return future.done()

    wait([result, obstacle], CONNECT_LIMIT, return_when="FIRST_COMPLETED")
    if not result.done() or result.exception():
        is_known = wait_for(obstacle, CONNECT_LIMIT)
        problem = obstacle.result() if is_known else f"no answer in {CONNECT_LIMIT:g} s"
        if problem and (not wait_for(result, CACHE_LIMIT) or result.exception()):
            raise UserError(
                f"no connection to {urlsplit(url).hostname} ({problem}): {what} cannot be "
                "downloaded; connect this machine, or copy the files from one that is connected"
            )
    return result.result()


def find_obstacle(url: str) -> str | None:
    """Return why the host of `url` cannot be reached, or None. Proxies are used as in urllib."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_LIMIT)
    except urllib.error.HTTPError:
        return None  # an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None


def _start(call: Callable[[], Any]) -> Future:
    """Run `call` in a thread that does not delay the end of the program."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
