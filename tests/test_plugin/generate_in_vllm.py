# SPDX-License-Identifier: Apache-2.0
"""Run by test_generate.py in a process of its own: generate greedily with vLLM, for one folder after another.

    python generate_in_vllm.py REQUEST.json ANSWER.json

REQUEST: {"prompts": [[token id]], "max_tokens": n, "runs": [keyword arguments of LLM]}. ANSWER: for every run
the generated ids, the mean of -log p over the prompts' tokens but the first of each, and, where vLLM runs in this
process, the bytes of every parameter.
"""

import json
import os
import sys
from pathlib import Path


def main(request_path: str, answer_path: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(Path(request_path).read_text())
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, prompt_logprobs=0
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    answers = []
    for arguments in request["runs"]:
        llm = LLM(**{"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4} | arguments)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        losses = [
            -given[token].logprob
            for output in outputs
            for token, given in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        answer = {
            "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
            "prompt_loss": sum(losses) / len(losses),
        }
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            (answer["parameter_bytes"],) = llm.apply_model(
                lambda model: {name: parameter.nbytes for name, parameter in model.named_parameters()}
            )
        answers.append(answer)
        del llm
        cleanup_dist_env_and_memory()
    Path(answer_path).write_text(json.dumps(answers))


if __name__ == "__main__":  # vLLM's spawned workers import this file again
    main(*sys.argv[1:])
