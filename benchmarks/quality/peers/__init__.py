# SPDX-License-Identifier: Apache-2.0
"""Other quantizers, each run in an environment of its own; ``environments.py`` makes them."""
