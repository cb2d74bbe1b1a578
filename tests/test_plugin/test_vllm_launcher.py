# SPDX-License-Identifier: Apache-2.0
"""vLLM's command line through this package."""

from pvq_vllm.vllm_launcher import split_commands


def test_launcher_splits_commands():
    assert split_commands(["bench", "a", "--next", "bench", "b"]) == [["bench", "a"], ["bench", "b"]]
    assert split_commands(["--next", "x"]) == [["x"]] and split_commands([]) == []
