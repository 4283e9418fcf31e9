"""The command line: output, exit codes, and one clear line for each mistake."""

import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import sparsifiner
from sparsifiner.cli import COMMANDS, main
from sparsifiner.config import make_config
from sparsifiner.measure.records import command_of
from sparsifiner.models.loading import read_weights
from sparsifiner.ops import native
from sparsifiner.ops.sparse_attention import torch_backend

TINY = ["--model", "deit_tiny_patch16_224", "--img-size", "32"]
TINY_ARGS = '{"patch_size": 4, "depth": 2, "embed_dim": 48, "num_classes": 10}'


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def weights(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, **json.loads(TINY_ARGS))
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / name / "0.png")
    return tmp_path / "images"


def test_macs_prints_the_contract(capsys):
    code, out, _ = run(
        capsys,
        *[
            "macs",
            "--model",
            "deit_small_patch16_224",
            "--img-size",
            "224",
            "--preset",
            "paper",
            "--keep",
            "0.1",
            "--json",
        ],
    )
    assert code == 0
    report = json.loads(out)
    assert report["tokens"] == 197
    assert report["dense"].keys() == {"attention", "total"}
    assert report["sparse"].keys() == {"attention", "scorer", "total"}
    assert report["paper"]["mhsa"] == pytest.approx(111.4e6, abs=0.2e6)


def test_options_of_the_lowrank_scorer_count(capsys):
    def scorer_macs(*arguments):
        options = ["--model_args", TINY_ARGS, "--preset", "paper", "--keep", "0.5", "--json"]
        code, out, _ = run(capsys, "macs", *TINY, *options, *arguments)
        assert code == 0
        return json.loads(out)["sparse"]["scorer"]

    smaller = (
        "--scorer.basis",
        4,
        "--scorer.coef-topk",
        2,
        "--scorer.reduced-dim",
        2,
        "--scorer.basis-threshold",
        0,
    )
    assert scorer_macs(*smaller) < scorer_macs("--scorer.basis", 4, "--scorer.coef-topk", 2) < scorer_macs()


def test_macs_prints_a_table(capsys):
    code, out, _ = run(capsys, "macs", *TINY, "--model_args", TINY_ARGS, "--keep", "[0.5, 0.1]")
    assert code == 0
    assert "65 tokens" in out
    assert "attention" in out
    assert "key visits" in out


class TestInfo:
    def test_tells_the_reason_and_the_remedy(self, capsys, monkeypatch):
        monkeypatch.setattr(native, "_load", lambda: (None, "no kernels; install g++"))
        monkeypatch.setattr(native, "_machine_isa", lambda: native.Isa.NONE)
        monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
        code, out, _ = run(capsys, "info")
        assert code == 0
        assert re.search(rf"^sparsifiner +{re.escape(sparsifiner.__version__)}$", out, re.M)
        assert re.search(r"^reference +yes ", out, re.M)
        assert re.search(r"^cpu +no .*\n +no kernels; install g\+\+$", out, re.M)

    def test_prints_json(self, capsys, monkeypatch):
        monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
        code, out, _ = run(capsys, "info", "--json")
        assert code == 0
        machine = json.loads(out)
        assert machine["versions"]["torch"] == torch.__version__
        assert machine["cpu"]["threads"] == torch.get_num_threads()
        assert set(machine["backends"]) == {"reference", "torch", "cpu", "triton"}
        for backend in machine["backends"].values():
            assert backend["brings"]
            assert backend["runs"] == ("reason" not in backend)
        assert machine["backends"]["cpu"]["runs"] == (machine["isa"] != "none")

    def test_wrong_instructions_are_one_line_and_exit_2(self, capsys, monkeypatch):
        monkeypatch.setenv(native.ISA_VARIABLE, "neon")
        check_error(run(capsys, "info"), "SPARSIFINER_ISA='neon' is unknown; choose one of none, avx2")


def test_eval_on_digits_beside_the_dense_twin(capsys, weights):
    code, out, _ = run(
        capsys, "eval", *TINY, "--model-args", TINY_ARGS, "--weights", weights, "--limit", 40,
        "--keep", 0.2, "--tile", 2, "--crop-pct", 1, "--against-dense", "--json", "--workers", 0,
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert report["images"] == 40
    assert report["sparsity"]["keep"] == 0.2
    against = report["against_dense"]
    assert report["top1"] - against["dense_top1"] == pytest.approx(against["difference"])
    assert 0 <= against["agreement"] <= 100
    assert report["images_per_second"] > 0


def test_a_dense_model_has_no_recall(capsys):
    arguments = ["eval", *TINY, "--model-args", TINY_ARGS, "--preset", "dense", "--mask-recall"]
    check_error(run(capsys, *arguments), "preset='dense' has no key lists; use preset='fast' or 'paper'")


def test_eval_of_a_config_file(capsys, tmp_path, weights):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"model: deit_tiny_patch16_224\nimg_size: 32\nweights: {weights}\ndata: digits\nlimit: 2\n"
        f"model_args: {TINY_ARGS}\npreset: fast\nkeep: 0.1\nworkers: 0\n"
    )
    code, out, _ = run(capsys, "eval", "--config", config)
    assert code == 0
    assert "images        2" in out


def test_help_is_complete(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, given in COMMANDS.items():
        assert name in out
        group = {"": given} if callable(given) else given
        commands = {f"{name} {word}": command for word, command in group.items()}
        for words, command in commands.items():
            code, help_text, _ = run(capsys, *words.split(), "--help")
            assert code == 0
            parameters = []
            for each in inspect.signature(command).parameters.values():
                is_group = dataclasses.is_dataclass(each.annotation)
                fields = [field.name for field in dataclasses.fields(each.annotation)] if is_group else []
                parameters += fields if is_group else [each.name]
            for parameter in parameters:
                assert re.search(rf"--{parameter}\b[^\n]*\s+[\w\"]", help_text), parameter


def test_help_of_a_switch_is_its_whole_entry(capsys):
    _, out, _ = run(capsys, "eval", "--help")
    entry = re.search(r"--against_dense +evaluate(.*?) --", out, re.DOTALL)[1]
    words = (
        "the dense twin on the same images: difference with its paired 95 % interval, agreement, KL of the"
    )
    assert " ".join(entry.split()) == f"{words} logits (default: False)"


def test_group_help_names_its_commands(capsys):
    code, out, _ = run(capsys, "bench", "--help")
    assert code == 0
    assert "{model,ops}" in out


class TestBench:
    OPS = (
        *(
            "bench",
            "ops",
            "--grid",
            4,
            6,
            "--batch-size",
            1,
            "--heads",
            2,
            "--head-dim",
            16,
            "--dtype",
            "fp32",
        ),
        *("--keep", 0.5, 0.3, "--tile", 2, "--summary", 2, "--device", "cpu", "--runs", 2, "--warmup", 0),
    )
    MODEL = (
        *("bench", "model", "--model", "deit_tiny_patch16_224", "--img-size", 64, "--batch-size", 1),
        *(
            "--model-args",
            '{"depth": 1}',
            "--dtype",
            "fp32",
            "--no-compile",
            "--device",
            "cpu",
            "--keep",
            0.3,
        ),
        *("--tile", 2, "--runs", 2, "--warmup", 0),
    )

    def test_ops_prints_json_and_keeps_rows(self, capsys, tmp_path):
        for _ in range(2):
            code, out, _ = run(capsys, *self.OPS, "--json", "--output", tmp_path / "new")
            assert code == 0
        rows = json.loads(out)
        assert {row["keep"] for row in rows} == {0.5, 0.3}
        assert len(json.loads((tmp_path / "new" / "results.json").read_text())) == 2 * len(rows)
        assert str(tmp_path) not in rows[0]["command"]
        assert rows[0]["command"].split()[1:8] == ["bench", "ops", "--grid", "4", "6", "--batch-size", "1"]

    def test_ops_prints_a_table(self, capsys):
        code, out, _ = run(capsys, *self.OPS)
        assert code == 0
        assert "N = 16, 2 heads of 16, batch 1, fp32, keep 0.5" in out
        assert out.count("fastest dense\n") == 2
        assert "left out: compiled kernels need a GPU" in out

    def test_the_command_of_a_row_runs(self, capsys):
        _, out, _ = run(capsys, *self.MODEL, "--json")
        row = json.loads(out)[0]
        code, out, _ = run(capsys, *shlex.split(row["command"])[1:], "--json")
        assert code == 0
        assert json.loads(out)[0]["command"] == row["command"]

    @pytest.mark.parametrize(
        "config",
        [
            make_config("fast", scorer="pooled", profile="even"),
            make_config("paper", scorer=sparsifiner.Released(coef_topk=4)),
            make_config("paper", scorer=sparsifiner.LowRank(basis=64, basis_threshold=0.0)),
            sparsifiner.SparsifyConfig(
                keep=[0.5, 0.1], summary=None, tile=6, scorer=sparsifiner.Impact(pool=3)
            ),
            make_config("fast", keep=0.05, share=2),
            make_config("paper", scorer=sparsifiner.BigBird(seed=3), backend="torch"),
            make_config("fast", tokens=sparsifiner.EViT(keep=0.5, fuse=False, at=(1, 2))),
            make_config("fast", tokens=sparsifiner.ToMe(r=4)),
        ],
    )
    def test_the_options_of_a_row_give_its_configuration(self, config, monkeypatch, capsys):
        given = {}
        monkeypatch.setattr(
            "sparsifiner.cli.commands.load_model",
            lambda name, **arguments: given.update(arguments) or nn.Identity(),
        )
        words = shlex.split(command_of("macs", config))
        run(capsys, *words[1:])
        assert given["config"] == config

    def test_model_reads_a_config_file(self, capsys, tmp_path):
        config = tmp_path / "bench.yaml"
        config.write_text(
            "model: deit_tiny_patch16_224\nmodel_args: {depth: 1}\nimg_size: [64, 80]\nbatch_size: [2, 1]\n"
            "dtype: fp32\ncompile: false\nlatency: false\ndevice: cpu\n"
            "keep: [0.3]\ntile: 2\nruns: 2\nwarmup: 0\n"
        )
        code, out, _ = run(capsys, "bench", "model", "--config", config, "--output", tmp_path)
        assert code == 0
        assert "deit_tiny_patch16_224, 80 px, N = 26, batch 1, fp32, keep [0.3]" in out
        assert (tmp_path / "break_even_model.svg").exists()

    def test_sizes_of_images_that_are_no_squares_stand_in_lists(self, capsys):
        words = [*self.MODEL[:4], "--img-size", "64", "64x96", *self.MODEL[6:]]
        code, out, _ = run(capsys, *words, "--no-latency", "--json")
        assert code == 0
        rows = json.loads(out)
        assert [(row["img_size"], row["tokens"]) for row in rows[::2]] == [(64, 17), ("64x96", 25)]
        assert "--img-size 64 64x96 " in rows[0]["command"]

    def test_calls_are_printed_as_they_are_made(self, capsys):
        code, out, _ = run(capsys, *self.MODEL)
        assert code == 0
        lines = [line for line in out.splitlines() if "eager (forward)" in line]
        assert [line.partition(",")[0] for line in lines] == ["dense", "sparse"]
        assert lines[1].endswith("1 of 1 layers sparse")

    def test_a_wrong_backend_exits_1_and_prints_no_times(self, capsys, monkeypatch, tmp_path):
        right = torch_backend.sparse_attention
        monkeypatch.setattr(torch_backend, "sparse_attention", lambda *args: 1.1 * right(*args))
        code, out, err = run(capsys, *self.OPS, "--backend", "torch", "--output", tmp_path)
        assert code == 1
        assert out == ""
        assert "error: backend='torch': the output differs from the reference by 1.00e-01" in err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([*OPS, "--batch-size", 1, 2, 3], "batch_size has 3 entries, but grid has 2"),
            ([*OPS, "--keep", 0], "keep must lie in (0, 1]"),
            ([*OPS, "--device", "abacus"], "device='abacus' cannot be used here"),
            ([*MODEL, "--preset", "dense"], "preset='dense' takes no sparsity options"),
            (["bench", "model", "--preset", "dense"], "preset='dense' leaves nothing to compare"),
            ([*MODEL, "--img-size", 50], "img_size=50 is not a multiple of the patch size 16"),
            ([*MODEL, "--runs", 1], "runs must be at least 2"),
        ],
    )
    def test_impossible_options_are_one_line_and_exit_2(self, capsys, arguments, message):
        check_error(run(capsys, *arguments), message)


def test_module_runs_as_a_program():
    program = subprocess.run(
        [sys.executable, "-m", "sparsifiner", "--version"], capture_output=True, text=True, check=True
    )
    assert program.stdout.startswith("sparsifiner 0.")


def sparsity_errors():
    yield ["--keep", "0"], "keep must lie in (0, 1]"
    yield ["--keep", "1.5"], "keep must lie in (0, 1]"
    yield ["--keep", "[0.1, 0.2, 0.3]"], "keep has 3 entries, but the model has 2 layers"
    yield ["--tile", "0"], "tile must be at least 1"
    yield ["--summary", "0"], "summary must be at least 1, got 0; use None for no summaries or 'auto'"
    yield ["--preset", "dense", "--keep", "0.1"], "preset='dense' takes no sparsity options, got keep"
    yield ["--scorer", "released"], "Released() is the released method and needs tile=1, got 8"
    yield ["--legacy"], "legacy=True is the released method and needs scorer='lowrank'"
    yield ["--backend", "cuda"], "backend='cuda' is unknown"
    yield ["--model", "resnet18", "--model_args", "{}"], "ResNet is not a timm VisionTransformer"
    yield ["--model", "deit_smal_patch16_224"], "did you mean deit_small"
    yield ["--img-size", "33"], "img_size=33 is not a multiple of the patch size 4"
    yield ["--model-args", '{"colour": 1}'], "do not fit deit_tiny_patch16_224"
    yield ["--model-args", '{"embed_dim": 50}'], "do not fit deit_tiny_patch16_224"
    yield (
        ["--preset", "dense", "--model", "resnet18", "--model_args", "{}"],
        "is not a timm VisionTransformer",
    )
    yield (
        ["--model", "sparsifiner_deit_tiny_patch16_224"],
        "give --model deit_tiny_patch16_224 --preset paper",
    )


@pytest.mark.parametrize(("arguments", "message"), list(sparsity_errors()))
def test_impossible_options_are_one_line_and_exit_2(capsys, arguments, message):
    arguments = ["macs", *TINY, "--model-args", TINY_ARGS, *arguments]
    if "resnet18" in arguments:
        arguments = [a for a in arguments if a not in {"--img-size", "32"}]
    check_error(run(capsys, *arguments), message)


@pytest.mark.parametrize("arguments", [["macs", "--kep", "1"], ["macs", "--keep", "x"], ["fly"]])
def test_unknown_words_exit_2(capsys, arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "error" in err
    assert "Traceback" not in err


class TestWeights:
    def check(self, capsys, path, message):
        check_error(run(capsys, "eval", *TINY, "--model-args", TINY_ARGS, "--weights", path), message)

    def test_missing(self, capsys, tmp_path):
        self.check(capsys, tmp_path / "none.safetensors", "there is no such file")

    def test_corrupt(self, capsys, weights):
        before = weights.read_bytes()[:1000]
        weights.write_bytes(before)
        self.check(capsys, weights, "it may be corrupt or cut off")
        assert weights.read_bytes() == before

    def test_corrupt_checkpoint(self, capsys, tmp_path):
        path = tmp_path / "model.pth"
        path.write_bytes(b"not a checkpoint")
        self.check(capsys, path, "it may be corrupt or cut off")

    def test_no_state_dict(self, capsys, tmp_path):
        for content in ({"epoch": 3}, {0: torch.zeros(1)}):
            torch.save(content, tmp_path / "model.pth")
            self.check(capsys, tmp_path / "model.pth", "holds no state dict")

    def test_other_shapes(self, capsys, tmp_path):
        other = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=10)
        save_file(other.state_dict(), tmp_path / "other.safetensors")
        self.check(capsys, tmp_path / "other.safetensors", "[192] in the file and [48] in the model")

    def test_other_names(self, capsys, tmp_path, weights):
        save_file({"head.weight": torch.zeros(10, 48), "neck.weight": torch.zeros(1)}, weights)
        self.check(capsys, weights, "cls_token is missing from the file")

    def test_checkpoints_load_from_their_usual_wrappings(self, capsys, tmp_path):
        model = timm.create_model("deit_tiny_patch16_224", img_size=32, **json.loads(TINY_ARGS))
        torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
        code, _, _ = run(
            capsys, "eval", *TINY, "--model-args", TINY_ARGS, "--weights", tmp_path / "model.pth",
            "--limit", 4, "--workers", 0,
        )  # fmt: skip
        assert code == 0

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_names_that_wrappers_put_before_the_model_are_taken_off(self, tmp_path, prefix):
        wrapped = {f"{prefix}head.bias": torch.ones(2)}
        save_file(wrapped, tmp_path / "model.safetensors")
        torch.save({"state_dict": wrapped}, tmp_path / "model.pth")
        for name in ("model.safetensors", "model.pth"):
            assert list(read_weights(tmp_path / name)) == ["head.bias"]

    def test_part_of_a_scorer(self, capsys, weights):
        state = load_file(weights)
        state["blocks.0.attn.scorer.query.bias"] = torch.zeros(8)
        save_file(state, weights)
        arguments = ["eval", *TINY, "--model-args", TINY_ARGS, "--weights", weights, "--preset", "paper"]
        check_error(run(capsys, *arguments), "scorer.down is missing from the file")


class TestData:
    def check(self, capsys, data, message):
        arguments = ["eval", *TINY, "--model-args", TINY_ARGS, "--workers", 0, "--data", data]
        check_error(run(capsys, *arguments), message)

    def test_missing_folder(self, capsys, tmp_path):
        self.check(capsys, tmp_path / "none", "does not exist; check the path")

    def test_empty_class_folder(self, capsys, folder):
        (folder / "empty").mkdir()
        self.check(capsys, folder, "class folder 'empty' holds no images")

    @pytest.mark.parametrize("workers", [0, 1])
    def test_truncated_image(self, capsys, folder, workers):
        picture = folder / "dog" / "0.png"
        picture.write_bytes(picture.read_bytes()[:60])
        arguments = [
            "eval",
            *TINY,
            "--model-args",
            '{"patch_size": 4}',
            "--workers",
            workers,
            "--data",
            folder,
        ]
        check_error(run(capsys, *arguments), "0.png' cannot be decoded")
        assert picture.stat().st_size == 60

    def test_other_number_of_classes(self, capsys, folder):
        arguments = ["eval", *TINY, "--model-args", TINY_ARGS, "--data", folder]
        check_error(run(capsys, *arguments), "has 2 classes, but the model has 10")

    def test_unusable_device(self, capsys, folder):
        arguments = ["eval", *TINY, "--data", folder, "--device", "abacus"]
        check_error(run(capsys, *arguments), "device='abacus' cannot be used here")

    def test_wrong_input_size_is_named(self, capsys, folder):
        arguments = ["eval", "--model", "deit_tiny_patch16_224", "--img-size", 100, "--data", folder]
        check_error(run(capsys, *arguments), "img_size=100 is not a multiple of the patch size 16")


def check_error(result, message):
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
