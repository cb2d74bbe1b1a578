# SPDX-License-Identifier: Apache-2.0
"""The checkpoint format, docs/format.md sections 1 to 3: `quantization_config` as dataclasses, and what every
tensor must look like.

``check_checkpoint`` is the gate that every reader goes through: it compares config.json, the index and the
headers of all shards and allocates nothing. The range of the codes (section 4) is checked by whoever decodes
them.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .activation import parse_activation
from .errors import PVQError
from .pyramid import index_bits
from .safetensors_header import TensorInfo, read_safetensors_header

FORMAT_VERSION = 1
QUANT_METHOD = "pvq"
GROUP = 8  # weights that share one code in the fixed-rate codebooks
BYTES_PER_GROUP = {"pvq2": 2, "pvq3": 3, "pvq4": 4, "int8": 8}
CODEBOOK_NAMES = (*BYTES_PER_GROUP, "canonical")
MAX_GROUP_SIZE, MAX_NUM_PULSES, MAX_AMPLITUDE_BITS = 1024, 4096, 16
MAX_IN_FEATURES, MAX_OUT_FEATURES = 65_536, 1 << 24
INDEX_FILE = "model.safetensors.index.json"


def _strict(mapping, where: str, required: set[str], optional: set[str] = frozenset()) -> Mapping:
    """Return ``mapping`` if it is a JSON object with all ``required`` keys and none but those and the
    ``optional`` ones.
    """
    if not isinstance(mapping, Mapping):
        raise PVQError(f"{where} must be a JSON object, not {mapping!r}")
    for key in mapping:
        if key not in required | optional:
            raise PVQError(
                f"{where} has the unknown key '{key}': this checkpoint needs a newer version of this project"
            )
    for key in sorted(required):
        if key not in mapping:
            raise PVQError(f"{where} lacks the key '{key}': quantize the model again")
    return mapping


def _integer(value, where: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise PVQError(f"{where} is {value!r}, but must be an integer from {least} to {most}")
    return value


@dataclass(frozen=True)
class Codebook:
    """How a module's weights are coded (format.md section 4). The last three fields are D, K and b of
    ``canonical``, else None.
    """

    name: str
    group_size: int | None = None
    num_pulses: int | None = None
    amplitude_bits: int | None = None

    def __post_init__(self) -> None:
        if self.name not in CODEBOOK_NAMES:
            raise PVQError(f"codebook name is {self.name!r}, but must be one of {', '.join(CODEBOOK_NAMES)}")
        if self.name == "canonical":
            _integer(self.group_size, "codebook group_size", 1, MAX_GROUP_SIZE)
            _integer(self.num_pulses, "codebook num_pulses", 1, MAX_NUM_PULSES)
            _integer(self.amplitude_bits, "codebook amplitude_bits", 0, MAX_AMPLITUDE_BITS)
        elif (self.group_size, self.num_pulses, self.amplitude_bits) != (None, None, None):
            raise PVQError(
                f"codebook {self.name} takes no group_size, num_pulses or amplitude_bits: remove them"
            )

    @property
    def h(self) -> int:
        """h of the weight (q + h/2) * row_scale."""
        return 1 if self.name in ("pvq2", "pvq3", "pvq4") else 0

    @property
    def bytes_per_group(self) -> int | None:
        """Bytes of a group of eight weights; None for ``canonical``, whose rows are bit streams."""
        return BYTES_PER_GROUP.get(self.name)

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight of a row of ``in_features``, amplitude and fp16 row scale included (levels
        are not).
        """
        return (math.prod(self.packed_shape(1, in_features)) * 8 + 16) / in_features

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of ``weight_packed`` (uint8).

        Raises:
            PVQError: ``in_features`` is no multiple of the group, or a limit of format.md section 8 is
                passed.
        """
        _integer(out_features, "out_features", 1, MAX_OUT_FEATURES)
        _integer(in_features, "in_features", 1, MAX_IN_FEATURES)
        group = self.group_size or GROUP
        if in_features % math.lcm(group, GROUP):
            raise PVQError(
                f"in_features = {in_features} is not a multiple of {math.lcm(group, GROUP)}, as {self} needs"
            )
        if self.bytes_per_group:
            return (out_features, in_features // GROUP, self.bytes_per_group)
        row_bits = in_features // group * (index_bits(group, self.num_pulses) + self.amplitude_bits)
        return (out_features, (row_bits + 7) // 8)

    def __str__(self) -> str:
        if self.name != "canonical":
            return self.name
        return f"canonical({self.group_size},{self.num_pulses},{self.amplitude_bits})"

    @classmethod
    def from_dict(cls, entry, where: str = "codebook") -> "Codebook":
        if isinstance(entry, Mapping) and entry.get("name") == "canonical":
            return cls(**_strict(entry, where, {"name", "group_size", "num_pulses", "amplitude_bits"}))
        return cls(**_strict(entry, where, {"name"}))

    def to_dict(self) -> dict:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ModuleSpec:
    """One quantized module: its codebook, and into how many blocks its input is split for the rotation (0:
    not rotated).
    """

    codebook: Codebook
    rotation_blocks: int


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` of config.json; ``modules`` lists every quantized module by its Hugging Face
    name.
    """

    activation: str
    codebook: Codebook
    rotation_seed: int
    rotation_factors: dict[int, list[int]] = field(default_factory=dict)
    modules: dict[str, ModuleSpec] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry) -> "CheckpointConfig":
        """Parse strictly.

        Raises:
            PVQError: another version, an unknown key or an unknown value; the sentence names it.
        """
        where = "quantization_config"
        if not isinstance(entry, Mapping) or entry.get("quant_method") != QUANT_METHOD:
            raise PVQError(
                f'{where} does not say quant_method "{QUANT_METHOD}": this is not a PVQ checkpoint, run `pvq quantize`'
            )
        version = entry.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise PVQError(
                f"{where}.format_version is {version!r}, but this release reads version {FORMAT_VERSION}: "
                "install a release that knows it, or quantize the model again"
            )
        keys = {"quant_method", "format_version", "activation", "codebook", "rotation", "modules"}
        _strict(entry, where, keys)
        parse_activation(entry["activation"], f"{where}.activation")
        default = Codebook.from_dict(entry["codebook"], f"{where}.codebook")
        rotation = _strict(entry["rotation"], f"{where}.rotation", {"seed", "factors"})
        seed = _integer(rotation["seed"], f"{where}.rotation.seed", 0, 2**64 - 1)
        if not isinstance(rotation["factors"], Mapping):
            raise PVQError(f"{where}.rotation.factors must be a JSON object, not {rotation['factors']!r}")
        factors = dict(
            _width_and_factors(*pair, f"{where}.rotation.factors") for pair in rotation["factors"].items()
        )
        if not isinstance(entry["modules"], Mapping):
            raise PVQError(f"{where}.modules must be a JSON object, not {entry['modules']!r}")
        modules = {}
        for name, module in entry["modules"].items():
            place = f"{where}.modules['{name}']"
            _strict(module, place, {"rotation_blocks"}, {"codebook"})
            blocks = _integer(module["rotation_blocks"], f"{place}.rotation_blocks", 0, MAX_IN_FEATURES)
            codebook = (
                Codebook.from_dict(module["codebook"], f"{place}.codebook")
                if "codebook" in module
                else default
            )
            modules[name] = ModuleSpec(codebook, blocks)
        return cls(entry["activation"], default, seed, factors, modules)

    def to_dict(self) -> dict:
        """Return what ``from_dict`` reads, in the shortest form: a module with the default codebook does not
        repeat it.
        """
        modules = {}
        for name, module in self.modules.items():
            modules[name] = {"rotation_blocks": module.rotation_blocks}
            if module.codebook != self.codebook:
                modules[name]["codebook"] = module.codebook.to_dict()
        factors = {str(width): list(orders) for width, orders in sorted(self.rotation_factors.items())}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "activation": self.activation,
            "codebook": self.codebook.to_dict(),
            "rotation": {"seed": self.rotation_seed, "factors": factors},
            "modules": modules,
        }


def _width_and_factors(width, orders, where: str) -> tuple[int, list[int]]:
    place = f"{where}['{width}']"
    if not (
        isinstance(width, str) and width.isascii() and width.isdigit() and 1 <= int(width) <= MAX_IN_FEATURES
    ):
        raise PVQError(f"{place}: the width must be an integer from 1 to {MAX_IN_FEATURES}")
    if not isinstance(orders, list) or not orders:
        raise PVQError(f"{place} must be a list of Hadamard orders, not {orders!r}")
    for order in orders:
        _integer(order, place, 1, MAX_IN_FEATURES)
    if math.prod(orders) != int(width):
        raise PVQError(f"{place} is {orders}, whose product is {math.prod(orders)} and not {width}")
    for order in orders[:-1]:
        if order % 4 or order & (order - 1) == 0:
            raise PVQError(
                f"{place} has the order {order}: all but the last must be multiples of four and no "
                "power of two"
            )
    if orders[-1] % 4 and orders[-1] not in (1, 2):
        raise PVQError(f"{place} has the order {orders[-1]}: there is no Hadamard matrix of this order")
    return int(width), orders


def expected_tensors(
    name: str, codebook: Codebook, out_features: int, in_features: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of the quantized module ``name`` (format.md section 3), without its bias: name ->
    (dtype, shape).

    Raises:
        PVQError: ``in_features`` does not fit the codebook.
    """
    try:
        tensors = {f"{name}.weight_packed": ("U8", codebook.packed_shape(out_features, in_features))}
    except PVQError as error:
        raise PVQError(f"{name}: {error}") from error
    tensors[f"{name}.weight_scale"] = ("F16", (out_features,))
    if codebook.name == "canonical":
        tensors[f"{name}.weight_levels"] = ("F32", (1 << codebook.amplitude_bits,))
    return tensors


def read_json(path: Path, what: str) -> dict:
    """Return the JSON object in ``path``; PVQError names the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PVQError(f"{path} is missing: {path.parent} is not a complete {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PVQError(f"{path} cannot be read as JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise PVQError(f"{path} must hold a JSON object: copy it again")
    return content


def read_shard_headers(folder: str | os.PathLike) -> dict[str, TensorInfo]:
    """Return every tensor of a Hugging Face folder, from the headers of its shards, checked against the
    index.

    Raises:
        PVQError: a shard is missing or damaged, or the index does not fit the shards.
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).exists():
        return read_safetensors_header(folder / "model.safetensors")
    weight_map = read_json(folder / INDEX_FILE, "model folder").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PVQError(f"{folder / INDEX_FILE} has no weight_map: copy it again")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise PVQError(
                f"{folder / INDEX_FILE} names the shard '{shard}', which is not a .safetensors file "
                "of the folder: copy the checkpoint again"
            )
        for name, tensor in read_safetensors_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise PVQError(
                    f"{folder / shard} holds tensor '{name}', but {INDEX_FILE} does not say so: "
                    "copy both again"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise PVQError(
                f"{folder / shard} lacks tensor '{name}', which {INDEX_FILE} promises: copy both again"
            )
    return tensors


def check_checkpoint(
    folder: str | os.PathLike, module_shapes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[CheckpointConfig, dict[str, TensorInfo]]:
    """Check every name, shape, dtype and size of the PVQ checkpoint ``folder`` without allocating a tensor.

    Args:
        module_shapes: [out_features, in_features] of the model's linear and embedding modules by Hugging Face
            name, when the caller knows them (``offline_quant.model_source.module_shapes`` gets them from
            config.json). Without it out_features is taken from ``weight_scale``, in_features from
            ``weight_packed`` or the rotation, and they must agree with each other.
    Returns:
        (config, tensors by name).
    Raises:
        PVQError: anything is missing, unknown, of a wrong shape or dtype; the sentence names the file or the
            tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PVQError(f"{folder} is not a folder: give the path of a PVQ checkpoint")
    model_config = read_json(folder / "config.json", "checkpoint")
    if "quantization_config" not in model_config:
        raise PVQError(
            f"{folder / 'config.json'} has no quantization_config: {folder} is not quantized, run "
            "`pvq quantize`"
        )
    try:
        config = CheckpointConfig.from_dict(model_config["quantization_config"])
    except PVQError as error:
        raise PVQError(f"{folder / 'config.json'}: {error}") from error
    tensors = read_shard_headers(folder)
    for name, spec in config.modules.items():
        out_features, in_features = (module_shapes or {}).get(name) or _claimed_shape(
            folder, name, spec, tensors
        )
        for tensor_name, (dtype, shape) in expected_tensors(
            name, spec.codebook, out_features, in_features
        ).items():
            _check_tensor(folder, tensor_name, tensors.get(tensor_name), dtype, shape)
        if f"{name}.weight" in tensors:
            raise PVQError(
                f"{tensors[f'{name}.weight'].shard} holds '{name}.weight', but config.json lists it "
                "as quantized: quantize the model again"
            )
        if spec.rotation_blocks:
            width, rest = divmod(in_features, spec.rotation_blocks)
            if rest or width not in config.rotation_factors:
                raise PVQError(
                    f"{folder / 'config.json'}: rotation.factors lacks the width of {name} "
                    f"({in_features} / {spec.rotation_blocks}): quantize the model again"
                )
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in ("weight_packed", "weight_scale", "weight_levels") and module not in config.modules:
            raise PVQError(
                f"{tensor.shard} holds '{name}', but config.json does not list '{module}' as quantized: "
                "copy config.json again"
            )
    return config, tensors


def _check_tensor(
    folder: Path, name: str, found: TensorInfo | None, dtype: str, shape: tuple[int, ...]
) -> None:
    if found is None:
        raise PVQError(
            f"{folder} lacks the tensor '{name}', which config.json promises: copy the checkpoint again"
        )
    if (found.dtype, found.shape) != (dtype, shape):
        raise PVQError(
            f"{found.shard}: '{name}' is {found.dtype} {list(found.shape)}, but by config.json it "
            f"must be {dtype} "
            f"{list(shape)}: quantize the model again"
        )


def _claimed_shape(
    folder: Path, name: str, spec: ModuleSpec, tensors: Mapping[str, TensorInfo]
) -> tuple[int, int]:
    """Return (out_features, in_features) as the module's tensors state them; the caller then checks them
    against each other.
    """
    packed, scale = tensors.get(f"{name}.weight_packed"), tensors.get(f"{name}.weight_scale")
    if packed is None or scale is None:
        kind = "weight_packed" if packed is None else "weight_scale"
        raise PVQError(
            f"{folder} lacks the tensor '{name}.{kind}', which config.json promises: copy the "
            "checkpoint again"
        )
    out_features = scale.shape[0] if scale.shape else 0
    if spec.codebook.bytes_per_group:
        return out_features, (packed.shape[1] if len(packed.shape) == 3 else 0) * GROUP
    # The bit stream of a canonical row is padded to bytes, so several widths may fit: take the one that is
    # rotated in this model.
    group = spec.codebook.group_size
    group_bits = index_bits(group, spec.codebook.num_pulses) + spec.codebook.amplitude_bits
    row_bytes = packed.shape[1] if len(packed.shape) == 2 else 0
    groups = range(max(1, -(-(row_bytes * 8 - 7) // group_bits)), row_bytes * 8 // group_bits + 1)
    return out_features, max((count * group for count in groups if count * group % GROUP == 0), default=0)
