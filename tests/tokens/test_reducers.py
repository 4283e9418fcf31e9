"""Each method against a transcription of it, in fp64, with gradients; the curve and the two attentions."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsifiner import DynamicViT, EViT, ToMe
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import sparse_attention
from sparsifiner.tokens import TokenState
from sparsifiner.tokens.dynamicvit.reducer import ratio_loss
from sparsifiner.tokens.evit.reducer import class_attention
from sparsifiner.tokens.policy import attend_with_policy
from sparsifiner.tokens.sizes import weigh_by_size
from sparsifiner.tokens.state import best_of
from tests.ops.cases import make_connectivity, make_qkv

WIDTH, HEADS, HEAD_DIM = 12, 2, 6
SCALE = HEAD_DIM**-0.5
LAYOUTS = [TokenLayout((4, 4), 1), TokenLayout((5, 3), 2), TokenLayout((1, 13), 1), TokenLayout((7, 9), 5)]


def make_tokens(layout, batch=2):
    """Residual stream, queries and keys in fp64."""
    x = torch.randn(batch, layout.tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    q, k = (
        torch.randn(batch, HEADS, layout.tokens, HEAD_DIM, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    return x, q, k


def place_on_curve(position, grid):
    """Bits of row and column in turn, the row's first."""
    row, column = divmod(position, grid[1])
    bits = zip(f"{row:08b}", f"{column:08b}", strict=True)
    return int("".join(a + b for a, b in bits), 2)


def best_first(scores):
    """Indices, the largest score first, the first among equal ones first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index].item(), index))


def assert_same(actual, expected, inputs):
    """Values and, with the same random direction, gradients."""
    assert (actual - expected).abs().max() < 1e-12
    direction = torch.randn_like(actual)
    gradients = [
        torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True, retain_graph=True)
        for out in (actual, expected)
    ]
    for found, wanted in zip(*gradients, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert wanted.abs().max() > 1e-3
            assert (found - wanted).abs().max() < 1e-12 * max(1.0, wanted.abs().max().item())


def transcribed_evit(x, q, k, keep, fuse, whole, fused, positions):
    """New tokens and positions of one image."""
    attention = sum((q[head, 0] @ k[head].T * SCALE).softmax(0) for head in range(HEADS)) / HEADS
    prefix = whole.prefix + fused
    order = best_first(attention[prefix:])
    left = math.ceil(round(keep * len(order), 9))
    kept = sorted(order[:left], key=lambda index: place_on_curve(positions[index], whole.grid))
    rows = [x[: whole.prefix]]
    if fuse:
        gone = [*range(whole.prefix, prefix), *(index + prefix for index in order[left:])]
        rows.append(sum(attention[index] * x[index] for index in gone)[None])
    return torch.cat([*rows, x[[index + prefix for index in kept]]]), [positions[index] for index in kept]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evit_drops_and_fuses_as_described(layout, fuse):
    reducer = EViT(0.6, fuse=fuse).reducer(3, 12, WIDTH, layout.patches)
    state, positions = TokenState(layout), [list(range(layout.patches))] * 2
    for _ in range(3):  # what was fused before is fused again
        inputs = make_tokens(state.layout)
        before = state
        actual, state = reducer.after_attention(*inputs, SCALE, before)
        expected = [
            transcribed_evit(
                *(each[image] for each in inputs), 0.6, fuse, layout, before.fused, positions[image]
            )
            for image in range(2)
        ]
        positions = [each[1] for each in expected]
        assert state.positions.tolist() == positions
        assert state.fused == fuse
        assert state.layout == CurveLayout(len(positions[0]), layout.prefix + fuse)
        assert_same(actual, torch.stack([each[0] for each in expected]), inputs)
    assert (state.sizes, state.policy) == (None, None)


def test_evit_leaves_tokens_alone_that_all_stay():
    layout = TokenLayout((2, 2), 1)
    reducer = EViT(0.9).reducer(3, 12, WIDTH, 4)
    x, q, k = make_tokens(layout)
    state = TokenState(layout)
    actual, after = reducer.after_attention(x, q, k, SCALE, state)
    assert actual is x
    assert after is state


def test_class_attention_is_the_mean_over_heads_and_not_rounded_by_autocast():
    _, q, k = make_tokens(TokenLayout((5, 3), 2))
    expected = F.scaled_dot_product_attention(q, k, torch.eye(17).double().expand(2, HEADS, -1, -1))[:, :, 0]
    assert (class_attention(q, k, SCALE) - expected.mean(1)).abs().max() < 1e-14
    single = class_attention(q.float(), k.float(), SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_attention(q.float(), k.float(), SCALE), single)


def transcribed_tome(x, k, sizes, r, prefix, grid, positions):
    """New tokens, sizes and positions of one image, pair by pair."""
    keys = F.normalize(sum(k[head] for head in range(HEADS)) / HEADS, dim=-1)
    first, second = range(prefix, len(x), 2), range(prefix + 1, len(x), 2)
    partner = {a: max(second, key=lambda b: ((keys[a] @ keys[b]).item(), -b)) for a in first}
    merged = sorted(first, key=lambda a: (-(keys[a] @ keys[partner[a]]).item(), a))[:r]
    groups = {token: [token] for token in range(prefix, len(x)) if token not in merged}
    for a in merged:
        groups[partner[a]].append(a)
    order = sorted(groups, key=lambda token: place_on_curve(positions[token - prefix], grid))
    size = {token: sum(sizes[each] for each in group) for token, group in groups.items()}
    means = [sum(sizes[each] * x[each] for each in groups[token]) / size[token] for token in order]
    return (
        torch.cat([x[:prefix], torch.stack(means)]),
        torch.cat([sizes[:prefix], torch.stack([size[token] for token in order])]),
        [positions[token - prefix] for token in order],
    )


@pytest.mark.parametrize("r", [3, 100])
@pytest.mark.parametrize("layout", [*LAYOUTS, TokenLayout((3, 4), 0)])
def test_tome_merges_as_described(layout, r):
    reducer = ToMe(r).reducer(0, 12, WIDTH, layout.patches)
    state, positions = TokenState(layout), [list(range(layout.patches))] * 2
    sizes = torch.ones(2, layout.tokens, dtype=torch.float64)
    for _ in range(3):
        x, q, k = make_tokens(state.layout)
        patches = state.layout.patches
        actual, state = reducer.after_attention(x, q, k, SCALE, state)
        if r == 100 and patches == 1:
            assert actual is x
            break
        expected = [
            transcribed_tome(
                *(each[image] for each in (x, k, sizes)),
                min(r, patches // 2), layout.prefix, layout.grid, positions[image],
            )
            for image in range(2)
        ]  # fmt: skip
        sizes, positions = torch.stack([each[1] for each in expected]), [each[2] for each in expected]
        assert torch.equal(state.sizes.double(), sizes)
        assert (sizes[:, layout.prefix :].sum(1) == layout.patches).all()
        assert state.positions.tolist() == positions
        assert_same(actual, torch.stack([each[0] for each in expected]), (x, q, k))


def test_ties_go_to_the_first():
    layout = TokenLayout((4, 4), 1)
    x, q, k = make_tokens(layout)
    alike = torch.ones_like(k)  # the same attention to all, all pairs alike
    _, evit = EViT(0.5).reducer(3, 12, WIDTH, 16).after_attention(x, q, alike, SCALE, TokenState(layout))
    assert (
        evit.positions.tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]] * 2
    )  # the first half of the image, by squares
    once_more, _ = make_tokens(evit.layout)[:2]
    _, evit = (
        EViT(0.5)
        .reducer(3, 12, WIDTH, 16)
        .after_attention(once_more, q[:, :, :10], alike[:, :, :10], SCALE, evit)
    )
    assert evit.positions.tolist() == [[0, 1, 4, 5]] * 2
    _, tome = ToMe(3).reducer(0, 12, WIDTH, 16).after_attention(x, q, alike, SCALE, TokenState(layout))
    # 0, 2 and 4 merge into 1
    assert sorted(tome.positions[0].tolist()) == [1, 3, *range(5, 16)]
    assert tome.sizes[0, 1 + tome.positions[0].tolist().index(1)] == 4
    dynamic = DynamicViT(0.5).reducer(3, 12, WIDTH, 16).double().eval()
    with torch.no_grad():
        for parameter in dynamic.out_conv[-1].parameters():
            parameter.zero_()
        _, state = dynamic.before_attention(x, TokenState(layout))
    assert state.positions.tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_that_are_not_finite_lose_as_many_tokens_and_leave_the_others_alone(layout, bad):
    x, q, k = (each.detach() for each in make_tokens(layout))
    spoilt = [each.clone() for each in (x, q, k)]
    for each in spoilt:
        each[0] = bad
    for method in (EViT(0.6), ToMe(3), DynamicViT(0.6, "after attention")):
        torch.manual_seed(0)
        reducer = method.reducer(3, 12, WIDTH, layout.patches).double().eval()
        (actual, after), (expected, wanted) = (
            reducer.after_attention(*inputs, SCALE, TokenState(layout)) for inputs in (spoilt, (x, q, k))
        )
        assert torch.equal(actual[1], expected[1])
        assert torch.equal(after.positions[1], wanted.positions[1])
        assert len(set(after.positions[0].tolist())) == wanted.positions.shape[1]
        assert set(after.positions[0].tolist()) <= set(range(layout.patches))


def make_predictor(keep=0.6, placement="before attention", stage=1):
    reducer = DynamicViT(keep, placement).reducer((3, 6, 9)[stage - 1], 12, WIDTH, 15).double()
    with torch.no_grad():
        for parameter in reducer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return reducer


def transcribed_predictor(reducer, patches):
    """Probability of staying [n] of one image's patches [n, C], half own channels and half those of all."""
    weights = dict(reducer.named_parameters())

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    normed = (patches - patches.mean(1, keepdim=True)) / (
        patches.var(1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    features = F.gelu(linear(normed * weights["in_conv.0.weight"] + weights["in_conv.0.bias"], "in_conv.1"))
    own, others = features[:, : WIDTH // 2], features[:, WIDTH // 2 :].sum(0) / len(patches)
    x = torch.stack([torch.cat([each, others]) for each in own])
    for name in ("out_conv.0", "out_conv.2"):
        x = F.gelu(linear(x, name))
    return linear(x, "out_conv.4").softmax(1)[:, 0]


def test_tome_merges_many_large_tokens_in_half_precision():
    layout = TokenLayout((8, 8), 1)
    x = torch.full((1, 65, WIDTH), 3000.0, dtype=torch.float16)
    k = torch.ones(1, HEADS, 65, HEAD_DIM, dtype=torch.float16)
    state = TokenState(layout)
    for _ in range(6):
        reducer = ToMe(64).reducer(0, 12, WIDTH, state.layout.patches)
        x, state = reducer.after_attention(x, k, k, SCALE, state)
        k = k[:, :, : x.shape[1]]
    assert state.sizes.tolist() == [[1, 64]]
    # 64 of them would be 192,000
    assert ((x.double() / 3000 - 1).abs() < torch.finfo(torch.float16).eps).all()


@pytest.mark.parametrize("placement", ["before attention", "after attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamicvit_keeps_what_its_predictor_scores_highest(layout, placement):
    state, positions = TokenState(layout), [list(range(layout.patches))] * 2
    for stage in (1, 2, 3):
        reducer = make_predictor(0.6, placement, stage).eval()
        x, q, k = make_tokens(state.layout)
        idle, _ = (
            reducer.after_attention(x, q, k, SCALE, state)
            if placement == "before attention"
            else reducer.before_attention(x, state)
        )
        assert idle is x
        if placement == "before attention":
            actual, state = reducer.before_attention(x, state)
        else:
            actual, state = reducer.after_attention(x, q, k, SCALE, state)
        left = math.ceil(round(0.6**stage * layout.patches, 9))
        rows = []
        for image in range(2):
            chance = transcribed_predictor(reducer, x[image, layout.prefix :])
            kept = sorted(
                best_first(chance)[:left],
                key=lambda index: place_on_curve(positions[image][index], layout.grid),
            )
            rows.append(
                torch.cat([x[image, : layout.prefix], x[image, [index + layout.prefix for index in kept]]])
            )
            positions[image] = [positions[image][index] for index in kept]
        assert state.positions.tolist() == positions
        assert_same(actual, torch.stack(rows), (x,))


def test_dynamicvit_draws_in_training_and_draws_no_token_twice():
    layout = TokenLayout((5, 3), 2)
    x, _, _ = make_tokens(layout, batch=64)
    first, second = make_predictor(stage=1).train(), make_predictor(stage=2).train()
    unchanged, state = first.before_attention(x, TokenState(layout))
    again, later = second.before_attention(x, state)
    assert unchanged is x
    assert again is x
    assert state.positions is later.positions is None
    for each in (state, later):
        assert ((each.policy == 0) | (each.policy == 1)).all()
        assert (each.policy[:, :2] == 1).all()
    assert (later.policy <= state.policy).all()
    assert later.policy.sum() < state.policy.sum() < 64 * 17
    # the second looks at those alone that are still there
    for image in range(3):
        there = state.policy[image, 2:] > 0
        assert there.any()
        logits = second.logits(x[image : image + 1, 2:], state.policy[image : image + 1, 2:])[0]
        expected = transcribed_predictor(second, x[image, 2:][there])
        assert (logits.softmax(1)[there, 0] - expected).abs().max() < 1e-12
    # drawn as often as predicted: 64 images of 15 patches, five standard deviations
    chance = torch.stack([transcribed_predictor(first, each[2:]) for each in x])
    spread = (chance * (1 - chance)).sum().sqrt()
    assert (state.policy[:, 2:].sum() - chance.sum()).abs() < 5 * spread
    later.policy.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in (*first.parameters(), *second.parameters()))


def test_ratio_loss_is_the_mean_squared_miss_of_each_stage_and_image():
    layout = TokenLayout((2, 5), 1)
    blocks = [torch.nn.Module() for _ in range(3)]
    blocks[0].reducer, blocks[2].reducer = make_predictor(0.7, stage=1), make_predictor(0.7, stage=2)
    policies = torch.tensor(
        [[[1.0] * 9 + [0] * 2, [1.0] * 11], [[1.0] * 5 + [0] * 6, [1.0] * 6 + [0] * 5]], requires_grad=True
    )
    states = [TokenState(layout, policy=policies[stage]) for stage in (0, 0, 1)]
    loss = ratio_loss(blocks, states)
    misses = [0.8 - 0.7, 1.0 - 0.7, 0.4 - 0.49, 0.5 - 0.49]
    assert loss.item() == pytest.approx(sum(miss**2 for miss in misses) / 4)
    loss.backward()
    assert policies.grad[0, 0, 1:].tolist() == pytest.approx([2 * misses[0] / 4 / 10] * 10)
    assert (policies.grad[:, :, 0] == 0).all()


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (5, 7), (3, 16), (1, 9), (37, 20)])
def test_squares_whose_patches_all_stay_are_runs(grid):
    layout = TokenLayout(grid, 1)
    state = TokenState(layout)
    whole = state.keep(state.best_patches(torch.zeros(1, layout.patches), layout.patches))
    curve = sorted(range(layout.patches), key=lambda position: place_on_curve(position, grid))
    assert whole.positions[0].tolist() == curve
    checked = 0
    for side in (1, 2, 4, 8):
        for top in range(0, grid[0] - side + 1, side):
            for left in range(0, grid[1] - side + 1, side):
                square = {
                    row * grid[1] + column
                    for row in range(top, top + side)
                    for column in range(left, left + side)
                }
                stays = torch.rand(layout.patches) < 0.5
                stays[list(square)] = True
                chosen = state.best_patches(stays[None].float(), int(stays.sum()))
                positions = state.keep(chosen).positions[0].tolist()
                places = [place for place, position in enumerate(positions) if position in square]
                assert places == list(range(places[0], places[0] + side**2))
                checked += 1
    assert checked >= layout.patches


@pytest.mark.parametrize("n", [1, 200, 512])
def test_few_scores_that_are_sorted_give_what_is_selected(n, monkeypatch):
    for scores in (torch.randint(0, 6, (4, n)).float(), torch.randn(4, n)):
        scores[0], scores[1, ::2], scores[2, 1::2] = math.nan, math.inf, -math.inf
        for count in {1, max(1, n // 2), n}:
            expected = best_of(scores, count, "reference")
            with monkeypatch.context() as patched:
                patched.setattr("sparsifiner.tuned.SORTED_SCORES", 0)
                for backend in ("reference", "torch", "auto"):
                    assert torch.equal(best_of(scores, count, backend), expected)


def test_where_a_grid_is_divided_runs_are_its_tiles():
    layout = TokenLayout((8, 16), 0)
    state = TokenState(layout)
    positions = state.keep(state.best_patches(torch.zeros(1, layout.patches), layout.patches)).positions[0]
    runs = {frozenset(run) for run in positions.view(-1, 16).tolist()}
    assert runs == {frozenset(tile) for tile in layout.square_tokens(4, positions.device).tolist()}


def test_tokens_of_the_image_are_known_at_every_step():
    layout = TokenLayout((3, 5), 2)
    state = TokenState(layout)
    assert state.tokens_of_image(2, torch.device("cpu")).tolist() == [list(range(17))] * 2
    kept = state.keep(torch.tensor([[1, 6, 14], [0, 2, 3]]), fused=1)
    # a fused token counts as the first one
    assert kept.tokens_of_image(2, torch.device("cpu")).tolist() == [[0, 1, 0, 3, 8, 16], [0, 1, 0, 2, 4, 5]]
    again = kept.keep(torch.tensor([[0, 2], [1, 2]]), fused=1)
    assert again.positions.tolist() == [[1, 14], [2, 3]]
    assert again.layout == CurveLayout(2, 3)


@pytest.mark.parametrize("head_dim", [6, 16, 20])
def test_sizes_add_their_logs_to_the_logits(head_dim):
    layout, scale = TokenLayout((4, 3), 2), head_dim**-0.5
    q, k, v = (x.clone().requires_grad_() for x in make_qkv(layout, head_dim=head_dim, dtype=torch.float64))
    sizes = torch.randint(1, 9, (1, layout.tokens))
    expected = (q @ k.mT * scale + sizes.double().log()).softmax(-1) @ v
    wide = weigh_by_size(q, k, v, sizes.float(), scale)
    assert all(each.shape[-1] % 16 == 0 for each in wide)
    dense = F.scaled_dot_product_attention(*wide, scale=scale)
    assert (dense[..., head_dim:] == 0).all()
    assert_same(dense[..., :head_dim], expected, (q, k, v))
    # the same with lists: -inf where a key is not listed
    lists = make_connectivity(layout, 0.4, 2, None)
    for backend in ("reference", "torch"):
        sparse = sparse_attention(*wide, lists, None, scale, backend)
        logits = (q @ k.mT * scale + sizes.double().log()).masked_fill(~lists.to_mask(), -math.inf)
        assert_same(sparse[..., :head_dim], logits.softmax(-1) @ v, (q, k, v))


POLICIES = [
    # lists, summary
    (None, None), ((1, 0.4), None), ((2, 0.5), None), ((1, 0.4), 2), ((2, 0.5), 3),
]  # fmt: skip
LAYOUT = TokenLayout((4, 3), 2)


def make_policy_case(lists, dtype=torch.float64):
    qkv = [x.clone().requires_grad_() for x in make_qkv(LAYOUT, batch=2, head_dim=5, dtype=dtype)]
    return qkv, None if lists is None else make_connectivity(LAYOUT, lists[1], lists[0], None, batch=2)


@pytest.mark.parametrize(("lists", "summary"), POLICIES)
def test_a_policy_that_keeps_everything_changes_nothing(lists, summary):
    qkv, connectivity = make_policy_case(lists)
    policy = torch.ones(2, LAYOUT.tokens, dtype=torch.float64)
    actual = attend_with_policy(*qkv, policy, 0.4, connectivity, summary)
    if connectivity is None:
        expected = F.scaled_dot_product_attention(*qkv, scale=0.4)
    else:
        expected = sparse_attention(*qkv, connectivity, summary, 0.4, "reference")
    assert_same(actual, expected, qkv)


def attend_to_survivors(q, k, v, stays, listed, summary, scale):
    """One head: each token that stays attends to what is listed and stays, and to windows of what stays."""
    out = {}
    windows = {}
    for token in range(LAYOUT.prefix, LAYOUT.tokens):
        row, column = divmod(token - LAYOUT.prefix, LAYOUT.grid[1])
        if summary and stays[token]:
            windows.setdefault((row // summary, column // summary), []).append(token)
    for query in range(LAYOUT.tokens):
        keys = [key for key in range(LAYOUT.tokens) if stays[key] and listed[query, key]]
        logits = [q[query] @ k[key] * scale for key in keys]
        values = [v[key] for key in keys]
        for members in windows.values():
            missing = len([token for token in members if not listed[query, token]])
            if query >= LAYOUT.prefix and missing:
                logits.append(q[query] @ k[members].mean(0) * scale + math.log(missing))
                values.append(v[members].mean(0))
        if stays[query] and logits:
            out[query] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize(("lists", "summary"), POLICIES)
def test_tokens_that_a_policy_drops_are_gone_for_the_others(lists, summary):
    (q, k, v), connectivity = make_policy_case(lists)
    policy = (torch.rand(2, LAYOUT.tokens) < 0.6).double()
    policy[:, : LAYOUT.prefix] = 1
    actual = attend_with_policy(q, k, v, policy, 0.4, connectivity, summary)
    everything = torch.ones(2, 2, LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool)
    mask = everything if connectivity is None else connectivity.to_mask()
    found, wanted = [], []
    for image in range(2):
        for head in range(2):
            one = [x[image, head] for x in (q, k, v)]
            rows = attend_to_survivors(*one, policy[image] > 0, mask[image, head], summary, 0.4)
            assert len(rows) > LAYOUT.prefix + 2
            found += [actual[image, head, query] for query in rows]
            wanted += rows.values()
    assert_same(torch.stack(found), torch.stack(wanted), (q, k, v))


@pytest.mark.parametrize(("lists", "summary"), POLICIES)
def test_the_gradient_of_a_policy_reaches_tokens_that_are_dropped(lists, summary):
    qkv, connectivity = make_policy_case(lists)
    policy = (torch.rand(2, LAYOUT.tokens) < 0.6).double()
    policy[:, : LAYOUT.prefix] = 1
    policy[:, [2, 4, 8, 11, 12]] = 1  # in every window one that stays, so that means are smooth
    policy.requires_grad_()

    def attend(policy):
        return attend_with_policy(*(x.detach() for x in qkv), policy, 0.4, connectivity, summary)

    assert torch.autograd.gradcheck(attend, (policy,), eps=1e-7, atol=1e-5)
    (gradient,) = torch.autograd.grad(attend(policy).square().sum(), policy)
    dropped = gradient[policy == 0]
    assert torch.isfinite(gradient).all()
    assert len(dropped) > 3
    assert (dropped != 0).all()


def test_a_query_of_whose_keys_none_stays_attends_to_itself():
    indices = torch.tensor([[2, 4], [1, 3], [1, 3], [1, 3]], dtype=torch.int32)[None, None]
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 5, 6))
    policy = torch.tensor([[1.0, 1, 0, 1, 0]], requires_grad=True)
    out = attend_with_policy(q, k, v, policy, 0.4, Connectivity(indices, (2, 2), 1, 1))
    assert torch.equal(out[0, 0, 1], v[0, 0, 1])
    out.square().sum().backward()
    for each in (q, k, v, policy):
        assert torch.isfinite(each.grad).all()
        assert each.grad.abs().max() < 1e3


def test_logits_of_keys_that_do_not_count_change_nothing_however_large():
    indices = torch.tensor([[1, 3], [1, 3], [1, 3], [1, 3]], dtype=torch.int32)[None, None]
    connectivity = Connectivity(indices, (2, 2), 1, 1)
    q, k, v = torch.randn(3, 1, 1, 5, 6)
    policy = torch.tensor([[1.0, 1, 1, 1, 0]], requires_grad=True)
    expected = attend_with_policy(q, k, v, policy, 0.4, connectivity)
    k[:, :, 2] = 200 * q[:, :, 1]  # is not listed
    k[:, :, 4] = 200 * q[:, :, 0]  # is dropped
    actual = attend_with_policy(q, k, v, policy, 0.4, connectivity)
    assert (actual[:, :, 1] - expected[:, :, 1]).abs().max() < 1e-6
    without = [x[:, :, [0, 1, 2, 3]] for x in (q, k, v)]
    alone = F.scaled_dot_product_attention(*without, scale=0.4)
    assert (actual[:, :, 0] - alone[:, :, 0]).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(actual.square().sum(), policy)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policies_are_computed_in_single_precision_under_autocast(dtype):
    qkv, connectivity = make_policy_case((1, 0.4), dtype)
    policy = (torch.rand(2, LAYOUT.tokens) < 0.6).to(dtype)
    expected = attend_with_policy(*qkv, policy, 0.4, connectivity, 2)
    assert expected.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend_with_policy(*qkv, policy, 0.4, connectivity, 2), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EViT(0), ValueError, r"tokens: keep must lie in \(0, 1\].*got 0"),
        (lambda: EViT(1.1), ValueError, r"tokens: keep must lie in \(0, 1\].*got 1\.1"),
        (lambda: EViT("half"), TypeError, "tokens: keep must be a number.*got 'half'"),
        (lambda: EViT(True), TypeError, "tokens: keep must be a number.*got True"),
        (lambda: DynamicViT(float("nan")), ValueError, "tokens: keep must lie in"),
        (lambda: DynamicViT(placement="behind"), ValueError, "tokens: placement='behind' is unknown"),
        (lambda: EViT(at=3), TypeError, "tokens: at must be the blocks.*got 3"),
        (lambda: EViT(at="39"), TypeError, "tokens: at must be the blocks.*got '39'"),
        (lambda: DynamicViT(at=[1.5]), TypeError, r"tokens: at must be the blocks.*got \[1\.5\]"),
        (
            lambda: EViT(at=[3, 12]).counts(12, 9, 1),
            ValueError,
            r"at=\[3, 12\] must be ascending blocks of 0 to 11",
        ),
        (lambda: EViT(at=[3, 3]).counts(12, 9, 1), ValueError, r"at=\[3, 3\] must be ascending"),
        (lambda: DynamicViT(at=[6, 3]).counts(12, 9, 1), ValueError, r"at=\[6, 3\] must be ascending"),
        (lambda: DynamicViT(at=[-1]).reducer(0, 12, 8, 9), ValueError, r"at=\[-1\] must be ascending"),
        (lambda: ToMe(0), ValueError, "tokens: r must be at least 1, got 0"),
        (lambda: ToMe(2.0), TypeError, "tokens: r must be a whole number of pairs per block, got 2.0"),
        (lambda: ToMe(True), TypeError, "tokens: r must be a whole number"),
    ],
)
def test_impossible_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
