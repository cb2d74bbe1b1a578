# SPDX-License-Identifier: Apache-2.0
"""The model to quantize: any local Hugging Face folder of safetensors, read one tensor at a time.

Which modules exist comes from the model that transformers builds on the meta device, so no architecture is
named here: decoder layers are the ``ModuleList`` of length num_hidden_layers, and what can be quantized are
the ``nn.Linear`` modules inside them.
"""

import hashlib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import read_json, read_shard_headers
from pvq_vllm.codec.safetensors_header import TensorInfo

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "I64": torch.int64,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Small linears that choose experts: an error there costs much and the bits saved are none.
ROUTERS = ("gate", "router", "shared_expert_gate")
# Of every tensor, for ``fingerprint``.
SAMPLES = 8
SAMPLE_BYTES = 1 << 12


def read_tensor(info: TensorInfo, name: str) -> torch.Tensor:
    """Read one tensor, nothing else, into new memory.

    Raises:
        PVQError: the dtype is not one that torch has, or the file got shorter since its header was checked.
    """
    if info.dtype not in TORCH_DTYPES:
        raise PVQError(f"{info.shard}: tensor '{name}' has dtype {info.dtype}: convert it to bfloat16 first")
    tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    if info.nbytes:
        with open(info.shard, "rb", buffering=0) as file:
            file.seek(info.offset)
            view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            while view:
                count = file.readinto(view)
                if not count:
                    raise PVQError(f"{info.shard} got shorter while it was read: copy it again")
                view = view[count:]
    return tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    """True if no value is NaN or infinite; a sum shows it in one pass, and only a sum that overflows asks for
    more.
    """
    chunks = (chunk.float() for chunk in tensor.reshape(-1).split(1 << 24))
    return all(bool(chunk.sum().isfinite() or chunk.isfinite().all()) for chunk in chunks)


@dataclass
class ModelSource:
    """An opened model folder. ``skeleton`` is the model with meta parameters (buffers are real)."""

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    skeleton: nn.Module
    layers_name: str
    head_name: str | None
    embedding_name: str | None

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "ModelSource":
        """Check the folder's files and build the skeleton; no weight is read.

        Raises:
            PVQError: not a model folder, a shard missing or damaged, already quantized, or a model type that
                the installed transformers does not know.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise PVQError(f"{folder} is not a folder: give the path of a local Hugging Face model")
        config = read_json(folder / "config.json", "model folder")
        if config.get("quantization_config"):
            raise PVQError(
                f"{folder} is already quantized (config.json): give the folder of the unquantized model"
            )
        if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
            raise PVQError(
                f"{folder} holds pickled weights (*.bin), which are not loaded: convert it to safetensors"
            )
        tensors = read_shard_headers(folder)
        skeleton = build_skeleton(folder)
        layers_name = decoder_layers_name(folder, skeleton)
        modules = {id(module): name for name, module in skeleton.named_modules()}
        head = modules.get(id(skeleton.get_output_embeddings()))
        embedding = modules.get(id(skeleton.get_input_embeddings()))
        source = cls(folder, config, tensors, skeleton, layers_name, head, embedding)
        source._check_tensors()
        return source

    def _check_tensors(self) -> None:
        """Compare the headers of the shards with the parameters that config.json leads to.

        Mixtures store their experts, and some their router, under other names than the modules have (one by one
        instead of together): where there are tensors that no parameter claims, those may be missing.
        """
        parameters = {name: tuple(parameter.shape) for name, parameter in self.skeleton.named_parameters()}
        for name, shape in parameters.items():
            if name in self.tensors and self.tensors[name].shape != shape:
                raise PVQError(
                    f"{self.tensors[name].shard}: '{name}' is {list(self.tensors[name].shape)}, but "
                    "by config.json it must be "
                    f"{list(shape)}: copy the folder again"
                )
        missing = [
            name for name in parameters if name not in self.tensors and name != f"{self.head_name}.weight"
        ]
        if self.head_name is not None and not self.is_tied and f"{self.head_name}.weight" not in self.tensors:
            missing.append(f"{self.head_name}.weight")
        unclaimed = sorted(set(self.tensors) - set(parameters))
        if unclaimed:
            missing = [name for name in missing if not _is_of_mixture(name)]
        if missing:
            raise PVQError(
                f"{self.folder}: the shards have no tensor '{missing[0]}', which config.json asks for: "
                + (
                    f"copy it again; if they have it under another name (as perhaps '{unclaimed[0]}'), this kind of "
                    "model cannot be quantized"
                    if unclaimed
                    else "copy it again"
                )
            )

    @property
    def layers(self) -> nn.ModuleList:
        return self.skeleton.get_submodule(self.layers_name)

    @property
    def is_tied(self) -> bool:
        """True when the head has no weight of its own in the files and the embedding serves as one."""
        return (
            self.head_name is not None
            and bool(self.skeleton.config.get_text_config().tie_word_embeddings)
            and f"{self.head_name}.weight" not in self.tensors
        )

    def linear_names(self, layer: int) -> list[str]:
        """Return the full names of the linear modules of one decoder layer that can be quantized, in the
        model's order.
        """
        names = []
        for name, module in self.layers[layer].named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTERS:
                full = f"{self.layers_name}.{layer}.{name}"
                if f"{full}.weight" in self.tensors:
                    names.append(full)
        return names

    def weight_shape(self, module: str) -> tuple[int, int]:
        """Return [out_features, in_features] of a linear or embedding module, from the shard's header."""
        return self.tensors[self.weight_name(module)].shape

    def weight_dtype(self, module: str) -> torch.dtype:
        """Return the dtype in which the module's weight is stored."""
        return TORCH_DTYPES[self.tensors[self.weight_name(module)].dtype]

    def weight_name(self, module: str) -> str:
        """Return the tensor that holds the module's weight (the embedding's for a tied head)."""
        return f"{self.embedding_name if module == self.head_name and self.is_tied else module}.weight"

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the shards."""
        return sum({(info.shard, info.offset): info.nbytes for info in self.tensors.values()}.values())

    def left_as_is(self, modules: Collection[str]) -> tuple[int, int]:
        """Return how many weights of the decoder layers' matrices belong to none of ``modules``, and their bits."""
        return left_as_is(self.tensors, self.layers_name, modules)

    def is_rotated_offline(self, module: str) -> bool:
        """True if the inputs of a linear module arrive rotated, so that it needs no rotation at run time."""
        return False

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor by name and refuse NaN and infinity.

        Raises:
            PVQError: it is not in the shards, or not finite; the sentence names it.
        """
        if name not in self.tensors:
            raise PVQError(
                f"{self.folder}: the shards have no tensor '{name}', which this model needs: copy "
                "the folder again, or "
                "quantize without --calibration if the model stores its layers under other names"
            )
        tensor = read_tensor(self.tensors[name], name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise PVQError(
                f"{self.tensors[name].shard}: tensor '{name}' has NaN or infinite values: get a "
                "sound copy of it"
            )
        return tensor

    def read_original(self, name: str) -> torch.Tensor:
        """Read a tensor as the model has it, without what a view of the model changes about it."""
        return ModelSource.read(self, name)

    def read_stored(self, name: str) -> torch.Tensor:
        """Read a tensor that is not quantized, in the dtype in which the checkpoint stores it; the weight of a
        tied head is the embedding's.
        """
        if name not in self.tensors:
            name = self.weight_name(name.rpartition(".")[0])
        return self.read(name).to(TORCH_DTYPES[self.tensors[name].dtype])

    def fingerprint(self) -> dict:
        """Return what identifies the source: per file its size and a hash of its config, header and samples
        of every tensor.
        """
        files = {"config.json": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()}
        places: dict[Path, set[tuple[int, int]]] = {}  # a view of the model may have two names for a tensor
        for info in self.tensors.values():
            places.setdefault(info.shard, set()).add((info.offset, info.nbytes))
        for shard, tensors in sorted(places.items()):
            digest = hashlib.sha256(str(shard.stat().st_size).encode())
            with open(shard, "rb") as file:
                digest.update(file.read(1 << 20))
                for offset, num_bytes in sorted(tensors):
                    for sample in range(SAMPLES):
                        file.seek(offset + num_bytes * sample // SAMPLES)
                        digest.update(file.read(min(SAMPLE_BYTES, num_bytes)))
            files[shard.name] = digest.hexdigest()
        return files


def _is_of_mixture(parameter: str) -> bool:
    """True for a parameter of an expert or a router."""
    path = parameter.split(".")
    return "experts" in path or path[-2] in ROUTERS


def left_as_is(
    tensors: Mapping[str, TensorInfo], layers_name: str, modules: Collection[str]
) -> tuple[int, int]:
    """Return how many weights the matrices in the decoder layers have that are of none of ``modules``, and their
    bits: linear layers that an --override leaves, experts that are stored together, routers.
    """
    left = [
        info
        for name, info in tensors.items()
        if name.startswith(f"{layers_name}.")
        and len(info.shape) > 1
        and name.rpartition(".")[0] not in modules
    ]
    return sum(math.prod(info.shape) for info in left), sum(8 * info.nbytes for info in left)


def build_skeleton(folder: Path) -> nn.Module:
    """Return the causal language model that ``folder``'s config.json describes, its parameters on the meta
    device.

    Raises:
        PVQError: transformers does not know the model type, or cannot build it.
    """
    import transformers
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError) as error:
        model_type = read_json(folder / "config.json", "model folder").get("model_type")
        raise PVQError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} cannot build a "
            "causal language model of type "
            f"{model_type!r} from it: check the file, or upgrade transformers"
        ) from error
    return model.eval()


def decoder_layers_name(folder: Path, skeleton: nn.Module) -> str:
    """Return the name of the ``ModuleList`` of decoder layers, the one of length num_hidden_layers."""
    depth = getattr(skeleton.config.get_text_config(), "num_hidden_layers", None)
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    raise PVQError(
        f"{folder / 'config.json'}: no list of {depth} decoder layers in {type(skeleton).__name__}: "
        "models of this shape cannot be quantized, give another one"
    )


def module_shapes(skeleton: nn.Module) -> dict[str, tuple[int, int]]:
    """Return [out_features, in_features] of every linear and embedding module ([vocabulary, hidden]).

    For ``pvq_vllm.codec.format.check_checkpoint``.
    """
    return {
        name: tuple(module.weight.shape)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
