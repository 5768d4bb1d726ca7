"""Accelerators: memory bandwidth and dense compute by the width of the weights, from vendors' data sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..core.errors import ConfigError

__all__ = ["ACCELERATORS", "Accelerator", "find_accelerator"]


@dataclass(frozen=True)
class Accelerator:
    """Peak rates of one accelerator, without sparsity.

    Where kernels unpack weights to a wider format before they multiply, the rate is that of the wider one:
    4-bit weights compute in 16 bits on all accelerators without 4-bit units, 8-bit ones in 16 on the A100.

    Attributes:
        name: name in options and errors.
        pattern: regular expression that the device name of torch contains, any case.
        bandwidth: memory bandwidth, in TB/s.
        bits16, bits8, bits4: TFLOPS with weights of 16, 8 and 4 bits.
        source: of the figures.
    """

    name: str
    pattern: str
    bandwidth: float
    bits16: float
    bits8: float
    bits4: float
    source: str

    def tflops(self, bits: int) -> float:
        """Peak TFLOPS with weights of 4, 8, 16 or 32 bits. 32 bits: TF32, half the rate of 16 bits."""
        return {4: self.bits4, 8: self.bits8, 16: self.bits16, 32: self.bits16 / 2}[bits]


_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_BLACKWELL = "NVIDIA Blackwell data sheet (GB200 NVL72 and HGX B200), halves of its figures with sparsity"
# More special patterns come first.
_ALL = (
    Accelerator("A100 40GB", r"\bA100\b.*40GB", 1.555, 312, 312, 312, _A100),
    Accelerator("A100 80GB PCIe", r"\bA[18]00\b.*PCIE", 1.935, 312, 312, 312, _A100),
    Accelerator("A100 80GB", r"\bA[18]00\b", 2.039, 312, 312, 312, _A100),
    Accelerator("H100 PCIe", r"\bH100\b.*PCIE", 2.0, 756, 1513, 756, _H100),
    Accelerator("H100 NVL", r"\bH100\b.*NVL", 3.9, 835, 1671, 835, _H100),
    # An H800 differs from it in its links.
    Accelerator("H100 SXM", r"\bH[18]00\b", 3.35, 989, 1979, 989, _H100),
    Accelerator("H200 NVL", r"\bH200\b.*NVL", 4.8, 836, 1671, 836, _H200),
    Accelerator("H200", r"\bH200\b", 4.8, 989, 1979, 989, _H200),
    Accelerator(
        "H20", r"\bH20\b", 4.0, 148, 296, 148, "NVIDIA H20, specifications given out by its resellers"
    ),
    Accelerator("B200", r"\bB200\b", 7.7, 2250, 4500, 9000, _BLACKWELL),
    Accelerator("GB200", r"\bGB200\b", 8.0, 2500, 5000, 10000, _BLACKWELL),
    Accelerator("L40S", r"\bL40S\b", 0.864, 362, 733, 362, "NVIDIA L40S data sheet"),
    Accelerator("MI300X", r"\bMI300X\b", 5.3, 1307, 2615, 1307, "AMD Instinct MI300X data sheet"),
    Accelerator("MI355X", r"\bMI355X\b", 8.0, 2500, 5000, 10100, "AMD Instinct MI355X data sheet"),
)
ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType({item.name: item for item in _ALL})
"""The known accelerators, by name."""


def find_accelerator(name: str) -> Accelerator:
    """The accelerator with a name of `ACCELERATORS`, any case, or with torch's name of a device.

    Examples: `H100 SXM`; `NVIDIA H100 80GB HBM3`, which is the same.

    Raises:
        ConfigError: unknown; the message lists the known ones.
    """
    for item in _ALL:
        if item.name.lower() == name.lower():
            return item
    for item in _ALL:
        if re.search(item.pattern, name, re.IGNORECASE):
            return item
    raise ConfigError(f"no known accelerator is {name!r}; there are {', '.join(ACCELERATORS)}")
