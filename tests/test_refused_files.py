"""Files that do not fit are refused before anything of the model is touched."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import sparsifiner
from sparsifiner.models.loading import load_weights
from sparsifiner.scorers import LowRank
from tests.test_layers import snapshot

pytestmark = pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
SCORER = "blocks.1.attn.scorer."


def make_model(img_size=32, depth=2):
    sizes = {"patch_size": 4, "embed_dim": 16, "num_heads": 2, "num_classes": 3, "reg_tokens": 1}
    return VisionTransformer(img_size=img_size, depth=depth, **sizes).eval()


def make_sparse(**options):
    return sparsifiner.sparsify(make_model(**options), preset="paper", keep=0.3, scorer=LowRank(basis=8))


def make_images():
    return torch.randn(1, 3, 32, 32)


def damaged(state):
    """The state with one thing wrong with one of its tensors, and what."""
    for key, tensor in state.items():
        wrong = {
            "missing": None,
            "longer": torch.cat([tensor, tensor]),
            "flat": tensor[None],
            "of another kind": tensor.bool() if tensor.is_floating_point() else tensor.float(),
            "complex": tensor.to(torch.complex64),
        }
        if key.endswith("native_grid"):
            del wrong["missing"]  # older files do not tell
            for name, grid in (
                ("absurd", [3000, 3000]),
                ("other", [5, 5]),
                ("negative", [-8, -8]),
                ("0", [0, 64]),
            ):
                wrong[name] = torch.tensor(grid)
        for name, value in wrong.items():
            rest = {other: each for other, each in state.items() if other != key}
            yield f"{key} {name}", rest if value is None else {**rest, key: value}
    yield "unknown", {**state, SCORER + "alien": torch.ones(1)}
    grid = {SCORER + name: torch.ones(27, 8) for name in ("down", "up")}
    yield "tables of another grid", {**state, **grid}


def other_values(tensors):
    return {
        key: (value + 1 if value.is_floating_point() else value).contiguous()
        for key, value in tensors.items()
    }


@torch.no_grad()
def test_weights_that_do_not_fit_leave_the_model_bit_for_bit(tmp_path):
    model, images, path = make_sparse(), make_images(), tmp_path / "w.safetensors"
    expected, count = model(images), 0
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for what, state in damaged(other_values(model.state_dict())):
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        with pytest.raises(ValueError, match="does not fit the model"):
            load_weights(model, path)
        assert snapshot(model) == before, what
        count += 1
    assert count > 200
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_one_wrong_table_among_many_good_tensors_changes_none(tmp_path):
    model, path = make_sparse(), tmp_path / "w.safetensors"
    before = snapshot(model)
    save_file({**other_values(model.state_dict()), SCORER + "up": torch.randn(300, 8)}, path)
    with pytest.raises(ValueError, match=r"does not fit the model: .*scorer\.up"):
        load_weights(model, path)
    assert snapshot(model) == before


@torch.no_grad()
def test_an_absurd_grid_resizes_nothing(tmp_path):
    model, images = make_sparse(), make_images()
    sparsifiner.save_adapter(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(tmp_path / "a.safetensors"), SCORER + "native_grid": torch.tensor([50, 50])}
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    before, expected = snapshot(model), model(images)
    with pytest.raises(ValueError, match=r"does not fit the model: .*scorer\.down"):
        sparsifiner.load_adapter(model, tmp_path / "b.safetensors")
    assert snapshot(model) == before
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("before", ["dense", "sparse", "fast"])
@torch.no_grad()
def test_adapters_that_do_not_fit_leave_the_model_bit_for_bit(tmp_path, before):
    source, images = make_sparse(), make_images()
    good, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sparsifiner.save_adapter(source, good)
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    model = make_model()
    if before != "dense":
        sparsifiner.sparsify(model, preset="paper" if before == "sparse" else "fast", keep=0.2)
    expected, state = model(images), snapshot(model)
    cases = [*damaged(other_values(load_file(good))), ("empty", {})]
    for what, tensors in cases:
        save_file({key: value.contiguous() for key, value in tensors.items()}, bad, metadata)
        with pytest.raises(ValueError, match="does not fit the model"):
            sparsifiner.load_adapter(model, bad)
        assert snapshot(model) == state, what
    assert torch.equal(model(images), expected)
    assert torch.equal(
        sparsifiner.load_adapter(model, good).blocks[1].attn.scorer.up, source.blocks[1].attn.scorer.up
    )


@torch.no_grad()
def test_a_bad_state_dict_leaves_a_scorer_whose_sizes_agree():
    state, images = other_values(make_sparse().state_dict()), make_images()
    scorers = {key: value for key, value in state.items() if key.startswith(SCORER)}
    backbone = {key: value for key, value in state.items() if key not in scorers}
    refused = set()
    for what, bad in damaged(scorers):
        model = make_sparse()
        scorer = model.blocks[1].attn.scorer
        try:
            model.load_state_dict({**backbone, **bad})
        except RuntimeError:
            refused.add(what.removeprefix(SCORER))
        assert scorer.native_grid.tolist() == list(scorer.native_layout.grid) == [8, 8], what
        assert len(scorer.down) == len(scorer.up) == 66, what
        assert model(images).isfinite().all(), what
    assert {"native_grid absurd", "native_grid negative", "up longer", "tables of another grid"} <= refused


@torch.no_grad()
def test_weights_of_another_grid_are_taken_over_whole(tmp_path):
    model, larger = make_sparse(), make_sparse(img_size=48)
    parameter = model.blocks[0].attn.scorer.up.requires_grad_(False)
    sparsifiner.save_adapter(larger, tmp_path / "a.safetensors")
    sparsifiner.load_adapter(model, tmp_path / "a.safetensors")
    scorer = model.blocks[0].attn.scorer
    assert scorer.up is parameter
    assert not parameter.requires_grad
    assert scorer.native_layout.grid == (12, 12)
    assert torch.equal(scorer.down, larger.blocks[0].attn.scorer.down)


class Wrapper(nn.Module):
    """As adapters of other packages wrap a model: under a prefix."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})


def test_adapters_of_wrapped_models_have_the_names_of_the_model(tmp_path):
    model = make_sparse()
    model.blocks[0].mlp.fc1 = nn.Sequential(model.blocks[0].mlp.fc1)
    sparsifiner.save_adapter(Wrapper(model), tmp_path / "a.safetensors")
    loaded = sparsifiner.load_adapter(make_model(), tmp_path / "a.safetensors")
    assert torch.equal(loaded.blocks[1].attn.scorer.up, model.blocks[1].attn.scorer.up)
    model.blocks[0].attn.scorer.query = nn.Sequential(model.blocks[0].attn.scorer.query)
    with pytest.raises(ValueError, match=r"scorers with parts of a wrapper, such as .*query\.0\.weight"):
        sparsifiner.save_adapter(Wrapper(model), tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
