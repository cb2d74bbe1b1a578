# SPDX-License-Identifier: Apache-2.0
"""The API keys: where they come from, how they are compared, when they are read again."""

import asyncio
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from server import metrics
from server.errors import ServerError

logger = logging.getLogger("pvq.keys")

_CHECK_INTERVAL_S = 2.0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path) -> dict[str, bytes]:
    """Return the keys of the file ``path`` as name -> SHA-256 digest.

    A line is ``KEY`` or ``NAME KEY``; empty lines and lines that begin with # do not count. A key without a name
    is called ``line N``.

    Raises:
        ServerError: the file cannot be read, holds no key, or names two keys alike. No message shows a key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ServerError(
            f"--api-key-file {path} cannot be read ({error.strerror}): give a file of keys"
        ) from None
    except UnicodeDecodeError:
        raise ServerError(
            f"--api-key-file {path} is not text in UTF-8: give a file of keys, one a line"
        ) from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) > 2:
            raise ServerError(f"{path}, line {number} has {len(parts)} words: write KEY or NAME KEY")
        name = parts[0] if len(parts) == 2 else f"line {number}"
        if name in keys:
            raise ServerError(
                f"{path}, line {number} uses the name {name} again: give each key a name of its own"
            )
        keys[name] = _digest(parts[-1])
    if not keys:
        raise ServerError(
            f"{path} holds no key: write one a line, or leave --api-key-file out to serve without"
        )
    return keys


class KeyStore:
    """The valid keys. Without any, every request passes.

    The keys themselves are not kept, only their digests; a comparison looks at all of them, so its time tells
    nothing about which one nearly matched.
    """

    def __init__(self, keys: Iterable[str] = (), path: Path | None = None) -> None:
        """Take the keys of the settings, which never change, and those of the file ``path``, if any."""
        self._fixed = {f"key {number}" if number else "key": _digest(key) for number, key in enumerate(keys)}
        self._path = path
        self._stamp = self._now()
        self._keys = self._fixed | (read_keys(path) if path else {})
        metrics.API_KEYS.set(len(self._keys))
        if path is not None and stat.S_IMODE(path.stat().st_mode) & 0o077:
            logger.warning("%s can be read by other users of this machine: chmod 600 %s", path, path)

    def __len__(self) -> int:
        return len(self._keys)

    def name_of(self, authorization: str) -> str | None:
        """Return the name of the key in an Authorization header (``Bearer KEY``); None if it is not valid."""
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip())
        matches = [name for name, known in self._keys.items() if secrets.compare_digest(digest, known)]
        return matches[0] if matches and scheme.lower() == "bearer" else None

    def reload(self) -> None:
        """Read the file again. If it cannot be used, say so in the log and go on with the keys there are."""
        if self._path is None:
            return
        self._stamp = self._now()
        try:
            self._keys = self._fixed | read_keys(self._path)
        except ServerError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        metrics.API_KEYS.set(len(self._keys))
        logger.info("%d keys are valid now", len(self._keys))

    async def watch(self) -> None:
        """Read the file again whenever it has changed; runs until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            if self._now() != self._stamp:
                self.reload()

    def _now(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._path) if self._path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None
