# SPDX-License-Identifier: Apache-2.0
"""Calibration without data: sequences that the model writes itself (`--calibration self`).

Each sequence begins with the token that the tokenizer puts at a beginning and is drawn token by token from the
model's own distribution at temperature 1; an end token does not end it, so that a sequence may hold several
texts (self-calibration, Williams, Chrysostomou and Aletras 2024).

Layer by layer, as elsewhere here, every token of a sequence would read the whole model from the disk: for a
model of 16 GB and 2048 tokens, 32 TB. So the whole model is loaded for this step, once, and only if it fits
into the memory that is free; it is let go before the first layer is quantized. The keys and values of the
sequences drawn together are bounded by ``CACHE_BYTES``.
"""

from collections.abc import Callable

import torch

from pvq_vllm.codec.errors import PVQError

from .calibration import forward_dtype
from .calibration_data import load_tokenizer
from .memory import check_memory
from .model_source import ModelSource

CACHE_BYTES = 4 << 30


def sample_tokens(
    source: ModelSource,
    sequences: int,
    length: int,
    seed: int,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda description: None,
) -> torch.Tensor:
    """Return int64 [sequences, length], sampled from the model; the same for the same seed, device, number of
    threads and versions.

    Raises:
        PVQError: the model does not fit into the free memory, or it has no token to begin with.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    dtype = forward_dtype(device)
    check_sampling_memory(source, device)
    first = first_token(source)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, local_files_only=True)
    model = model.to(device).eval()
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    batch = max(1, CACHE_BYTES // (cache_bytes_per_token(model.config.get_text_config(), dtype) * length))
    drawn = []
    for start in range(0, sequences, batch):
        count = min(batch, sequences - start)
        tokens = torch.full((count, 1), first, dtype=torch.int64, device=device)
        drawn.append(_continue(model, tokens, length, generator, progress).cpu())
    return torch.cat(drawn)


def _continue(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    length: int,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> torch.Tensor:
    """Draw tokens behind ``tokens`` [count, 1] until there are ``length``."""
    result, cache = [tokens], None
    with torch.inference_mode():
        while len(result) < length:
            output = model(input_ids=result[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probabilities = output.logits[:, -1].float().softmax(dim=-1)
            result.append(torch.multinomial(probabilities, 1, generator=generator))
            if len(result) % 32 == 0:
                progress(f"sampling token {len(result)} of {length}")
    return torch.cat(result, dim=1)


def first_token(source: ModelSource) -> int:
    """Return the token that texts begin with: the tokenizer's, or the model's, or the end token."""
    tokenizer, config = load_tokenizer(source.folder), source.skeleton.config.get_text_config()
    for token in (tokenizer.bos_token_id, getattr(config, "bos_token_id", None), tokenizer.eos_token_id):
        if token is not None:
            return token
    raise PVQError(
        f"{source.folder}: neither tokenizer nor config.json name a first or last token to begin a text with: "
        "use --calibration builtin"
    )


def cache_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


def check_sampling_memory(source: ModelSource, device: str) -> None:
    """Raise PVQError unless the whole model and the cache fit into the memory that is free on ``device``."""
    check_memory(source, device, 1, CACHE_BYTES, "--calibration self", "use --calibration builtin or a text")
