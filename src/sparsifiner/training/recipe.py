"""What a training run does: stages, optimisation, augmentation; validated once, never changed."""

from dataclasses import dataclass, field
from typing import Any, Literal

StageName = Literal["reconstruct", "distil", "self", "classify", "joint"]


@dataclass(frozen=True)
class StageKind:
    """What a stage trains, on which losses, and the paper's learning rates.

    Attributes:
        trains: "scorer", "backbone" or "everything".
        losses: names of fields of `LossWeights`.
        lr: learning rate after the warm-up.
        min_lr: learning rate at the end.
    """

    trains: Literal["scorer", "backbone", "everything"]
    losses: tuple[str, ...]
    lr: float
    min_lr: float


STAGE_KINDS: dict[str, StageKind] = {
    "reconstruct": StageKind("scorer", ("reconstruct",), 3e-4, 2e-4),
    "distil": StageKind("backbone", ("classify", "distil", "token"), 8e-5, 2e-6),
    "self": StageKind("scorer", ("self_reconstruct",), 3e-4, 2e-4),
    "classify": StageKind("backbone", ("classify",), 8e-5, 2e-6),
    "joint": StageKind("everything", ("classify", "distil", "token", "reconstruct"), 8e-5, 2e-6),
}


@dataclass(frozen=True)
class Stage:
    """One stage of training, with an optimizer of its own.

    Attributes:
        name: "reconstruct" (the scorer learns the dense twin's attention), "distil" (the backbone learns
            to attend sparsely, from labels and the twin), "self" (the scorer learns the student's own
            attention), "classify" (the backbone learns from labels alone) or "joint" (everything learns).
        epochs: passes over the training images.
        warmup_epochs: of these, with linearly rising learning rate; fractions are allowed.
        lr: learning rate after the warm-up, the paper's by default.
        min_lr: learning rate at the end of the cosine, the paper's by default.
    """

    name: StageName
    epochs: int
    warmup_epochs: float = 0.0
    lr: float | None = None
    min_lr: float | None = None

    def __post_init__(self) -> None:
        """Fills in the paper's learning rates and rejects impossible values."""
        if self.name not in STAGE_KINDS:
            raise ValueError(f"stages: name={self.name!r} is unknown; choose one of {tuple(STAGE_KINDS)}")
        kind = STAGE_KINDS[self.name]
        if self.lr is None:
            object.__setattr__(self, "lr", kind.lr)
        if self.min_lr is None:
            object.__setattr__(self, "min_lr", min(kind.min_lr, self.peak_lr))
        if self.epochs < 1:
            raise ValueError(f"stages: {self.name} has epochs={self.epochs}; leave the stage out, or give 1")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"stages: {self.name} has warmup_epochs={self.warmup_epochs} of {self.epochs} epochs; "
                "the warm-up must end before the stage does"
            )
        if not 0 <= self.last_lr <= self.peak_lr:
            raise ValueError(
                f"stages: {self.name} has lr={self.lr} and min_lr={self.min_lr}; 0 <= min_lr <= lr is needed"
            )

    @property
    def kind(self) -> StageKind:
        """What the stage trains, and on what."""
        return STAGE_KINDS[self.name]

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        assert self.lr is not None
        return self.lr

    @property
    def last_lr(self) -> float:
        """Learning rate at the end."""
        assert self.min_lr is not None
        return self.min_lr


def _paper_stages() -> list[Stage]:
    return [Stage("reconstruct", 5, warmup_epochs=3), Stage("distil", 45, warmup_epochs=3)]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses. None depends on the batch size.

    Attributes:
        classify: cross entropy with soft targets.
        distil: KL(teacher ‖ student) of the logits.
        token: mean squared error of the final patch tokens.
        reconstruct: squared error per image between scores and the teacher's attention, averaged over
            layers: .01 on the sum over the released batch of 168 images.
        self_reconstruct: the same against the student's own attention: .002 on that sum.
        ratio: mean squared difference between the share of patches that a predictor keeps and the one that
            is wanted, where the model has a predictor (DynamicViT).

    Source:
        Wei et al., "Sparsifiner", CVPR 2023, and its released code.
    """

    classify: float = 1.0
    distil: float = 0.5
    token: float = 0.5
    reconstruct: float = 0.01 * 168
    self_reconstruct: float = 0.002 * 168
    ratio: float = 2.0

    def __post_init__(self) -> None:
        """Rejects negative weights."""
        for name, weight in vars(self).items():
            if not weight >= 0:
                raise ValueError(f"loss_weights: {name} must be at least 0, got {weight}")


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's, but for the batch, which was 8 x 168.

    Attributes:
        stages: what is trained, in this order.
        batch_size: images per optimizer step, over all processes.
        accumulate: parts that a process computes its share of a batch in, one after another.
        weight_decay: of AdamW; biases, norms, class tokens and position embeddings have none.
        clip_grad: largest norm of the gradient, None for no clipping.
        warmup_lr: learning rate at the first step of a warm-up.
        ema_decay: decay of the moving average of the weights, which is evaluated too; None for none.
        ema_warmup: let the decay rise from 0, for short runs.
        amp: autocast precision, "none" or "bf16".
        loss_weights: weights of the losses.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        mixup_prob: share of batches that are mixed.
        mixup_switch: share of the mixed batches that take cutmix where both are on.
        label_smoothing: label smoothing.
        auto_augment: timm's name of a policy, None for none.
        color_jitter: strength of colour jitter; a policy takes its place.
        erasing: share of images with a random part erased.
        crop_scale: smallest and largest share of the image area that a random crop takes.
        hflip: share of images that are mirrored.
        interpolation: resizing filter, the model's own by default.
        mean: channel means for normalisation, the model's own by default.
        std: channel standard deviations, the model's own by default.
        crop_pct: share of the side that the crop for validation keeps, the model's own by default.
        seed: seed of everything that is random.
        workers: processes that read images, 0 for none. The result does not depend on it.
        log_every: steps between two log lines.
        checkpoint_every: steps between two checkpoints, besides the one after every epoch.

    Raises:
        ValueError: a value is impossible or contradicts another.
    """

    stages: list[Stage] = field(default_factory=_paper_stages)
    batch_size: int = 256
    accumulate: int = 1
    weight_decay: float = 0.05
    clip_grad: float | None = None
    warmup_lr: float = 1e-6
    ema_decay: float | None = 0.9999
    ema_warmup: bool = False
    amp: Literal["none", "bf16"] = "none"
    loss_weights: LossWeights = field(default_factory=LossWeights)
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch: float = 0.5
    label_smoothing: float = 0.1
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    erasing: float = 0.25
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None
    seed: int = 0
    workers: int = 2
    log_every: int = 50
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        """Rejects impossible values by name."""
        if not self.stages:
            raise ValueError("stages is empty; give at least one, such as '[{name: distil, epochs: 1}]'")
        for name, least in (
            ("batch_size", 2),
            ("accumulate", 1),
            ("log_every", 1),
            ("workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")
        for name in ("weight_decay", "warmup_lr", "mixup", "cutmix", "color_jitter"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("mixup_prob", "mixup_switch", "label_smoothing", "erasing", "hflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be positive, got {self.clip_grad}; None clips nothing")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in (0, 1), got {self.ema_decay}; None keeps no average")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be 0 < smallest <= largest <= 1, got {self.crop_scale}")
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        self._check_order()

    def _check_order(self) -> None:
        moved = None
        for stage in self.stages:
            if stage.name == "reconstruct" and moved is not None:
                raise ValueError(
                    f"stages: reconstruct learns the dense twin's attention, but {moved} before it moves the "
                    "backbone away from it; put reconstruct first, or use self"
                )
            if stage.kind.trains != "scorer":
                moved = stage.name


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, as YAML and the command line write it."""
    settings = dict(vars(recipe))
    settings["stages"] = [dict(vars(stage)) for stage in recipe.stages]
    settings["loss_weights"] = dict(vars(recipe.loss_weights))
    settings["crop_scale"] = list(recipe.crop_scale)
    return settings
