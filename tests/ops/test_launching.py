"""How launches are made ready: what C may launch, what it passes to the driver, and who launches the rest."""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsifiner.ops import launching
from sparsifiner.ops.backends import HAS_TRITON
from sparsifiner.ops.launching import Address, Launch, replay_by_triton, why_not_by_c

HERE = Path(__file__).parent
TYPES = {"x": "*fp32", "y": "*bf16", "N": "i32", "factor": "fp32", "BLOCK": "constexpr", "stride": "i64"}
PTX_TYPES = ("u64", "u64", "u32", "f32", "u64", "u64", "u64")


def ptx(types=PTX_TYPES, name="scale_kernel"):
    lines = ",\n".join(
        f"\t.param .{type_} {'.ptr .global .align 1 ' if type_ == 'u64' else ''}{name}_param_{index}"
        for index, type_ in enumerate(types)
    )
    return f".version 8.7\n.visible .entry {name}(\n{lines}\n)\n.reqntid 128\n{{ }}"


def compiled(text=None, types=TYPES, **metadata):
    """A kernel as Triton compiles one, as far as launches look at it."""
    usual = {
        "name": "scale_kernel",
        "num_warps": 4,
        "warp_size": 32,
        "shared": 1024,
        "num_ctas": 1,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "tensordesc_meta": [],
        "instrumentation_mode": "",
    }
    return SimpleNamespace(
        metadata=SimpleNamespace(**(usual | metadata)),
        asm={"ptx": ptx() if text is None else text},
        src=SimpleNamespace(signature=types),
        function=77,
        packed_metadata=("packed",),
    )


def launch(grid=(7, 2, 3), **changes):
    kernel = SimpleNamespace(arg_names=list(TYPES))
    told = {"x": Address(0, 8), "y": Address(1, 0), "N": 5, "factor": 0.5} | changes
    return Launch(kernel, grid, tuple(told.values()), {"BLOCK": 16, "stride": 2**40, "num_warps": 4})


def test_what_c_launches():
    assert why_not_by_c(compiled(), launch()) == ""


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (compiled(launch_pdl=True), "asks for launch_pdl"),
        (compiled(launch_cooperative_grid=True), "asks for launch_cooperative_grid"),
        (compiled(tensordesc_meta=[{}]), "asks for tensordesc_meta"),
        (compiled(instrumentation_mode="consan"), "asks for instrumentation_mode"),
        (compiled(global_scratch_size=8), "takes scratch memory"),
        (compiled(profile_scratch_size=8), "takes scratch memory"),
        (compiled(num_ctas=2), "asks for a cluster"),
        (compiled(""), "has other parameters in its PTX"),
        (compiled(ptx(PTX_TYPES[:-1])), "has other parameters in its PTX"),
        (compiled(ptx((*PTX_TYPES, "u64"))), "has other parameters in its PTX"),
        (compiled(ptx(("u64", "u64", "u64", *PTX_TYPES[3:]))), "has other parameters in its PTX"),
        (compiled(ptx(name="another_kernel")), "has other parameters in its PTX"),
        (compiled(types=TYPES | {"N": "i8"}), "has parameters of other types"),
        (compiled(types=TYPES | {f"x{i}": "i32" for i in range(60)}), "too many of them"),
    ],
)
def test_what_c_does_not_launch(kernel, reason):
    assert reason in why_not_by_c(kernel, launch())


def test_metadata_that_lacks_a_size_of_scratch_memory_is_not_trusted():
    kernel = compiled()
    del kernel.metadata.profile_scratch_size
    assert "takes scratch memory" in why_not_by_c(kernel, launch())


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_launches_with_the_arguments_of_all_its_versions():
    calls = []
    kernel = compiled()
    kernel.run = lambda *arguments: calls.append(arguments)
    replay_by_triton([launch(), launch(N=6)], [kernel, kernel])([100, 200], 9)
    rest = (9, 77, ("packed",), None, None, None, 108, 200)
    assert calls == [(7, 2, 3, *rest, n, 0.5, 16, 2**40) for n in (5, 6)]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_hooks_are_seen(monkeypatch):
    from triton import knobs  # noqa: PLC0415

    assert not launching.hooked()
    for hook in (SimpleNamespace(calls=[print]), print):
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, "launch_exit_hook", hook)
            assert launching.hooked()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", None)
        patch.setattr(knobs.runtime, "launch_exit_hook", None)
        assert not launching.hooked()


def mode_of_captures():
    """What captures of this thread forbid, asked by setting it twice."""
    mode, exchange = ctypes.c_int32(1), launching._driver().cuThreadExchangeStreamCaptureMode
    exchange(ctypes.byref(mode))
    found = mode.value
    exchange(ctypes.byref(mode))
    return found


PROGRAM = """
import threading
from tests.ops.test_launching import compiled, launch
from sparsifiner.ops.launching import RelaxedCapture, replay_by_c
from tests.ops.test_launching import mode_of_captures

replay = replay_by_c([launch(), launch(grid=(7, 1, 1), N=-1)], [compiled(), compiled()])
replay([1000, 2000], 9)
thread = threading.Thread(target=replay, args=([3000, 2**62], 8))
thread.start()
thread.join()
with RelaxedCapture():
    assert mode_of_captures() == 2
assert mode_of_captures() == 0
failing = compiled()
failing.function = 666
try:
    replay_by_c([launch()], [failing])([0, 0], 0)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.skipif(isinstance(launching._library(), str), reason="the library that launches was not built")
def test_what_c_passes_to_the_driver(tmp_path):
    driver, log = tmp_path / "libcuda.so.1", tmp_path / "log"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", driver, HERE / "fake_driver.c"], check=True)
    variables = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_DRIVER_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=False
    )
    message = "launches failed: an illegal memory access was encountered (CUDA driver error 700)\n"
    assert done.stdout == message, done.stderr
    half = struct.unpack("<i", struct.pack("<f", 0.5))[0]

    def line(grid, stream, x, y, n):
        start = f"launch 77 grid {grid} threads 128 1 1 shared 1024 stream {stream} extra 0:"
        return f"{start} {x} {y} {n} {half} {2**40} 0 0"

    assert log.read_text().splitlines() == [
        line("7 2 3", 9, 1008, 2000, 5),
        line("7 1 1", 9, 1008, 2000, -1),
        line("7 2 3", 8, 3008, 2**62, 5),
        line("7 1 1", 8, 3008, 2**62, -1),
    ]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_every_kernel_compiles_for_a_gpu_and_is_launched_by_c(tmp_path):
    """With whatever version of Triton is installed, no GPU needed."""
    variables = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.sm90", "--sample"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 15
    assert [line for line in lines if '"reason": ""' not in line] == []
