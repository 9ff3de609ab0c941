"""Hardware: which CPUs are taken to multiply bfloat16 faster than float32."""

import pytest
import torch

from gobelin.kernels import hardware

_CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cpu", "instructions", "has", "is_faster"),
    [
        ("GenuineIntel", {"avx512_bf16", "amx_bf16"}, True, True),
        ("GenuineIntel", {"avx512_bf16"}, True, False),
        ("GenuineIntel", {"avx2"}, False, False),
        ("AuthenticAMD", {"avx512_bf16"}, True, True),
        ("AuthenticAMD", {"avx2"}, False, False),
        ("an ARM", {"bf16"}, True, True),
    ],
)
def test_bfloat16_is_fast_on_cpus_that_were_measured_so(monkeypatch, cpu, instructions, has, is_faster):
    monkeypatch.setattr(hardware, "has_instructions", instructions.__contains__)
    monkeypatch.setattr(hardware, "is_intels", lambda: cpu == "GenuineIntel")
    assert hardware.has_bfloat16(_CPU) is has
    assert hardware.has_fast_bfloat16(_CPU) is is_faster


def test_the_maker_of_a_cpu_is_read_where_the_system_says_it(monkeypatch, tmp_path):
    for where, text, expected in (
        ("file", "vendor_id\t: GenuineIntel\n", True),
        ("file", "vendor_id\t: AuthenticAMD\n", False),
        ("processor", "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True),
        ("processor", "arm", False),
    ):
        hardware.is_intels.cache_clear()
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if where == "file":
            file.write_text(text)
        monkeypatch.setattr(hardware, "Path", lambda name, file=file: file)
        monkeypatch.setattr(hardware.platform, "processor", lambda text=text: text)
        assert hardware.is_intels() is expected
    hardware.is_intels.cache_clear()


def test_devices_that_are_neither_have_none():
    assert not hardware.has_fast_bfloat16(torch.device("mps"))
    assert not hardware.has_bfloat16(torch.device("meta"))
