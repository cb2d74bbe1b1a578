# SPDX-License-Identifier: Apache-2.0
"""Load test: drives vLLM's benchmark client over several loads (client.py), reads its results (results.py),
draws them (picture.py).
"""
