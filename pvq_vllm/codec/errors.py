# SPDX-License-Identifier: Apache-2.0
"""The one exception of this project for input that cannot be used."""


class PVQError(ValueError):
    """Bad input: one sentence that names the file or argument and says what to do.

    The command line prints the sentence without a traceback and exits with status 2.
    """
