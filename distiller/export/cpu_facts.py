"""What this machine's processor is called, and whether it multiplies 8-bit integers in its own way.

Knows nothing about models.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = {
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "amx_int8": "AMX",
    "asimddp": "ARM dot product",
    "i8mm": "ARM int8 matrix product",
    "sve2": "ARM SVE2",
}


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """A processor.

    Attributes:
        name: as it calls itself, or its architecture where that is all that is known.
        dot_products: instructions for sums of 8-bit products, in words; None where that is not known.
    """

    name: str
    dot_products: tuple[str, ...] | None

    def __str__(self) -> str:
        if self.dot_products is None:
            return f"{self.name} (whether it has VNNI or the like is not known)"
        return f"{self.name} ({', '.join(self.dot_products) or 'no VNNI, AMX or ARM dot product'})"


def cpu_facts(cpuinfo: Path = _CPUINFO) -> CpuFacts:
    """This machine's processor, from Linux's list where there is one, else what Python knows.

    Args:
        cpuinfo: the list.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return CpuFacts(platform.processor() or platform.machine() or "unknown processor", None)
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features")
    name = fields.get("model name") or platform.processor() or platform.machine()
    found = None if flags is None else {text for flag, text in _DOT_PRODUCTS.items() if flag in flags.split()}
    ordered = None if found is None else tuple(text for text in _DOT_PRODUCTS.values() if text in found)
    return CpuFacts(name or "unknown processor", ordered)
