# SPDX-License-Identifier: Apache-2.0
"""The activation modes of docs/format.md section 6 by name: ``a8``, ``a16``, and ``pvq:D,K`` as in ``pvq:16,58``.

The same name stands in config.json, in the environment variable PVQ_ACTIVATION and on the command line; each
mode has one spelling.
"""

import re
from typing import NamedTuple

from .errors import PVQError

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
MAX_PULSES = 4096
_PVQ = re.compile(r"pvq:([1-9][0-9]{0,3}),([1-9][0-9]{0,3})")


class Activation(NamedTuple):
    """What the kernels need to know of a mode.

    ``num_planes`` is the number of int8 planes of a quantized token. ``group_size`` and ``num_pulses`` are D and
    K of the pyramid that each group is projected onto; both are 0 for ``a8`` and ``a16``.
    """

    num_planes: int
    group_size: int = 0
    num_pulses: int = 0


def parse_activation(name, where: str = "activation") -> Activation:
    """Return the mode called ``name``.

    Raises:
        PVQError: there is none, or its D or K is out of range; the sentence starts with ``where``.
    """
    if name == "a8":
        return Activation(1)
    if name == "a16":
        return Activation(2)
    match = _PVQ.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise PVQError(f"{where} is {name!r}, but must be one of a8, a16, pvq:D,K (for example pvq:16,58)")
    group_size, num_pulses = map(int, match.groups())
    if group_size not in GROUP_SIZES or num_pulses > MAX_PULSES:
        raise PVQError(
            f"{where} is {name!r}, but in pvq:D,K the group D must be one of {', '.join(map(str, GROUP_SIZES))} "
            f"and the pulses K 1 to {MAX_PULSES}"
        )
    return Activation(1, group_size, num_pulses)


def check_width(activation: str, width: int, where: str) -> None:
    """Raise PVQError unless the groups of ``activation`` tile ``width`` columns, those of one rank."""
    group_size = parse_activation(activation).group_size
    if group_size and width % group_size:
        raise PVQError(
            f"{where} has {width} input columns on a rank, which activation {activation} cannot split into groups of "
            f"{group_size}: choose a group that divides them, a8 or a16"
        )
