"""sparsifiner train: its plan, its folder as a configuration, its errors."""

import json
import pathlib
import shutil

import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from sparsifiner.cli import main
from sparsifiner.config import make_config
from sparsifiner.models.loading import load_model
from sparsifiner.training import Recipe
from sparsifiner.training.recipe import recipe_settings

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
NET = ["--model", "deit_tiny_patch16_224", "--img-size", "32", "--model-args", json.dumps(SMALL)]
MODEL = ["--data", "digits", *NET]
QUICK = ["--limit", "16", "--validation-limit", "8", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
STAGES = "[{name: reconstruct, epochs: 1}, {name: distil, epochs: 1}]"


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def train(capsys, folder, *options):
    return run(capsys, "train", *MODEL, *QUICK, "--stages", STAGES, "--output", folder, *options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the paper's two stages, and the dense weights that it began with."""
    folder = tmp_path_factory.mktemp("trained")
    dense = folder / "dense.safetensors"
    save_file(
        timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=10, **SMALL).state_dict(), dense
    )
    options = ["--preset", "paper", "--keep", "0.5", "--stages", STAGES, "--weights", str(dense)]
    assert main(["train", *MODEL, *QUICK, *options, "--output", str(folder / "run")]) == 0
    return folder


def test_the_saved_settings_are_a_configuration(capsys, trained):
    saved = yaml.safe_load((trained / "run" / "config.yaml").read_text())
    assert saved["keep"] == 0.5
    assert [stage["name"] for stage in saved["stages"]] == ["reconstruct", "distil"]
    before = load_file(trained / "run" / "last.safetensors")
    code, _, err = run(capsys, "train", "--config", trained / "run" / "config.yaml", "--resume")
    assert code == 0, err
    after = load_file(trained / "run" / "last.safetensors")
    assert all((before[key] == after[key]).all() for key in before)
    code, _, err = run(
        capsys, "train", "--config", trained / "run" / "config.yaml", "--resume", "--keep", "0.25"
    )
    assert code == 2
    assert "begun with other settings: keep: 0.5 -> 0.25" in err


def test_the_adapter_carries_the_scorer(capsys, trained):
    config = make_config("paper", keep=0.5)
    arguments = {"img_size": 32, "model_args": {**SMALL, "num_classes": 10}}
    last = load_file(trained / "run" / "last.safetensors")
    model = load_model(
        "deit_tiny_patch16_224",
        config=config,
        weights=trained / "dense.safetensors",
        adapter=trained / "run" / "adapter.safetensors",
        **arguments,
    )
    dense = load_file(trained / "dense.safetensors")
    for name, weight in model.state_dict().items():
        assert (weight == (last if ".scorer." in name else dense)[name]).all(), name
    options = [*MODEL, "--limit", "8", "--workers", "0", "--weights", trained / "dense.safetensors"]
    adapter = ["--adapter", trained / "run" / "adapter.safetensors"]
    code, out, err = run(capsys, "eval", *options, *adapter, "--preset", "paper", "--mask-recall", "--json")
    assert code == 0, err
    assert len(json.loads(out)["mask_recall"]) == 2
    for preset, message in (
        ("fast", "but scorer='impact'; use preset='paper'"),
        ("dense", "but preset='dense'"),
    ):
        code, _, err = run(capsys, "eval", *options, *adapter, "--preset", preset)
        assert code == 2
        assert message in err
    code, _, err = run(
        capsys, "eval", *options, "--adapter", trained / "dense.safetensors", "--preset", "paper"
    )
    assert code == 2
    assert "holds more than scorers" in err


def test_eval_beside_a_twin_with_weights_of_its_own(capsys, trained):
    options = [*MODEL, "--limit", "40", "--workers", "0", "--preset", "dense", "--json"]
    dense = ["--dense-weights", trained / "dense.safetensors"]
    _, out, _ = run(capsys, "eval", *options, "--weights", trained / "dense.safetensors", *dense)
    assert json.loads(out)["against_dense"]["logit_kl"] == pytest.approx(0, abs=1e-9)
    distilled = trained / "distilled.safetensors"
    weights = load_file(trained / "run" / "last.safetensors")
    save_file({name: weight for name, weight in weights.items() if ".scorer." not in name}, distilled)
    _, out, _ = run(capsys, "eval", *options, "--weights", distilled, *dense)
    assert json.loads(out)["against_dense"]["logit_kl"] > 1e-9


def test_the_plan_and_the_summary(capsys, tmp_path):
    code, out, err = train(capsys, tmp_path / "run", "--preset", "paper", "--keep", "0.5")
    assert code == 0
    assert "stage 1   reconstruct: 1 epochs (0 of warm-up) x 2 steps, lr 0.0003 -> 0.0002" in out
    assert "loss 1 classify + 0.5 distil + 0.5 token" in out
    assert "16 images to train on, 8 to validate on, 10 classes" in out
    assert "training starts from random weights" in err
    assert str(tmp_path / "run") in out


def test_scorers_that_learn_nothing_skip_the_reconstruct_stage(capsys, tmp_path, caplog):
    code, _, _ = train(capsys, tmp_path / "run", "--preset", "fast", "--tile", "2", "--keep", "0.5")
    assert code == 0
    assert "stage reconstruct is skipped: the scorer has no parameters" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"distil"}
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_dry_run_keeps_nothing_and_needs_no_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        capsys, "train", *NET, "--data", "/nowhere/imagenet", "--preset", "paper", "--dry-run",
        "--stages", STAGES, "--amp", "bf16", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    assert "data      is not here: the number of steps is unknown" in out
    assert "two steps per stage on random images took" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_configuration_builds_and_steps(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # as written, but without files that are not here, and narrow
    settings = yaml.safe_load(config.read_text()) | {"data": "/nowhere/images", "weights": None}
    settings["pretrained"] = False
    settings["model_args"] = {**settings.get("model_args", {}), "embed_dim": 24, "depth": 1, "num_heads": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = run(capsys, "train", "--config", tmp_path / "small.yaml", "--dry-run", "--device", "cpu")
    assert code == 0, err
    assert "nothing was kept" in out


@pytest.mark.usefixtures("checkout")
def test_the_imagenet_recipe_is_the_papers():
    (file,) = [path for path in CONFIGS if path.stem == "deit_small_imagenet"]
    settings, paper = yaml.safe_load(file.read_text()), recipe_settings(Recipe())
    assert settings["stages"] == paper["stages"]
    shared = settings.keys() & paper.keys() - {"batch_size", "amp", "interpolation", "workers"}
    assert len(shared) >= 11
    assert {name: settings[name] for name in shared} == {name: paper[name] for name in shared}
    assert (settings["batch_size"], settings["interpolation"]) == (8 * 168, "bicubic")


def errors():
    yield ["--batch-size", "7"], "it must be a multiple of 2; use 6 or 8"
    yield ["--batch-size", "64"], "batch_size=64 exceeds the 16 training images"
    yield ["--stages", "[]"], "stages is empty"
    yield ["--stages", "[{name: distil, epochs: 1}, {name: reconstruct, epochs: 1}]"], "put reconstruct first"
    yield ["--validation-split", "train"], "the same images for training and validation"
    yield ["--validation-split", "training"], "the same images for training and validation"
    seven = ["--model-args", json.dumps({**SMALL, "num_classes": 7})]
    yield seven, "data='digits' has 10 classes, but the model has 7; create it with num_classes=10"
    yield ["--data", "/nowhere/images"], "does not exist"
    yield ["--preset", "dense", "--stages", "[{name: reconstruct, epochs: 1}]"], "nothing is left to train"
    yield ["--preset", "fast", "--stages", "[{name: joint, epochs: 1}]"], "joint trains the scorer too"
    yield ["--teacher-weights", "none.safetensors"], "there is no such file"


@pytest.mark.parametrize(("options", "message"), list(errors()))
def test_mistakes_are_one_line_exit_2_and_leave_nothing(capsys, tmp_path, options, message):
    code, _, err = train(capsys, tmp_path / "run", *options)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_without_an_intact_checkpoint_resuming_is_one_line_and_exit_2(capsys, trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for checkpoint in checkpoints:
        (checkpoint / "optimizer.bin").write_bytes(b"cut")
    options = ["--config", tmp_path / "run" / "config.yaml", "--output", tmp_path / "run", "--resume"]
    code, _, err = run(capsys, "train", *options)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(f"{checkpoint.name}: optimizer.bin has 3 bytes" in line for checkpoint in checkpoints)
    assert "put a copy of one back, or give another --output" in line
    assert "Traceback" not in err


def test_data_without_splits_is_not_trained_and_validated_on(capsys, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for image in range(8):
            Image.new("RGB", (40, 40), (30 * image, 0, 0)).save(tmp_path / "images" / name / f"{image}.png")
    code, _, err = train(capsys, tmp_path / "run", "--data", tmp_path / "images")
    assert code == 2
    assert "the same images for training and validation; put them into folders" in err
    elsewhere = ["--validation-data", tmp_path / "images" / ".." / "images"]
    code, _, err = train(capsys, tmp_path / "run", "--data", tmp_path / "images", *elsewhere)
    assert code == 2
    assert "the same images" in err
