# SPDX-License-Identifier: Apache-2.0
"""Rotate a model's residual stream without changing what it computes: everything goes into the weights.

With h the residual stream, x = h / rms(h) what an RMS norm passes on before its gain g, and R orthogonal:
rms(R h) = rms(h), so a model whose stream is R h computes the same if

    embedding E            E R^T                  what reads x through g:  W  ->  W diag(g) R^T, and g becomes 1
    what writes to h: W    R W  (bias: R b)       the head likewise, with the gain of the last norm

(SliceGPT, Ashkboos et al. 2024; QuaRot, Ashkboos et al. 2024). The head no longer equals the embedding, so a
tied one gets a tensor of its own. Attention adds values weighted by scalars, hence a rotation B of every
value head (rows of v) is undone in the columns of o: W_v -> B W_v, W_o -> W_o B^T for each head; queries that
share a key-value head share its B.

``FoldedSource`` is such a model, as a view of a ``ModelSource``: tensors are folded one by one as they are
read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import Rotation, rotation_layout

from .calibration import LayerwiseForward
from .model_source import ModelSource
from .norms import norm_offset
from .plan import DEFAULT_ROTATION
from .rotation import rotate_rows

# x [rows, width] -> x R^T, float32; R orthogonal.
RowRotation = Callable[[torch.Tensor], torch.Tensor]

# Within a decoder layer: which linears read the residual stream through which norm, which ones write to it,
# and what lies between and knows nothing of either. Linears that read it fused have the rows of their parts.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
VALUES, AFTER_VALUES = "self_attn.v_proj", "self_attn.o_proj"
INSIDE = ("self_attn.q_norm", "self_attn.k_norm", "self_attn.sinks", "self_attn.rotary_emb.inv_freq")
CHUNK_WEIGHTS = 1 << 24  # of a large tensor at a time: 64 MB float32
CHECK_TOKENS = 16
# Relative error of a layer that was folded rightly, in float32: 1e-6 to 1e-5. Of one folded wrongly: about 1.
CHECK_TOLERANCE = 1e-3


class CannotFold(PVQError):
    """The model is not one whose residual stream can be rotated; it may still be quantized otherwise."""


@dataclass(frozen=True)
class Fold:
    """What happens to one tensor: columns times the gain of norm ``gain``, then ``columns`` on the input side
    and ``rows`` on the output side. ``is_norm``: the gain itself, which becomes neutral.
    """

    gain: str | None = None
    columns: RowRotation | None = None
    rows: RowRotation | None = None
    is_norm: bool = False


def hadamard_rotation(width: int, seed: int) -> RowRotation:
    """Return x -> x R^T with the seeded Hadamard rotation of docs/format.md §5 in as few blocks as there
    are.
    """
    try:
        rotation = Rotation(seed, width, *rotation_layout(width))
    except PVQError as error:
        raise CannotFold(f"{error}: use --rotation online") from error
    return lambda x: rotate_rows(x, rotation)


def random_rotation(width: int, seed: int) -> RowRotation:
    """Return x -> x Q^T with Q uniformly distributed over the orthogonal matrices (Q of a Gaussian's QR, with
    the signs of R's diagonal: Mezzadri 2007), computed in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(gaussian)
    transposed = (orthogonal * upper.diagonal().sign()).T.contiguous()
    return lambda x: (x.double() @ transposed).float()


def _on_blocks(rotation: RowRotation, width: int) -> RowRotation:
    """Rotate every ``width`` columns alike."""
    return lambda x: rotation(x.reshape(-1, width)).reshape(x.shape)


@dataclass
class FoldedSource(ModelSource):
    """The model ``source`` with another residual stream. ``read`` gives folded tensors in float32; ``tensors``
    keeps the dtypes in which they are to be stored, and has the head on its own.
    """

    folds: dict[str, Fold] = field(default_factory=dict)
    norm_offset: float = 0.0  # the norms' gain is weight + offset (Gemma's is 1)
    device: str = "cpu"  # where ``read`` folds a tensor and leaves it

    @classmethod
    def of(
        cls,
        source: ModelSource,
        make_rotation: Callable[[int, int], RowRotation],
        seed: int,
        rotate_heads: bool,
    ) -> "FoldedSource":
        """Return the view.

        Args:
            make_rotation: (width, seed) -> rotation, for the residual stream and, with ``rotate_heads``, for
                the head dimension.
        Raises:
            CannotFold: a part of the model is not known to read or to write the residual stream in the way
                above, or does not compute the same afterwards (the first layer is run to see that).
        """
        residual = make_rotation(source.skeleton.config.get_text_config().hidden_size, seed)
        heads = None
        if rotate_heads:
            width = _head_width(source)
            heads = _on_blocks(make_rotation(width, seed), width)
        folds, norms = plan_folds(source, residual, heads)
        tensors = dict(source.tensors)
        if source.head_name is not None:
            tensors[f"{source.head_name}.weight"] = source.tensors[source.weight_name(source.head_name)]
        folded = cls(
            **{key: value for key, value in vars(source).items() if key not in ("config", "tensors")},
            config={**source.config, "tie_word_embeddings": False},
            tensors=tensors,
            folds=folds,
            norm_offset=_norm_offset(source, norms),
        )
        _check_same_outputs(source, folded, residual)
        return folded

    def is_rotated_offline(self, module: str) -> bool:
        fold = self.folds.get(f"{module}.weight")
        return fold is not None and fold.columns is not None

    def weight_dtype(self, module: str) -> torch.dtype:
        name = self.weight_name(module)
        return torch.float32 if name in self.folds else super().weight_dtype(module)

    def read(self, name: str) -> torch.Tensor:
        tensor, fold = super().read(name), self.folds.get(name)
        if fold is None:
            return tensor
        if fold.is_norm:
            return torch.full(tensor.shape, 1.0 - self.norm_offset, device=self.device)
        folded = tensor.to(self.device, torch.float32)
        if folded is tensor:
            folded = tensor.clone()
        if fold.gain is not None:
            folded *= super().read(fold.gain).to(self.device, torch.float32) + self.norm_offset
        if fold.columns is not None:
            for part in _row_chunks(folded):
                part.copy_(fold.columns(part))
        if fold.rows is not None:
            matrix = folded if folded.ndim == 2 else folded[:, None]
            for part in _row_chunks(matrix.T):
                part.copy_(fold.rows(part.contiguous()))
        return folded


def rotated_source(
    source: ModelSource, rotation: str, seed: int, device: str = "cpu"
) -> tuple[ModelSource, str]:
    """Return the model in the coordinates in which ``plan.Settings.rotation`` wants it quantized, and that
    rotation: folded (on ``device``) for 'residual' and 'residual:N', and for 'auto' if that is possible (it
    becomes 'residual:128', else ``plan.DEFAULT_ROTATION``); otherwise ``source`` itself.

    Raises:
        CannotFold: see ``FoldedSource.of``; not for 'auto'.
    """
    kind = rotation.partition(":")[0]
    if kind not in ("auto", "residual"):
        return source, rotation
    try:
        folded = FoldedSource.of(source, hadamard_rotation, seed, rotate_heads=True)
    except CannotFold:
        if kind == "residual":
            raise
        return source, DEFAULT_ROTATION
    folded.device = device
    return folded, "residual:128" if kind == "auto" else rotation


def _row_chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from matrix.split(max(1, CHUNK_WEIGHTS // matrix.shape[1]))


def _head_width(source: ModelSource) -> int:
    config = source.skeleton.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def plan_folds(
    source: ModelSource, residual: RowRotation, heads: RowRotation | None
) -> tuple[dict[str, Fold], list[str]]:
    """Return what happens to every tensor, by name, and the names of the norms; reads no weight.

    Raises:
        CannotFold: a tensor whose part in the residual stream is not known.
    """
    parameters = {name for name, _ in source.skeleton.named_parameters()}
    unknown = (set(source.tensors) | parameters) - {f"{source.head_name}.bias"}
    folds: dict[str, Fold] = {}
    norms: list[str] = []

    def claim(module: str, fold: Fold) -> None:
        for name in (f"{module}.weight", f"{module}.bias"):
            if name in source.tensors:
                folds[name] = fold if name.endswith("weight") else Fold(rows=fold.rows)
            unknown.discard(name)

    for layer in range(len(source.layers)):
        prefix = f"{source.layers_name}.{layer}."
        unknown -= {name for name in unknown if name.startswith(tuple(prefix + inside for inside in INSIDE))}
        for norm, readers in READERS.items():
            if f"{prefix}{norm}.weight" not in parameters:
                continue  # and so its readers stay unknown
            norms.append(prefix + norm)
            claim(prefix + norm, Fold(is_norm=True))
            for reader in readers:
                rows = heads if reader == VALUES else None
                claim(prefix + reader, Fold(f"{prefix}{norm}.weight", residual, rows))
        # Values that are part of a fused module stay as they are, and so does what comes after them.
        has_values = f"{prefix}{VALUES}.weight" in source.tensors
        for writer in WRITERS:
            columns = heads if writer == AFTER_VALUES and has_values else None
            claim(prefix + writer, Fold(None, columns, residual))
    base = {name for name in unknown if not name.startswith(f"{source.layers_name}.")}
    final = sorted(name for name in base if name.endswith("norm.weight"))
    if len(final) == 1:
        norms.append(final[0].removesuffix(".weight"))
        claim(norms[-1], Fold(is_norm=True))
        claim(source.embedding_name, Fold(columns=residual))
        unknown.discard(f"{source.head_name}.weight")
        if source.head_name is not None:
            folds[f"{source.head_name}.weight"] = Fold(final[0], residual)
    for name in sorted(unknown):
        raise CannotFold(
            f"{source.folder}: the residual stream cannot be rotated, since the part that '{name}' has in it "
            f"({source.config.get('model_type')} model) is not known: use --rotation online"
        )
    return folds, norms


def _norm_offset(source: ModelSource, norms: list[str]) -> float:
    """Return the offset c of norms that compute x / rms(x) * (weight + c), found by running each of them.

    Raises:
        CannotFold: one of them computes something else, for instance subtracts the mean.
    """
    offsets = {norm_offset(source.skeleton.get_submodule(name)) for name in norms}
    if None in offsets or len(offsets) > 1:
        raise CannotFold(
            f"{source.folder}: the residual stream cannot be rotated, since the norms of a "
            f"{source.config.get('model_type')} model are not plain RMS norms: use --rotation online"
        )
    return offsets.pop()


def _check_same_outputs(source: ModelSource, folded: FoldedSource, residual: RowRotation) -> None:
    """Run a few tokens through embedding and first layer of both, in float32, and compare what enters and
    what leaves the layer.

    The names of modules tell which weights have to be folded, but not all that a model computes around them.
    """
    vocabulary = source.weight_shape(source.embedding_name)[0]
    tokens = torch.linspace(0, vocabulary - 1, CHECK_TOKENS).long()[None]
    results = []
    for one in (source, folded):
        forward = LayerwiseForward(one, tokens, torch.float32)
        before = forward.hidden[0]
        with forward.loaded(0):
            forward.advance(0)
        results.append((before[0], forward.hidden[0][0] - before[0]))
    for plain, rotated in zip(*results, strict=True):
        expected = residual(plain)
        error = ((rotated - expected).norm() / expected.norm()).item()
        if not error < CHECK_TOLERANCE:
            raise CannotFold(
                f"{source.folder}: with its residual stream rotated, the first layer of this "
                f"{source.config.get('model_type')} model computes something else (relative difference "
                f"{error:.1e}): use --rotation online"
            )
