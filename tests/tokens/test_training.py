"""Training and evaluation of models that drop tokens: what learns, from what, and what is compared."""

import copy

import pytest
import torch
from torch.optim import AdamW

import sparsifiner
from sparsifiner import DynamicViT, EViT, ToMe
from sparsifiner.hosts import host_of
from sparsifiner.measure.accuracy import evaluate
from sparsifiner.models.adapter import is_predictor, is_scorer
from sparsifiner.models.features import token_states
from sparsifiner.tokens.dynamicvit.reducer import ratio_loss
from sparsifiner.training import LossWeights
from sparsifiner.training.losses import classification_loss, distillation_loss
from sparsifiner.training.recipe import STAGE_KINDS
from sparsifiner.training.stages import Student, Teacher, compute_losses, same_backbone, total_loss
from tests.models import make_images, make_model

pytestmark = pytest.mark.filterwarnings("ignore:the (low-rank scorer|token predictor) is untrained")

SIZE = (80, 112)  # 5 x 7 patches of 16
METHODS = {
    "evit": EViT(0.7),
    "evit unfused": EViT(0.5, fuse=False),
    "dynamicvit": DynamicViT(0.7),
    "dynamicvit after": DynamicViT(0.7, "after attention"),
    "tome": ToMe(4),
}
ATTENTIONS = {
    "dense": {"keep": 1.0},
    "tiles": {"scorer": "pooled", "keep": 0.2, "tile": 4, "summary": 2},
    "paper": {"preset": "paper", "keep": 0.25},
}
DISTIL = STAGE_KINDS["distil"]


def make_sparse(tokens, attention="dense", name="deit"):
    model = sparsifiner.sparsify(
        make_model(name, depth=4, img_size=SIZE), tokens=tokens, **ATTENTIONS[attention]
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if is_predictor(parameter_name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_targets(batch=2):
    return torch.randn(batch, 7).softmax(1)


def outputs_and_losses(model, images, targets, teacher=None):
    taught = (teacher or Teacher(model))(images, projections=False)
    outputs = Student(model, DISTIL).train()(images)
    return outputs, compute_losses(DISTIL, outputs, taught, targets), taught


def shift(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_of_distil_moves_backbone_and_predictor(method, attention):
    model = make_sparse(method, attention)
    teacher = Teacher(model)
    shift(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, losses, _ = outputs_and_losses(model, make_images(SIZE), make_targets(), teacher)
    expected = {"classify", "distil", "token"} | ({"ratio"} if isinstance(method, DynamicViT) else set())
    assert losses.keys() == expected
    assert all(loss.item() > 0 for loss in losses.values())
    loss = total_loss(losses, LossWeights())
    weights = {"classify": 1.0, "distil": 0.5, "token": 0.5, "ratio": 2.0}
    assert loss.item() == pytest.approx(sum(weights[name] * each.item() for name, each in losses.items()))
    loss.backward()
    for name, parameter in model.named_parameters():
        if is_scorer(name):
            assert parameter.grad is None
        else:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name
    AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == is_scorer(name), name
    assert bool(sum(is_predictor(name) for name in before)) == isinstance(method, DynamicViT)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_token_loss_compares_the_same_patches(method):
    model = make_sparse(method)
    teacher, images = Teacher(model), make_images(SIZE)
    shift(model)
    with token_states(model) as states:
        outputs, losses, taught = outputs_and_losses(model, images, make_targets(), teacher)
    wanted = teacher.model.forward_features(images)[:, 1:]
    assert torch.equal(taught.tokens, wanted)
    state, errors = states[-1], []
    if isinstance(method, DynamicViT):  # which masks in training
        assert "positions" not in outputs
        assert outputs["tokens"].shape == wanted.shape
        for image in range(2):
            errors += [
                (outputs["tokens"][image, patch] - wanted[image, patch]).square().mean()
                for patch in range(35)
                if state.policy[image, 1 + patch]
            ]
        assert len(errors) == outputs["policy"].sum() < 2 * 35
    else:
        assert "policy" not in outputs
        assert torch.equal(outputs["positions"], state.positions)
        assert outputs["tokens"].shape == (2, state.positions.shape[1], 48)
        for image in range(2):
            for place, patch in enumerate(state.positions[image].tolist()):
                errors.append((outputs["tokens"][image, place] - wanted[image, patch]).square().mean())
    assert losses["token"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


@torch.no_grad()
def test_tokens_of_a_student_that_changes_none_are_exactly_the_teachers():
    model = make_sparse(EViT(0.5, fuse=False, at=[3]))  # drops behind the last attention
    images = make_images(SIZE)
    outputs, losses, taught = outputs_and_losses(model, images, make_targets())
    assert outputs["tokens"].shape == (2, 18, 48)
    assert losses["token"] < 1e-12
    # and those that are left out are others
    assert (outputs["tokens"] - taught.tokens[:, :18]).abs().max() > 0.1
    # the fused token is no patch
    model = make_sparse(EViT(0.5, at=[3]))
    outputs, losses, _ = outputs_and_losses(model, images, make_targets())
    assert outputs["tokens"].shape == (2, 18, 48)
    assert losses["token"] < 1e-12


@pytest.mark.parametrize("placement", ["before attention", "after attention"])
def test_the_ratio_loss_holds_the_shares_of_all_stages(placement):
    model = make_sparse(DynamicViT(0.7, placement))
    with token_states(model) as states:
        outputs, losses, _ = outputs_and_losses(model, make_images(SIZE, batch=3), make_targets(3))
    misses = []
    for block, share in ((1, 0.7), (2, 0.49), (3, 0.343)):
        kept = states[block].policy[:, 1:].sum(1) / 35
        misses += [(each - share) ** 2 for each in kept.tolist()]
    assert len(misses) == 9
    assert losses["ratio"].item() == pytest.approx(sum(misses) / 9, rel=1e-5)
    assert torch.equal(losses["ratio"], ratio_loss(model.blocks, states))
    assert torch.equal(outputs["policy"], states[-1].policy[:, 1:])
    (gradient,) = torch.autograd.grad(losses["ratio"], model.blocks[3].reducer.out_conv[-1].bias)
    # who keeps too many is pushed to keep fewer, by the way in which the mean of the misses points
    excess = torch.stack([state.policy[:, 1:].mean(1) for state in states[3:]]).mean() - 0.343
    assert gradient[0] * excess > 0
    assert gradient[0] == pytest.approx(-gradient[1].item())


def test_ratio_loss_teaches_the_share():
    model = make_sparse(DynamicViT(0.5, at=[1]))
    predictor = [parameter for name, parameter in model.named_parameters() if is_predictor(name)]
    optimizer, images, student = (
        AdamW(predictor, lr=3e-3),
        make_images(SIZE, batch=8),
        Student(model, DISTIL).train(),
    )
    with torch.no_grad():
        model.blocks[1].reducer.out_conv[-1].bias.copy_(torch.tensor([2.0, -2.0]))
    shares = []
    for _ in range(25):
        outputs = student(images)
        shares.append(outputs["policy"].mean().item())
        optimizer.zero_grad()
        outputs["ratio"].backward()
        optimizer.step()
    assert shares[0] > 0.9
    assert sum(shares[-5:]) / 5 == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 0.3, "tile": 1, "scorer": "pooled", "profile": "even"}],
    ids=["all keys", "lists of the keys that stay"],
)
@pytest.mark.parametrize("name", ["deit", "average pooling", "lv-vit"])
def test_what_masking_trains_is_what_gathering_computes(name, options):
    """With the patches that inference keeps as the policy, training gives the same logits."""
    model, images = make_sparse(DynamicViT(0.6), name=name), make_images(SIZE)
    model.eval()
    if options:
        sparsifiner.sparsify(model, summary=None, backend="torch", **options)
    with token_states(model) as states:
        expected = model(images)
    for block, state in zip(model.blocks, states, strict=True):
        if block.reducer is not None:
            drawn = torch.zeros(2, 35).scatter_(1, state.positions, 1.0)
            logits = torch.stack([drawn, 1 - drawn], -1) * 1e4  # so that chance has no say
            block.reducer.logits = lambda patches, policy, logits=logits: logits
    student = Student(model, STAGE_KINDS["classify"]).train()
    for module in model.modules():  # whose statistics change
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    outputs = student(images)
    assert outputs["policy"].sum(1).tolist() == [8.0, 8.0]
    assert (outputs["logits"] - expected).abs().max() < 1e-5


def test_heads_that_would_see_masked_patches_are_refused():
    for name, options in (("map pooling, registers", {}), ("average pooling", {"global_pool": "max"})):
        model = sparsifiner.sparsify(make_model(name, **options), keep=1.0, tokens=DynamicViT(0.6))
        with pytest.raises(ValueError, match=r"stages: DynamicViT masks tokens.*use EViT or ToMe"):
            Student(model, DISTIL)


@pytest.mark.parametrize("stage", ["joint", "self"])
def test_stages_that_compare_the_attention_of_all_tokens_are_refused(stage):
    for method in METHODS.values():
        with pytest.raises(
            ValueError, match=r"stages: joint and self compare attention of all tokens.*use distil"
        ):
            Student(make_sparse(method, "paper"), STAGE_KINDS[stage])
    assert Student(make_sparse(None, "paper"), STAGE_KINDS[stage]).kind is STAGE_KINDS[stage]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_reconstruct_teaches_the_scorers_on_all_tokens(method):
    """The twin does the forward, so that it is the same as without token sparsity."""
    losses = []
    for tokens in (method, None):
        torch.manual_seed(0)
        model = sparsifiner.sparsify(
            make_model("deit", depth=4, img_size=SIZE), preset="paper", tokens=tokens
        )
        torch.manual_seed(1)
        for layer in model.blocks:
            layer.attn.scorer.reset_parameters()
        images = make_images(SIZE)
        taught = Teacher(model)(images, projections=True)
        student = Student(model, STAGE_KINDS["reconstruct"]).train()
        losses.append(student(images, taught.projections)["reconstruct"])
        losses[-1].backward()
        learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert learned == {name for name, _ in model.named_parameters() if is_scorer(name)}
    assert losses[0].item() == losses[1].item()


def test_a_predictor_is_no_part_of_the_backbone_that_a_teacher_shares():
    model = make_sparse(DynamicViT(0.5), "paper")
    twin = sparsifiner.desparsify(copy.deepcopy(model))
    assert same_backbone(model, twin)
    shift(twin)
    assert not same_backbone(model, twin)


@pytest.mark.parametrize("name", ["deit", "lv-vit"])
def test_the_other_losses_are_those_of_any_student(name):
    model = make_sparse(EViT(0.5), name=name)
    teacher, images, targets = Teacher(model), make_images(SIZE), make_targets()
    shift(model)
    outputs, losses, taught = outputs_and_losses(model.eval(), images, targets, teacher)
    assert losses["classify"] == classification_loss(outputs["logits"], targets)
    assert losses["distil"] == distillation_loss(outputs["logits"], taught.logits)
    with torch.no_grad():
        assert torch.equal(taught.logits, teacher.model(images))
        # the student trains on what it computes in evaluation, batch norm of the stem apart
        if name == "deit":
            assert (model.eval()(images) - outputs["logits"]).abs().max() < 1e-6


@pytest.fixture
def batches():
    images = make_images(SIZE, batch=5)
    return [(images[:3], torch.tensor([0, 1, 2])), (images[3:], torch.tensor([3, 4]))]


@pytest.mark.parametrize("name", ["deit", "deit distilled", "average pooling"])
def test_tokens_are_compared_with_those_of_the_twin(batches, name):
    dense = make_model(name, depth=4, img_size=SIZE)
    # of 35 patches .99 are all, which nothing but the layout says
    nothing = DynamicViT(0.99, at=[3]) if name == "average pooling" else EViT(0.99, at=[3])
    drops = DynamicViT(0.5) if name == "average pooling" else EViT(0.5)
    model = sparsifiner.sparsify(make_model(name, depth=4, img_size=SIZE), keep=1.0, tokens=nothing)
    missing = model.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert all(is_predictor(key) for key in missing)
    same = evaluate(model, batches, dense=dense, progress=False).against_dense
    assert same.token_cosine == pytest.approx(1)
    assert same.token_error < 1e-5
    assert same.agreement == 100
    sparsifiner.sparsify(model, tokens=drops)
    other = evaluate(model, batches, dense=dense, progress=False).against_dense
    cosines = []
    with torch.no_grad(), token_states(model) as states:
        for images, _ in batches:
            features, twin = model.forward_features(images), dense.forward_features(images)
            tokens, wanted = (
                host_of(model).patch_tokens(features, states[-1]),
                host_of(dense).patch_tokens(twin),
            )
            for image, positions in enumerate(states[-1].positions.tolist()):
                for place, patch in enumerate(positions):
                    cosines.append(torch.cosine_similarity(tokens[image, place], wanted[image, patch], dim=0))
    assert len(cosines) == 5 * 5
    assert 0 < other.token_cosine < 0.9999
    assert other.token_cosine == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-5)
    assert other.token_error > 1e-3
    assert not any(block._forward_hooks for block in model.blocks)
