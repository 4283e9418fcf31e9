"""The demo: a small ViT learns digits, becomes sparse with and without training, and shows the cost."""

import copy
import functools
import html
import importlib.resources
import time
from dataclasses import dataclass
from pathlib import Path
from string import Template

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from sparsifiner.convert import about_to_train, sparsify
from sparsifiner.data import evaluation_transform, make_loader, open_images
from sparsifiner.macs import count_macs
from sparsifiner.measure.accuracy import evaluate
from sparsifiner.measure.timing import Timing, time_in_turns
from sparsifiner.tracing import trace
from sparsifiner.training import Recipe, Stage, train
from sparsifiner.viz.figures import key_list_svg

_KEEPS = (0.25, 0.1, 0.05)
_TILE = 4  # the preset's 8 would leave four tiles of this small grid
_PAPER_KEEP = 0.25
_QUERIES = ((3, 8), (8, 3), (12, 11))
_LARGE_PX = 512
_DENSE = Stage("classify", 12, warmup_epochs=2, lr=3e-3, min_lr=0)
_RECONSTRUCT = Stage("reconstruct", 2, warmup_epochs=0.5, lr=3e-3, min_lr=1e-4)
_DISTIL = Stage("distil", 2, warmup_epochs=0.3, lr=4e-4, min_lr=2e-6)


def _recipe(stage: Stage, seed: int) -> Recipe:
    """One stage on the digits, which are too small and too few for the paper's augmentation."""
    return Recipe(
        stages=[stage],
        batch_size=12,
        clip_grad=1.0,
        ema_decay=None,
        mixup=0,
        cutmix=0,
        label_smoothing=0,
        auto_augment=None,
        color_jitter=0,
        erasing=0,
        hflip=0,
        crop_scale=(0.8, 1),
        crop_pct=1,
        workers=0,
        seed=seed,
    )


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        name: what was measured.
        top1: percent of the validation images.
        agreement: percent of images with the dense model's class.
        attention_macs: MACs of attention and scorer per image.
        total_macs: MACs of the whole model per image.
        ms: ms per image at batch 60.
    """

    name: str
    top1: float
    agreement: float
    attention_macs: int
    total_macs: int
    ms: float


def run_demo(output: Path, seed: int = 0) -> list[DemoRow]:
    """Trains, makes sparse in two ways, prints one table and the timing of a large model, writes report.html.

    Args:
        output: folder for the report and the training runs; an older one is kept under another name.
        seed: seed of the training.

    Returns:
        The rows of the table.
    """
    output = output.resolve()
    _keep_older(output)
    output.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    images, validation = open_images("digits", "train"), open_images("digits", "validation")
    torch.manual_seed(seed)
    model = _make_digits_model()

    def learn(model: nn.Module, stage: Stage) -> None:
        train(model, images, validation, _recipe(stage, seed), output / stage.name, device="cpu")

    print(f"1/4  training a dense ViT on handwritten digits (32x32 px, 257 tokens, {_DENSE.epochs} epochs)")
    learn(model, _DENSE)
    candidates = {"dense": model}
    for keep in _KEEPS:
        candidates[f"fast, keep {keep}"] = sparsify(copy.deepcopy(model), keep=keep, tile=_TILE)

    print(
        f"2/4  the paper's two stages at keep {_PAPER_KEEP}: the scorer learns the dense attention, then the"
    )
    print("     network learns to do with what the scorer chooses")
    with about_to_train():
        paper = sparsify(copy.deepcopy(model), preset="paper", keep=_PAPER_KEEP)
    learn(paper, _RECONSTRUCT)
    candidates[f"paper, keep {_PAPER_KEEP}: stage 1"] = copy.deepcopy(paper)
    learn(paper, _DISTIL)
    candidates[f"paper, keep {_PAPER_KEEP}: both stages"] = paper

    print('3/4  comparing; the preset "fast" took no training at all')
    transform = evaluation_transform(model, crop_pct=1.0)
    batches = list(make_loader(validation, transform, 60, workers=0))
    rows = compare(candidates, batches)
    print(format_table(rows))

    print(f"4/4  timing DeiT-S at {_LARGE_PX} px, batch 1, on this CPU: dense against the preset 'fast'")
    timing = describe_timing(time_large_model())
    report = write_report(output, model, validation[0][0], batches[0][0][:1], rows, timing)
    print(f"report with pictures: {report}; the training runs are beside it")
    print(timing)
    return rows


def compare(candidates: dict[str, nn.Module], batches: list[tuple[Tensor, Tensor]]) -> list[DemoRow]:
    """Accuracy, MACs and time of models on the same images; the first is the dense one."""
    dense = next(iter(candidates.values()))
    images = batches[0][0]
    with torch.inference_mode():
        times = time_in_turns(
            {name: functools.partial(candidate, images) for name, candidate in candidates.items()},
            runs=5,
            label="timing",
        )
    rows = []
    for name, candidate in candidates.items():
        accuracy = evaluate(candidate, batches, dense=dense, progress=False)
        assert accuracy.against_dense is not None
        macs = count_macs(candidate, (3, 32, 32)).to_dict()["sparse"]
        rows.append(
            DemoRow(
                name,
                accuracy.top1,
                accuracy.against_dense.agreement,
                macs["attention"] + macs["scorer"],
                macs["total"],
                times[name].median_ms / len(images),
            )
        )
    return rows


def time_large_model() -> dict[str, Timing]:
    """DeiT-S at 512 px, batch 1: dense and the training-free preset, in turns."""
    dense = timm.create_model("deit_small_patch16_224", img_size=_LARGE_PX).eval()
    fast = sparsify(copy.deepcopy(dense))
    image = torch.randn(1, 3, _LARGE_PX, _LARGE_PX)
    with torch.inference_mode():
        return time_in_turns(
            {"dense": lambda: dense(image), "fast": lambda: fast(image)}, runs=15, label="timing"
        )


def format_table(rows: list[DemoRow]) -> str:
    """The rows as an aligned text table."""
    lines = [
        f"{'':30}{'top-1':>8}{'agree':>8}{'attention':>12}{'total':>10}{'ms/image':>10}",
        f"{'':30}{'%':>8}{'%':>8}{'MMACs':>12}{'MMACs':>10}{'':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row.name:30}{row.top1:8.1f}{row.agreement:8.1f}{row.attention_macs / 1e6:12.1f}"
            f"{row.total_macs / 1e6:10.1f}{row.ms:10.2f}"
        )
    return "\n".join(lines)


def describe_timing(times: dict[str, Timing]) -> str:
    """The last line of the demo."""
    ratio = times["dense"].median_ms / times["fast"].median_ms
    return (
        f"DeiT-S, {_LARGE_PX} px, batch 1, fp32, {torch.get_num_threads()} CPU threads: "
        f"dense {times['dense']}, fast {times['fast']}: {ratio:.2f}x"
    )


def write_report(
    output: Path, model: nn.Module, image: Image.Image, pixels: Tensor, rows: list[DemoRow], timing: str
) -> Path:
    """Writes report.html: the table, and what three query patches attend to.

    Args:
        output: folder of the report.
        model: the dense model.
        image: picture to draw on.
        pixels: the same as the model sees it, [1, 3, H, W].
        rows: lines of the table.
        timing: the last line of the demo.

    Returns:
        Path of the report.
    """
    sparse = sparsify(copy.deepcopy(model), keep=0.1, tile=_TILE)
    with torch.inference_mode(), trace(sparse) as traces:
        sparse(pixels)
    figures = []
    last = traces[len(traces) - 1]
    lists, layout = last.connectivity, last.connectivity.layout
    window = None if last.summary is None else layout.extent(last.summary)
    for y, x in _QUERIES:
        keys = lists.patches_of((y, x), head=0)
        picture = key_list_svg(image, keys, layout.raster, (y, x), tile=lists.tile, window=window)
        figures.append(f"<figure>{picture}<figcaption>row {y}, column {x}</figcaption></figure>")
    cells = [
        f"<tr><td>{html.escape(row.name)}</td><td>{row.top1:.1f}</td><td>{row.agreement:.1f}</td>"
        f"<td>{row.attention_macs / 1e6:.1f}</td><td>{row.total_macs / 1e6:.1f}</td></tr>"
        for row in rows
    ]
    head = "".join(
        f"<th>{name}</th>" for name in ("", "top-1 %", "agreement %", "attention MMACs", "total MMACs")
    )
    template = Template(importlib.resources.files("sparsifiner").joinpath("demo.html").read_text())
    page = template.substitute(
        setup="A small Vision Transformer (257 tokens) trained on scikit-learn's handwritten digits, then "
        "made sparse in two ways. Fast, without any training: every tile of 4x4 patches attends to its "
        "best keys and to the mean of every window. Paper: every patch attends to the keys that a learned "
        "scorer chooses.",
        table=f"<table><tr>{head}</tr>{''.join(cells)}</table>",
        timing=html.escape(timing),
        caption="Last layer, head 0, keep 0.1. Red: the query patch and its tile. "
        "Blue: the keys in its list. Grey: the windows whose mean key and value stand in for the rest.",
        figures="".join(figures),
    )
    report = output / "report.html"
    report.write_text(page)
    return report


def _keep_older(output: Path) -> None:
    """Renames the folder of an earlier demo by its time.

    Raises:
        FileExistsError: the folder holds something else.
    """
    if output.exists() and any(output.iterdir()):
        if not (output / "report.html").exists():
            raise FileExistsError(f"output={str(output)!r} holds no earlier demo; give another folder")
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(output.stat().st_mtime))
        output.rename(output.with_name(f"{output.name}-{written}"))


def _make_digits_model() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=2,
        embed_dim=48,
        depth=3,
        num_heads=3,
        mlp_ratio=2,
        num_classes=10,
        global_pool="avg",
        qk_norm=True,
        weight_init="jax",
    )
    return model
