"""Times calls of whole models: sparse against dense as timm makes it, both called the same way."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator
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
from sparsifiner.measure.calls import compare_calls, kernel_milliseconds, time_calls
from sparsifiner.measure.candidates import why_it_fails
from sparsifiner.measure.memory import scratch_bytes
from sparsifiner.measure.parity import check_model
from sparsifiner.measure.records import Row, command_of, provenance
from sparsifiner.measure.settings import (
    DTYPES,
    ImageSize,
    Precision,
    check_settings,
    cpu_threads,
    one_for_each,
    sides_of,
)
from sparsifiner.models.loading import load_model
from sparsifiner.ops.backends import resolve_backend
from sparsifiner.scorers import SCORERS
from sparsifiner.tracing import trace

FORWARD, TRAINING = "forward", "training step"
DENSE, SPARSE = "dense", "sparse"
EAGER, COMPILED, REDUCED = "eager", "compiled", "reduce-overhead"

# Up to here the reference backend, which keeps all logits of one head, is at hand to compare with.
_REFERENCE_TOKENS = {"cpu": 4097, "cuda": 16385}
# So small that weights stay what they are while steps are timed.
_LEARNING_RATE = 1e-6


# size of the images, images per call, and how the model is called
Setting = tuple[ImageSize, int, str]


@dataclass(frozen=True)
class ModelBenchmark:
    """Which models to time, and how they are called.

    Attributes:
        model: timm name of a dense model.
        model_args: more arguments for timm, as JSON: '{"num_classes": 10}'.
        img_size: sides of the input in pixels, one or several: '224 512'; height and width of images that are
            no squares: '1024x2048'.
        batch_size: images per call, one for all sizes, one per size, or several for one size: '1 8'.
        dtype: of weights and images; weights are cast, there is no autocast.
        compile: time compiled models, too; forward passes on a GPU also with mode="reduce-overhead".
        latency: time forward passes of single images, too.
        train: time training steps (forward, cross entropy, backward and AdamW) in place of forward passes.
        device: where to compute, such as "cuda" or "cpu"; "auto" takes a GPU if there is one.
        threads: of the CPU, torch's choice by default.
        runs: rounds that count.
        warmup: rounds before them.
        seed: of weights and images.
    """

    model: str = "deit_small_patch16_224"
    model_args: dict[str, Any] | None = None
    img_size: ImageSize | list[ImageSize] = field(
        default_factory=lambda: list[ImageSize]((224, 384, 512, 768, 1024))
    )
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
        check_settings(self, {})
        for size, _ in self.cases():
            sides_of(size)

    def cases(self) -> list[tuple[ImageSize, int]]:
        """Sizes of images with the number of images per call; those of one size follow each other.

        Raises:
            ValueError: the lists differ in length.
        """
        sizes: list[ImageSize] = self.img_size if isinstance(self.img_size, list) else [self.img_size]
        if len(sizes) == 1 and isinstance(self.batch_size, list):
            sizes = sizes * len(self.batch_size)
        batches = one_for_each("batch_size", self.batch_size, "img_size", len(sizes))
        cases = []
        for size, batch in zip(sizes, batches, strict=True):
            cases += [(size, batch), (size, 1)] if self.latency and not self.train else [(size, batch)]
        return list(dict.fromkeys(cases))

    def ways(self, device: torch.device) -> list[str]:
        """How models are called on a device."""
        compiled = [COMPILED] if self.train or device.type != "cuda" else [COMPILED, REDUCED]
        return [EAGER, *(compiled if self.compile else [])]


@dataclass(frozen=True)
class _Prepared:
    """A dense model and its sparse twin with images of one size.

    Attributes:
        models: both, by name.
        images: [B, 3, H, W], as many as the largest call takes.
        described: columns that all of its rows share.
    """

    models: dict[str, nn.Module]
    images: Tensor
    described: Row


def benchmark_model(
    settings: ModelBenchmark, config: SparsifyConfig, done: Collection[Setting] = ()
) -> Iterator[list[Row]]:
    """Times calls of a dense model and its sparse twin, weights and images random.

    Both are called the same way, one after the other, round by round: as they are, compiled, and on a GPU
    compiled with mode="reduce-overhead". A call is timed by the host's clock until its result is there.
    Before anything of a size is timed, lists and attention of every layer are compared with the reference,
    up to 4,097 tokens on a CPU and 16,385 on a GPU.

    Args:
        settings: what to time.
        config: how sparse.
        done: what is left out.

    Yields:
        The rows of each setting: `part` "dense" and "sparse". Besides the columns of `compare_calls`, which
        compare with dense called the same way, they have `way` ("eager", "compiled", "reduce-overhead"),
        `measure` ("forward" or "training step"), `sparse_layers` of `layers`, `kernel_ms` (the sum of the
        kernels' times of a call on a GPU), `images_per_second`, and `memory_bytes`, the peak of a call beyond
        its result (None on a CPU, and with reduce-overhead, which keeps its memory between calls). Where one
        did not run, `left_out` says why.

    Raises:
        ParityError: the backend computes something else than the reference.
        ValueError: the model, its size, the device or the backend cannot be used.
    """
    device = choose_device(settings.device)
    resolve_backend(config.backend, "sparse_attention", device)
    options = command_of("", config).removeprefix("sparsifiner")
    source = {**provenance(device), "command": command_of("bench model", settings) + options}
    wanted = [(*case, way) for case in settings.cases() for way in settings.ways(device)]
    wanted = [setting for setting in wanted if setting not in done]
    with (
        cpu_threads(settings.threads),
        tqdm(desc="calls", total=len(wanted), disable=None, leave=False) as bar,
    ):
        for size, group in itertools.groupby(wanted, lambda setting: setting[0]):
            of_size = list(group)
            prepared = _prepare(size, max(batch for _, batch, _ in of_size), settings, config, device)
            for _, batch, way in of_size:
                yield [row | source for row in _time_way(prepared, batch, way, settings, device)]
                bar.update()


def make_pair(settings: ModelBenchmark, config: SparsifyConfig, size: ImageSize) -> dict[str, nn.Module]:
    """The dense model and its sparse twin with the same random weights, in evaluation mode, on the CPU.

    Raises:
        ValueError: the model, its size or the configuration do not fit.
    """
    with torch.random.fork_rng(devices=[]), about_to_train():
        torch.manual_seed(settings.seed)
        dense = load_model(settings.model, img_size=sides_of(size), model_args=settings.model_args)
        if any(isinstance(module, SparseAttention) for module in dense.modules()):
            name = settings.model.removeprefix("sparsifiner_")
            raise ValueError(f"model={settings.model!r} is sparse already; give --model {name}")
        sparse = sparsify(copy.deepcopy(dense), config)
        for layer in sparse_layers(sparse):
            layer.scorer.imitate_training()
    dtype = DTYPES[settings.dtype]
    return {DENSE: dense.to(dtype), SPARSE: sparse.to(dtype)}


def _prepare(
    size: ImageSize, batch: int, settings: ModelBenchmark, config: SparsifyConfig, device: torch.device
) -> _Prepared:
    """Both models on the device, compared with the reference."""
    # a GPU convolves 16-bit patches many times as fast where the channels of a pixel lie together
    layout_of_images = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    models = {
        name: model.to(device=device, memory_format=layout_of_images)  # type: ignore[call-overload]
        for name, model in make_pair(settings, config, size).items()
    }
    sparse = models[SPARSE]
    layout = host_of(sparse).native
    generator = torch.Generator(device).manual_seed(settings.seed)
    images = torch.randn((batch, 3, *sides_of(size)), generator=generator, device=device)
    images = images.to(DTYPES[settings.dtype], memory_format=layout_of_images)
    largest = _REFERENCE_TOKENS.get(device.type, _REFERENCE_TOKENS["cpu"])
    parity = check_model(sparse, images[:1]) if layout.tokens <= largest else None
    with torch.no_grad(), trace(sparse) as layers:
        sparse(images[:1])
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
        "layers": len(layers),
        "sparse_layers": sum(not layer.dense for layer in layers.values()),
        "parity_error": None if parity is None else parity.error,
        "parity_budget": None if parity is None else parity.budget,
        "parity_agreement": None if parity is None else parity.agreement,
        "runs": settings.runs,
    }
    return _Prepared(models, images, described)


def _time_way(
    prepared: _Prepared, batch: int, way: str, settings: ModelBenchmark, device: torch.device
) -> list[Row]:
    """Rows of both models, called in turns the same way."""
    torch.compiler.reset()  # compiled code of other shapes and ways would be in the way
    make = _training_step if settings.train else _forward_pass
    calls = {name: make(model, prepared.images[:batch], way) for name, model in prepared.models.items()}
    reasons = {
        name: why_it_fails(call, device, required=name == SPARSE and way == EAGER)
        for name, call in calls.items()
    }
    running = {name: call for name, call in calls.items() if reasons[name] is None}
    label = f"{prepared.described['img_size']} px, batch {batch}, {way}"
    times = time_calls(running, runs=settings.runs, warmup=settings.warmup, device=device, label=label)
    rows = []
    for name in calls:
        compared = compare_calls(times.get(name), times.get(DENSE), device)
        whole = compared["median_ms"]
        row = {
            "batch": batch,
            "part": name,
            "measure": TRAINING if settings.train else FORWARD,
            "way": way,
            **compared,
            "baseline": DENSE if DENSE in times else None,
            "kernel_ms": kernel_milliseconds(running[name], device) if name in running else None,
            "images_per_second": None if whole is None else 1e3 * batch / whole,
            "memory_bytes": scratch_bytes(running[name], device)
            if name in running and way != REDUCED
            else None,
            "left_out": reasons[name],
        }
        rows.append(prepared.described | row)
    return rows


def _forward_pass(model: nn.Module, images: Tensor, way: str) -> Callable[[], object]:
    """Calls the model for its logits."""
    called = _called(model, way)

    @torch.inference_mode()
    def forward() -> Tensor:
        return called(images)

    return forward


def _training_step(model: nn.Module, images: Tensor, way: str) -> Callable[[], object]:
    """Takes a step with a copy of the model."""
    trained = copy.deepcopy(model).train()
    called = _called(trained, way)
    on_gpu = images.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained.parameters(), lr=_LEARNING_RATE, fused=on_gpu)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(called(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _called(model: nn.Module, way: str) -> Callable[[Tensor], Tensor]:
    """The model as it is, or as torch compiles it."""
    if way == EAGER:
        return model
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, mode=REDUCED if way == REDUCED else None)
    return compiled
