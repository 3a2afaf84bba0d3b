"""API keys and rate limits. The server keeps hashes of keys; a key itself is shown once, when it is made."""

import hashlib
import hmac
import secrets
import time
from pathlib import Path

from fluid_core.serving.errors import ApiError

PREFIX = "sk-fluid-"


def new_key(name: str, path: str | Path) -> str:
    """Make a key, append `name:sha256` to the file at `path`, and return the key.

    Raises:
        ValueError: the name is taken, holds ':' or spaces, or begins with '#'.
    """
    if not name or ":" in name or name.split() != [name] or name.startswith("#"):  # '#' would make its line a comment
        raise ValueError(f"key name {name!r}: use letters and digits without spaces, ':' or a leading '#'")
    path = Path(path)
    if path.is_file() and name in load_keys(path):
        raise ValueError(f"{path} has a key named {name!r} already: remove its line first")
    key = PREFIX + secrets.token_urlsafe(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    with open(path, "a") as file:
        file.write(f"{name}:{_digest(key)}\n")
    return key


def load_keys(path: str | Path) -> dict[str, str]:
    """name -> sha256 of its key.

    Raises:
        ValueError: the file is missing, empty, or has a line that is not `name:sha256`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"serving.api_keys_file {path} does not exist: make a key with pipelines/serve.py --new-key NAME")
    keys = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digest = line.strip().partition(":")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"{path} line {number}: write name:sha256 (64 hex digits), never the key itself")
        keys[name] = digest
    if not keys:
        raise ValueError(f"{path} holds no key: make one with pipelines/serve.py --new-key NAME")
    return keys


class Authenticator:
    """Names the client behind a request, or refuses it. Without keys every client is named by its address."""

    def __init__(self, keys: dict[str, str] | None):
        self._keys = keys

    def client(self, authorization: str | None, address: str) -> str:
        """Raises ApiError 401."""
        if self._keys is None:
            return f"address:{address}"
        scheme, _, key = (authorization or "").partition(" ")
        presented = _digest(key.strip()) if scheme.lower() == "bearer" else ""
        found = None
        # Every key is compared, each in constant time: the time taken tells nothing about which was close.
        for name, digest in self._keys.items():
            if hmac.compare_digest(digest, presented):
                found = name
        if found is None:
            raise ApiError(401, "invalid_api_key", "missing or wrong API key: send Authorization: Bearer <key>")
        return f"key:{found}"


class RateLimiter:
    """A token bucket for each client: `per_minute` requests a minute, as many at once."""

    def __init__(self, per_minute: int | None):
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> None:
        """Raises ApiError 429 with the time until the next request would pass."""
        if self._per_minute is None:
            return
        now = time.monotonic()
        rate = self._per_minute / 60
        level, since = self._buckets.get(client, (float(self._per_minute), now))
        level = min(float(self._per_minute), level + (now - since) * rate)
        if level < 1:
            self._buckets[client] = (level, now)
            raise ApiError(
                429, "rate_limit_exceeded", f"more than {self._per_minute} requests a minute", retry_after=(1 - level) / rate
            )
        self._buckets[client] = (level - 1, now)
        if len(self._buckets) > 10_000:
            # Clients whose bucket is full again need no entry.
            self._buckets = {c: (v, t) for c, (v, t) in self._buckets.items() if v + (now - t) * rate < self._per_minute}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
