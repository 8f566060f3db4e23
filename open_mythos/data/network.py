"""Is the Hub within reach? Asked once and quickly: its own client tries for half a minute first."""

import functools
import os
import socket
from urllib.parse import urlsplit

PATIENCE = 1.5  # seconds


class OfflineError(ConnectionError, ValueError):
    """Something of the Hub was asked for and the Hub cannot be reached. One line, with the way out."""


def require_hub(wanted: str, instead: str) -> None:
    """Raises `OfflineError` if `wanted` cannot be had from the Hub; `instead` says what would work."""
    if not hub_in_reach():
        raise OfflineError(
            f"{wanted} is on the Hugging Face Hub, which cannot be reached; go online, or {instead}"
        )


@functools.cache
def hub_in_reach() -> bool:
    """Whether a connection to the Hub (`HF_ENDPOINT`, or a configured proxy) opens within a moment."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxy = next(
        (os.environ[name] for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY") if os.environ.get(name)), ""
    )
    address = urlsplit(proxy if "://" in proxy else f"//{proxy}" if proxy else constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=PATIENCE):
            return True
    except OSError:
        return False
