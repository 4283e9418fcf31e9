"""Times rows of one source tree, a turn whenever it is asked for one, for `compare_speed.py`.

python tools/probe_speed.py SOURCE --device cpu|cuda

Requests and replies are lines of JSON on standard input and output; between two it waits without computing.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import timm
import torch
from probe import import_from, shake
from speed_rows import ROWS, TOKENS, ModelRow, OperationRow
from torch import Tensor, nn

# before anything is timed: kernels compile, libraries choose theirs, memory is got
WARM_UP = 3

Call = Callable[[], Tensor]


class Stopwatch:
    """Prepares rows and times their calls.

    Args:
        library: the package sparsifiner.
        device: where it computes.
    """

    def __init__(self, library: Any, device: str) -> None:
        self.library = library
        self.device = torch.device(device)
        self.call: Call = torch.Tensor
        self.cores = os.sched_getaffinity(0)

    def describe(self) -> dict[str, Any]:
        """Device, versions, and which native kernels run, None for none."""
        told = dict(importlib.import_module("sparsifiner.measure.records").provenance(self.device))
        told.pop("commit")
        native = importlib.import_module("sparsifiner.ops.native")
        uses = self.device.type == "cpu" and not native.why_not()
        return {**told, "isa": native.best_isa().name.lower() if uses else None}

    def prepare(self, name: str, tiny: bool, output: str | None) -> None:
        """Makes what a row calls and calls it until it is warm.

        Args:
            name: of the row.
            tiny: take the row's smallest size.
            output: file for what the first call gives, None for none.
        """
        self.forget()
        run_on(self.cores)
        row = ROWS[self.device.type][name]
        row = row.tiny() if tiny else row
        torch.manual_seed(0)
        if isinstance(row, ModelRow):
            self.call = model_call(self.library, row, self.device)
        else:
            self.call = operation_call(self.library, row, self.device)
        result = self.call()
        if output is not None:
            torch.save(result.detach().clone().cpu(), output)
        for _ in range(WARM_UP):
            self.call()
        self.wait()
        gc.collect()

    def measure(self, calls: int) -> float:
        """Milliseconds of a call, the mean of several, each waited for.

        One before them does not count: it finds the other tree's data in the caches. What gives a GPU its
        work, autograd's thread among them, does so on two cores, the same for all workers: cores differ.
        """
        if self.device.type == "cuda":
            run_on(set(sorted(self.cores)[:2]))
        self.call()
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
            self.wait()
        return 1e3 * (time.perf_counter() - start) / calls

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Lets go of the row before, and of its memory."""
        self.call = torch.Tensor
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run_on(cores: set[int]) -> None:
    """Has every thread of this process run on these cores."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it may have ended since
            os.sched_setaffinity(int(thread.name), cores)


def model_call(library: Any, row: ModelRow, device: torch.device) -> Call:
    """A call of a model, which gives logits, or the first weight's gradient where it trains."""
    model: nn.Module = timm.create_model(row.model, img_size=row.img_size, depth=row.depth)
    options = dict(row.options)
    if TOKENS in options:
        name, argument = options[TOKENS]
        options[TOKENS] = getattr(library, name)(argument)
    library.sparsify(model, **options)
    for part in (".scorer.", ".reducer."):  # commits may fill them in another order
        shake(model, 0.1, part)
    dtype = getattr(torch, row.dtype)
    model = model.to(device, dtype).train(row.train)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(row.batch, 3, row.img_size, row.img_size, generator=generator).to(device, dtype)
    if row.train:
        return functools.partial(train, model, images)
    forward = torch.compile(model) if row.how == "compiled" else model
    call = functools.partial(infer, forward, images)
    return captured(call) if row.how == "captured" else call


@torch.inference_mode()
def infer(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits of images [B, 3, H, W]."""
    return model(images)


def train(model: Any, images: Tensor) -> Tensor:
    """Gradients of a loss on images [B, 3, H, W]; that of the first weight is returned."""
    model.zero_grad()
    model(images).float().square().mean().backward()
    gradient: Tensor = model.patch_embed.proj.weight.grad
    return gradient


def captured(call: Call) -> Call:
    """What replays a call as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    gc.collect()  # what the collector frees during a capture may break it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def operation_call(library: Any, row: OperationRow, device: torch.device) -> Call:
    """A call of an operation on random inputs."""
    operations = importlib.import_module("sparsifiner.ops")
    side, tokens = -(-row.grid // row.tile), row.grid**2 + 1
    dtype, generator = getattr(torch, row.dtype), torch.Generator().manual_seed(1)
    scores = torch.randn(row.batch, row.heads, side**2, tokens, generator=generator).to(device, dtype)
    budget = round(row.keep * tokens)
    # by default a row stands for one token; with tiles no row here is without a score
    own = None if row.tile == 1 else torch.full((side**2, 1), -1, device=device)
    select = functools.partial(operations.select_topk, scores, budget, forced=1, own=own)
    if row.operation == "select_topk":
        return select
    lists = library.Connectivity(select(), grid=(row.grid, row.grid), tile=row.tile, prefix=1)
    packed = torch.randn(row.batch, tokens, 3, row.heads, 64, generator=generator).to(device, dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()  # views of one projection, as in models
    return functools.partial(operations.sparse_attention, q, k, v, lists, row.summary)


def serve(stopwatch: Stopwatch, requests: TextIO, replies: TextIO) -> None:
    """Does what each line asks for, until there are no more."""
    for line in requests:
        request = json.loads(line)
        try:
            reply = {"value": getattr(stopwatch, request.pop("do"))(**request)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def main() -> None:
    """Serves until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that holds the package sparsifiner")
    parser.add_argument("--device", choices=ROWS, required=True, help="where to compute")
    options = parser.parse_args()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no reply
    warnings.simplefilter("ignore")  # untrained scorers, old spellings
    serve(Stopwatch(import_from(options.source.resolve()), options.device), sys.stdin, replies)


if __name__ == "__main__":
    main()
