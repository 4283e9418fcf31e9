"""Scorers: scores against their formulas, lists against the selection rules."""

import pathlib
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

import sparsifiner
from sparsifiner import tuned
from sparsifiner.config import make_config
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import select_topk
from sparsifiner.plan import Call, plan
from sparsifiner.scorers import SCORERS, Impact, ListSpec, LowRank, Released
from tests.models import make_images, make_model
from tests.ops.cases import build_scorer, make_qkv

NAMES = ["lowrank", "impact", "pooled", "oracle", "window", "strided", "random", "bigbird"]


def make(name, layout, layer=0, **options):
    return build_scorer(SCORERS.read({"method": name, **options}), layout, layer)


def spec_of(layout, tile, budget, forced=0):
    return ListSpec(layout, tile, budget, forced, scale=0.25, summary=3)


def tile_members(layout, tile):
    members = layout.square_tokens(tile, torch.device("cpu"))
    return [row[row >= 0] for row in members]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("grid", "tile", "prefix"), [((5, 7), 1, 1), ((5, 7), 3, 0), ((4, 4), 8, 2)])
def test_lists_are_the_selection_of_the_scores_in_any_chunks(name, grid, tile, prefix, monkeypatch):
    layout = TokenLayout(grid, prefix)
    q, k, v = make_qkv(layout, batch=2)
    scorer = make(name, layout)
    spec = spec_of(layout, tile, budget=prefix + 4, forced=prefix if tile > 1 else 0)
    scores = scorer.scores(q, k, v, spec).expand(2, 2, -1, -1)
    assert scores[..., prefix:].isfinite().float().mean() > 0.9
    own = layout.square_tokens(tile, q.device)
    expected = select_topk(scores, spec.budget, forced=spec.forced, own=own, backend="reference")
    assert torch.equal(scorer(q, k, v, spec).indices, expected)
    monkeypatch.setitem(tuned.SCORE_CHUNK, "cpu", 1)
    connectivity = scorer(q, k, v, spec)
    assert torch.equal(connectivity.indices, expected)
    assert (connectivity.grid, connectivity.tile, connectivity.prefix) == (grid, tile, prefix)


@pytest.mark.parametrize("tile", [1, 3])
def test_pooled_is_the_tile_mean_query_times_key(tile):
    layout = TokenLayout((5, 7), 1)
    q, k, v = make_qkv(layout, dtype=torch.float64)
    scores = make("pooled", layout).scores(q, k, v, spec_of(layout, tile, 3))
    expected = torch.stack([q[:, :, row].mean(2) for row in tile_members(layout, tile)], 2) @ k.mT
    assert (scores - expected).abs().max() < 1e-12


@pytest.mark.parametrize("tile", [1, 3])
def test_oracle_is_the_mean_attention_of_the_tile(tile):
    layout = TokenLayout((5, 7), 2)
    q, k, v = make_qkv(layout, dtype=torch.float64)
    attention = (q @ k.mT * 0.25).softmax(-1)
    scores = make("oracle", layout).scores(q, k, v, spec_of(layout, tile, 3))
    expected = torch.stack([attention[:, :, row].mean(2) for row in tile_members(layout, tile)], 2)
    assert (scores - expected).abs().max() < 1e-12


@pytest.mark.parametrize("tile", [1, 3])
def test_lowrank_is_the_formula_of_the_paper(tile):
    layout = TokenLayout((5, 7), 1)
    scorer = make("lowrank", layout, basis=12, reduced_dim=4, coef_topk=3).double()
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    q, k, v = make_qkv(layout, dtype=torch.float64)
    rows = torch.stack([q[:, :, row].mean(2) for row in tile_members(layout, tile)], 2)
    reduced_q = rows @ scorer.query.weight.T + scorer.query.bias
    reduced_k = k @ scorer.key.weight.T + scorer.key.bias
    key_down = torch.einsum("nk,bhnc->bhkc", scorer.down, reduced_k)
    coefficients = (reduced_q @ key_down.mT * 4**-0.5).softmax(-1)
    smallest_kept = coefficients.sort(-1, descending=True).values[..., 2:3]
    sparse_coefficients = torch.where(coefficients >= smallest_kept, coefficients, 0)
    basis = torch.where(scorer.up.abs() > 0.02, scorer.up.abs(), 0)
    scores = scorer.scores(q, k, v, spec_of(layout, tile, 3))
    assert (scores - sparse_coefficients @ basis.T).abs().max() < 1e-12


def test_window_takes_the_nearest_patches():
    layout = TokenLayout((5, 5), 1)
    q, k, v = make_qkv(layout)
    lists = make("window", layout)(q, k, v, spec_of(layout, 1, budget=6)).indices
    # prefix, the patch in the middle and its four neighbours
    assert lists[0, 0, 12].tolist() == [0, 8, 12, 13, 14, 18]


def test_strided_takes_every_s_th_token_from_the_own_one():
    layout = TokenLayout((4, 4), 0)
    q, k, v = make_qkv(layout)
    lists = make("strided", layout)(q, k, v, spec_of(layout, 1, budget=4)).indices
    assert lists[0, 0, 6].tolist() == [2, 6, 10, 14]


def test_random_is_fixed_by_seed_and_layer_and_uniform():
    layout = TokenLayout((16, 16), 1)
    q, k, v = make_qkv(layout)
    spec = spec_of(layout, 4, 26)
    first = make("random", layout).scores(q, k, v, spec)
    assert torch.equal(first, make("random", layout).scores(k, q, v, spec))
    for other in (make("random", layout, layer=1), make("random", layout, seed=1)):
        assert (first == other.scores(q, k, v, spec)).float().mean() < 1e-3
    assert (first[:, 0] == first[:, 1]).float().mean() < 1e-3
    uniform = first.double() / 2**24
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.std() - 12**-0.5) < 0.02


def test_bigbird_is_half_window_and_half_random():
    layout = TokenLayout((16, 16), 1)
    q, k, v = make_qkv(layout)
    lists, window, chance = (
        make(name, layout)(q, k, v, spec_of(layout, 4, budget)).indices
        for name, budget in (("bigbird", 26), ("window", 13), ("random", 26))
    )
    listed = Connectivity(lists, layout.grid, 4, 1).to_mask()[:, :, 1:]
    near, drawn = (Connectivity(each, layout.grid, 4, 1).to_mask()[:, :, 1:] for each in (window, chance))
    assert (listed & near).sum() == near.sum()
    # the others have the largest random scores of those that are left, so that they are on the random list
    assert (listed & ~near & drawn).sum() == (listed & ~near).sum()


def test_lowrank_follows_another_grid_by_resampling():
    native, other = TokenLayout((14, 14), 1), TokenLayout((28, 20), 1)
    scorer = build_scorer(LowRank(), native)
    with torch.no_grad():  # something smooth that resampling should keep
        y, x = torch.meshgrid(torch.linspace(0, 1, 14), torch.linspace(0, 1, 14), indexing="ij")
        scorer.up[1:] = (y + x).reshape(-1, 1) * torch.linspace(0.5, 1.5, 32)
        scorer.down[1:] = (y * x).reshape(-1, 1) * torch.linspace(0.5, 1.5, 32)
    up, down = scorer._resampled_up(other), scorer._resampled_down(other)
    assert up.shape == down.shape == (561, 32)
    assert torch.equal(up[0], scorer.up[0])
    assert torch.equal(down[0], scorer.down[0])
    assert up[1:].std().item() == pytest.approx(scorer.up[1:].std().item(), rel=1e-5)
    assert (down[1:].sum(0) / scorer.down[1:].sum(0) - 1).abs().max() < 0.05
    q, k, v = make_qkv(other)
    assert scorer.scores(q, k, v, spec_of(other, 1, 5)).shape == (1, 2, 560, 561)
    assert scorer._resampled_up(native) is scorer.up


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_lowrank_weights_survive_a_change_of_size():
    model = sparsifiner.sparsify(make_model("deit"), preset="paper")
    state = model.state_dict()
    model.set_input_size(img_size=(96, 128))
    assert model(make_images((96, 128))).shape == (2, 7)
    assert torch.equal(model.state_dict()["blocks.0.attn.scorer.up"], state["blocks.0.attn.scorer.up"])


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_lowrank_weights_made_at_another_size_load_with_their_grid():
    trained = sparsifiner.sparsify(make_model("deit"), preset="paper")
    trained.set_input_size(img_size=(96, 128))
    images = make_images((96, 128))
    fresh = make_model("deit", img_size=(96, 128))
    sparsifiner.sparsify(fresh, preset="paper").requires_grad_(False)
    before = dict(fresh.named_parameters())
    fresh.load_state_dict(trained.state_dict())
    assert fresh.blocks[0].attn.scorer.native_layout.grid == (14, 14)
    # optimizers hold these, and what is frozen stays so
    assert all(parameter is before[name] for name, parameter in fresh.named_parameters())
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    with torch.no_grad():
        assert torch.equal(fresh(images), trained(images))


class TestReleased:
    """`Released()` against outputs of the released code."""

    @pytest.fixture
    def released(self):
        return load_file(pathlib.Path(__file__).parent / "fixtures" / "legacy.safetensors")

    @pytest.fixture
    def layer(self, released):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
        with pytest.warns(UserWarning, match="untrained"):
            sparsifiner.sparsify(model, make_config("paper", keep=0.25, scorer=Released()))
        weights = {
            f"blocks.0.attn.{key.removeprefix('weight.')}": value
            for key, value in released.items()
            if key.startswith("weight.")
        }
        # released names load as they are
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert unexpected == []
        assert not [key for key in missing if ".attn." in key]
        return model.eval().blocks[0].attn

    @torch.no_grad()
    def test_scores_mask_and_output(self, layer, released):
        q, k, v = layer.project(released["input"])
        spec = plan(Call(layer.current_layout(197)), layer.config, layer.place)
        assert spec.budget == 50
        scores = layer.scorer.scores(q, k, v, spec)
        # the scores reach .011, so this is two units in the last place: another CPU's matrix products
        assert (scores - released["scores"]).abs().max() <= 2 * 2**-30
        mask = layer.scorer(q, k, v, spec).to_mask()
        assert torch.equal(mask, released["mask"].bool())
        assert (layer(released["input"]) - released["output"]).abs().max() < 1e-6

    @torch.no_grad()
    def test_stage_one(self, layer, released):
        q, k, v = layer.project(released["input"])
        coefficients, basis = layer.scorer.factors(q, k, TokenLayout((14, 14), 1), tile=1)
        scores = coefficients @ basis.mT
        reached = released["stage1_scores"].abs().max()
        assert (scores - released["stage1_scores"]).abs().max() <= 4 * torch.finfo().eps * reached
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out = layer.combine(released["input"], dense)
        assert (out - released["stage1_output"]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("tile", "pool", "summary"), [(4, 2, 2), (4, None, 4), (3, None, None), (1, None, 2)]
)
def test_impact_is_the_attention_of_mean_queries_times_the_distance_of_values(tile, pool, summary):
    layout = TokenLayout((5, 7), 2)
    q, k, v = make_qkv(layout, dtype=torch.float64)
    spec = ListSpec(layout, tile, 6, 2, scale=0.25, summary=summary)
    scorer = make("impact", layout, pool=pool)
    assert scorer.pool_side(spec) == (pool or {4: 2, 3: 3, 1: 1}[tile])
    assert scorer.pool_side(replace(spec, budget=5)) == {4: 4, 3: 3, 1: 1}[tile]  # 3 < 16 / 4 keys
    scores = scorer.scores(q, k, v, spec)
    side = summary or 7  # all patches without summaries
    windows = tile_members(layout, side)
    mass_keys = torch.cat([k[:, :, :2], *(k[:, :, w].mean(2, keepdim=True) for w in windows)], 2)
    sizes = torch.tensor([1.0, 1.0, *map(len, windows)], dtype=torch.float64)
    deviation = torch.ones_like(k[..., 0])
    for window in windows:
        deviation[:, :, window] = (v[:, :, window] - v[:, :, window].mean(2, keepdim=True)).norm(dim=-1)
    squares = tile_members(layout, pool or (tile if tile % 2 else tile // 2))
    for row, members in enumerate(tile_members(layout, tile)):
        inside = [square for square in squares if set(square.tolist()) <= set(members.tolist())]
        assert sum(map(len, inside)) == len(members)
        queries = torch.stack([q[:, :, square].mean(2) for square in inside], 2)
        mass = ((queries @ mass_keys.mT * 0.25).exp() * sizes).sum(-1, keepdim=True)
        mass = (
            mass if len(inside) > 1 or tile % 2 == 0 else torch.ones(())
        )  # one square: the order needs none
        expected = ((queries @ k.mT * 0.25).exp() / mass).amax(2) * deviation
        assert (scores[:, :, row].exp() - expected).abs().max() < 1e-12


@pytest.mark.parametrize("tile", [1, 4])
def test_impact_lists_keys_on_small_grids_without_summaries(tile):
    layout = TokenLayout((5, 5), 1)
    q, k, v = make_qkv(layout)
    spec = ListSpec(layout, tile, 20, forced=1 if tile > 1 else 0, scale=0.25)
    lists = make("impact", layout)(q, k, v, spec).indices
    assert (lists >= 0).all()
    assert (lists == layout.tokens - 1).any()  # the corner patch is no window of its own


def test_lowrank_scores_along_a_curve_take_the_origin_of_its_tokens():
    q, k, v = make_qkv(CurveLayout(9, 1))
    scorer = make("lowrank", TokenLayout((4, 4), 1))
    with pytest.raises(TypeError, match="a curve of 9 patches take the origin of its tokens; give"):
        scorer(q, k, v, spec_of(CurveLayout(9, 1), 2, 3))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lowrank"])
@pytest.mark.parametrize("tile", [1, 2, 4])
def test_lists_along_a_curve_are_those_of_a_grid_of_one_row_cut_into_as_long_runs(name, tile):
    curve, row = CurveLayout(41, 1), TokenLayout((1, 41), 1)
    q, k, v = make_qkv(curve)
    # squares that a row cuts off are as long as their side
    along = ListSpec(curve, tile, 9, 1, scale=0.25, summary=2)
    in_row = ListSpec(row, tile * tile, 9, 1, scale=0.25, summary=4)
    own, others = make(name, curve), make(name, row)
    if name == "impact":
        own.configure(Impact(pool=max(1, tile // 2)))
        others.configure(Impact(pool=max(1, tile // 2) ** 2))
    lists = own(q, k, v, along)
    assert lists.layout == curve
    assert torch.equal(lists.indices, others(q, k, v, in_row).indices)
