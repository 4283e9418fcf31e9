"""Accuracy of a model, alone or paired with its dense twin on the same images."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sparsifiner.hosts import find_host
from sparsifiner.models.features import same_patches, token_states
from sparsifiner.tokens import TokenState

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class AgainstDense:
    """A model beside its dense twin, image by image.

    Attributes:
        dense_top1: top-1 of the twin, in percent.
        difference: top-1 minus that of the twin, in points.
        interval: half width of the paired 95 % interval of the difference, in points.
        agreement: share of images with the same first class, in percent.
        logit_kl: mean KL(dense ‖ model) of the class probabilities, in nats.
        token_cosine: mean cosine of the patch tokens behind the final norm with those of the twin, what a
            detection or segmentation head would see; None for models without such tokens.
        token_error: mean distance of those tokens from the twin's, as a share of their length.
        dense_images_per_second: speed of the twin in the same run.
    """

    dense_top1: float
    difference: float
    interval: float
    agreement: float
    logit_kl: float
    token_cosine: float | None
    token_error: float | None
    dense_images_per_second: float


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a model.

    Attributes:
        images: number of images.
        top1: percent whose label is the first class.
        top5: percent whose label is among the first five.
        images_per_second: speed of the forward passes alone.
        against_dense: comparison with the dense twin, None if there was none.
        right: bool [images], whether each image's label was the first class.
    """

    images: int
    top1: float
    top5: float
    images_per_second: float
    against_dense: AgainstDense | None
    right: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, without those of single images."""
        return {name: value for name, value in asdict(self).items() if name != "right"}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dense: nn.Module | None = None,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Accuracy:
    """Evaluates a classifier; with `dense` also how far it is from its twin.

    Args:
        model: the model, in evaluation mode, on `device`.
        batches: pairs of images [B, 3, H, W] and labels int64 [B].
        dense: the dense twin, likewise.
        device: where to compute.
        amp_dtype: autocast dtype, None for full precision.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: there is no image.
    """
    runs = {"model": _Run(model, device, amp_dtype)}
    if dense is not None:
        runs["dense"] = _Run(dense, device, amp_dtype)
    tokens = _TokenDistance()
    labels: list[Tensor] = []
    bar = tqdm(batches, desc="evaluating", unit="batch", disable=None if progress else True, leave=False)
    hits = seen = 0
    with ExitStack() as stack:
        if dense is not None:
            for run in runs.values():
                stack.enter_context(run.keeping_tokens())
        for images, label in bar:
            images = images.to(device, non_blocking=True)
            if not labels:
                for run in runs.values():
                    run.compute(images)
            labels.append(label)
            for run in runs.values():
                run.step(images)
            if dense is not None:
                tokens.add(runs["model"], runs["dense"])
            hits += int((runs["model"].logits[-1].argmax(1) == label).sum())
            seen += len(label)
            bar.set_postfix(top1=f"{100 * hits / seen:.2f}", refresh=False)
    if not labels:
        raise ValueError("data: there is no image to evaluate on")
    label = torch.cat(labels)
    logits = torch.cat(runs["model"].logits)
    classes = min(5, logits.shape[1])
    right = logits.argmax(1) == label
    top5 = (logits.topk(classes).indices == label[:, None]).any(1)
    return Accuracy(
        images=len(label),
        top1=_percent(right),
        top5=_percent(top5),
        images_per_second=len(label) / runs["model"].seconds,
        against_dense=_compare(logits, right, label, runs["dense"], tokens) if dense is not None else None,
        right=right,
    )


class _TokenDistance:
    """How far patch tokens are from those of the dense twin, image by image."""

    def __init__(self) -> None:
        self.cosines: list[Tensor] = []
        self.errors: list[Tensor] = []

    def add(self, run: "_Run", dense_run: "_Run") -> None:
        """Takes the patch tokens of one batch, if there are some: those that the model has left."""
        if run.tokens is None or dense_run.tokens is None:
            return
        tokens, dense = run.tokens.double(), same_patches(dense_run.tokens, run.state).double()
        self.cosines.append(F.cosine_similarity(tokens, dense, dim=-1).mean(1).cpu())
        self.errors.append(((tokens - dense).norm(dim=-1) / dense.norm(dim=-1)).mean(1).cpu())

    def means(self) -> tuple[float | None, float | None]:
        """Mean cosine and mean relative distance."""
        if not self.cosines:
            return None, None
        return torch.cat(self.cosines).mean().item(), torch.cat(self.errors).mean().item()


class _Run:
    """One model over all batches: its logits on the CPU and the seconds of its forward passes."""

    def __init__(self, model: nn.Module, device: torch.device | str, amp_dtype: torch.dtype | None) -> None:
        self.model = model
        self.device = torch.device(device)
        self.amp_dtype = amp_dtype
        self.logits: list[Tensor] = []
        self.seconds = 0.0
        self.tokens: Tensor | None = None
        self.state: TokenState | None = None

    @contextmanager
    def keeping_tokens(self) -> Iterator[None]:
        """Keeps the patch tokens of each batch, where the model has some."""
        host = find_host(self.model)
        if host is None:
            yield
            return

        with token_states(self.model) as states:

            def keep(module: nn.Module, args: Any, features: Tensor) -> None:
                self.state = states[-1] if states else None
                self.tokens = host.patch_tokens(features, self.state)

            handle = host.last_module.register_forward_hook(keep)
            try:
                yield
            finally:
                handle.remove()

    def compute(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits: Tensor = self.model(images)
        return logits.float().cpu()  # the copy waits for a GPU

    def step(self, images: Tensor) -> None:
        start = time.perf_counter()
        self.logits.append(self.compute(images))
        self.seconds += time.perf_counter() - start


def _compare(
    logits: Tensor, right: Tensor, label: Tensor, dense: _Run, tokens: _TokenDistance
) -> AgainstDense:
    dense_logits = torch.cat(dense.logits)
    dense_right = dense_logits.argmax(1) == label
    difference = right.double() - dense_right.double()
    spread = difference.std() if len(label) > 1 else torch.zeros(())
    log_probability, dense_log_probability = (x.double().log_softmax(1) for x in (logits, dense_logits))
    divergence = F.kl_div(log_probability, dense_log_probability, log_target=True, reduction="none").sum(1)
    token_cosine, token_error = tokens.means()
    return AgainstDense(
        dense_top1=_percent(dense_right),
        difference=100 * difference.mean().item(),
        interval=100 * _NORMAL_95 * (spread / len(label) ** 0.5).item(),
        agreement=_percent(logits.argmax(1) == dense_logits.argmax(1)),
        logit_kl=divergence.mean().item(),
        token_cosine=token_cosine,
        token_error=token_error,
        dense_images_per_second=len(label) / dense.seconds,
    )


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()
