"""The command line: each command is one function, its help is the function's docstring."""

import copy
import dataclasses
import inspect
import json as json_format
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace

from sparsifiner import __version__
from sparsifiner.config import SparsifyConfig, make_config
from sparsifiner.data import evaluation_transform, make_loader, open_images
from sparsifiner.demo import run_demo
from sparsifiner.measure.accuracy import Accuracy
from sparsifiner.measure.accuracy import evaluate as evaluate_accuracy
from sparsifiner.measure.macs import count_macs
from sparsifiner.models.loading import load_model
from sparsifiner.patch import desparsify, why_not


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
        pretrained: load timm's weights from the hub.
    """

    weights: str | None = None
    pretrained: bool = False


@dataclass(frozen=True)
class SparsityOptions:
    """How sparse; what is not given comes from the preset.

    Attributes:
        preset: "fast" (training-free), "paper" (learned scorer, one key list per query) or "dense".
        keep: share of keys per list in (0, 1], or one per layer: '[0.5, 0.1]'.
        tile: side in patches of the square of queries that share a key list.
        summary: side in patches of the summary windows, "auto", or "none".
        scorer: who chooses the keys.
        backend: "auto", "reference" or "torch".
        min_tokens: layers that see fewer tokens stay dense.
        seed: seed of the scorer "random".
        legacy: the scorer exactly as released.
    """

    preset: Literal["fast", "paper", "dense"] = "fast"
    keep: float | list[float] | None = None
    tile: int | None = None
    summary: int | Literal["auto", "none"] | None = None
    scorer: Literal["lowrank", "pooled", "oracle", "window", "strided", "random"] | None = None
    backend: str | None = None
    min_tokens: int | None = None
    seed: int | None = None
    legacy: bool = False

    def to_config(self) -> SparsifyConfig | None:
        """The configuration, None for a dense model.

        Raises:
            ValueError: an option is impossible.
        """
        options = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name != "preset" and value is not None and value is not False
        }
        if self.preset == "dense":
            if options:
                raise ValueError(f"preset='dense' takes no sparsity options, got {', '.join(options)}")
            return None
        if options.get("summary") == "none":
            options["summary"] = None
        return make_config(self.preset, **options)


def macs(model: ModelOptions, sparsity: SparsityOptions, *, json: bool = False) -> None:
    """Counts multiply-accumulates per image: dense, sparse, and by the paper's accounting.

    Args:
        model: the model.
        sparsity: how sparse.
        json: print JSON.
    """
    config = sparsity.to_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained scorer costs what a trained one costs
        built = load_model(model.model, config=config, img_size=model.img_size, model_args=model.model_args)
    reasons = why_not(built)
    if reasons:
        raise ValueError(f"model={model.model!r} cannot be counted: {'; '.join(reasons)}")
    height, width = built.patch_embed.img_size  # type: ignore[union-attr, misc]
    report = count_macs(built, (3, int(height), int(width))).to_dict()
    if json:
        print(json_format.dumps(report))
        return
    print(f"{model.model}, {height}x{width} px, {report['tokens']} tokens; MMACs per image")
    print(f"{'':18}{'dense':>12}{'sparse':>12}")
    for name in ("attention", "scorer", "total"):
        dense = report["dense"].get(name, 0) / 1e6
        print(f"{name:18}{dense:12.1f}{report['sparse'][name] / 1e6:12.1f}")
    if report["paper"] is not None:
        print(f"{'paper accounting':18}{'':12}{report['paper']['mhsa'] / 1e6:12.1f}  (attention + scorer)")


def evaluate(
    model: ModelOptions,
    weights: WeightOptions,
    sparsity: SparsityOptions,
    *,
    data: str = "digits",
    split: str = "validation",
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
    amp: Literal["none", "bf16", "fp16"] = "none",
    limit: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    against_dense: bool = False,
    json: bool = False,
) -> None:
    """Evaluates a model on labelled images: top-1, top-5, images/s; optionally beside its dense twin.

    Args:
        model: the model.
        weights: its weights.
        sparsity: how sparse.
        data: "digits" (embedded), a folder of class folders, a folder of Parquet files, tar shards, or
            the name of a data set on the hub.
        split: part of the data to read.
        batch_size: images per batch.
        workers: processes that read images, 0 for none.
        device: where to compute, such as "cuda" or "cpu"; "auto" takes a GPU if there is one.
        amp: autocast precision.
        limit: number of images, all by default.
        mean: channel means for normalisation, the model's own by default.
        std: channel standard deviations, the model's own by default.
        crop_pct: share of the image side that the centre crop keeps, the model's own by default.
        interpolation: resizing filter, the model's own by default.
        against_dense: evaluate the dense twin on the same images: difference with its paired 95 %
            interval, agreement, KL of the logits.
        json: print JSON.
    """
    config = sparsity.to_config()
    chosen = _choose_device(device)
    images = open_images(data, split, limit=limit)
    arguments = dict(model.model_args or {})
    if weights.weights is None and not weights.pretrained:
        print("no --weights and no --pretrained: the model's weights are random", file=sys.stderr)
    if not weights.pretrained:  # a pretrained head stays as it is
        arguments.setdefault("num_classes", images.num_classes)
    built = load_model(
        model.model,
        config=config,
        weights=weights.weights,
        img_size=model.img_size,
        pretrained=weights.pretrained,
        model_args=arguments,
    )
    transform = evaluation_transform(
        built, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation
    )
    classes = getattr(built, "num_classes", None)
    if classes != images.num_classes:
        raise ValueError(f"data={data!r} has {images.num_classes} classes, but the model has {classes}")
    built.to(chosen)
    dense = desparsify(copy.deepcopy(built)) if against_dense else None
    accuracy = evaluate_accuracy(
        built,
        make_loader(images, transform, batch_size, workers=workers),
        dense=dense,
        device=chosen,
        amp_dtype={"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp],
    )
    if json:
        run = {"model": model.model, "data": data, "split": split, "device": str(chosen), "amp": amp}
        sparse = None if config is None else dataclasses.asdict(config)
        print(json_format.dumps({**run, "sparsity": sparse, **accuracy.to_dict()}))
    else:
        _print_accuracy(accuracy)


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}); try cpu") from error
    return chosen


def _print_accuracy(accuracy: Accuracy) -> None:
    print(f"images        {accuracy.images}")
    print(f"top-1         {accuracy.top1:.2f} %")
    print(f"top-5         {accuracy.top5:.2f} %")
    print(f"images/s      {accuracy.images_per_second:.1f} (forward passes)")
    against = accuracy.against_dense
    if against is not None:
        print(f"dense top-1   {against.dense_top1:.2f} %")
        print(f"difference    {against.difference:+.2f} ± {against.interval:.2f} points (paired, 95 %)")
        print(f"agreement     {against.agreement:.2f} %")
        print(f"logit KL      {against.logit_kl:.4f} nats")
        print(f"dense img/s   {against.dense_images_per_second:.1f}")


def demo(output: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Trains a small ViT on handwritten digits, makes it sparse without training, shows what it costs.

    Args:
        output: folder for report.html.
        seed: seed of the training.
    """
    run_demo(output, seed)


COMMANDS: dict[str, Callable[..., None]] = {"demo": demo, "eval": evaluate, "macs": macs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line without the program's name, `sys.argv` by default.

    Returns:
        The exit code: 0, or 2 after an error of the user's, which is printed in one line.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparsifiner").setLevel(logging.INFO)
    given = sys.argv[1:] if arguments is None else arguments
    options = _make_parser().parse_args([_with_underscores(argument) for argument in given])
    command = COMMANDS[options.subcommand]
    try:
        command(**_bind(command, options[options.subcommand]))
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="sparsifiner",
        description="Vision Transformers that attend only to the token pairs that matter for this image.",
        epilog="Options may be written with dashes or underscores.",
    )
    parser.add_argument("--version", action="version", version=f"sparsifiner {__version__}")
    subcommands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        command = ArgumentParser(description=summary)
        command.add_argument("--config", action="config", help="YAML file of these options")
        groups = _option_groups(function)
        for group in groups.values():
            command.add_class_arguments(group, skip=_flags(group))
            _add_flags(command, group)
        command.add_function_arguments(function, skip={*groups, *_flags(function)})
        _add_flags(command, function)
        subcommands.add_subcommand(name, command, help=summary)
    return parser


def _option_groups(function: Callable[..., None]) -> dict[str, Any]:
    """Parameters that are dataclasses: their fields are options of the command."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in parameters if dataclasses.is_dataclass(p.annotation)}


def _flags(source: Callable[..., Any]) -> set[str]:
    """Parameters that are switches: given or not, without a value."""
    return {p.name for p in inspect.signature(source).parameters.values() if p.annotation is bool}


def _add_flags(parser: ArgumentParser, source: Callable[..., Any]) -> None:
    documented = {line.split(":")[0].strip(): line for line in (inspect.getdoc(source) or "").splitlines()}
    for name in sorted(_flags(source)):
        text = documented[name].partition(":")[2].strip().rstrip(".:")
        parser.add_argument(f"--{name}", action="store_true", help=text)


def _bind(command: Callable[..., None], options: Namespace) -> dict[str, Any]:
    """Arguments of a command from its options: groups become their dataclasses."""
    given = {key: value for key, value in vars(options).items() if key != "config"}
    arguments: dict[str, Any] = {}
    for name, group in _option_groups(command).items():
        fields = [field.name for field in dataclasses.fields(group)]
        arguments[name] = group(**{field: given.pop(field) for field in fields})
    return {**arguments, **given}


def _with_underscores(argument: str) -> str:
    """`--img-size=3` as `--img_size=3`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
