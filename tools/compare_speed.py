"""Compares how long calls of two commits take, both in one run, a turn of one after a turn of the other.

python tools/compare_speed.py BEFORE AFTER --device cpu|cuda --output docs/results/walls_speed.json

BEFORE and AFTER are commits, or folders that hold the package `sparsifiner`. Rows stand in `speed_rows.py`;
they are appended to the file as they come. Each tree runs in several processes, since two of the same tree
may differ by more than two trees. Exit code 1 where a row got slower than `--limit` allows, or did not run.
"""

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from compare_commits import ROOT, build_kernels
from probe import import_from
from speed_rows import ROWS

# run by both, whatever is edited meanwhile
PROGRAMS = [Path(__file__).with_name(f"{name}.py") for name in ("probe_speed", "probe", "speed_rows")]
# a turn lasts at least as long: the clock and the pipe do not count
TURN_MILLISECONDS = 10
# rounds of a row at most, and at least, whatever time it is given
MOST_ROUNDS, LEAST_ROUNDS = 200, 4
# results of random weights that are further apart come from other work
DIFFERENCE = 0.05
# of the caller's environment, what would change how the trees compute
CHANGING = ("SPARSIFINER_", "TRITON_INTERPRET", "OMP_")


@dataclass(frozen=True)
class Source:
    """One of the two source trees.

    Attributes:
        name: what rows call it: a commit, or what `--commits` says.
        package: folder that holds the package.
        kernels: the folder that native kernels are built from, None where there is none.
    """

    name: str
    package: Path
    kernels: Path | None


def find(given: str, folder: Path) -> Source:
    """The source tree of a commit, which is extracted, or in a folder.

    Args:
        given: the commit or the folder.
        folder: where to extract to; it is made.

    Raises:
        ValueError: it is neither.
    """
    package = Path(given).resolve()
    if (package / "sparsifiner" / "__init__.py").is_file():
        beside = package.parent
        return Source(given, package, beside if (beside / "CMakeLists.txt").is_file() else None)
    git = ["git", "-C", str(ROOT)]
    try:
        asked = [*git, "rev-parse", "--short", "--verify", f"{given}^{{commit}}"]
        commit = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{given} is no commit, nor a folder that holds the package sparsifiner") from error
    archive = subprocess.run([*git, "archive", commit], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return Source(commit, folder / "src", folder)


class Worker:
    """A process that times calls of one source tree when it is asked to.

    Args:
        name: what errors call it.
        process: runs `probe_speed.py`.
    """

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self.process = process

    def send(self, do: str, **arguments: Any) -> None:
        """Asks for something; `receive` gives it."""
        assert self.process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)

    def receive(self) -> Any:
        """What was asked for, once it is there.

        Raises:
            RuntimeError: it failed.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the process ended"}
        if "error" in reply:
            raise RuntimeError(f"{self.name}: {reply['error']}")
        return reply["value"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """Asks and waits; see `receive`."""
        self.send(do, **arguments)
        return self.receive()


def environment_of(source: Source, name: str, folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """Environment of the workers of a source tree, whose native kernels are built where they are needed.

    Args:
        source: their source tree.
        name: of its folders.
        folder: kernels and caches are made in it.
        options: of the command line.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(CHANGING)}
    environment |= {
        "OMP_WAIT_POLICY": "passive",  # while one measures, threads of the other must not spin
        "TRITON_CACHE_DIR": str(folder / f"triton-{name}"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{name}"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # several compile at once
        **({} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}),
    }
    if options.device == "cpu" and source.kernels is not None:
        environment |= build_kernels(source.kernels, folder / f"build-{name}")
    return environment


@contextmanager
def started(source: Source, folder: Path, device: str, environment: dict[str, str]) -> Iterator[Worker]:
    """A worker, which ends at the end.

    Args:
        source: its source tree.
        folder: holds the programs.
        device: where it computes.
        environment: see `environment_of`.
    """
    command = [sys.executable, str(folder / PROGRAMS[0].name), str(source.package), "--device", device]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Worker(source.name, process)
            process.communicate()  # its input ends, and so does it
        finally:
            process.kill()


@contextmanager
def started_workers(folder: Path, options: argparse.Namespace) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """Workers of both source trees, as many of each, which run alike; they end at the end.

    Args:
        folder: holds the programs; trees, kernels and caches are made in it.
        options: of the command line.

    Raises:
        RuntimeError: they do not run alike.
        ValueError: a source is none.
    """
    trees = []
    for name, given in (("before", options.before), ("after", options.after)):
        source = find(given, folder / name)
        trees.append((source, environment_of(source, name, folder, options)))
    workers: tuple[list[Worker], list[Worker]] = ([], [])
    with ExitStack() as stack:
        for turn in range(options.processes):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                source, environment = trees[side]
                worker = stack.enter_context(started(source, folder, options.device, environment))
                workers[side].append(worker)
        described = [worker.ask("describe") for each in workers for worker in each]
        if any(each != described[0] for each in described):
            raise RuntimeError(f"the trees do not run alike, which compares nothing: {described}")
        yield workers


def distance(before: Path, after: Path) -> float:
    """How far apart two results are, relative to the first; infinite where they are of other shapes."""
    a, b = (torch.load(file, weights_only=True).double() for file in (before, after))
    if a.shape != b.shape:
        return math.inf
    return float((a - b).norm() / a.norm().clamp(min=1e-30))


def prepare(workers: tuple[list[Worker], list[Worker]], name: str, folder: Path, tiny: bool) -> float:
    """Makes all workers ready for a row, at once, since nothing is timed yet.

    Args:
        workers: before and after.
        name: of the row.
        folder: where results of the first calls are put to compare them.
        tiny: take the row's smallest size.

    Returns:
        How far apart the results of the two are, see `distance`.

    Raises:
        RuntimeError: it does not run.
    """
    files = (folder / "before.pt", folder / "after.pt")
    for each, file in zip(workers, files, strict=True):
        for number, worker in enumerate(each):
            worker.send("prepare", name=name, tiny=tiny, output=None if number else str(file))
    failures = []
    for worker in (
        *workers[0],
        *workers[1],
    ):  # all are heard, so that none has an old answer for the next row
        try:
            worker.receive()
        except RuntimeError as error:
            failures.append(str(error))
    if failures:
        raise RuntimeError("; ".join(dict.fromkeys(failures)))
    return distance(*files)


def measure(workers: tuple[list[Worker], list[Worker]], seconds: float) -> dict[str, Any]:
    """Times what is prepared, in rounds of before, after, after, before; each with each in turn.

    Args:
        workers: before and after.
        seconds: about how long to measure.

    Returns:
        Times in ms, ratios after / before, and how they were found.
    """
    pairs = [(before, after) for before in workers[0] for after in workers[1]]
    single = [worker.ask("measure", calls=1) for worker in (*workers[0], *workers[1])]
    calls = max(1, math.ceil(TURN_MILLISECONDS / min(single)))
    turn = sum(single) / len(single) * (calls + 1)  # one does not count
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(1e3 * seconds / (4 * turn))))
    rounds = len(pairs) * math.ceil(rounds / len(pairs))
    times: dict[str, list[float]] = {"before_ms": [], "after_ms": [], "ratio": []}
    for number in range(rounds):
        before, after = pairs[number % len(pairs)]
        # two turns of each, in this order: what drifts, or who finds the caches warm, cancels out
        taken = [worker.ask("measure", calls=calls) for worker in (before, after, after, before)]
        times["before_ms"] += [taken[0], taken[3]]
        times["after_ms"] += [taken[1], taken[2]]
        times["ratio"].append((taken[1] + taken[2]) / (taken[0] + taken[3]))
    found: dict[str, Any] = {"processes": len(workers[0]), "calls": calls, "rounds": rounds}
    for key, values in times.items():
        tenths = quantiles(values, n=10, method="inclusive")
        found |= {key: median(values), f"{key}_low": tenths[0], f"{key}_high": tenths[-1]}
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Times in ms and ratios with what 8 of 10 lie between, and the slowest."""
    if not rows:
        return
    width = max(len(row["row"]) for row in rows)
    print(f"{'row':{width}}  {'before, ms':>28}  {'after, ms':>28}  {'after / before':>24}")
    for row in rows:
        cells = [
            f"{row[key]:{digits}} ({row[f'{key}_low']:{digits}} to {row[f'{key}_high']:{digits}})"
            for key, digits in (("before_ms", ".3f"), ("after_ms", ".3f"), ("ratio", ".3f"))
        ]
        print(f"{row['row']:{width}}  {cells[0]:>28}  {cells[1]:>28}  {cells[2]:>24}")
    slowest = max(rows, key=lambda row: float(row["ratio"]))
    print(f"slowest: {slowest['row']}, {slowest['ratio']:.3f} times the time before")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", help="a commit, or a folder that holds the package")
    parser.add_argument("after", help="another one")
    parser.add_argument("--device", choices=ROWS, required=True, help="where to compute")
    parser.add_argument("--output", type=Path, required=True, help="file that rows are appended to")
    parser.add_argument("--rows", type=int, help="only so many, the first ones")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows, by name")
    parser.add_argument(
        "--seconds", type=float, help="to measure a row, 20 on the CPU, 5 on a GPU by default"
    )
    parser.add_argument("--threads", type=int, help="of the CPU, as many as torch takes by default")
    parser.add_argument("--processes", type=int, help="of each tree, 3 on the CPU, 2 on a GPU by default")
    parser.add_argument("--limit", type=float, default=1.05, help="largest ratio, %(default)s by default")
    parser.add_argument("--commits", nargs=2, metavar="COMMIT", help="what rows call two folders")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that everything runs")
    options = parser.parse_args()
    known = list(ROWS[options.device])
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: choose from {'; '.join(known)}")
    options.names = [name for name in known if options.only is None or name in options.only][: options.rows]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.device == "cpu" and options.threads is None:
        options.threads = torch.get_num_threads()
    if options.seconds is None:
        options.seconds = 20.0 if options.device == "cpu" else 5.0
    if options.processes is None:
        options.processes = 3 if options.device == "cpu" else 2
    return options


def compare(
    workers: tuple[list[Worker], list[Worker]], folder: Path, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures row by row and keeps each in the file as it comes.

    Args:
        workers: before and after.
        folder: for results of calls.
        options: of the command line.

    Returns:
        Rows, and the names of those that did not run.
    """
    # a GPU machine has the package in this checkout alone
    append_rows = import_module(f"{import_from(ROOT / 'src').__name__}.measure.records").append_rows
    commits = options.commits or [each[0].name for each in workers]
    common = {**workers[1][0].ask("describe"), "before": commits[0], "after": commits[1]}
    rows: list[dict[str, Any]] = []
    failed = []
    for name in options.names:
        row = ROWS[options.device][name]
        settings = asdict(row.tiny() if options.tiny else row)
        try:
            difference = prepare(workers, name, folder, options.tiny)
            found = measure(workers, options.seconds)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        rows.append({"row": name, **settings, "difference": difference, **found, **common})
        append_rows(options.output, rows[-1:])
        print(f"{name}: {found['ratio']:.3f} after {found['rounds']} rounds", flush=True)
        if not difference <= DIFFERENCE:
            print(f"{name}: results differ by {difference:.3g} of their size", file=sys.stderr, flush=True)
    return rows, failed


def main() -> int:
    """Exit code 1 where a row is too slow or does not run."""
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for program in PROGRAMS:
            shutil.copy(program, folder)
        with started_workers(folder, options) as workers:
            rows, failed = compare(workers, folder, options)
    print_table(rows)
    slow = [row["row"] for row in rows if row["ratio"] > options.limit]
    for told, names in (("did not run", failed), (f"over {options.limit:g} times the time before", slow)):
        if names:
            print(f"{told}: {'; '.join(names)}", file=sys.stderr)
    return int(bool(failed or slow))


if __name__ == "__main__":
    sys.exit(main())
