# SPDX-License-Identifier: Apache-2.0
"""The demo, ``make demo``: from a real model to a served one, with numbers. Drives the command ``pvq``; has
no logic of its own.
"""
