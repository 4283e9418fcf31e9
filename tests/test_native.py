"""The loader of the native kernels: what it says where they are missing, and which instructions it takes."""

import _ctypes
import ctypes
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from sparsifiner.ops import native
from sparsifiner.ops.native import Isa


@pytest.fixture
def load(monkeypatch):
    """Loads another library for one test, None for the installed one."""

    def load_from(path):
        if path is None:
            monkeypatch.delenv(native.LIBRARY_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(native.LIBRARY_VARIABLE, str(path))
        native._load.cache_clear()
        native._machine_isa.cache_clear()
        return native.library()

    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    yield load_from
    monkeypatch.undo()
    native._load.cache_clear()
    native._machine_isa.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Pretends that the machine's best instruction set is another."""
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    return lambda isa: monkeypatch.setattr(native, "_machine_isa", lambda: isa)


def test_structures_are_as_large_as_those_of_the_library():
    # csrc/library.cpp asserts the same numbers
    assert ctypes.sizeof(native.Lists) == 64
    assert ctypes.sizeof(native.NativeTensor) == 32
    assert ctypes.sizeof(native.Attention) == 248
    assert ctypes.sizeof(native.Predictor) == 184
    assert ctypes.sizeof(native.Impact) == 208


def test_the_library_is_there_or_it_says_why_not():
    assert (native.library() is None) == bool(native.why_missing())
    if native.library() is None:
        assert native.why_not() == native.why_missing()


class TestMissing:
    def check(self, reason):
        assert native.library() is None
        assert reason in native.why_missing()
        assert native.why_not() == native.why_missing()
        assert native.best_isa() is Isa.NONE

    def test_no_such_file(self, load, tmp_path):
        load(tmp_path / "none.so")
        self.check(f"cannot be loaded from {tmp_path / 'none.so'}: ")

    def test_no_library(self, load, tmp_path):
        (tmp_path / "text.so").write_text("no library")
        load(tmp_path / "text.so")
        self.check("text.so: ")

    def test_another_library(self, load):
        load(_ctypes.__file__)
        self.check("sparsifiner_interface; reinstall with pip install")

    def test_not_installed(self, load, monkeypatch):
        monkeypatch.setattr(native, "find_spec", lambda name: None)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(sys, "platform", "linux")
        load(None)
        self.check("needs g++ 12 or newer with OpenMP; install it and run pip install")

    def test_another_machine(self, load, monkeypatch):
        monkeypatch.setattr(native, "find_spec", lambda name: None)
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        load(None)
        self.check(f"are for x86-64 on Linux, this is aarch64 on {sys.platform}")

    def test_instructions_name_the_reason(self, load, monkeypatch, tmp_path):
        load(tmp_path / "none.so")
        monkeypatch.setenv(native.ISA_VARIABLE, "avx2")
        with pytest.raises(
            ValueError, match=r"SPARSIFINER_ISA='avx2' cannot be used here \(native .* loaded"
        ):
            native.best_isa()


class TestInstructions:
    @pytest.mark.parametrize("asked", ["none", "avx2", "avx512"])
    def test_lower_ones_are_taken(self, machine, monkeypatch, asked):
        machine(Isa.AVX512_BF16)
        monkeypatch.setenv(native.ISA_VARIABLE, asked)
        assert native.best_isa() is Isa[asked.upper()]

    def test_the_best_by_default(self, machine):
        machine(Isa.AVX512)
        assert native.best_isa() is Isa.AVX512

    def test_more_than_there_is(self, machine, monkeypatch):
        machine(Isa.AVX2)
        monkeypatch.setenv(native.ISA_VARIABLE, "avx512")
        message = "SPARSIFINER_ISA='avx512' cannot be used here.*; choose one of none, avx2$"
        with pytest.raises(ValueError, match=message):
            native.best_isa()

    def test_unknown(self, machine, monkeypatch):
        machine(Isa.AVX2)
        monkeypatch.setenv(native.ISA_VARIABLE, "neon")
        message = "SPARSIFINER_ISA='neon' is unknown; choose one of none, avx2, avx512, avx512_bf16"
        with pytest.raises(ValueError, match=message):
            native.best_isa()

    @pytest.mark.skipif(native.library() is None, reason="there is no native library")
    def test_why_not_names_the_cause(self, machine, monkeypatch):
        machine(Isa.NONE)
        assert "need a processor with AVX2" in native.why_not()
        machine(Isa.AVX2)
        assert native.why_not() == ""
        monkeypatch.setenv(native.ISA_VARIABLE, "none")
        assert "switched off by SPARSIFINER_ISA=none" in native.why_not()


@pytest.mark.skipif(native.library() is None, reason="there is no native library")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is loaded")
def test_the_library_shares_torchs_openmp_threads():
    program = (
        "from sparsifiner.ops import native; assert native.library();"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line})"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(eval(loaded.stdout)) == 1


@pytest.mark.skipif(native.library() is None, reason="there is no native library")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how much memory is taken")
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the address sanitizer itself ends a process that has no memory",
)
def test_memory_that_is_not_there_is_an_error_and_calls_go_on():
    program = """
import resource, torch
from sparsifiner import Connectivity
from sparsifiner.ops import select_topk, sparse_attention
torch.set_num_threads(1)

def attend(side, tile):
    q = torch.ones(1, 1, 1, 64).expand(1, 1, side**2, 64)
    lists = torch.zeros(1, 1, (side // tile) ** 2, 1, dtype=torch.int32)
    return sparse_attention(q, q, q, Connectivity(lists, (side, side), tile), backend="cpu")

def select(tokens):
    return select_topk(torch.ones(()).expand(1, 1, 1, tokens), 1, backend="cpu")

attend(4, 1), select(64)
before = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
for call in (lambda: attend(1000, 100), lambda: select(10**8)):
    try:
        call()
        print("finished")
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, str(error)[:60])
resource.setrlimit(resource.RLIMIT_AS, before)
print(bool((attend(4, 1) == 1).all()), select(64).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    first, second, after = done.stdout.splitlines()
    assert first == "MemoryError native kernels: attend found no memory to work in; take fewe"
    assert second.startswith(("MemoryError", "RuntimeError"))
    assert after == "True [[[[0]]]]"


@pytest.mark.skipif(native.library() is None, reason="there is no native library")
def test_a_library_of_another_version_is_refused(load, monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    load(native._find())
    assert native.library() is None
    assert (
        f"(interface {native.INTERFACE - 1}, needed is {native.INTERFACE}); reinstall" in native.why_missing()
    )


def test_the_interface_is_that_of_the_header():
    header = pathlib.Path(__file__).parents[1] / "csrc" / "sparsifiner.h"
    assert f"enum {{ SPARSIFINER_INTERFACE = {native.INTERFACE} }};" in header.read_text()
