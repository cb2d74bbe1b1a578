# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: small random models with a real tokenizer, as Hugging Face folders."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what this build or this machine cannot run, before any fixture is made for it."""
    needs_gpu = item.get_closest_marker("cuda") is not None
    if not needs_gpu and item.get_closest_marker("cuda_build") is None:
        return
    import torch

    from pvq_vllm import _C

    if not _C.with_cuda:
        pytest.skip("this build has no CUDA kernels")
    if needs_gpu and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")


VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Sizes: a head of 32 is the smallest that vLLM's CPU attention takes; 192 = 12 * 16 needs a dense Hadamard
# factor.
_COMMON = dict(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=8192,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    initializer_range=0.08,
)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from offline_quant.evaluate import evaluation_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([evaluation_text().read_text(encoding="utf-8")[:20_000]], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _tiny_config(name: str):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    family, _, variant = name.partition("-")
    tied = variant == "tied"
    if family == "llama":
        return LlamaConfig(**_COMMON, tie_word_embeddings=tied)
    if family == "qwen2":  # q, k and v have a bias
        sizes = {key: value for key, value in _COMMON.items() if key != "head_dim"}
        return Qwen2Config(**sizes, tie_word_embeddings=tied)
    if family == "qwen3":
        return Qwen3Config(**_COMMON, tie_word_embeddings=tied)
    raise KeyError(name)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """Return a function: name -> folder of a small random bfloat16 model with tokenizer and chat template.

    Names: ``llama``, ``qwen2`` (bias), ``qwen3``; with ``-tied`` the head shares the embedding. Two layers,
    hidden 128, inner 192, 4 heads and 2 key-value heads of 32, vocabulary 512. Made once a session; tests
    must not write into it.
    """
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            import torch
            from transformers import AutoModelForCausalLM, GenerationConfig

            with torch.random.fork_rng():
                torch.manual_seed(len(name))
                model = AutoModelForCausalLM.from_config(_tiny_config(name), dtype=torch.bfloat16)
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name.endswith(
                        "bias"
                    ):  # made zero by the model; a zero bias would test nothing
                        torch.nn.init.normal_(parameter, std=0.1)
            model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
            folder = tmp_path_factory.mktemp(f"tiny-{name}")
            model.save_pretrained(folder)
            _save_tokenizer(folder)
            folders[name] = folder
        return folders[name]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model_folder) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_model_folder) -> Path:
    return tiny_model_folder("qwen2")


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_model_folder) -> Path:
    return tiny_model_folder("qwen3")
