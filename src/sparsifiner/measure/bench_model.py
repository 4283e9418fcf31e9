"""Times whole models: dense as timm makes them and sparse, each as it is and compiled."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sparsifiner.attention import SparseAttention
from sparsifiner.config import SparsifyConfig, config_to_dict
from sparsifiner.convert import about_to_train, sparse_layers, sparsify
from sparsifiner.device import choose_device
from sparsifiner.hosts import host_of
from sparsifiner.measure.candidates import Candidate, time_candidates
from sparsifiner.measure.parity import check_model
from sparsifiner.measure.records import Row, command_of, provenance
from sparsifiner.measure.settings import DTYPES, Precision, check_settings, cpu_threads, one_for_each
from sparsifiner.models.loading import load_model
from sparsifiner.ops.backend import resolve_backend
from sparsifiner.scorers import SCORERS

THROUGHPUT, LATENCY, TRAINING = "throughput", "latency", "training step"
DENSE, SPARSE = "dense", "sparse"
_AS_IT_IS, _COMPILED = "as it is", "compiled"

# Up to here the reference backend, which keeps all logits, is at hand to compare with.
_REFERENCE_TOKENS = 4097
_INPUT_SETS = 2
# So small that weights stay what they are while steps are timed.
_LEARNING_RATE = 1e-6


Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class ModelBenchmark:
    """Which models to time.

    Attributes:
        model: timm name of a dense model.
        model_args: more arguments for timm, as JSON: '{"num_classes": 10}'.
        img_size: sides of the input in pixels, one or several: '224 512'.
        batch_size: images per batch, one for all sizes or one per size.
        dtype: of weights and images; weights are cast, there is no autocast.
        compile: time compiled models, too.
        latency: time single images, too.
        train: time training steps, too: forward, cross entropy, backward and AdamW.
        device: where to compute, such as "cuda" or "cpu"; "auto" takes a GPU if there is one.
        threads: of the CPU, torch's choice by default.
        runs: rounds that count.
        warmup: rounds before them.
        seed: of weights and images.
    """

    model: str = "deit_small_patch16_224"
    model_args: dict[str, Any] | None = None
    img_size: int | list[int] = field(default_factory=lambda: [224, 384, 512, 768, 1024])
    batch_size: int | list[int] = 8
    dtype: Precision = "bf16"
    compile: bool = True
    latency: bool = True
    train: bool = False
    device: str = "auto"
    threads: int | None = None
    runs: int = 20
    warmup: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Rejects impossible values by name."""
        check_settings(self, {"img_size": 1})
        self.cases()

    def cases(self) -> list[tuple[int, int]]:
        """Sides in pixels with their batch sizes.

        Raises:
            ValueError: the lists differ in length.
        """
        sizes = self.img_size if isinstance(self.img_size, list) else [self.img_size]
        batches = one_for_each("batch_size", self.batch_size, "img_size", len(sizes))
        return list(zip(sizes, batches, strict=True))


def benchmark_model(settings: ModelBenchmark, config: SparsifyConfig) -> Iterator[list[Row]]:
    """Times a dense model and its sparse twin, weights and images random, in turns.

    Before anything of a size is timed, lists and attention of every layer are compared with the reference, up
    to 4,097 tokens. On a GPU every candidate is replayed as a CUDA graph, compiled or not.

    Args:
        settings: what to time.
        config: how sparse.

    Yields:
        The rows of each size: "dense", "dense compiled", "sparse" and "sparse compiled", each for throughput,
        latency (one image) and training steps as asked for. See `time_candidates` for their columns.

    Raises:
        ParityError: the backend computes something else than the reference.
        ValueError: the model, its size, the device or the backend cannot be used.
    """
    device = choose_device(settings.device)
    resolve_backend(config.backend, "sparse_attention", device)
    options = command_of("", config).removeprefix("sparsifiner")
    source = {**provenance(device), "command": command_of("bench model", settings) + options}
    with cpu_threads(settings.threads):
        for size, batch in tqdm(settings.cases(), desc="sizes", disable=None, leave=False):
            yield _measure(size, batch, settings, config, device, source)


def make_pair(settings: ModelBenchmark, config: SparsifyConfig, size: int) -> dict[str, nn.Module]:
    """The dense model and its sparse twin with the same random weights, in evaluation mode, on the CPU.

    Raises:
        ValueError: the model, its size or the configuration do not fit.
    """
    with torch.random.fork_rng(devices=[]), about_to_train():
        torch.manual_seed(settings.seed)
        dense = load_model(settings.model, img_size=size, model_args=settings.model_args)
        if any(isinstance(module, SparseAttention) for module in dense.modules()):
            name = settings.model.removeprefix("sparsifiner_")
            raise ValueError(f"model={settings.model!r} is sparse already; give --model {name}")
        sparse = sparsify(copy.deepcopy(dense), config)
        for layer in sparse_layers(sparse):
            layer.scorer.imitate_training()
    dtype = DTYPES[settings.dtype]
    return {DENSE: dense.to(dtype), SPARSE: sparse.to(dtype)}


def _measure(
    size: int,
    batch: int,
    settings: ModelBenchmark,
    config: SparsifyConfig,
    device: torch.device,
    source: Row,
) -> list[Row]:
    # a GPU convolves 16-bit patches many times as fast where the channels of a pixel lie together
    layout_of_images = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    models = {
        name: model.to(device=device, memory_format=layout_of_images)  # type: ignore[call-overload]
        for name, model in make_pair(settings, config, size).items()
    }
    sparse = models[SPARSE]
    layout = host_of(sparse).native
    generator = torch.Generator(device).manual_seed(settings.seed)
    shape = (_INPUT_SETS * batch, 3, size, size)
    images = torch.randn(shape, generator=generator, device=device).to(DTYPES[settings.dtype])
    images = images.contiguous(memory_format=layout_of_images).view(_INPUT_SETS, batch, *shape[1:])
    parity = check_model(sparse, images[0, :1]) if layout.tokens <= _REFERENCE_TOKENS else None
    options = config_to_dict(config)
    described = {
        "benchmark": "model",
        "model": settings.model,
        "model_args": settings.model_args,
        "img_size": size,
        "tokens": layout.tokens,
        "dtype": settings.dtype,
        "weights": f"random, cast to {settings.dtype}",
        **{"token_method" if name == "tokens" else name: value for name, value in options.items()},
        # its name, and its options beside it
        "scorer": SCORERS.name_of(config.scorer),
        **dataclasses.asdict(config.scorer),
        "keep": list(config.keep) if isinstance(config.keep, tuple) else config.keep,
        "parity_error": None if parity is None else parity.error,
        "parity_budget": None if parity is None else parity.budget,
        "parity_agreement": None if parity is None else parity.agreement,
        "input_sets": _INPUT_SETS,
        "runs": settings.runs,
    }
    batches = {THROUGHPUT: batch, LATENCY: 1} if batch > 1 and settings.latency else {THROUGHPUT: batch}
    if settings.train:
        batches[TRAINING] = batch
    rows = []
    for measure, count in batches.items():
        torch.compiler.reset()  # compiled code of other shapes would be in the way
        make = _training_steps if measure == TRAINING else _forward_passes
        candidates = [
            Candidate(
                name if way == _AS_IT_IS else f"{name} {way}",
                measure,
                calls,
                dense=name == DENSE,
                required=name == SPARSE and way == _AS_IT_IS,
                needs=calls[0],
            )
            for name, model in models.items()
            for way, calls in make(model, images[:, :count], settings.compile).items()
        ]
        timed = time_candidates(
            candidates,
            runs=settings.runs,
            warmup=settings.warmup,
            device=device,
            label=f"{size} px, {measure}",
        )
        rows += [described | {"batch": count} | row | _speed(row, count) | source for row in timed]
    return rows


def _forward_passes(model: nn.Module, images: Tensor, compiled: bool) -> dict[str, Calls]:
    """Forward passes over each set of images, by way."""

    @torch.no_grad()
    def forward(way: Callable[[Tensor], Tensor], index: int) -> Tensor:
        return way(images[index])

    return _by_way(forward, model, compiled)


def _training_steps(model: nn.Module, images: Tensor, compiled: bool) -> dict[str, Calls]:
    """Whole steps over each set of images, by way, all on one copy of the model."""
    trained = copy.deepcopy(model).train()
    on_gpu = images.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained.parameters(), lr=_LEARNING_RATE, fused=on_gpu, capturable=on_gpu)
    labels = torch.zeros(images.shape[:2], dtype=torch.int64, device=images.device)

    def step(way: Callable[[Tensor], Tensor], index: int) -> None:
        # gradients of the step before belong to the memory of another graph
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(way(images[index]).float(), labels[index])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _by_way(step, trained, compiled)


def _by_way(
    function: Callable[[Callable[[Tensor], Tensor], int], object], model: nn.Module, compiled: bool
) -> dict[str, Calls]:
    """Calls of a function for each set of images: with the model as it is and, if asked for, compiled."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {_AS_IT_IS: model}
    if compiled:
        ways[_COMPILED] = torch.compile(model, dynamic=False)
    return {
        name: [functools.partial(function, way, index) for index in range(_INPUT_SETS)]
        for name, way in ways.items()
    }


def _speed(row: Row, images: int) -> Row:
    milliseconds = row["median_ms"]
    return {"images_per_second": None if milliseconds is None else 1e3 * images / milliseconds}
