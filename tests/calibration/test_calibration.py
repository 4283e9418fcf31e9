"""Calibration: budgets against brute force, errors against whole models, fits, the command and its file."""

import copy
import itertools
import json
import signal

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import sparsifiner
from sparsifiner.calibration import budgets
from sparsifiner.calibration.budgets import calibrate, choose_budgets
from sparsifiner.cli import main
from sparsifiner.config import make_config
from sparsifiner.convert import sparse_layers
from sparsifiner.measure.recall import mask_recall
from sparsifiner.models.adapter import is_scorer, scorer_weights
from sparsifiner.models.loading import load_model, load_weights
from sparsifiner.scorers import LowRank

SMALL = {"patch_size": 4, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 10}


def make_dense():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, **SMALL).eval()
    for index, block in enumerate(model.blocks):  # sharp attention, most of all in the second layer
        block.attn.qkv.weight.data.mul_(20 if index == 1 else 8)
    return model


def make_batches(*sizes):
    return [torch.randn(size, 3, 32, 32) for size in sizes]


def make_sparse(**options):
    return sparsifiner.sparsify(make_dense(), **{"keep": 0.2, "tile": 2, "summary": 4, **options})


def budgets_of(model):
    with sparsifiner.trace(model) as traces, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return [traces[layer].connectivity.indices.shape[-1] for layer in range(3)]


def kl(model, dense, batches):
    with torch.no_grad():
        ours, theirs = (
            torch.cat([each(x) for x in batches]).double().log_softmax(1) for each in (model, dense)
        )
    return (theirs.exp() * (theirs - ours)).sum(1).mean().item()


def test_budgets_are_the_best_that_there_are():
    errors = [[4.0, 2.0, 1.0], [16.0, 8.0, 4.0], [0.4, 0.2, 0.1]]
    lengths = [2, 4, 8]
    chosen = choose_budgets(errors, lengths, total=14, least=2, tokens=64)
    assert sum(chosen) <= 14

    def error(budgets):
        points = [2, 4, 8, 64]
        total = 0.0
        for row, budget in zip(errors, budgets, strict=True):
            values = [*row, 0.0]
            right = next(i for i, point in enumerate(points) if point >= budget)
            if points[right] == budget:
                total += values[right]
                continue
            x = torch.tensor([points[right - 1], budget, points[right]]).double().log()
            share = ((x[1] - x[0]) / (x[2] - x[0])).item()
            total += values[right - 1] * (1 - share) + values[right] * share
        return total

    every = [b for b in itertools.product(range(2, 13), repeat=3) if sum(b) <= 14]
    assert error(chosen) == pytest.approx(min(map(error, every)))
    # prices alone would leave these at 2 each, as all moves cost the same
    assert choose_budgets([[4, 3.9, 1]] * 2, lengths, total=10, least=2, tokens=64) == [8, 2]
    assert choose_budgets(errors, lengths, total=6, least=2, tokens=64) == [2, 2, 2]
    assert choose_budgets(errors, lengths, total=200, least=2, tokens=64) == [64, 64, 64]


@pytest.mark.parametrize("match", ["logits", "tokens"])
def test_errors_are_those_of_whole_models(match):
    dense, model, batches = make_dense(), make_sparse(), make_batches(3, 2)
    before = budgets_of(model)
    report = calibrate(model, batches, match=match, progress=False)
    assert report.images == 5
    assert report.budgets_before == tuple(before)
    assert report.budgets == tuple(budgets_of(model))
    assert sum(report.budgets) <= sum(before)
    assert report.error <= report.error_before
    assert sparse_layers(model)[0].config.keep == report.keep
    if match == "logits":
        assert report.error_before == pytest.approx(kl(make_sparse(), dense, batches), rel=1e-4)
        assert report.error == pytest.approx(kl(model, dense, batches), rel=1e-4)
        for layer, column in ((0, 1), (2, 3)):
            keep = [1.0] * 3
            keep[layer] = report.lengths[column] / 65
            one = kl(make_sparse(keep=keep), dense, batches)
            assert report.layer_errors[layer][column] == pytest.approx(one, rel=1e-4, abs=1e-9)


def test_moves_keys_to_where_they_matter():
    model = make_sparse(profile="even")
    report = calibrate(model, make_batches(8), progress=False)
    assert report.error < 0.8 * report.error_before
    for name, tensor in make_dense().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_keeps_what_it_cannot_better(monkeypatch):
    model = make_sparse()
    monkeypatch.setattr(
        "sparsifiner.calibration.budgets.choose_budgets", lambda *args: [65, 2, 2]
    )  # starves the layer that matters
    before = budgets_of(model)
    report = calibrate(model, make_batches(4), progress=False)
    assert report.budgets == report.budgets_before == tuple(before) == tuple(budgets_of(model))
    assert report.error == report.error_before


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda model: model.train(), {}, "training mode"),
        (lambda model: model.reset_classifier(0), {}, "use match='tokens'"),
        (lambda model: sparsifiner.sparsify(model, share=2), {}, "set share=1"),
        (lambda model: sparsifiner.sparsify(model, min_tokens=100), {}, "lower min_tokens=100"),
        (lambda model: None, {"images": []}, "no image"),
        (lambda model: None, {"images": [torch.zeros(0, 3, 32, 32)]}, "no image"),
        (lambda model: None, {"images": [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 36, 36)]}, "one size"),
        (lambda model: None, {"match": "logit"}, "match='logit' is unknown"),
        (sparsifiner.desparsify, {}, r"call sparsifiner.sparsify"),
    ],
)
def test_impossible_calls_are_named(change, options, message):
    model = make_sparse()
    change(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, **{"images": make_batches(1), "progress": False, **options})


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_and_its_file(capsys, tmp_path):
    save_file(make_dense().state_dict(), tmp_path / "dense.safetensors")
    model = ["--model", "deit_tiny_patch16_224", "--img-size", 32, "--model-args", json.dumps(SMALL)]
    shared = [*model, "--weights", tmp_path / "dense.safetensors", "--device", "cpu", "--workers", 0]
    sparsity = ["--keep", 0.2, "--tile", 2, "--summary", 4, "--profile", "even"]
    output = tmp_path / "new" / "calibrated.safetensors"
    options = ["--match", "tokens", "--limit", 8, "--batch-size", 4, "--output", output]
    code, out, _ = run(capsys, "calibrate", *shared, *sparsity, *options, "--json")
    assert code == 0
    report = json.loads(out)
    assert output.stat().st_size < 2 * 2**20
    assert output.with_suffix(".svg").read_text().startswith("<?xml")
    code, out, err = run(capsys, "calibrate", *shared, *sparsity, *options)
    assert (code, "exists; remove it" in err) == (2, True)

    loaded = sparsifiner.load_adapter(make_dense(), output)
    assert budgets_of(loaded) == report["budgets"] != report["budgets_before"]
    images = ["--limit", 8, "--against-dense", "--json"]
    code, out, _ = run(capsys, "eval", *shared, "--adapter", output, "--split", "train", *images)
    assert code == 0
    evaluated = json.loads(out)
    assert evaluated["sparsity"]["keep"] == report["keep"]
    assert evaluated["against_dense"]["token_error"] == pytest.approx(report["error"], rel=1e-3)
    code, _, err = run(capsys, "eval", *shared, "--adapter", output, "--keep", 0.1)
    assert (code, "leave out keep" in err) == (2, True)
    output.unlink()
    output.with_suffix(".svg").write_text("someone's")
    code, out, err = run(capsys, "calibrate", *shared, *sparsity, *options)
    assert (code, "calibrated.svg' exists; remove it" in err) == (2, True)
    assert (output.exists(), output.with_suffix(".svg").read_text()) == (False, "someone's")
    # by hand again, as a table
    output.with_suffix(".svg").unlink()
    code, out, _ = run(capsys, "calibrate", *shared, *sparsity, *options)
    assert code == 0
    assert "relative distance of the patch tokens" in out


class TestFit:
    def test_scorers_learn_and_nothing_else_moves(self):
        with pytest.warns(UserWarning, match="untrained"):
            model = make_sparse(preset="paper", scorer=LowRank(basis=8, coef_topk=4))
        backbone = {key: value.clone() for key, value in model.state_dict().items() if not is_scorer(key)}
        batches = make_batches(8, 8)
        before, unfitted = mask_recall(model, [(batch, None) for batch in batches]), copy.deepcopy(model)
        model.norm.weight.requires_grad_(False)
        report = calibrate(model, batches, fit_steps=100, progress=False)
        assert sum(mask_recall(model, [(batch, None) for batch in batches])) > sum(before)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in backbone.items())
        trainable = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert trainable == {"norm.weight"}
        assert all(parameter.grad is None for parameter in model.parameters())
        assert report.error < calibrate(unfitted, batches, fit_steps=0, progress=False).error

    def test_an_interrupted_fit_leaves_the_model_trainable(self, monkeypatch):
        with pytest.warns(UserWarning, match="untrained"):
            model = make_sparse(preset="paper", scorer=LowRank(basis=8, coef_topk=4))
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: signal.raise_signal(signal.SIGINT))
        # what a shell starts in the background ignores interrupts
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                calibrate(model, make_batches(8), fit_steps=100, progress=False)
        finally:
            signal.signal(signal.SIGINT, before)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_a_fit_that_makes_it_worse_is_taken_back(self, monkeypatch):
        with pytest.warns(UserWarning, match="untrained"):
            model = make_sparse(preset="paper", scorer=LowRank(basis=8, coef_topk=4))
        batches = make_batches(8)
        calibrate(model, batches, fit_steps=100, progress=False)
        before = copy.deepcopy(scorer_weights(model))

        def spoil(model, *args, **options):
            for name, parameter in model.named_parameters():
                if is_scorer(name):
                    parameter.data.normal_()
            return True

        monkeypatch.setattr("sparsifiner.calibration.budgets.fit_scorers", spoil)
        report = calibrate(model, batches, progress=False)
        assert all(torch.equal(value, before[key]) for key, value in scorer_weights(model).items())
        assert report.error <= report.error_before

    def test_no_steps_leave_the_scorers_as_they_are(self):
        with pytest.warns(UserWarning, match="untrained"):
            model = make_sparse(preset="paper", scorer=LowRank(basis=8, coef_topk=4))
        before = copy.deepcopy(scorer_weights(model))
        calibrate(model, make_batches(2), fit_steps=0, progress=False)
        assert all(torch.equal(value, before[key]) for key, value in scorer_weights(model).items())


class TestAdapters:
    def test_learned_scorers_come_back(self, tmp_path):
        with pytest.warns(UserWarning, match="untrained"):
            model = make_sparse(preset="paper", scorer=LowRank(basis=4, coef_topk=2))
        sparsifiner.save_adapter(model, tmp_path / "a.safetensors")
        loaded = sparsifiner.load_adapter(make_dense(), tmp_path / "a.safetensors")
        images = make_batches(1)[0]
        with torch.no_grad():
            assert torch.equal(model(images), loaded(images))

    def test_bad_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            sparsifiner.load_adapter(make_dense(), tmp_path / "none.safetensors")
        (tmp_path / "cut.safetensors").write_bytes(b"1234")
        with pytest.raises(ValueError, match="cannot be read"):
            sparsifiner.load_adapter(make_dense(), tmp_path / "cut.safetensors")
        save_file({}, tmp_path / "bare.safetensors")
        with pytest.raises(ValueError, match="holds scorers' weights alone"):
            sparsifiner.load_adapter(make_dense(), tmp_path / "bare.safetensors")
        with pytest.raises(ValueError, match=r"must end in \.safetensors"):
            sparsifiner.save_adapter(make_sparse(), tmp_path / "a.bin")

    def test_other_models_are_refused(self, tmp_path):
        with pytest.warns(UserWarning, match="untrained"):
            model = make_sparse(preset="paper", scorer=LowRank(basis=4, coef_topk=2))
        sparsifiner.save_adapter(model, tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["sparsifiner"])["scorer"]["basis"] == 4
        other = timm.create_model("deit_tiny_patch16_224", img_size=32, **{**SMALL, "embed_dim": 48})
        with pytest.raises(ValueError, match="does not fit the model"):
            sparsifiner.load_adapter(other, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"call sparsifiner\.sparsify"):  # it stayed dense
            sparse_layers(other)
        sparsifiner.sparsify(other, keep=0.3)
        scorer = other.blocks[0].attn.scorer
        with pytest.raises(ValueError, match="does not fit the model"):
            sparsifiner.load_adapter(other, tmp_path / "a.safetensors")
        assert other.blocks[0].attn.scorer is scorer
        assert {layer.config.keep for layer in sparse_layers(other)} == {0.3}

    @pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
    def test_an_incomplete_file_changes_nothing(self, tmp_path):
        sparsifiner.save_adapter(
            make_sparse(preset="paper", scorer=LowRank(coef_topk=3)), tmp_path / "a.safetensors"
        )
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            told = file.metadata()
        scorers = load_file(tmp_path / "a.safetensors")
        del scorers["blocks.2.attn.scorer.up"]
        save_file(scorers, tmp_path / "a.safetensors", told)
        model, images = make_sparse(preset="paper", scorer=LowRank(basis_threshold=0.01)), make_batches(1)[0]
        with torch.no_grad():
            expected = model(images)
            with pytest.raises(ValueError, match=r"blocks\.2\.attn\.scorer\.up is missing"):
                sparsifiner.load_adapter(model, tmp_path / "a.safetensors")
            assert torch.equal(model(images), expected)
        assert sparse_layers(model)[0].config.scorer.basis_threshold == 0.01

    @pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
    def test_scorers_follow_to_another_image_size(self, tmp_path):
        model = make_sparse(preset="paper")
        sparsifiner.save_adapter(model, tmp_path / "a.safetensors")
        save_file(model.state_dict(), tmp_path / "sparse.safetensors")
        loaded = load_model(
            "deit_tiny_patch16_224",
            weights=tmp_path / "sparse.safetensors",
            resample=True,
            config=sparse_layers(model)[0].config,
            img_size=48,
            model_args=SMALL,
        )
        adapted = sparsifiner.load_adapter(
            timm.create_model("deit_tiny_patch16_224", img_size=48, **SMALL), tmp_path / "a.safetensors"
        )
        for other in (loaded, adapted):
            scorer = sparse_layers(other)[1].scorer
            assert torch.equal(scorer.up, sparse_layers(model)[1].scorer.up)
            assert scorer.native_layout.grid == (8, 8)
            assert other(torch.zeros(1, 3, 48, 48)).shape == (1, 10)

    def test_a_configuration_besides_its_own_is_refused(self, tmp_path):
        sparsifiner.save_adapter(make_sparse(), tmp_path / "a.safetensors")
        arguments = {"img_size": 32, "model_args": SMALL, "adapter": tmp_path / "a.safetensors"}
        model = load_model("deit_tiny_patch16_224", **arguments)
        assert sparse_layers(model)[0].config == sparse_layers(make_sparse())[0].config
        with pytest.raises(ValueError, match="brings its own configuration"):
            load_model("deit_tiny_patch16_224", config=make_config("fast", keep=0.9), **arguments)


class TestResampling:
    def test_embeddings_of_another_size_are_fitted_as_timm_does(self, tmp_path):
        save_file(make_dense().state_dict(), tmp_path / "dense.safetensors")
        arguments = {"img_size": 96, "model_args": {**SMALL, "patch_size": 8}}
        with pytest.raises(ValueError, match="give --resample"):
            load_model("deit_tiny_patch16_224", weights=tmp_path / "dense.safetensors", **arguments)
        model = load_model(
            "deit_tiny_patch16_224",
            weights=tmp_path / "dense.safetensors",
            resample=True,
            config=make_config(keep=0.3),
            **arguments,
        )
        kernel = make_dense().patch_embed.proj.weight
        assert torch.equal(model.patch_embed.proj.weight, resample_patch_embed(kernel, [8, 8]))
        expected = resample_abs_pos_embed(make_dense().pos_embed, [12, 12], num_prefix_tokens=1)
        assert torch.equal(model.pos_embed, expected)
        assert torch.equal(model.blocks[2].mlp.fc1.weight, make_dense().blocks[2].mlp.fc1.weight)

    def test_a_twin_s_weights_are_fitted_too(self, tmp_path):
        save_file(make_dense().state_dict(), tmp_path / "dense.safetensors")
        model = timm.create_model("deit_tiny_patch16_224", **{**SMALL, "img_size": 64})
        with pytest.raises(ValueError, match="give --resample"):
            load_weights(model, tmp_path / "dense.safetensors")
        load_weights(model, tmp_path / "dense.safetensors", resample=True)
        expected = resample_abs_pos_embed(make_dense().pos_embed, [16, 16], num_prefix_tokens=1)
        assert torch.equal(model.pos_embed, expected)

    def test_what_does_not_belong_is_still_named(self, tmp_path):
        save_file({**make_dense().state_dict(), "alien": torch.ones(1)}, tmp_path / "strange.safetensors")
        with pytest.raises(ValueError, match="alien is unknown"):
            load_model(
                "deit_tiny_patch16_224",
                weights=tmp_path / "strange.safetensors",
                resample=True,
                img_size=64,
                model_args=SMALL,
            )


def test_what_fails_leaves_scorers_as_they_were(monkeypatch):
    model = sparsifiner.sparsify(make_dense(), preset="paper", keep=0.2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.blocks[0].attn.config

    def fail(*unused):
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        raise MemoryError("none left")

    monkeypatch.setattr(budgets, "_layer_errors", fail)
    monkeypatch.setattr(budgets, "_mean_error", lambda *unused: 0.0)
    with pytest.raises(MemoryError, match="none left"):
        calibrate(model, [torch.randn(2, 3, 32, 32)], fit_steps=2, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.blocks[0].attn.config == config


def test_layers_that_moved_are_refused_before_anything_is_measured():
    model, batches = make_sparse(), make_batches(1, 2)
    model.blocks = model.blocks[1:]
    with pytest.raises(ValueError, match=r"removed or moved .* call sparsifiner\.sparsify\(model\) again"):
        calibrate(model, batches, progress=False)
    calibrate(sparsifiner.sparsify(model), batches, fit_steps=0, progress=False)
