"""What a packed file takes, tensor by tensor, beside what was packed.

Knows nothing about how tensors are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tabulate import tabulate

__all__ = ["PackReport", "TensorReport"]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What one tensor takes.

    Attributes:
        name: in the state, or its place in the structure.
        shape: of the tensor.
        dtype: of its elements, as torch calls it.
        encoding: how it is stored.
        bytes: of its section, checksum included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    bytes: int

    @property
    def elements(self) -> int:
        """How many there are."""
        return prod(self.shape)

    @property
    def bits_per_element(self) -> float:
        """Bits of the section for each element; of an empty tensor, 0."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a packed file takes.

    Attributes:
        path: the file.
        tensors: in the order of the file.
        header_bytes: what is not a tensor's: names, structure, checksums.
        original_bytes: of what the file is compared with.
    """

    path: Path
    tensors: tuple[TensorReport, ...]
    header_bytes: int
    original_bytes: int

    @property
    def bytes(self) -> int:
        """Of the file."""
        return self.header_bytes + sum(tensor.bytes for tensor in self.tensors)

    @property
    def compression_rate(self) -> float:
        """Original bytes over bytes of the file."""
        return self.original_bytes / self.bytes

    def to_text(self) -> str:
        """A table with a line for each tensor, and the sums under it."""
        rows = [
            [
                tensor.name,
                "x".join(map(str, tensor.shape)) or "-",
                tensor.dtype,
                tensor.encoding,
                f"{tensor.bytes:,}",
                f"{tensor.bits_per_element:.3f}",
            ]
            for tensor in self.tensors
        ]
        rows.append(["names, structure, checksums", "", "", "", f"{self.header_bytes:,}", ""])
        table = tabulate(
            rows,
            ["tensor", "shape", "type", "encoding", "bytes", "bits an element"],
            colalign=("left", "right", "left", "left", "right", "right"),
            disable_numparse=True,
        )
        return f"{table}\n{self.summary()}"

    def summary(self) -> str:
        """Size and compression rate in one sentence."""
        return (
            f"packed file {self.path}: {self.bytes:,} bytes; compression rate {self.original_bytes:,} / "
            f"{self.bytes:,} = {self.compression_rate:.2f}x"
        )

    def to_json(self) -> dict[str, Any]:
        """The sizes as plain data."""
        return {
            "file": self.path.name,
            "bytes": self.bytes,
            "original_bytes": self.original_bytes,
            "compression_rate": self.compression_rate,
        }
