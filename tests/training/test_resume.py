"""A run that is killed and resumed ends bit for bit as one that was left alone."""

import json
import os
import pickle
import random
import shutil
import signal

import pytest
import timm
import torch
from safetensors.torch import load_file

import sparsifiner
from sparsifiner.data import open_images
from sparsifiner.scorers import LowRank
from sparsifiner.training import Recipe, Stage, loop, train
from sparsifiner.training.progress import Progress
from sparsifiner.training.run import RunFolder
from sparsifiner.training.seal import seal
from tests.processes import clean_processes
from tests.training.runs import assert_equal_runs, weights_of

EVERYTHING = {"drop_path_rate": 0.2, "proj_drop_rate": 0.1}


def small_model():
    torch.manual_seed(1)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2,
        num_classes=10, **EVERYTHING,
    )  # fmt: skip
    return sparsifiner.sparsify(model, preset="paper", keep=0.5, scorer=LowRank(basis=8, coef_topk=4))


def recipe(**options):
    stages = [Stage("reconstruct", 1, 0.5, lr=3e-3), Stage("joint", 2, 1, lr=1e-3)]
    defaults = {"batch_size": 8, "log_every": 3, "checkpoint_every": 2, "clip_grad": 1.0, "workers": 0}
    return Recipe(**{"stages": stages, "ema_decay": 0.9, **defaults, **options})


def run(folder, *, resume=False, **options):
    images, validation = open_images("digits", "train", limit=320), open_images("digits", limit=40)
    return train(
        small_model(),
        images,
        validation,
        recipe(**options),
        folder,
        resume=resume,
        device="cpu",
        progress=False,
    )


def run_until(folder, event, count):
    """Runs in a process of its own and kills it, hard, at the given event."""
    torch.set_num_threads(1)
    seen = 0

    def kill_at(name, original):
        def wrapped(*args, **kwargs):
            nonlocal seen
            if name == event:
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapped

    loop._Trainer._train_step = kill_at("step", loop._Trainer._train_step)
    loop._Trainer._validate = kill_at("validation", loop._Trainer._validate)
    RunFolder.save_weights = kill_at("weights", RunFolder.save_weights)
    Progress.save = kill_at("checkpoint", Progress.save)
    run(folder, resume=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return folder


@pytest.mark.matrix(sample=lambda kills: kills == 5)
@pytest.mark.parametrize("kills", [5, 20])
def test_kills_at_random_moments_change_nothing(undisturbed, tmp_path, kills):
    draw = random.Random(0)
    # a checkpoint every two steps: some runs get no further than the one before
    moments = [("step", draw.randint(1, 5)) for _ in range(kills)]
    moments += [("checkpoint", 1), ("checkpoint", 2), ("validation", 1), ("weights", 1), ("weights", 2)]
    draw.shuffle(moments)
    context = clean_processes(__name__)
    for event, count in moments:
        process = context.Process(target=run_until, args=(tmp_path, event, count))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(tmp_path, resume=True)
    assert_equal_runs(tmp_path, undisturbed)


def test_the_result_depends_neither_on_workers_nor_on_accumulation(undisturbed, tmp_path, monkeypatch):
    run(tmp_path / "workers", workers=2)
    assert_equal_runs(tmp_path / "workers", undisturbed)
    # dropped paths are drawn per part, and AdamW blows up the rounding of the key bias's gradient, which is
    # 0: only a model without them is divided exactly
    divisible = {"drop_path_rate": 0.0, "proj_drop_rate": 0.0, "qkv_bias": False}
    for name, value in divisible.items():
        monkeypatch.setitem(EVERYTHING, name, value)
    for accumulate in (1, 2):
        run(tmp_path / str(accumulate), accumulate=accumulate)
    for name, tensors in weights_of(tmp_path / "1").items():
        for key, tensor in weights_of(tmp_path / "2")[name].items():
            assert torch.allclose(tensor.double(), tensors[key].double(), rtol=1e-4, atol=1e-5), key


def test_a_run_is_never_overwritten(undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"output=.* holds a run already.*--resume"):
        run(undisturbed)
    with pytest.raises(ValueError, match=r"begun with other settings: clip_grad: 1.0 -> 0.5.*--config"):
        run(undisturbed, resume=True, clip_grad=0.5)
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    before = weights_of(undisturbed)
    result = run(undisturbed, resume=True)
    assert result.records == [
        json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()
    ]
    for name, tensors in weights_of(undisturbed).items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in tensors.items())


def test_the_folder_holds_what_it_promises(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    weights = {"best.safetensors", "last.safetensors", "last_ema.safetensors", "adapter.safetensors"}
    others = {"config.yaml", "metrics.jsonl", "report.html", "tensorboard", "checkpoints", ".run", ".lock"}
    assert names == weights | others
    assert {path.name for path in (undisturbed / "checkpoints").iterdir()} == {"01-00000078", "01-00000080"}
    page = (undisturbed / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") >= 10
    adapter = load_file(undisturbed / "adapter.safetensors")
    assert adapter.keys() == {
        f"blocks.{block}.attn.scorer.{name}"
        for block in range(2)
        for name in ("query.weight", "query.bias", "key.weight", "key.bias", "down", "up", "native_grid")
    }


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite any more; lower lr"):
        run(tmp_path, stages=[Stage("distil", 1, lr=1e30, min_lr=1e29)], clip_grad=None, ema_decay=None)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".run", ".lock"}
    # nothing was reached, so the same folder takes the mended recipe
    run(tmp_path, stages=[Stage("distil", 1)], ema_decay=None)
    assert (tmp_path / "last.safetensors").exists()


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "best.safetensors").write_text("someone's")
    with pytest.raises(FileExistsError, match=r"best\.safetensors"):
        run(tmp_path)
    with pytest.raises(ValueError, match="but no config"):
        run(tmp_path, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", ".lock"}
    assert (tmp_path / "best.safetensors").read_text() == "someone's"


def test_another_teacher_cannot_take_over(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "copy")
    images, validation = open_images("digits", "train", limit=320), open_images("digits", limit=40)
    model = small_model()
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(ValueError, match="teacher's weights are not those that the run began with"):
        train(
            model, images, validation, recipe(), tmp_path / "copy", resume=True, device="cpu", progress=False
        )


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_another_model_or_other_images_cannot_take_over(tmp_path, monkeypatch):
    few = {"train": 32, "validation": 8}
    dense = sparsifiner.desparsify(small_model())
    one = recipe(stages=[Stage("classify", 1)], ema_decay=None)

    def resume(model, limits, recipe=one):
        sets = [open_images("digits", split, limit=limit) for split, limit in limits.items()]
        train(model, *sets, recipe, tmp_path, resume=True, device="cpu", progress=False)

    resume(dense, few)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"images: '32, \w+' -> '48, \w+'\. Resume with"):
        resume(dense, {**few, "train": 48})
    with pytest.raises(ValueError, match=r"validation_images: '8, \w+' -> '9, \w+'\."):
        resume(dense, {**few, "validation": 9})
    with pytest.raises(ValueError, match=r"sparsity\.keep: None -> 0\.5.*and \d+ more"):
        resume(small_model(), few)
    other = sparsifiner.desparsify(small_model())
    other.__class__ = type("Other", (type(other),), {})
    with pytest.raises(ValueError, match="model: 'VisionTransformer' -> 'Other'"):
        resume(other, few)
    monkeypatch.setitem(EVERYTHING, "qkv_bias", False)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.bias: \[72\] -> None"):
        resume(sparsifiner.desparsify(small_model()), few)
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        resume(dense, few, recipe(stages=one.stages, ema_decay=None, seed=1))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    resume(dense, few)


def test_what_was_frozen_stays_frozen(tmp_path):
    model = small_model()
    model.patch_embed.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, validation = open_images("digits", "train", limit=16), open_images("digits", limit=8)
    one = recipe(stages=[Stage("distil", 1, lr=1e-3)])
    train(model, images, validation, one, tmp_path, device="cpu", progress=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not [name for name in changed if "patch_embed" in name or ".scorer." in name]
    assert "blocks.0.attn.qkv.weight" in changed
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_every_step_and_part_draws_anew(tmp_path, monkeypatch):
    mixed, dropped = [], []
    monkeypatch.setattr(loop, "seed_generators", lambda *parts: mixed.append(parts))
    monkeypatch.setattr(loop, "derive_seed", lambda *parts: dropped.append(parts) or len(dropped))
    images, validation = open_images("digits", "train", limit=32), open_images("digits", limit=8)
    two = recipe(stages=[Stage("distil", 1), Stage("classify", 1)], accumulate=2)
    train(small_model(), images, validation, two, tmp_path, device="cpu", progress=False)
    assert len(mixed) == len(dropped) == 2 * 4 * 2
    assert len(set(mixed)) == 2 * 4  # the parts of a batch are mixed alike
    assert len(set(dropped)) == 2 * 4 * 2


class Executes:
    """A pickle that leaves a file where it is read carelessly."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_checkpoint_is_executed(undisturbed, tmp_path):
    newest = undisturbed / "checkpoints" / "01-00000080"
    read = {file.name for file in newest.iterdir()} - {"run.txt", "manifest.json"}
    assert read == {"model.safetensors", "optimizer.bin", "progress.pt", "random_states_0.pkl"}
    for name in read - {"model.safetensors"}:
        copy = tmp_path / name
        shutil.copytree(undisturbed, copy)
        forged = copy / "checkpoints" / newest.name
        torch.save(Executes(tmp_path / f"executed by {name}"), forged / name)
        seal(forged, (copy / ".run").read_text(), forged.name)
        if name == "random_states_0.pkl":  # Accelerate goes on without them
            run(copy, resume=True)
        else:
            with pytest.raises(pickle.UnpicklingError, match="weights_only"):
                run(copy, resume=True)
    assert not list(tmp_path.glob("executed*"))
