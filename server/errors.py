# SPDX-License-Identifier: Apache-2.0
"""The one exception of this package for input that cannot be used."""


class ServerError(ValueError):
    """Bad input: one sentence that names the file or argument and says what to do; ``pvq`` prints it and
    exits with status 2.
    """
