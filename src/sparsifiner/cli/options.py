"""Options that several commands share."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from sparsifiner.choices import Choices
from sparsifiner.config import SparsifyConfig, make_config, scorer_of
from sparsifiner.data import ImageSet, evaluation_transform, open_images
from sparsifiner.models.adapter import read_adapter_config
from sparsifiner.models.loading import load_model
from sparsifiner.old_spellings import OLD_FLAGS, modern_settings, old_flags_given
from sparsifiner.scorers import SCORERS
from sparsifiner.tokens import TOKENS


@dataclass(frozen=True)
class ModelOptions:
    """Which model.

    Attributes:
        model: timm name of a dense model.
        img_size: side of the input in pixels, the model's own by default.
        model_args: more arguments for timm, as JSON: '{"num_classes": 10}'.
    """

    model: str = "deit_small_patch16_224"
    img_size: int | None = None
    model_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Rejects names of models that are sparse already: the options decide that here."""
        if self.model.startswith("sparsifiner_"):
            dense = self.model.removeprefix("sparsifiner_")
            raise ValueError(f"model={self.model!r} is sparse already; give --model {dense} --preset paper")


@dataclass(frozen=True)
class WeightOptions:
    """Which weights.

    Attributes:
        weights: file of weights, .safetensors or a torch checkpoint.
        adapter: file that calibration wrote, which brings its own configuration, or of the scorers' weights
            alone, as training writes it.
        pretrained: load timm's weights from the hub.
        resample: fit patch and position embeddings of weights made at another image or patch size.
    """

    weights: str | None = None
    adapter: str | None = None
    pretrained: bool = False
    resample: bool = False


@dataclass(frozen=True)
class ImageOptions:
    """How images are prepared; what is not given is the model's own.

    Attributes:
        mean: channel means for normalisation.
        std: channel standard deviations.
        crop_pct: share of the image side that the centre crop keeps.
        interpolation: resizing filter.
    """

    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None

    def transform(self, model: nn.Module) -> Any:
        """The transform of images for a model, without augmentation."""
        return evaluation_transform(model, **dataclasses.asdict(self))


@dataclass(frozen=True)
class SparsityOptions:
    """How sparse; what is not given comes from the preset.

    Attributes:
        preset: "fast" (training-free), "paper" (learned scorer, one key list per query) or "dense".
        keep: share of keys per list in (0, 1], or one per layer: '[0.5, 0.1]'.
        profile: how one number is spread over the layers, "even" or "falling".
        tile: side in patches of the square of queries that share a key list.
        summary: side in patches of the summary windows, "auto", or "none".
        scorer: who chooses the keys, by a name of the list below; its options are --scorer.OPTION, which
            change the preset's scorer where none is named.
        share: consecutive layers that attend by the lists of the first of them.
        backend: "auto", "reference", "torch", "cpu" (native code, for inference) or, on a GPU, "triton".
        min_tokens: layers that see fewer tokens stay dense.
        tokens: fewer tokens from block to block, by a name of the list below; its options are
            --tokens.OPTION. Both may be JSON too: '{"method": "evit", "keep": 0.5}'.
    """

    preset: Literal["fast", "paper", "dense"] = "fast"
    keep: float | list[float] | None = None
    profile: Literal["even", "falling"] | None = None
    tile: int | None = None
    summary: int | Literal["auto", "none"] | None = None
    scorer: str | dict[str, Any] | None = None
    share: int | None = None
    backend: str | None = None
    min_tokens: int | None = None
    tokens: str | dict[str, Any] | None = None

    # hidden options of the command line, for this release
    OLD_FLAGS: ClassVar[dict[str, Any]] = {flag: hint for flag, (_, hint) in OLD_FLAGS.items()}
    # the options that are choices, whose own options are listed below the others
    CHOICES: ClassVar[dict[str, Choices[Any]]] = {"scorer": SCORERS, "tokens": TOKENS}

    def __post_init__(self) -> None:
        """Makes mappings of plain names, in which the settings of a run tell what the preset left open."""
        chosen = modern_settings({"scorer": self.scorer, "tokens": self.tokens}, scorer_of(self.preset))
        for name, value in chosen.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SparsityOptions":
        """The options of a command line or its file, where old ones are named on standard error.

        Args:
            values: by name, old ones among them.
        """
        given = old_flags_given(values)
        options = modern_settings(values, scorer_of(values["preset"]))
        if given:
            old = " ".join(f"--{flag.replace('_', '-')}" for flag in given)
            new = json.dumps(options["scorer"])
            print(
                f"sparsifiner: the next release does not know {old}; write --scorer '{new}'", file=sys.stderr
            )
        return cls(**options)

    def given(self) -> dict[str, Any]:
        """The options that were given, but for the preset."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name != "preset" and value is not None
        }

    def to_config(self, adapter: str | None = None) -> SparsifyConfig | None:
        """The configuration, None for a dense model.

        Args:
            adapter: file that may bring its own.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an option is impossible, or given although the adapter decides it.
        """
        options = self.given()
        brought = None if adapter is None else read_adapter_config(adapter)
        if brought is not None:
            if options or self.preset != "fast":
                names = ", ".join([*(["preset"] if self.preset != "fast" else []), *options])
                raise ValueError(f"adapter={adapter!r} brings its own configuration; leave out {names}")
            return brought
        if self.preset == "dense":
            if options:
                raise ValueError(f"preset='dense' takes no sparsity options, got {', '.join(options)}")
            return None
        if options.get("summary") == "none":
            options["summary"] = None
        for name, choices in self.CHOICES.items():
            if name in options:
                options[name] = choices.read(options[name])
        return make_config(self.preset, **options)


def build_model(
    model: ModelOptions, weights: WeightOptions, config: SparsifyConfig | None, num_classes: int
) -> nn.Module:
    """The model with its weights, and a word on standard error where these are random.

    Args:
        model: which model.
        weights: which weights.
        config: how sparse, None for dense.
        num_classes: of the images; a pretrained head stays as it is.
    """
    if weights.weights is None and not weights.pretrained:
        print("no --weights and no --pretrained: the model's weights are random", file=sys.stderr)
    return load_chosen(model, weights, config, None if weights.pretrained else num_classes)


def load_chosen(
    model: ModelOptions, weights: WeightOptions, config: SparsifyConfig | None, num_classes: int | None
) -> nn.Module:
    """The model with its weights.

    Args:
        model: which model.
        weights: which weights.
        config: how sparse, None for dense.
        num_classes: of a head that `model` does not size, None for timm's.
    """
    arguments = dict(model.model_args or {})
    if num_classes is not None:
        arguments.setdefault("num_classes", num_classes)
    return load_model(
        model.model,
        config=config,
        weights=weights.weights,
        adapter=weights.adapter,
        resample=weights.resample,
        img_size=model.img_size,
        pretrained=weights.pretrained,
        model_args=arguments,
    )


@dataclass(frozen=True)
class DataOptions:
    """Which images.

    Attributes:
        data: "digits" (embedded), a folder of class folders, a folder of Parquet files, tar shards, or
            the name of a data set on the hub.
        train_split: part of the data to train on.
        validation_split: part of the data to validate on.
        validation_data: where to find that part, if not in `data`.
        limit: number of training images, all by default.
        validation_limit: number of validation images, all by default.
    """

    data: str
    train_split: str = "train"
    validation_split: str = "validation"
    validation_data: str | None = None
    limit: int | None = None
    validation_limit: int | None = None

    def open(self) -> tuple[ImageSet, ImageSet]:
        """Images to train on and images to validate on.

        Raises:
            FileNotFoundError: `data` is not there.
            ValueError: `data` is unknown, or the two would be the same images.
        """
        images = open_images(self.data, self.train_split, limit=self.limit)
        elsewhere = self.validation_data or self.data
        validation = open_images(elsewhere, self.validation_split, limit=self.validation_limit)
        if _place_of(elsewhere) == _place_of(self.data) and images.split == validation.split:
            raise ValueError(
                f"data={self.data!r} would give the same images for training and validation; put them into "
                "folders 'train' and 'validation', or give validation_data"
            )
        if images.class_names != validation.class_names:
            raise ValueError(
                f"data={self.data!r} has {images.num_classes} classes for training and "
                f"{validation.num_classes} for validation, or other names; give both the same classes"
            )
        return images, validation


def _place_of(data: str) -> Path:
    """Data sets of the hub have two names, folders many."""
    return Path(data.removeprefix("hfds/")).expanduser().resolve()
