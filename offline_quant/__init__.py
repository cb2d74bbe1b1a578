# SPDX-License-Identifier: Apache-2.0
"""How to find good values for a PVQ checkpoint: calibration, error feedback, writing, evaluation (never
imports vLLM).
"""
