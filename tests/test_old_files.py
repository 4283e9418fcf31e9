"""Adapters, settings and runs that commit f74ce80 wrote load, and give the lists and logits they gave."""

import json
import pathlib
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

import sparsifiner
from sparsifiner.cli import main
from sparsifiner.scorers import Impact, LowRank
from tests.training.runs import records_of, without_times

FILES = pathlib.Path(__file__).parent / "fixtures" / "f74ce80"
MODEL = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 1}


def load_dense():
    model = timm.create_model("deit_tiny_patch16_224", **MODEL, num_classes=10).eval()
    model.load_state_dict(load_file(FILES / "dense.safetensors"))
    return model


@pytest.mark.parametrize(
    ("name", "scorer", "keeps"),
    [("paper", LowRank(basis=16, coef_topk=4), [0.25]), ("fast", Impact(), [25 / 65, 2 / 65])],
)
def test_adapters_give_the_same_lists_and_logits(name, scorer, keeps):
    expected = load_file(FILES / "expected.safetensors")
    model = sparsifiner.load_adapter(load_dense(), FILES / f"{name}.safetensors")
    config = model.blocks[0].attn.config
    assert config.scorer == scorer
    assert config.keep == (keeps[0] if len(keeps) == 1 else tuple(keeps))
    with torch.no_grad(), sparsifiner.trace(model) as traces:
        logits = model(expected["images"])
    for layer in range(2):
        assert torch.equal(traces[layer].connectivity.indices, expected[f"{name}.lists.{layer}"])
    # another CPU's products round otherwise; lists do not change with that, as their maker asserts
    reached = expected[f"{name}.logits"].abs().max()
    assert (logits - expected[f"{name}.logits"]).abs().max() <= 1e-5 * reached


def test_an_interrupted_run_goes_on_to_its_end_by_its_own_settings(tmp_path, monkeypatch, capsys):
    shutil.copytree(FILES / "run", tmp_path / "run")
    shutil.copy(FILES / "dense.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "run/config.yaml", "--resume"]) == 0, capsys.readouterr().err
    before = [json.loads(line) for line in (FILES / "undisturbed.jsonl").read_text().splitlines()]
    # another CPU rounds otherwise, which training carries on; on the one that made them all is equal
    for now, then in zip(without_times(records_of(tmp_path / "run")), without_times(before), strict=True):
        assert now.keys() == then.keys()
        for name, value in then.items():
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-6)
            assert now[name] == close, name
    weights = load_file(tmp_path / "run" / "last.safetensors")
    expected = load_file(FILES / "undisturbed.safetensors")
    assert weights.keys() == expected.keys()
    # Adam moves an entry whose gradient is all rounding, as a key's bias, by the learning rate either way
    rates = sum(record["lr"] for record in before if record["stage"] == "distil" and "lr" in record)
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() <= 2 * rates, name
