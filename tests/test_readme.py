"""The README's Python and command lines run as they stand."""

import pathlib
import re
import shlex

import pytest
import timm
from safetensors.torch import save_file

import sparsifiner
from sparsifiner.cli import main

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
pytestmark = pytest.mark.usefixtures("checkout")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_python_blocks_run_in_order():
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["logits"].shape == (1, 1000)
    assert names["layers"][3].connectivity.indices.shape == (1, 6, 16, 155)
    assert names["out"].shape == (1, 6, 1025, 64)
    assert sparsifiner.why_not(names["model"]) == []


def test_command_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    save_file(model.state_dict(), "model.safetensors")
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sparsifiner ")]
    assert len(lines) == 9
    (tmp_path / "configs").symlink_to(CONFIGS)
    shorter = "--limit 24 --validation-limit 8 --device cpu"
    for line in lines:
        arguments = shlex.split(line.replace("FOLDER", "digits --limit 4 --workers 0"))[1:]
        if arguments[0] == "train":
            arguments += shlex.split(shorter)
        if arguments[0] == "compare":
            arguments += shlex.split(f"{shorter} --no-trained --workers 0")
        if arguments[0] == "bench":
            arguments += ["--device", "cpu", "--runs", "2", "--warmup", "0"]
        if arguments[0] != "demo":  # takes minutes; `make demo` runs it
            assert main(arguments) == 0, line
            assert capsys.readouterr().out
