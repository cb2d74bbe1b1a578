# SPDX-License-Identifier: Apache-2.0
"""The one exception of this package for input that cannot be used, and how a command reports it."""

import contextlib
import sys
from collections.abc import Iterator

import typer


class ServerError(ValueError):
    """Bad input: one sentence that names the file or argument and says what to do; ``pvq`` prints it and
    exits with status 2.
    """


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Print a ServerError as one sentence and end with status 2."""
    try:
        yield
    except ServerError as error:
        print(f"pvq: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
