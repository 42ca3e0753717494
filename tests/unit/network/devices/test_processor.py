"""What a processor says that it can do in bfloat16, and what its small products say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoprune.network.devices import processor
from autoprune.network.devices.processor import processor_text, this_processor, without_bfloat16

X86 = "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu sse4_1 {}\n"
ARM = "BogoMIPS\t: 243.75\nFeatures\t: fp asimd {}\n"


@pytest.fixture(autouse=True)
def on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is known of the processor but what a test writes."""
    for name in processor._LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("text", "kind", "can"),
    [
        (X86.format("avx2 fma avx_vnni avx_ne_convert"), "AVX2", False),
        (X86.format("avx2 avx512f avx512_vnni"), "AVX-512", False),
        (X86.format("avx2 avx512f avx512_bf16"), "AVX-512 with bfloat16", True),
        (X86.format("avx2 avx512f avx512_bf16 amx_tile amx_bf16"), "AMX", True),
        (ARM.format("asimdhp"), "NEON", False),
        (ARM.format("asimdhp bf16"), "NEON with bfloat16", True),
        (ARM.format("sve bf16 svebf16"), "SVE with bfloat16", True),
        ("processor\t: 0\nisa\t: rv64imafdc\n", "", None),
    ],
)
def test_bfloat16_is_a_choice_where_the_processor_multiplies_in_it(text: str, kind: str, can: bool | None) -> None:
    processor._CPUINFO.write_text(text)
    found = this_processor()
    assert (found.kind, found.bfloat16) == (kind, can)
    assert ("Some CPU @ 2 GHz" in str(found)) == ("model name" in text)
    if can is not None:
        expected = None if can else f"this processor ({kind}) only emulates bfloat16"
        assert without_bfloat16("cpu") == expected


def test_torch_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    processor._CPUINFO.write_text(X86.format("avx2"))
    able = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert (this_processor().kind, this_processor().bfloat16) == ("AVX-512 with bfloat16", True)


@pytest.mark.parametrize("variable", processor._LIMITS)
def test_a_limit_of_onednn_takes_bfloat16_away(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor._CPUINFO.write_text(X86.format("avx2 avx512f avx512_bf16"))
    before = processor_text("cpu")
    for limit in ("avx2", "AVX512_CORE", "AVX2_VNNI_2"):
        monkeypatch.setenv(variable, limit)
        said = (
            f"this processor (AVX-512 with bfloat16, limited to {limit.upper()} by {variable}) only emulates bfloat16"
        )
        assert without_bfloat16("cpu") == said
        assert processor_text("cpu") != before
    for limit in ("ALL", "AVX512_CORE_BF16", ""):
        monkeypatch.setenv(variable, limit)
        assert without_bfloat16("cpu") is None


@pytest.mark.parametrize(("ratio", "slow"), [(0.5, False), (1.9, False), (2.1, True)])
def test_where_a_processor_does_not_say_small_products_tell(
    ratio: float, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_is_slow", processor._is_slow.__wrapped__)
    monkeypatch.setattr(processor, "_small_products", lambda *_: (ratio, 1.0))
    reason = without_bfloat16("cpu")
    assert (reason is not None) == slow
    assert not slow or "more than twice as long" in str(reason)


def test_without_onednn_the_abilities_of_a_processor_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    processor._CPUINFO.write_text(X86.format("avx512f avx512_bf16"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert this_processor().bfloat16 is None


def test_one_reading_in_twenty_that_is_wrong_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated product timed as short as a real one, or a real one as long as an emulated one."""
    count = iter(range(1000))

    def timed(table: torch.Tensor, *_: torch.Tensor) -> float:
        right = 25.0 if table.dtype == torch.bfloat16 else 1.0
        return 26.0 - right if next(count) % 20 == 4 else right

    monkeypatch.setattr(processor, "_timed", timed)
    assert processor._small_products(torch.bfloat16, torch.float32) == (25.0, 1.0)


def test_small_products_are_timed_on_one_thread_and_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    assert all(seconds > 0 for seconds in processor._small_products(torch.float32, torch.bfloat16))
    assert torch.get_num_threads() == before


def test_an_older_gpu_that_emulates_bfloat16_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old")
    assert without_bfloat16("cuda") == "this GPU (Old) only emulates bfloat16"
    assert processor_text("cuda") == "Old"
    assert without_bfloat16("meta") is None
