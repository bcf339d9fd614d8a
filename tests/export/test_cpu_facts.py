import platform

import pytest

from distiller.export.cpu_facts import CpuFacts, cpu_facts

XEON = """processor\t: 0
model name\t: Some Xeon @ 2.0GHz
flags\t\t: fpu avx2 avx512_vnni amx_int8 amx_tile
processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.mark.parametrize(
    "text,name,found",
    [
        (XEON, "Some Xeon @ 2.0GHz", ("AVX512-VNNI", "AMX")),
        (XEON.replace("avx512_vnni amx_int8", "avx_vnni_not_this"), "Some Xeon @ 2.0GHz", ()),
        (ARM, "arm64", ("ARM dot product", "ARM int8 matrix product")),
        ("", "arm64", None),
    ],
)
def test_name_and_instructions_are_read_from_linux_list(text, name, found, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    assert cpu_facts(tmp_path / "cpuinfo") == CpuFacts(name, found)


def test_without_the_list_python_says_what_it_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
    assert cpu_facts(tmp_path / "none") == CpuFacts("Intel64 Family 6", None)


def test_in_words():
    assert str(CpuFacts("A", ("AVX-VNNI", "AMX"))) == "A (AVX-VNNI, AMX)"
    assert str(CpuFacts("A", ())) == "A (no VNNI, AMX or ARM dot product)"
    assert str(CpuFacts("A", None)) == "A (whether it has VNNI or the like is not known)"


def test_this_machine_has_a_name():
    assert cpu_facts().name
