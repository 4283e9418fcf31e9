"""Calibration on a few images: scorers learn the dense attention, budgets go to where they are needed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sparsifiner.attention import SparseAttention
from sparsifiner.calibration.scorer_fit import fit_scorers
from sparsifiner.config import SparsifyConfig, change_config
from sparsifiner.convert import sparse_layers, sparsify
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.hosts import Host, host_of
from sparsifiner.models.adapter import scorer_weights
from sparsifiner.plan import Call, plan

# List lengths at which a layer is measured, as multiples of the mean length that is asked for.
_MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
# Lengths among which each layer's is chosen; between measured ones errors are interpolated.
_LENGTHS_PER_LAYER = 256
_EVERY_KEY = 1.0

Match = Literal["logits", "tokens"]


@dataclass(frozen=True)
class Calibration:
    """What was measured and chosen.

    Attributes:
        keep: share of the keys that each layer lists now.
        budgets: the same in keys.
        budgets_before: keys that each layer listed before.
        images: how many were used.
        match: what errors are of: "logits" (mean KL(dense ‖ sparse) in nats) or "tokens" (mean relative
            distance of the final patch tokens).
        error_before: error of the model as it was.
        error: error with those that were chosen.
        lengths: list lengths at which every layer was measured.
        layer_errors: error with one layer sparse and all others dense: one row per layer, one column per
            length.
    """

    keep: tuple[float, ...]
    budgets: tuple[int, ...]
    budgets_before: tuple[int, ...]
    images: int
    match: Match
    error_before: float
    error: float
    lengths: tuple[int, ...]
    layer_errors: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers."""
        return asdict(self)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    match: Match = "logits",
    fit_steps: int = 300,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Calibration:
    """Fits the scorers of a sparse model and spreads its keys so that it comes nearest to its dense twin.

    Scorers with weights learn the dense attention first. Together the layers list at most as many keys as
    before, so that no MACs are added. Layers are measured one at a time, all others dense: their errors
    nearly add up. The backbone is not touched, and no labels are needed. What is no better than before,
    scorers or budgets, stays as it was.

    Args:
        model: a sparse model in evaluation mode; its configuration and scorers are changed in place.
        images: batches [B, 3, H, W] of one size; some forty images are enough.
        match: "logits", or "tokens" for models whose patch tokens are used.
        fit_steps: optimizer steps, of a batch each, in which scorers with weights learn; 0 leaves them.
        device: where the model is.
        progress: show a progress bar on a terminal.

    Returns:
        What was measured and chosen.

    Raises:
        ValueError: the model is of no family that is known here, is not sparse, is in training, shares
            lists, lost layers in front, has no classes to match, stays dense at this size; `match` is
            unknown; there is no image, or they differ in size.
    """
    layers = sparse_layers(model)
    host = host_of(model)
    config = layers[0].config
    _check(host, config, match, fit_steps)
    if [layer.place.index for layer in layers] != list(range(len(layers))):
        raise ValueError(
            "layers were removed or moved since the model was made sparse; call sparsifiner.sparsify(model) "
            "again first"
        )
    batches = [batch.to(device) for batch in images]
    count = sum(map(len, batches))
    if not count:
        raise ValueError("images: there is no image to calibrate on")
    sizes = {tuple(batch.shape[-2:]) for batch in batches}
    if len(sizes) > 1:
        raise ValueError(f"images have the sizes {sorted(sizes)}; give one size at a time")
    height, width = batches[0].shape[-2:]
    layout = host.layout_for((height, width))
    keeps = [min(1.0, config.keep_of(layer.place.index, layer.place.depth)) for layer in layers]
    unfitted = {name: tensor.clone() for name, tensor in scorer_weights(model).items()}
    before = _budgets(layers, layout, config)
    # every list holds its forced keys and one more
    least = min(_budgets(layers, layout, change_config(config, keep=1e-6)))
    if least == layout.tokens:
        raise ValueError(
            f"all layers stay dense at {layout.tokens} tokens; lower min_tokens={config.min_tokens}"
        )
    with _restored(layers):
        error_before = _mean_error(host, layers, batches, keeps, match)
    error_fitted = error_before
    with _given_back_on_failure(model, unfitted):
        if fit_scorers(model, batches, fit_steps, progress=progress):
            with _restored(layers):
                error_fitted = _mean_error(host, layers, batches, keeps, match)
            if error_fitted > error_before:
                model.load_state_dict(unfitted, strict=False)
                error_fitted = error_before
        total = sum(before)
        lengths = _lengths(total / len(layers), least, layout.tokens)
        rows = torch.zeros(len(layers), len(lengths), dtype=torch.float64)
        bar = tqdm(batches, desc="calibrating", unit="batch", disable=None if progress else True, leave=False)
        with _restored(layers):
            for batch in bar:
                errors = list(_layer_errors(host, layers, batch, lengths, layout, match))
                rows += torch.tensor(errors, dtype=torch.float64) * len(batch) / count
            chosen = choose_budgets(rows.tolist(), lengths, total, least, layout.tokens)
            keep = [budget / layout.tokens for budget in chosen]
            error = _mean_error(host, layers, batches, keep, match)
    if error >= error_fitted:
        chosen, error, keep = before, error_fitted, keeps
    sparsify(model, change_config(config, keep=keep))
    return Calibration(
        keep=tuple(keep),
        budgets=tuple(chosen),
        budgets_before=tuple(before),
        images=count,
        match=match,
        error_before=error_before,
        error=error,
        lengths=tuple(lengths),
        layer_errors=tuple(map(tuple, rows.tolist())),
    )


def choose_budgets(
    errors: Sequence[Sequence[float]], lengths: Sequence[int], total: int, least: int, tokens: int
) -> list[int]:
    """List lengths, one per layer, of the smallest summed error that together do not exceed `total`.

    Errors between the measured lengths are interpolated over the logarithm of the length; no longer list is
    taken to be worse, and a list of every key has no error. A price per key turns the problem into one per
    layer; the price is searched for. Keys that are left over, since a price moves many layers at once, go
    where they help most, one layer at a time.

    Args:
        errors: one row per layer, one column per length.
        lengths: ascending.
        total: keys of all layers together.
        least: keys that every list has.
        tokens: keys that a list can have.
    """
    steps = torch.linspace(math.log(least), math.log(tokens), _LENGTHS_PER_LAYER, dtype=torch.float64)
    candidates = torch.unique(steps.exp().round())  # ascending
    measured = torch.tensor([*lengths, tokens], dtype=torch.float64)
    table = torch.tensor([[*row, 0.0] for row in errors], dtype=torch.float64).cummin(1).values
    curves = torch.stack([_interpolate(candidates.log(), measured.log(), row) for row in table])

    def cheapest(price: float) -> Tensor:
        lengths: Tensor = candidates[(curves + price * candidates).argmin(1)]
        return lengths

    low, high = 0.0, float(table.max()) + 1.0  # at the highest price no key is worth it
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if cheapest(price).sum() <= total else (price, high)
    return _spend_rest(cheapest(high), candidates, curves, total)


def _spend_rest(chosen: Tensor, candidates: Tensor, curves: Tensor, total: int) -> list[int]:
    """Lengthens lists, the largest gain per key first, while keys are left and help."""
    place = torch.searchsorted(candidates, chosen)
    while True:
        cost = candidates - candidates[place][:, None]  # [layers, candidates]
        gain = curves.gather(1, place[:, None]) - curves
        affordable = (cost > 0) & (cost <= total - candidates[place].sum())
        rate = torch.where(affordable, gain / cost.clamp(min=1), 0.0)
        best = int(rate.argmax())
        if rate.flatten()[best] <= 0:
            return [int(length) for length in candidates[place]]
        place[best // len(candidates)] = best % len(candidates)


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear through ascending points, constant beyond them."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
    share = ((at - x0) / (x1 - x0)).clamp(0, 1)
    interpolated: Tensor = y0 + share * (y1 - y0)
    return interpolated


def _check(host: Host, config: SparsifyConfig, match: Match, fit_steps: int) -> None:
    if fit_steps < 0:
        raise ValueError(f"fit_steps must be at least 0, got {fit_steps}; 0 leaves the scorers as they are")
    if match not in get_args(Match):
        raise ValueError(f"match={match!r} is unknown; choose one of {get_args(Match)}")
    if host.model.training:
        raise ValueError("model is in training mode; call model.eval() first")
    if config.share > 1:
        raise ValueError(f"share={config.share}: calibrate needs lists of each layer's own; set share=1")
    if config.tokens is not None:
        raise ValueError("calibrate measures layers that see all tokens; set tokens=None, and add them later")
    if match == "logits" and not host.num_classes:
        raise ValueError("match='logits' needs classes, but the model has none; use match='tokens'")


def _budgets(layers: Sequence[SparseAttention], layout: TokenLayout, config: SparsifyConfig) -> list[int]:
    """Keys of each list of the layers, if they did as configured."""
    specs = [plan(Call(layout), config, layer.place) for layer in layers]
    return [layout.tokens if spec is None else spec.budget for spec in specs]


def _lengths(mean: float, least: int, tokens: int) -> list[int]:
    lengths = {min(tokens - 1, max(least, round(multiple * mean))) for multiple in _MULTIPLES}
    return sorted(lengths)


def _layer_errors(
    host: Host,
    layers: Sequence[SparseAttention],
    batch: Tensor,
    lengths: Sequence[int],
    layout: TokenLayout,
    match: Match,
) -> Iterator[list[float]]:
    """Errors of each layer alone, by length of its lists: what lies before it is computed once."""
    keeps = [_EVERY_KEY] * len(layers)
    _keep(layers, keeps)
    inputs: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for block in host.blocks
    ]
    try:
        expected = _outcome(host, host.features(batch), match)
    finally:
        for hook in hooks:
            hook.remove()
    for index in range(len(layers)):
        errors = []
        for length in lengths:
            _keep(layers, [*keeps[:index], length / layout.tokens, *keeps[index + 1 :]])
            features = host.features_from(index, inputs[index])
            errors.append(_distance(_outcome(host, features, match), expected, match))
        yield errors


def _mean_error(
    host: Host,
    layers: Sequence[SparseAttention],
    batches: Sequence[Tensor],
    keeps: Sequence[float],
    match: Match,
) -> float:
    """Error with all layers sparse, the mean over all images."""
    total = 0.0
    for batch in batches:
        outcomes = []
        for chosen in ([_EVERY_KEY] * len(layers), keeps):
            _keep(layers, chosen)
            outcomes.append(_outcome(host, host.features(batch), match))
        total += len(batch) * _distance(outcomes[1], outcomes[0], match)
    return total / sum(map(len, batches))


def _keep(layers: Sequence[SparseAttention], keeps: Sequence[float]) -> None:
    """Has each layer list this share of the keys."""
    config = change_config(layers[0].config, keep=list(keeps))
    for layer in layers:
        layer.configure(config, layer.place)


def _outcome(host: Host, features: Tensor, match: Match) -> Tensor:
    """What is compared: log-probabilities [B, classes] or patch tokens [B, patches, C]."""
    if match == "logits":
        return host.logits(features).double().log_softmax(-1)
    return host.patch_tokens(features).double()


def _distance(actual: Tensor, expected: Tensor, match: Match) -> float:
    if match == "logits":
        return float(F.kl_div(actual, expected, log_target=True, reduction="batchmean"))
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


@contextmanager
def _restored(layers: Sequence[SparseAttention]) -> Iterator[None]:
    """Gives layers their configuration back at the end."""
    config = layers[0].config
    try:
        yield
    finally:
        for layer in layers:
            layer.configure(config, layer.place)


@contextmanager
def _given_back_on_failure(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Gives the scorers their weights back where something fails, so that nothing is calibrated by half."""
    try:
        yield
    except BaseException:
        model.load_state_dict(weights, strict=False)
        raise
