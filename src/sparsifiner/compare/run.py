"""Trains, evaluates and counts each method alike, keeps a row of every one, then times all of them."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from sparsifiner.compare.methods import METHODS, Budget, Geometry, Method
from sparsifiner.data import ImageSet, evaluation_transform, make_loader
from sparsifiner.files import write_aside
from sparsifiner.hosts import host_of
from sparsifiner.macs import count_macs
from sparsifiner.measure.accuracy import evaluate
from sparsifiner.measure.memory import scratch_bytes
from sparsifiner.measure.records import Row, append_rows, changing_rows, provenance, read_rows
from sparsifiner.measure.timing import forward_calls, time_in_turns
from sparsifiner.training import Recipe, train
from sparsifiner.training.recipe import recipe_settings
from sparsifiner.training.stages import weights_digest

RESULTS = "results.json"
_SETTINGS = "comparison.yaml"
# settings of a recipe that do not change its result, or are a row's own
_OF_NO_EFFECT = ("workers", "accumulate", "log_every", "checkpoint_every", "seed")
# what tells what a model costs, and one row from another
_SETTING = ("method", "keep", "token_keep")
_KEYS = (*_SETTING, "trained", "seed")
_TIMED_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        methods: one or several, as in '[fast,evit]': dense, fast, fast+evit, fast+tome, pooled, paper,
            paper+falling+summaries, released, linformer, window, strided, random, bigbird, oracle, evit,
            dynamicvit, tome.
        keep: shares of the keys, one or several: '0.1 0.25'.
        token_keep: shares of the patches that stay at each stage of dropping; as many as `keep`.
        tile: side in patches of the square of queries that share one list.
        summary: side in patches of the summary windows of our methods.
        pool: side of the squares whose mean queries score for "impact"; half the tile's by default.
        seeds: of the training, one run each; training-free rows have the first.
        untrained: make training-free rows too.
        trained: make rows of trained models.
        timed_on: where models are timed, "cuda" in bf16 and "cpu" in fp32; what is there by default, '[]'
            for nowhere, on a machine that does other work.
        timing_batch: images of a timed batch on a GPU; one on a CPU.
    """

    methods: str | list[str] = field(default_factory=lambda: list(METHODS))
    keep: float | list[float] = field(default_factory=lambda: [0.1, 0.25])
    token_keep: float | list[float] = field(default_factory=lambda: [0.5, 0.7])
    tile: int = 8
    summary: int = 8
    pool: int | None = None
    seeds: int | list[int] = 0
    untrained: bool = True
    trained: bool = True
    timed_on: str | list[str] | None = None
    timing_batch: int = 64

    def __post_init__(self) -> None:
        """Rejects what cannot be compared by name."""
        unknown = [name for name in self.listed("methods") if name not in METHODS]
        if unknown:
            raise ValueError(f"methods: {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}")
        for name in ("methods", "keep", "token_keep", "seeds"):
            if not self.listed(name):
                raise ValueError(f"{name} is empty; give at least one")
        keeps, tokens = self.listed("keep"), self.listed("token_keep")
        for name, shares in (("keep", keeps), ("token_keep", tokens)):
            for share in shares:
                if not 0 < share <= 1:
                    raise ValueError(f"{name} must lie in (0, 1], got {share}")
        both = [name for name in self.listed("methods") if METHODS[name].spends == "both"]
        if both and len(keeps) != len(tokens):
            raise ValueError(
                f"keep has {len(keeps)} entries, but token_keep has {len(tokens)}, and {both[0]} takes one "
                "of each; give as many, or leave it out"
            )
        if not list(_settings(self)):
            raise ValueError(
                f"untrained={self.untrained} and trained={self.trained} leave no row of {self.methods}; "
                "methods that must learn first have only trained ones"
            )
        pool = self.tile if self.pool is None else self.pool
        if min(self.tile, self.summary, pool) < 1 or self.tile % pool:
            raise ValueError(
                f"tile={self.tile}, summary={self.summary} and pool={self.pool} must be at least 1, and pool "
                "a divisor of tile"
            )
        self._check_timing()

    def _check_timing(self) -> None:
        for device in self.listed("timed_on"):
            if device not in _TIMED_DTYPES:
                raise ValueError(f"timed_on={device!r} is unknown; choose from {', '.join(_TIMED_DTYPES)}")
            if device == "cuda" and not torch.cuda.is_available():
                raise ValueError("timed_on='cuda', but there is no GPU here; leave it out")
        if self.timing_batch < 1:
            raise ValueError(f"timing_batch must be at least 1, got {self.timing_batch}")

    @property
    def geometry(self) -> Geometry:
        """What lists of all methods share."""
        return Geometry(self.tile, self.summary, self.pool)

    def listed(self, name: str) -> list[Any]:
        """An attribute as a list."""
        value = getattr(self, name)
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]


def compare(
    dense: nn.Module,
    images: ImageSet,
    validation: ImageSet,
    recipe: Recipe,
    comparison: Comparison,
    output: str | Path,
    *,
    device: str = "auto",
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Compares methods on one data set, from one dense model, by one recipe; goes on where it stopped.

    Each method starts from the dense model's weights and learns from it as `train` does; "dense" is that
    model trained on alike. Rows of methods that are there already are not made again.

    Args:
        dense: the dense model, which is the teacher, too.
        images: to train on.
        validation: to evaluate on.
        recipe: how to train; stages that have nothing to learn in a method are left out there.
        comparison: what is compared.
        output: folder of results.json and of the runs.
        device: where to train and to evaluate: "auto" takes a GPU if there is one.
        report: called with every new row.

    Raises:
        ValueError: the rows in `output` are of another model, data, recipe or geometry.

    Returns:
        All rows of the folder. Their "right" tells image by image who was right, as hexadecimal bits.
    """
    host_of(dense)
    images.check_classes(dense)
    for name, budget in dict.fromkeys((name, budget) for name, budget, *_ in _settings(comparison)):
        METHODS[name].build(copy.deepcopy(dense), budget, comparison.geometry)  # rather now than after hours
    output = Path(output)
    settings = _settings_of(dense, images, validation, recipe, comparison)
    _check_folder(output, settings)
    file = output / RESULTS
    done = {_key(row) for row in read_rows(file)}
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    transform = evaluation_transform(
        dense, mean=recipe.mean, std=recipe.std, crop_pct=recipe.crop_pct, interpolation=recipe.interpolation
    )
    loader = make_loader(validation, transform, recipe.batch_size, workers=recipe.workers)
    for name, budget, trained, seed in _settings(comparison):
        described = {"method": name, **dataclasses.asdict(budget), "trained": trained, "seed": seed}
        if _key(described) in done:
            continue
        method = METHODS[name]
        torch.manual_seed(seed)
        model = method.build(copy.deepcopy(dense), budget, comparison.geometry)
        if trained:
            run = "_".join(str(part) for part in described.values() if part is not None).replace(" ", "")
            own = dataclasses.replace(recipe, seed=seed)
            teacher = copy.deepcopy(dense)
            folder = output / "runs" / run
            train(
                model,
                images,
                validation,
                own,
                folder,
                teacher=teacher,
                settings={**settings, **described},
                device=device,
                resume=folder.exists(),
            )
        row = {
            **described,
            "ours": method.ours,
            "is_bound": method.is_bound,
            **measure(model, dense, loader, chosen),
            "costs": {},
            **provenance(chosen),
        }
        append_rows(file, [row])
        if report is not None:
            report(row)
    return time_settings(dense, comparison, file)


def measure(model: nn.Module, dense: nn.Module, loader: Any, device: str) -> dict[str, Any]:
    """Accuracy and MACs of one model."""
    model, twin = model.to(device).eval(), copy.deepcopy(dense).to(device).eval()
    accuracy = evaluate(model, loader, dense=twin, device=device)
    against = accuracy.against_dense
    assert against is not None
    counted = count_macs(model, (3, *host_of(dense).image_size)).to_dict()
    return {
        "images": accuracy.images,
        "top1": accuracy.top1,
        "right": pack_bits(accuracy.right),
        "agreement": against.agreement,
        "logit_kl": against.logit_kl,
        "tokens": counted["tokens"],
        "key_visits": counted["key_visits"],
        "macs": counted["sparse"],
        "dense_macs": counted["dense"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def time_settings(dense: nn.Module, comparison: Comparison, file: Path) -> list[Row]:
    """Times each setting of a file's rows once, with the dense weights, wherever that is still to be done.

    Time depends on the setting, not on the weights: trained rows of all seeds share it with the untrained
    one. (With one list per query lists of neighbours overlap more once a scorer has learned, so that trained
    models are a little faster on a GPU than this says.) So rows may come from machines that were busy, and be
    timed on one that is not; times of another batch or device are measured again. Methods that this package
    computes by its reference are not timed.

    Returns:
        The rows, with "costs" of each place: milliseconds of a batch, those of the dense model in the same
        run, and on a GPU the memory that the model needs.
    """
    default = ["cuda" if torch.cuda.is_available() else "cpu"]
    places = default if comparison.timed_on is None else comparison.listed("timed_on")
    settings = {
        tuple(row[name] for name in _SETTING) for row in read_rows(file) if METHODS[row["method"]].is_timed
    }
    for setting, place in itertools.product(sorted(settings, key=str), places):
        own = [row for row in read_rows(file) if tuple(row[name] for name in _SETTING) == setting]
        expected = {"batch": _batch_on(place, comparison), "device": provenance(place)["device"]}
        costs = [row["costs"].get(place, {}) for row in own]
        known = next((cost for cost in costs if cost.items() >= expected.items()), None)
        if known is not None and all(cost == known for cost in costs):
            continue
        if known is None:
            name, *shares = setting
            model = METHODS[name].build(copy.deepcopy(dense), Budget(*shares), comparison.geometry)
            known = _cost_on(place, {"model": model.eval(), "dense": dense}, comparison, dense)
        with changing_rows(file) as rows:  # others may have added some meanwhile
            for row in rows:
                if tuple(row[name] for name in _SETTING) == setting:
                    row["costs"][place] = known
    return read_rows(file)


def pack_bits(right: Tensor) -> str:
    """Bools as hexadecimal digits."""
    return np.packbits(right.numpy()).tobytes().hex()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """The first `count` bools that `pack_bits` packed, as numbers."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count]
    return bits.astype(np.float64)


def _settings(comparison: Comparison) -> Iterator[tuple[str, Budget, bool, int]]:
    """Every row wanted, once: all methods before more seeds, so that a first picture is there early."""
    seeds = comparison.listed("seeds")
    kinds = [(False, seeds[:1] if comparison.untrained else []), (True, seeds if comparison.trained else [])]
    seen = set()
    for trained, own_seeds in kinds:
        for seed, name in itertools.product(own_seeds, comparison.listed("methods")):
            method: Method = METHODS[name]
            if trained or method.untrained:
                for budget in method.budgets(comparison.listed("keep"), comparison.listed("token_keep")):
                    setting = (name, budget, trained, seed)
                    if setting not in seen:
                        seen.add(setting)
                        yield setting


def _settings_of(
    dense: nn.Module, images: ImageSet, validation: ImageSet, recipe: Recipe, comparison: Comparison
) -> dict[str, Any]:
    """What all rows of a folder must share; methods, budgets and seeds may be added."""
    shared = {name: getattr(comparison, name) for name in ("tile", "summary", "pool")}
    own = {name: value for name, value in recipe_settings(recipe).items() if name not in _OF_NO_EFFECT}
    counts = {"images": images.describe(), "validation_images": validation.describe()}
    return {"dense": weights_digest(dense), **counts, **shared, "recipe": own}


def _check_folder(output: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings of a new folder; those of an old one must be the same."""
    file, text = output / _SETTINGS, yaml.safe_dump(settings, sort_keys=False)
    if file.exists():
        before, now = yaml.safe_load(file.read_text()), yaml.safe_load(text)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"output={str(output)!r} holds rows with another {', '.join(changed)} ({_SETTINGS} there "
                "tells which); give another --output"
            )
    output.mkdir(parents=True, exist_ok=True)
    write_aside(file, lambda aside: aside.write_text(text))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEYS)


def _batch_on(place: str, comparison: Comparison) -> int:
    return comparison.timing_batch if place == "cuda" else 1


def _cost_on(
    place: str, models: dict[str, nn.Module], comparison: Comparison, dense: nn.Module
) -> dict[str, Any]:
    """What a batch costs there, beside the dense model."""
    batch = _batch_on(place, comparison)
    images = torch.randn(batch, 3, *host_of(dense).image_size, dtype=_TIMED_DTYPES[place], device=place)
    calls = forward_calls(models, images)
    timings = time_in_turns(calls, device=place, graphs=True)
    return {
        "batch": batch,
        "ms": timings["model"].median_ms,
        "ms_low": timings["model"].low_ms,
        "ms_high": timings["model"].high_ms,
        "dense_ms": timings["dense"].median_ms,
        "graph": timings["model"].graph,
        "dtype": str(_TIMED_DTYPES[place]).removeprefix("torch."),
        "bytes": scratch_bytes(calls["model"], place),
        **provenance(place),
    }
