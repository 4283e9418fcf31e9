"""Stages: their gradients against a transcription of the method, what they move, what they refuse."""

import copy
import logging

import pytest
import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2

import sparsifiner
from sparsifiner.attention import SparseAttention
from sparsifiner.measure.recall import mask_recall
from sparsifiner.models.adapter import is_scorer
from sparsifiner.scorers import LowRank
from sparsifiner.training import LossWeights, Recipe, Stage
from sparsifiner.training.loop import choose_stages
from sparsifiner.training.recipe import STAGE_KINDS
from sparsifiner.training.stages import (
    Student,
    Teacher,
    compute_losses,
    needs_teacher,
    same_backbone,
    total_loss,
    why_skipped,
)
from tests.models import make_images, make_model

pytestmark = pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")

SIZE = (80, 48)  # 5 x 3 patches of 16
WEIGHTS = LossWeights()


def make_sparse(name="deit", preset="paper", size=SIZE, model_options=None, **options):
    """A small sparse model whose scorers have left their small start."""
    model = sparsifiner.sparsify(
        make_model(name, img_size=size, **(model_options or {})), preset=preset, **options
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if is_scorer(parameter_name) and not parameter_name.endswith(".up"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_targets(batch=2, dtype=torch.float32):
    return torch.randn(batch, 7, dtype=dtype).softmax(1)


def train_step(model, kind, images, targets, teacher=None):
    """Gradients of one step, as the loop makes it."""
    teacher = teacher or Teacher(model)
    student = Student(model, kind).train()
    taught = teacher(images, projections="reconstruct" in kind.losses) if needs_teacher(kind) else None
    losses = compute_losses(kind, student(images, taught.projections if taught else ()), taught, targets)
    loss = total_loss(losses, WEIGHTS)
    loss.backward()
    return loss


def learned(model, *, scorer):
    return {name: weight for name, weight in model.named_parameters() if is_scorer(name) == scorer}


def shift(model, amount=0.05):
    """Moves the backbone."""
    with torch.no_grad():
        for parameter in learned(model, scorer=False).values():
            parameter.add_(amount * torch.randn_like(parameter))


class Transcription:
    """A pre-norm Vision Transformer with attention as dense matrices, from the submodules of a model."""

    def __init__(self, model, images, masks=None):
        self.attention, self.qk = [], []
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for layer, block in enumerate(model.blocks):
            mask = None if masks is None else masks[layer]
            x = x + block.ls1(self.attend(block.attn, block.norm1(x), mask))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = model.norm(x)
        self.tokens = x[:, model.num_prefix_tokens :]
        self.logits = model.head(x[:, 0])

    def attend(self, attn, x, mask):
        B, N, C = x.shape
        q, k, v = attn.qkv(x).view(B, N, 3, 3, 16).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / 16**0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        attention = logits.softmax(-1)
        self.attention.append(attention)
        self.qk.append((q, k))
        return attn.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


def transcribed_scores(scorer, q, k, grid, prefix, tile, coef_topk):
    """Sparse coefficients times sparse basis, spread over the patch queries: [B, H, patches, N]."""
    height, width = grid
    patches = q[:, :, prefix:]
    own = torch.tensor([y // tile * width + x // tile for y in range(height) for x in range(width)])
    same_tile = (own[:, None] == own[None, :]).to(q.dtype)
    query = same_tile / same_tile.sum(1, keepdim=True) @ patches
    reduced_q = query @ scorer.query.weight.T + scorer.query.bias
    reduced_k = k @ scorer.key.weight.T + scorer.key.bias
    coefficients = (reduced_q @ (scorer.down.T @ reduced_k).mT * 8**-0.5).softmax(-1)
    threshold = coefficients.sort(-1, descending=True).values[..., coef_topk - 1 : coef_topk]
    sparse_coefficients = coefficients * (coefficients >= threshold).detach()
    magnitude = scorer.up.abs()
    sparse_basis = torch.where(magnitude > 0.02, magnitude, 0)
    straight_through = magnitude + (sparse_basis - magnitude).detach()
    return sparse_coefficients @ straight_through.T


def assert_same_gradients(parameters, actual, expected, tolerance):
    assert len(actual) == len(expected) == len(parameters) > 0
    for name, found, wanted in zip(parameters, actual, expected, strict=True):
        assert wanted.abs().max() > 1e-9, f"{name} tells nothing"
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("tile", [1, 2])
def test_reconstruct_has_the_gradients_of_the_method(tile):
    model = make_sparse(tile=tile, scorer=LowRank(basis=12, coef_topk=4)).double()
    images = make_images(SIZE, batch=3).double()
    loss = train_step(model, STAGE_KINDS["reconstruct"], images, make_targets(3, torch.float64))
    parameters = learned(model, scorer=True)
    actual = [parameter.grad for parameter in parameters.values()]
    with torch.no_grad():
        dense = Transcription(model, images)
    expected, constant = 0, 0
    for block, attention, (q, k) in zip(model.blocks, dense.attention, dense.qk, strict=True):
        scores = transcribed_scores(block.attn.scorer, q, k, (5, 3), 1, tile, 4)
        expected = expected + 1.68 * (scores - attention[:, :, 1:]).square().sum() / 3 / 2
        constant += 1.68 * attention[:, :, 1:].square().sum() / 3 / 2
    assert (loss + constant).item() == pytest.approx(expected.item(), rel=1e-10)
    assert len(parameters) == 2 * 6
    assert_same_gradients(parameters, actual, torch.autograd.grad(expected, list(parameters.values())), 1e-9)
    assert all(parameter.grad is None for parameter in learned(model, scorer=False).values())


@pytest.mark.parametrize(
    ("name", "size", "tile"), [("deit", SIZE, 1), ("deit", SIZE, 2), ("dinov2 registers", (56, 70), 1)]
)
def test_distil_has_the_gradients_of_the_method(name, size, tile):
    model = make_sparse(name, size=size, tile=tile, keep=0.3).double()
    teacher = Teacher(model)
    with torch.no_grad():
        taught = Transcription(teacher.model, images := make_images(size).double())
    shift(model)
    targets = make_targets(dtype=torch.float64)
    loss = train_step(model, STAGE_KINDS["distil"], images, targets, teacher)
    parameters = learned(model, scorer=False)
    actual = [parameter.grad for parameter in parameters.values()]
    assert all(parameter.grad is None for parameter in learned(model, scorer=True).values())

    with sparsifiner.trace(model) as traces, torch.no_grad():
        model(images)
    masks = [traces[layer].connectivity.to_mask() for layer in range(2)]
    assert all(mask.double().mean() < 0.6 for mask in masks)
    student = Transcription(model, images, masks)
    p, log_q = taught.logits.softmax(1), student.logits.log_softmax(1)
    expected = (
        -(targets * log_q).sum(1).mean()
        + 0.5 * (p * (p.log() - log_q)).sum(1).mean()
        + 0.5 * (student.tokens - taught.tokens).square().mean()
    )
    # the step rounds its teacher's outputs to fp32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(parameters, actual, torch.autograd.grad(expected, list(parameters.values())), 1e-6)


def test_classify_and_joint_have_the_gradients_of_their_parts():
    model = make_sparse(tile=2, keep=0.3).double()
    teacher = Teacher(model)
    shift(model)
    images, targets = make_images(SIZE).double(), make_targets(dtype=torch.float64)

    def gradients(kind):
        model.zero_grad()
        train_step(model, STAGE_KINDS[kind], images, targets, teacher)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    joint, distil = gradients("joint"), gradients("distil")
    for name, gradient in distil.items():  # the scorer's loss does not reach the backbone
        assert torch.equal(joint[name], gradient), name
    assert joint.keys() - distil.keys() == learned(model, scorer=True).keys()
    assert gradients("classify").keys() == distil.keys()


def test_joint_fits_what_the_student_scores_to_what_the_teacher_attends_to():
    model = make_sparse(scorer=LowRank(basis=12, coef_topk=4), keep=0.3).double()
    teacher = Teacher(model)
    shift(model)
    images = make_images(SIZE).double()
    train_step(model, STAGE_KINDS["joint"], images, make_targets(dtype=torch.float64), teacher)
    _check_scorer_gradients(model, images, Transcription(teacher.model, images).attention, 1.68)


def test_self_fits_the_students_own_unmasked_attention():
    model = make_sparse(scorer=LowRank(basis=12, coef_topk=4), keep=0.3).double()
    images = make_images(SIZE).double()
    train_step(model, STAGE_KINDS["self"], images, make_targets(dtype=torch.float64))
    _check_scorer_gradients(model, images, None, 0.336)


def _check_scorer_gradients(model, images, wanted, weight):
    """The scorers see the sparse student; `wanted` is the attention that they learn, None for its own."""
    with sparsifiner.trace(model) as traces, torch.no_grad():
        model(images)
        masks = [traces[layer].connectivity.to_mask() for layer in range(2)]
        own = Transcription(model, images, masks)
    wanted = wanted or [(q @ k.mT / 4).softmax(-1) for q, k in own.qk]
    expected = 0
    for block, attention, (q, k) in zip(model.blocks, wanted, own.qk, strict=True):
        scores = transcribed_scores(block.attn.scorer, q, k, (5, 3), 1, 1, 4)
        expected = expected + weight * (scores - attention[:, :, 1:].detach()).square().sum() / 2 / 2
    parameters = learned(model, scorer=True)
    actual = [parameter.grad for parameter in parameters.values()]
    assert_same_gradients(parameters, actual, torch.autograd.grad(expected, list(parameters.values())), 1e-9)


def changes_of_a_step(model, stage):
    """Names of the state dict's entries that two steps of AdamW change."""
    teacher = Teacher(model)
    student = Student(model, STAGE_KINDS[stage])
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        train_step(model, student.kind, make_images(SIZE), make_targets(), teacher)
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("stage", "moves_scorer", "moves_backbone"),
    [
        ("reconstruct", True, False),
        ("self", True, False),
        ("distil", False, True),
        ("classify", False, True),
        ("joint", True, True),
    ],
)
def test_a_step_moves_what_the_stage_trains_and_nothing_else(stage, moves_scorer, moves_backbone):
    model = make_sparse(keep=0.3)
    changed = changes_of_a_step(model, stage)
    expected = set()
    if moves_scorer:
        expected |= learned(model, scorer=True).keys()
    if moves_backbone:
        expected |= learned(model, scorer=False).keys()
    assert changed == expected


def test_reconstruct_lowers_its_loss_and_raises_the_recall():
    model = make_sparse(keep=0.3)
    images, teacher, kind = make_images(SIZE, batch=4), Teacher(model), STAGE_KINDS["reconstruct"]
    Student(model, kind)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.0)
    losses, before = [], mask_recall(model, [(images, None)])
    for _ in range(40):
        losses.append(train_step(model, kind, images, make_targets(4), teacher).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < min(losses[:10])
    assert sum(mask_recall(model, [(images, None)])) > sum(before)


def test_scorers_learn_at_another_image_size():
    model = make_sparse()
    model.set_input_size(img_size=(64, 96))
    train_step(model, STAGE_KINDS["reconstruct"], make_images((64, 96)), make_targets())
    for name, parameter in learned(model, scorer=True).items():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_frozen_backbone_stays_in_evaluation_mode():
    model = make_sparse(model_options={"drop_path_rate": 0.5})
    assert any(isinstance(module, DropPath) for module in model.modules())
    for stage in ("reconstruct", "self"):
        student = Student(model, STAGE_KINDS[stage]).train()
        assert student.training
        assert not any(module.training for module in model.modules())
    for stage in ("distil", "classify", "joint"):
        student = Student(model, STAGE_KINDS[stage]).train()
        assert all(module.training for module in student.modules())
        assert not any(module.training for module in student.eval().modules())


def test_a_student_frees_what_another_stage_froze():
    model = make_sparse()
    for stage, scorer, backbone in (
        ("reconstruct", True, False),
        ("distil", False, True),
        ("joint", True, True),
    ):
        Student(model, STAGE_KINDS[stage])
        assert {p.requires_grad for p in learned(model, scorer=True).values()} == {scorer}
        assert {p.requires_grad for p in learned(model, scorer=False).values()} == {backbone}


@pytest.mark.parametrize(
    "name", ["deit distilled", "dinov2 registers", "internvit dynamic", "average pooling"]
)
def test_the_teacher_is_the_dense_twin(name):
    size = 56 if name in {"dinov2 registers", "internvit dynamic"} else 64
    model = make_sparse(name, "fast", size, {"drop_path_rate": 0.5}, keep=0.2)
    twin = sparsifiner.desparsify(copy.deepcopy(model))
    images = make_images(size)
    state = copy.deepcopy(model.state_dict())
    teacher = Teacher(model.train())
    taught = teacher(images, projections=True)
    assert model.training
    with torch.no_grad():
        assert torch.equal(taught.logits, twin(images))
        assert torch.equal(taught.tokens, twin.forward_features(images)[:, twin.num_prefix_tokens :])
    assert len(taught.projections) == 2
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert all(torch.equal(weight, state[key]) for key, weight in model.state_dict().items())
    assert all(isinstance(block.attn, SparseAttention) for block in model.blocks)
    assert not any(isinstance(module, SparseAttention) for module in teacher.model.modules())
    if name == "internvit dynamic":  # the copy took only its own hook away
        assert model.eval()(make_images(70)).shape == teacher.model(make_images(70)).shape == (2, 7)
    shift(model)
    again = teacher(images, projections=False)
    assert torch.equal(again.logits, taught.logits)
    assert len(again.projections) == 0


def test_projections_are_the_queries_and_keys_of_the_dense_twin():
    model = make_sparse().double()
    images = make_images(SIZE).double()
    taught = Teacher(model)(images, projections=True)
    for (q, k), (wanted_q, wanted_k) in zip(taught.projections, Transcription(model, images).qk, strict=True):
        assert not q.requires_grad
        assert (q - wanted_q).abs().max() < 1e-12
        assert (k - wanted_k).abs().max() < 1e-12


def test_stages_that_look_at_the_twin_need_a_teacher():
    needing = {name for name, kind in STAGE_KINDS.items() if needs_teacher(kind)}
    assert needing == {"reconstruct", "distil", "joint"}


def test_distil_trains_every_backbone_parameter_of_the_fast_preset():
    model = make_sparse(preset="fast", size=128, tile=4, summary=2, keep=0.2)
    teacher = Teacher(model)
    shift(model)
    train_step(model, STAGE_KINDS["distil"], make_images(128), make_targets(), teacher)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 1e-6, name


class TestChoice:
    """Which stages run on which model."""

    def choose(self, model, *names, teacher=None):
        recipe = Recipe(stages=[Stage(name, 1) for name in names])
        return [(index, stage.name) for index, stage in choose_stages(model, recipe, teacher)]

    def test_a_learned_scorer_skips_nothing(self):
        model = make_sparse()
        assert all(why_skipped(model, kind) is None for kind in STAGE_KINDS.values())
        assert self.choose(model, "reconstruct", "distil") == [(0, "reconstruct"), (1, "distil")]

    def test_a_scorer_without_parameters_skips_its_stages_and_says_so(self, caplog):
        model = make_sparse(preset="fast")
        for stage, reason in {
            "reconstruct": "no parameters",
            "self": "no parameters",
            "distil": None,
        }.items():
            found = why_skipped(model, STAGE_KINDS[stage])
            assert reason in found if reason else found is None
        with caplog.at_level(logging.WARNING, logger="sparsifiner"):
            assert self.choose(model, "reconstruct", "distil") == [(1, "distil")]
        assert caplog.text.count("stage reconstruct is skipped: the scorer has no parameters") == 1
        assert len(caplog.records) == 1

    def test_joint_needs_a_scorer_that_learns(self):
        with pytest.raises(ValueError, match=r"stages: joint trains the scorer too, but .*; use distil"):
            self.choose(make_sparse(preset="fast"), "joint")

    def test_something_must_be_left(self):
        with pytest.raises(ValueError, match="stages: nothing is left to train"):
            self.choose(make_sparse(preset="fast"), "reconstruct", "self")

    def test_reconstruct_needs_the_teachers_weights(self):
        model = make_sparse()
        twin = sparsifiner.desparsify(copy.deepcopy(model))
        assert self.choose(model, "reconstruct", teacher=twin) == [(0, "reconstruct")]
        shift(twin)
        with pytest.raises(ValueError, match="stages: reconstruct needs a student that starts from"):
            self.choose(model, "reconstruct", teacher=twin)
        assert self.choose(model, "distil", "self", teacher=twin) == [(0, "distil"), (1, "self")]

    def test_same_backbone_looks_past_scorers(self):
        model = make_sparse()
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.blocks[0].attn.scorer.up.add_(1)
        assert same_backbone(model, other)
        assert same_backbone(model, sparsifiner.desparsify(copy.deepcopy(model)))
        assert same_backbone(model, sparsifiner.sparsify(copy.deepcopy(model), preset="fast"))
        with torch.no_grad():
            other.blocks[1].attn.proj.bias[0] += 1
        assert not same_backbone(model, other)
        assert not same_backbone(model, make_model("deit", img_size=64))
        assert not same_backbone(model, make_model("deit", img_size=SIZE, depth=1))


def test_tokens_of_average_pooling_models_are_those_behind_their_final_norm():
    model = make_model("deit", global_pool="avg")
    images = make_images(224)
    taught = Teacher(model)(images, projections=False)
    with torch.no_grad():
        features = model.forward_features(images)[:, model.num_prefix_tokens :]
        assert torch.equal(taught.tokens, model.fc_norm(features))
        assert not torch.allclose(taught.tokens, features)
        assert torch.equal(taught.logits, model(images))
