# SPDX-License-Identifier: Apache-2.0
"""What a PVQ checkpoint is: codebooks, rotation, file format (docs/format.md). Knows nothing of vLLM."""
