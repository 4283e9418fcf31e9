"""The student in one stage, what of it learns, and its teacher."""

import copy
import hashlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsifiner.blocks import TokenBlocks
from sparsifiner.convert import desparsify, sparse_layers
from sparsifiner.hosts import host_of
from sparsifiner.models.adapter import is_predictor, is_scorer
from sparsifiner.models.features import token_states
from sparsifiner.ops.precision import without_autocast
from sparsifiner.scorers import BorrowingScorer
from sparsifiner.tokens.dynamicvit.reducer import ratio_loss
from sparsifiner.tokens.state import take_tokens
from sparsifiner.tracing import trace_projections
from sparsifiner.training.losses import (
    classification_loss,
    distillation_loss,
    reconstruction_loss,
    token_loss,
)
from sparsifiner.training.recipe import STAGE_KINDS, LossWeights, StageKind

Projections = Sequence[tuple[Tensor, Tensor]]


class TeacherOutput(NamedTuple):
    """What a student learns from.

    Attributes:
        tokens: [B, patches, C], the patch tokens behind the final norm.
        logits: [B, classes].
        projections: queries and keys of every layer, each [B, H, N, d]; empty if not asked for.
    """

    tokens: Tensor
    logits: Tensor
    projections: Projections


class Teacher:
    """The frozen dense twin.

    Args:
        model: the student before training, or a dense model with weights of its own; it is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = desparsify(copy.deepcopy(model)).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, *, projections: bool) -> TeacherOutput:
        """Looks at images [B, 3, H, W]; `projections` asks for queries and keys too."""
        if not projections:
            seen = _forward(self.model, images)
            return TeacherOutput(seen["tokens"], seen["logits"], [])
        with trace_projections(self.model) as recorded:
            seen = _forward(self.model, images)
        return TeacherOutput(seen["tokens"], seen["logits"], recorded)


class Student(nn.Module):
    """The model in one stage: what data parallelism wraps, so that every parameter that learns is used.

    Args:
        model: the model; what the stage does not train is frozen.
        kind: the stage.
        frozen: names of parameters that never train.
    """

    def __init__(self, model: nn.Module, kind: StageKind, frozen: Collection[str] = ()) -> None:
        super().__init__()
        if {"joint", "self"} & {name for name, stage in STAGE_KINDS.items() if stage is kind} and any(
            isinstance(module, TokenBlocks) for module in model.modules()
        ):
            raise ValueError(
                "stages: joint and self compare attention of all tokens, but tokens drops some; use distil, "
                "after reconstruct where the scorer learns"
            )
        predicts = any(is_predictor(name) for name, _ in model.named_parameters())
        reason = host_of(model).why_not_masked() if predicts and kind.trains != "scorer" else ""
        if reason:
            raise ValueError(
                f"stages: DynamicViT masks tokens while it trains, and of this model {reason}; use EViT or "
                "ToMe, or a model that pools by token or avg"
            )
        self.model = model
        self.kind = kind
        for name, parameter in model.named_parameters():
            learns = kind.trains == "everything" or is_scorer(name) == (kind.trains == "scorer")
            parameter.requires_grad_(learns and name not in frozen)

    def train(self, mode: bool = True) -> "Student":
        """Frozen backbones compute as in evaluation, without stochastic depth."""
        self.training = mode
        self.model.train(mode and self.kind.trains != "scorer")
        return self

    def forward(self, images: Tensor, teacher: Projections = ()) -> dict[str, Tensor]:
        """What the stage's losses need.

        Args:
            images: [B, 3, H, W].
            teacher: queries and keys of the teacher's layers, where the stage reconstructs them.

        Returns:
            "reconstruct" or "self_reconstruct", scalar, where the scorer learns; "logits" and "tokens"
            where the backbone does; "positions" [B, n] of the tokens where some are gone; "policy" [B, n] and
            "ratio" where a predictor learns which should be.
        """
        losses = self.kind.losses
        if self.kind.trains == "scorer" and "reconstruct" in losses:  # the twin did the forward
            return {"reconstruct": self._reconstruct(images, teacher, teacher)}
        if not {"reconstruct", "self_reconstruct"}.intersection(losses):
            return _forward(self.model, images)
        with trace_projections(self.model) as own:
            outputs = _forward(self.model, images)
        if "reconstruct" in losses:
            outputs["reconstruct"] = self._reconstruct(images, own, teacher)
        if "self_reconstruct" in losses:
            outputs["self_reconstruct"] = self._reconstruct(images, own, own)
        return outputs

    def _reconstruct(self, images: Tensor, scored: Projections, target: Projections) -> Tensor:
        """Loss of the scorers that see `scored` against the attention of `target`, mean over layers."""
        height, width = images.shape[-2:]
        layout = host_of(self.model).layout_for((height, width))
        errors = []
        for layer, seen, wanted in zip(sparse_layers(self.model), scored, target, strict=True):
            if isinstance(layer.scorer, BorrowingScorer):
                continue
            tile = layer.config.tile
            with without_autocast(wanted[0].device):
                coefficients, basis = layer.scorer.factors(*seen, layout, tile)
                error = reconstruction_loss(
                    coefficients, basis, *wanted, layout=layout, tile=tile, scale=layer.scale
                )
            errors.append(error)
        return torch.stack(errors).mean()


def compute_losses(
    kind: StageKind, outputs: dict[str, Tensor], teacher: TeacherOutput | None, targets: Tensor
) -> dict[str, Tensor]:
    """The stage's losses, unweighted.

    Args:
        kind: the stage.
        outputs: of `Student.forward`.
        teacher: of the same images, None where the stage does not need it.
        targets: soft labels [B, classes].
    """
    losses = {}
    for name in kind.losses:
        if name == "classify":
            losses[name] = classification_loss(outputs["logits"], targets)
        elif name == "distil":
            assert teacher is not None
            losses[name] = distillation_loss(outputs["logits"], teacher.logits.to(outputs["logits"].dtype))
        elif name == "token":
            assert teacher is not None
            wanted = teacher.tokens.to(outputs["tokens"].dtype)
            if "positions" in outputs:
                wanted = take_tokens(wanted, outputs["positions"])
            losses[name] = token_loss(outputs["tokens"], wanted, outputs.get("policy"))
        else:
            losses[name] = outputs[name]
    if "ratio" in outputs:
        losses["ratio"] = outputs["ratio"]
    return losses


def total_loss(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Weighted sum."""
    return torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()


def needs_teacher(kind: StageKind) -> bool:
    """Whether the stage looks at the dense twin."""
    return any(name in kind.losses for name in ("distil", "token", "reconstruct"))


def why_skipped(model: nn.Module, kind: StageKind) -> str | None:
    """Why a stage has nothing to train on this model, None if it has."""
    scorer_learns = any(is_scorer(name) for name, _ in model.named_parameters())
    if kind.trains != "backbone" and not scorer_learns:
        return "the scorer has no parameters"
    return None


def weights_digest(model: nn.Module) -> str:
    """Names the weights of a model: equal for equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_backbone(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights, what chooses keys or tokens aside."""
    weights, others = (
        {
            name: weight
            for name, weight in each.state_dict().items()
            if not (is_scorer(name) or is_predictor(name))
        }
        for each in (model, other)
    )
    return weights.keys() == others.keys() and all(
        torch.equal(weight.cpu(), others[name].cpu()) for name, weight in weights.items()
    )


def _forward(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Patch tokens behind the final norm [B, patches, C], logits [B, classes], and what tells of others."""
    host = host_of(model)
    with token_states(model) as states:
        features = host.features(images)
    state = states[-1] if states else None
    seen = features if state is None or state.policy is None else host.masked(features, state.policy)
    outputs = {"tokens": host.patch_tokens(features, state), "logits": host.logits(seen)}
    if state is not None and state.positions is not None:
        outputs["positions"] = state.positions
    if state is not None and state.policy is not None:
        outputs["policy"] = state.policy[:, state.prefix :]
        outputs["ratio"] = ratio_loss(host.blocks, states)
    return outputs
