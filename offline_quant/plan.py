# SPDX-License-Identifier: Apache-2.0
"""What to quantize how: the settings of a run, and the codebook and rotation that follow for every module."""

import os
import re
from dataclasses import dataclass

from pvq_vllm.codec.activation import check_width, parse_activation
from pvq_vllm.codec.canonical import AMPLITUDES
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig, Codebook, ModuleSpec, expected_tensors
from pvq_vllm.codec.rotation import rotation_layout

from .calibration_data import BUILTIN, SELF
from .model_source import ModelSource

CODEBOOK_OF_BITS = {
    "2": Codebook("pvq2"),
    "3": Codebook("pvq3"),
    "4": Codebook("pvq4"),
    "8": Codebook("int8"),
}
UNQUANTIZED = "16"
ROTATIONS = ("auto", "residual", "online", "none")
ROTATIONS_IN_BLOCKS = ("block:N", "residual:N")  # what is rotated online, in blocks of at most N columns
DEFAULT_ROTATION = "block:128"  # nearly as good as the whole width, and faster on a GPU (docs/quantizer.md)
SMALLEST_BLOCK = 8
# Linears whose input is split between the ranks of tensor parallelism, by the last part of their name in
# Hugging Face models.
ROW_PARALLEL = (
    "o_proj",
    "down_proj",
    "out_proj",
    "dense",
    "dense_4h_to_h",
    "fc2",
    "c_proj",
    "wo",
    "w2",
    "fc_out",
)

TOKEN_WEIGHTS = ("gradient", "uniform")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of the checkpoint, besides the model.

    ``overrides`` are (regular expression, value) pairs, searched in the module's name; the last one that
    matches counts. ``lm_head_bits`` is 16, 8 or 4, ``embedding_bits`` 16 or 8. ``rotation`` is 'residual'
    (folded into the weights offline, the MLP's inner rotation online), 'residual:N' (the inner one in blocks
    of at most N), 'online' (over the whole input width of every linear), 'block:N' (online, in blocks of at
    most N), 'none', or 'auto': 'residual:128' for a model that allows it, else the default. ``calibration`` is what
    ``calibration_data.calibration_tokens`` takes: 'builtin', 'self' or a path; None rounds to nearest.
    ``token_weights`` tells how much each token counts in a Hessian: 'gradient' (``gradients``) or 'uniform';
    ``tune_epochs`` are the passes of ``tuning``. ``target_bpw`` is the average rate of the decoder layers,
    reached by choosing one of ``rates`` for every module (``rate_plan``); it then stands in the place of
    ``codebook``.
    """

    codebook: Codebook = CODEBOOK_OF_BITS["4"]
    overrides: tuple[tuple[str, str], ...] = ()
    lm_head_bits: int = 8
    embedding_bits: int = 16
    activation: str = "a8"
    rotation: str = DEFAULT_ROTATION
    seed: int = 0
    tensor_parallel: int = 1
    calibration: str | None = None
    calibration_sequences: int = 24
    calibration_length: int = 1024
    token_weights: str = "gradient"
    tune_epochs: int = 0
    amplitude: str = "lloyd_max"
    target_bpw: float | None = None
    rates: tuple[str, ...] = ()
    device: str = "cpu"
    max_shard_bytes: int = 4_000_000_000

    def __post_init__(self) -> None:
        _one_of("--lm-head", self.lm_head_bits, (16, 8, 4))
        _one_of("--embeddings", self.embedding_bits, (16, 8))
        parse_activation(self.activation, "--activation")
        if self.max_block is None:
            _one_of("--rotation", self.rotation, (*ROTATIONS, *ROTATIONS_IN_BLOCKS))
        elif self.max_block < SMALLEST_BLOCK:
            raise PVQError(f"--rotation {self.rotation}: a block must have at least {SMALLEST_BLOCK} columns")
        _one_of("--amplitude", self.amplitude, AMPLITUDES)
        _one_of("--token-weights", self.token_weights, TOKEN_WEIGHTS)
        _one_of("--device", self.device, ("cpu", "cuda"))
        for option, value in (
            ("--tensor-parallel", self.tensor_parallel),
            ("--calibration-sequences", self.calibration_sequences),
            ("--calibration-length", self.calibration_length),
        ):
            if value < 1:
                raise PVQError(f"{option} is {value}, but must be at least 1")
        if self.tune_epochs < 0:
            raise PVQError(f"--tune-epochs is {self.tune_epochs}, but must be at least 0")
        if self.tune_epochs and self.calibration is None:
            raise PVQError("--tune-epochs needs data to tune on: add --calibration builtin")
        for option in ("calibration_sequences", "calibration_length", "token_weights"):
            if self.calibration is None and getattr(self, option) != getattr(Settings, option):
                raise PVQError(
                    f"--{option.replace('_', '-')} belongs to --calibration: add --calibration builtin"
                )
        if not 0 <= self.seed < 2**64:
            raise PVQError(f"--seed is {self.seed}, but must be from 0 to 2^64 - 1")
        if self.calibration not in (None, BUILTIN, SELF) and not os.path.exists(self.calibration):
            raise PVQError(
                f"--calibration {self.calibration}: there is no such file or folder; without data of your own, "
                "use builtin or self"
            )

        if self.target_bpw is None:
            if self.rates:
                raise PVQError("--rate belongs to --target-bpw: add it, or give --bits instead")
            return
        if not 1 <= self.target_bpw <= 16:
            raise PVQError(f"--target-bpw is {self.target_bpw:g}, but must be from 1 to 16")
        if self.calibration is None:
            raise PVQError("--target-bpw needs data to measure sensitivities on: add --calibration builtin")
        for rate in self.rates:
            if codebook_from_text(rate, "--rate") is None:
                raise PVQError("--rate 16 is not possible: leave a module unquantized with --override")

    @property
    def max_block(self) -> int | None:
        """N of the rotations block:N and residual:N, None for the others."""
        match = re.fullmatch(r"(?:block|residual):([0-9]{1,5})", self.rotation)
        return int(match[1]) if match else None


def _one_of(option: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise PVQError(f"{option} is {value}, but must be one of {', '.join(map(str, allowed))}")


def codebook_from_text(text: str, option: str) -> Codebook | None:
    """Return the codebook that '2', '3', '4', '8' or 'D,K,b' (canonical) names; None for '16', not quantized.

    Raises:
        PVQError: anything else; the sentence names ``option``.
    """
    if text == UNQUANTIZED:
        return None
    if text in CODEBOOK_OF_BITS:
        return CODEBOOK_OF_BITS[text]
    try:
        group_size, num_pulses, amplitude_bits = (int(part) for part in text.split(","))
        return Codebook("canonical", group_size, num_pulses, amplitude_bits)
    except ValueError as error:  # a PVQError is one too
        reason = f" ({error})" if isinstance(error, PVQError) else ""
        raise PVQError(
            f"{option}: '{text}' must be 2, 3, 4, 8, 16 or D,K,b of the canonical codebook{reason}"
        ) from error


def parse_override(text: str) -> tuple[str, str]:
    """Split 'REGEX=VALUE' at the last '=' and check both halves.

    Raises:
        PVQError: there is no '=', the expression does not compile or the value is unknown.
    """
    pattern, separator, value = text.rpartition("=")
    if not separator or not pattern:
        raise PVQError(f"--override '{text}' must look like 'REGEX=BITS', for example 'down_proj=3'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise PVQError(f"--override '{text}': '{pattern}' is not a regular expression ({error})") from error
    codebook_from_text(value, f"--override '{text}'")
    return pattern, value


def plan_checkpoint(source: ModelSource, settings: Settings) -> CheckpointConfig:
    """Choose codebook and rotation for every module of the model; reads no weight. ``source`` is in the
    coordinates that ``settings.rotation`` asks for (``residual_rotation.rotated_source``).

    Raises:
        PVQError: an override matches nothing, a shape is wrong, or an input width has no rotation or no
            groups; the sentence names the module and what to do.
    """
    if not any(source.linear_names(layer) for layer in range(len(source.layers))):
        raise PVQError(
            f"{source.folder}: its decoder layers have no linear modules (nn.Linear), so nothing can be quantized: give "
            "a model of another kind"
        )
    chosen: dict[str, Codebook] = {}
    matched: set[str] = set()
    for layer in range(len(source.layers)):
        for name in source.linear_names(layer):
            codebook: Codebook | None = settings.codebook
            for pattern, value in settings.overrides:
                if re.search(pattern, name):
                    matched.add(pattern)
                    codebook = codebook_from_text(value, "--override")
            if codebook is not None:
                chosen[name] = codebook
    for pattern, value in settings.overrides:
        if pattern not in matched:
            raise PVQError(
                f"--override '{pattern}={value}' matches no linear module of the decoder layers: try "
                f"'mlp.down_proj={value}' (the head has --lm-head, the embedding --embeddings)"
            )
    if settings.lm_head_bits < 16 and source.head_name is not None:
        chosen[source.head_name] = CODEBOOK_OF_BITS[str(settings.lm_head_bits)]
    if not chosen and settings.embedding_bits == 16:
        raise PVQError(f"{source.folder}: nothing is left to quantize: check --override")

    factors: dict[int, list[int]] = {}
    modules: dict[str, ModuleSpec] = {}
    for name, codebook in chosen.items():
        out_features, in_features = source.weight_shape(name)
        splits = settings.tensor_parallel if name.rpartition(".")[2] in ROW_PARALLEL else 1
        try:
            expected_tensors(name, codebook, out_features, in_features)
            blocks, orders = 0, []
            if in_features % splits:
                raise PVQError(f"in_features {in_features} cannot be divided among {splits} ranks")
            if settings.rotation != "none" and not source.is_rotated_offline(name):
                blocks, orders = rotation_layout(in_features, splits, settings.max_block)
        except PVQError as error:
            remedy = "lower --tensor-parallel, or leave" if splits > 1 else "leave"
            option = "--lm-head 16" if name == source.head_name else f"--override '{re.escape(name)}=16'"
            where = "" if name in str(error) else f"{name}: "
            raise PVQError(f"{where}{error}: {remedy} it unquantized with {option}") from error
        check_width(settings.activation, in_features // splits, name)
        if blocks:
            factors[in_features // blocks] = list(orders)
        modules[name] = ModuleSpec(codebook, blocks)
    if settings.embedding_bits < 16:
        out_features, in_features = source.weight_shape(source.embedding_name)
        codebook = CODEBOOK_OF_BITS[str(settings.embedding_bits)]
        expected_tensors(source.embedding_name, codebook, out_features, in_features)
        modules[source.embedding_name] = ModuleSpec(codebook, 0)
    return CheckpointConfig(settings.activation, settings.codebook, settings.seed, factors, modules)
