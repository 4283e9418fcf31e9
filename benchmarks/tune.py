"""Measures again what was tuned on one machine: each value of tuned.py and csrc/tuned.h beside others.

    python benchmarks/tune.py                         # all that this machine can measure
    python benchmarks/tune.py SORTED_SCORES TILE_QUERIES
    python benchmarks/tune.py --list

A line says what the same work costs with other values, as a ratio to its time with the value that stands:
above 1 they are slower. For a threshold it says, at several sizes, what the way taken below it costs against
the other way. Values take turns in one run and medians count; kernels in C++ are built anew for each value,
in a folder of its own, and take turns by processes. The machine must have nothing else to do. Nothing is
written: who finds a better value puts it into the table.
"""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tune_work import NATIVE, SIZES, THRESHOLDS, Size, Threshold, Work, native_work

from sparsifiner import tuned
from sparsifiner.measure.timing import time_in_turns
from sparsifiner.ops.program import mark_programs

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "tuned.h"
RUNS = 15
ROUNDS = 3  # of processes
LIMIT = 2**31 - 1  # a threshold below which all sizes lie


def value_of(name: str) -> object:
    """What stands in the table; `NAME[cpu]` and `NAME[16]` are entries of dictionaries."""
    head, key = place_of(name)
    value = getattr(tuned, head)
    return value if key is None else value[key]


def place_of(name: str) -> tuple[str, str | int | None]:
    """The name in the table, and the key in its dictionary, if it is one."""
    head, _, key = name.removesuffix("]").partition("[")
    return head, int(key) if key.isdigit() else key or None


def put(name: str, value: object) -> None:
    """Writes a value into the table of this process."""
    head, key = place_of(name)
    if key is None:
        setattr(tuned, head, value)
    else:
        getattr(tuned, head)[key] = value
    mark_programs((name, value))  # programs are made of these values


def with_value(name: str, value: object, work: Work) -> Work:
    def call() -> object:
        put(name, value)
        return work()

    return call


def milliseconds(name: str, values: list[object], work: Work, device: str) -> list[float]:
    """Median time of the same work with each value, in turns."""
    before = value_of(name)
    try:
        # on a GPU every value's launches are captured, so that the host does not count
        calls = {str(number): with_value(name, value, work) for number, value in enumerate(values)}
        timings = time_in_turns(calls, runs=RUNS, warmup=3, device=device, graphs=device == "cuda")
    finally:
        put(name, before)
    return [timings[str(number)].median_ms for number in range(len(values))]


def tune_size(name: str, size: Size) -> str:
    stands = value_of(name)
    first, *others = milliseconds(name, [stands, *size.others], size.make(), size.device)
    ratios = zip(size.others, others, strict=True)
    return line(name, stands, [f"{value}: {other / first:.2f}" for value, other in ratios], f"{first:.3g} ms")


def tune_threshold(name: str, threshold: Threshold) -> str:
    told = []
    for size in threshold.sizes:
        below, above = milliseconds(name, [LIMIT, 0], threshold.make(size), threshold.device)
        told.append(f"at {size}: {below / above:.2f}")
    return line(name, value_of(name), told, "below it / above it")


def line(name: str, stands: object, told: list[str], note: str) -> str:
    return f"{name:22}{stands!s:>12}   {'  '.join(told)}   ({note})"


def native_values() -> dict[str, str]:
    """The values of csrc/tuned.h, as they are written there."""
    return dict(re.findall(r"^constexpr \w+ (\w+) = (.+);$", HEADER.read_text(), re.M))


def build(folder: Path, name: str, value: str) -> Path:
    """Builds the kernels with another value, from copies of their sources.

    Raises:
        RuntimeError: this machine has no native kernels.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    header = folder / "csrc" / HEADER.name
    header.write_text(re.sub(rf"( {name} = ).+;", rf"\g<1>{value};", header.read_text()))
    output = folder / "build"
    subprocess.run(["cmake", "-S", folder, "-B", output], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", output, "--parallel"], check=True, stdout=subprocess.DEVNULL)
    if not (output / "_native.so").exists():
        raise RuntimeError("there are no native kernels for this machine; name other values")
    return output / "_native.so"


def tune_native(name: str) -> str:
    stands, others = native_values()[name], NATIVE[name]
    with tempfile.TemporaryDirectory() as folder:
        libraries = [
            build(Path(folder) / str(number), name, value) for number, value in enumerate([stands, *others])
        ]
        times: list[list[float]] = [[] for _ in libraries]
        for _ in range(ROUNDS):
            for taken, library in zip(times, libraries, strict=True):
                taken.append(run_alone(name, library))
    first, *rest = (median(taken) for taken in times)
    told = [f"{value}: {other / first:.2f}" for value, other in zip(others, rest, strict=True)]
    return line(name, stands, told, f"{first:.3g} ms")


def run_alone(name: str, library: Path) -> float:
    """Milliseconds of a value's work in a process that has loaded a library."""
    done = subprocess.run(
        [sys.executable, __file__, "--time", name],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "SPARSIFINER_LIBRARY": str(library)},
    )
    return float(json.loads(done.stdout))


def tunings() -> dict[str, tuple[str, Callable[[], str]]]:
    """By name where a value is measured, and how."""
    found: dict[str, tuple[str, Callable[[], str]]] = {}
    for name, size in SIZES.items():
        found[name] = (size.device, functools.partial(tune_size, name, size))
    for name, threshold in THRESHOLDS.items():
        found[name] = (threshold.device, functools.partial(tune_threshold, name, threshold))
    for name in NATIVE:
        found[name] = ("cpu", functools.partial(tune_native, name))
    return found


def main() -> None:
    every = tunings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these values")
    parser.add_argument("--list", action="store_true", help="print the names and where they are measured")
    parser.add_argument("--time", choices=NATIVE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        timing = time_in_turns({"": native_work(options.time)}, runs=RUNS, warmup=3)[""]
        print(json.dumps(timing.median_ms))
        return
    if options.list:
        print("\n".join(f"{name:22} {device}" for name, (device, _) in every.items()))
        return
    unknown = set(options.names) - set(every)
    if unknown:
        parser.error(f"names: {', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    warnings.simplefilter("ignore")  # an untrained scorer costs what a trained one costs
    has_gpu = torch.cuda.is_available()
    for name in options.names or every:
        device, tune = every[name]
        if device == "cuda" and not has_gpu:
            print(f"{name:22} not measured: it needs a GPU", flush=True)
        else:
            print(tune(), flush=True)


if __name__ == "__main__":
    main()
