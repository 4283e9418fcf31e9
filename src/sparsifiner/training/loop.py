"""The training loop: stages -> epochs -> steps, on one process or many."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from sparsifiner.data import ImageSet
from sparsifiner.models.adapter import scorer_weights
from sparsifiner.training.checkpoints import Position
from sparsifiner.training.data import (
    DROP,
    MIX,
    BatchSampler,
    Mixer,
    Share,
    derive_seed,
    seed_generators,
    training_loader,
    training_transform,
)
from sparsifiner.training.processes import (
    begin_together,
    check_launch,
    name_weights_alike,
    share_weights,
)
from sparsifiner.training.progress import Progress, describe_subject
from sparsifiner.training.recipe import Recipe, Stage, recipe_settings
from sparsifiner.training.report import write_training_report
from sparsifiner.training.run import RunFolder
from sparsifiner.training.stages import (
    Student,
    Teacher,
    compute_losses,
    needs_teacher,
    same_backbone,
    total_loss,
    weights_digest,
    why_skipped,
)
from sparsifiner.training.validation import Validation

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a run left.

    Attributes:
        output: its folder.
        records: its measurements, as in metrics.jsonl.
    """

    output: Path
    records: list[dict[str, Any]]


def train(
    model: nn.Module,
    images: ImageSet,
    validation: ImageSet,
    recipe: Recipe,
    output: str | Path,
    *,
    teacher: nn.Module | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Trains a model, sparse or dense, and leaves everything about it in a folder.

    The folder gets config.yaml, metrics.jsonl, a TensorBoard log, report.html, `best.safetensors` (the
    highest validation top-1, of the weights or of their average), `last.safetensors`,
    `last_ema.safetensors`, `adapter.safetensors` (the scorer alone) and the newest two checkpoints, and is
    locked meanwhile. Under `accelerate launch` or `torchrun` all processes share the work; the result is
    that of one process up to rounding. Seeds Python's, NumPy's and torch's generators.

    Args:
        model: as `sparsify` left it, or dense; it is trained in place.
        images: to train on.
        validation: to validate on after every epoch.
        recipe: how.
        output: the run's folder.
        teacher: model whose dense twin teaches; by default the model as it is given.
        settings: more settings to keep and to compare when the run resumes, besides the recipe, the model's
            class, shapes and sparsity, and the images.
        device: "auto" takes a GPU if there is one, "cpu" none.
        resume: continue the run in `output` at its newest intact checkpoint, bit for bit.
        progress: show progress bars on a terminal.

    Returns:
        Folder and measurements.

    Raises:
        BlockingIOError: another process trains in `output`.
        FileExistsError: `output` holds a run and `resume` is False.
        FloatingPointError: a loss is no number any more.
        ValueError: recipe, images, model and number of processes do not fit, or the run in `output` has
            other settings, no intact checkpoint, or was begun with another model, other images or another
            seed.
    """
    AcceleratorState._reset_state()  # a run before this one may have had another precision
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if recipe.amp == "none" else recipe.amp,
        gradient_accumulation_steps=recipe.accumulate,
    )
    check_launch(accelerator, recipe)
    share = Share(accelerator.process_index, accelerator.num_processes, recipe.accumulate)
    share.check(recipe.batch_size)
    if len(images) < recipe.batch_size:
        raise ValueError(
            f"batch_size={recipe.batch_size} exceeds the {len(images)} training images; lower batch_size"
        )
    for learner_or_teacher in (model, teacher):
        if learner_or_teacher is not None:
            images.check_classes(learner_or_teacher)
    stages = choose_stages(model, recipe, teacher)
    settings = {**(settings or {}), **recipe_settings(recipe)}
    subject = describe_subject(model, images, validation)
    with closing(begin_together(accelerator, Path(output), settings, subject, resume=resume)) as run:
        model.to(accelerator.device)
        share_weights(model)
        twin = None
        if any(needs_teacher(stage.kind) for _, stage in stages):
            twin = Teacher(model if teacher is None else teacher)
            twin.model.to(accelerator.device)
            share_weights(twin.model)
        trainer = _Trainer(
            accelerator=accelerator,
            run=run,
            recipe=recipe,
            share=share,
            model=model,
            teacher=twin,
            images=images,
            validation=Validation(accelerator, model, validation, recipe, share),
            mixer=Mixer(recipe, images.num_classes),
            progress=progress and accelerator.is_main_process,
            state=Progress(subject=subject),
        )
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        try:
            for index, stage in stages:
                trainer.run_stage(index, stage)
        finally:
            model.eval()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)
        return TrainingResult(run.path, run.records())


def choose_stages(
    model: nn.Module, recipe: Recipe, teacher: nn.Module | None = None
) -> list[tuple[int, Stage]]:
    """The stages that have something to train, with their indices; what is skipped is said in the log.

    Raises:
        ValueError: a stage, or all of them, cannot train this model.
    """
    chosen = []
    for index, stage in enumerate(recipe.stages):
        reason = why_skipped(model, stage.kind)
        if reason is None:
            if stage.name == "reconstruct" and teacher is not None and not same_backbone(model, teacher):
                raise ValueError(
                    "stages: reconstruct needs a student that starts from its teacher's weights, and these "
                    "differ; leave the teacher out, or use self"
                )
            chosen.append((index, stage))
        elif stage.kind.trains == "everything":
            raise ValueError(f"stages: joint trains the scorer too, but {reason}; use distil")
        else:
            _logger.warning("sparsifiner: stage %s is skipped: %s", stage.name, reason)
    if not chosen:
        raise ValueError("stages: nothing is left to train; add distil, or choose a scorer that learns")
    return chosen


def make_schedule(
    optimizer: torch.optim.Optimizer, stage: Stage, steps_per_epoch: int, warmup_lr: float
) -> CosineLRScheduler:
    """Learning rate per step: linear from `warmup_lr` to `lr`, then a cosine to `min_lr`."""
    steps = stage.epochs * steps_per_epoch
    warmup = min(round(stage.warmup_epochs * steps_per_epoch), steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=stage.last_lr,
        warmup_t=warmup,
        warmup_lr_init=min(warmup_lr, stage.peak_lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )


@dataclass
class _Trainer:
    """What all stages of a run share."""

    accelerator: Accelerator
    run: RunFolder
    recipe: Recipe
    share: Share
    model: nn.Module
    teacher: Teacher | None
    images: ImageSet
    validation: Validation
    mixer: Mixer
    progress: bool
    state: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        """Notes what never trains, and the teacher."""
        self.frozen = {
            name for name, parameter in self.model.named_parameters() if not parameter.requires_grad
        }
        if self.teacher is not None:
            self.state.teacher = weights_digest(self.teacher.model)
        name_weights_alike(self.accelerator)

    def run_stage(self, index: int, stage: Stage) -> None:
        """Trains one stage: from its beginning, from a checkpoint within it, or not at all if it is done."""
        reached = self.run.position
        if index < reached.stage:
            return
        first_step = reached.step if index == reached.stage else 0
        recipe, accelerator = self.recipe, self.accelerator
        sampler = BatchSampler(
            len(self.images), recipe.batch_size, stage.epochs, self.share, (recipe.seed, index), first_step
        )
        student = Student(self.model, stage.kind, self.frozen)
        optimizer = create_optimizer_v2(
            self.model, "adamw", lr=stage.peak_lr, weight_decay=recipe.weight_decay
        )
        schedule = make_schedule(optimizer, stage, sampler.steps_per_epoch, recipe.warmup_lr)
        # wrapping a student copies the main process's weights to all, so the average starts after it
        student, optimizer = accelerator.prepare(student, optimizer)
        if recipe.ema_decay is not None:
            self.state.ema = ModelEmaV3(self.model, recipe.ema_decay, use_warmup=recipe.ema_warmup)
        if self.run.checkpoint is not None and index == reached.stage:
            self.state.load(self.run.checkpoint)
            accelerator.load_state(str(self.run.checkpoint))
            accelerator.step = 0  # a checkpoint stands between two optimizer steps

        transform = training_transform(self.model, recipe)
        batches = iter(training_loader(self.images, transform, sampler, recipe.workers))
        bar = tqdm(
            range(first_step, sampler.steps),
            desc=stage.name,
            unit="step",
            initial=first_step,
            total=sampler.steps,
            disable=None if self.progress else True,
        )
        student.train()
        speed = _Speed()
        for step in bar:
            schedule.step_update(step)
            self._train_step(stage, student, optimizer, batches, (recipe.seed, index), step)
            speed.count(recipe.batch_size)
            done = step + 1
            at = Position(index, done)
            epoch_ends = done % sampler.steps_per_epoch == 0
            if done % sampler.steps_per_epoch % recipe.log_every == 0:
                epoch = done / sampler.steps_per_epoch
                where = {"stage": stage.name, "stage_index": index, "step": done, "epoch": epoch}
                measured = self._mean_losses()
                measured["lr"] = optimizer.param_groups[0]["lr"]
                measured["images_per_second"] = speed.images_per_second()
                bar.set_postfix({name: f"{value:.3g}" for name, value in measured.items()}, refresh=False)
                self._log({"kind": "train", **where, **measured})
                if epoch_ends:
                    self._validate(where)
                    student.train()
                speed.restart()
            if epoch_ends or (recipe.checkpoint_every and done % recipe.checkpoint_every == 0):
                self._save_checkpoint(at)
                speed.restart()
        self.state.steps_before += sampler.steps
        student, optimizer = accelerator.free_memory(student, optimizer)

    def _train_step(
        self,
        stage: Stage,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[tuple[Tensor, Tensor]],
        seed: tuple[int, int],
        step: int,
    ) -> None:
        """One optimizer step over this process's share of a batch."""
        accelerator, recipe, kind = self.accelerator, self.recipe, stage.kind
        for part in range(recipe.accumulate):
            images, labels = next(batches)
            images = images.to(accelerator.device, non_blocking=True)
            labels = labels.to(accelerator.device, non_blocking=True)
            # every part of a batch is mixed alike, but drops paths of its own
            seed_generators(*seed, MIX, step)
            images, targets = self.mixer(images, labels)
            torch.manual_seed(derive_seed(*seed, DROP, step, self.share.rank, part))
            taught = None
            if self.teacher is not None and needs_teacher(kind):
                with accelerator.autocast():
                    taught = self.teacher(images, projections="reconstruct" in kind.losses)
            with accelerator.accumulate(student):
                outputs = student(images, taught.projections if taught else ())
                losses = compute_losses(kind, outputs, taught, targets)
                losses["loss"] = total_loss(losses, recipe.loss_weights)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients and recipe.clip_grad is not None:
                    accelerator.clip_grad_norm_(student.parameters(), recipe.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            for name, loss in losses.items():
                mean = loss.detach().float() / recipe.accumulate
                self.state.sums[name] = self.state.sums.get(name, 0) + mean
        self.state.summed += 1
        if self.state.ema is not None:
            self.state.ema.update(self.model, step=step + 1 if recipe.ema_warmup else None)

    def _mean_losses(self) -> dict[str, float]:
        """Mean losses since the last log line, over all processes."""
        self._average_sums()
        losses = {name: total.item() / self.state.summed for name, total in self.state.sums.items()}
        self.state.sums, self.state.summed = {}, 0
        return losses

    def _validate(self, where: dict[str, Any]) -> None:
        """Measures the weights and their average, keeps the better ones if they are the best so far."""
        start = time.perf_counter()
        candidates = {"top1": self.model}
        if self.state.ema is not None:
            candidates["top1_ema"] = self.state.ema.module
        record = {"kind": "validation", **where}
        for name, model in candidates.items():
            record[name] = self.validation.top1(model.eval())
            if record[name] > self.state.best:
                self.state.best = record[name]
                self.run.save_weights("best", model.state_dict())
        recall = self.validation.recall(self.model)
        if recall is not None:
            record["mask_recall"] = recall
        record["seconds"] = time.perf_counter() - start
        self._log(record)
        self.run.save_weights("last", self.model.state_dict())
        if self.state.ema is not None:
            self.run.save_weights("last_ema", self.state.ema.module.state_dict())
        if scorer_weights(self.model):
            self.run.save_weights("adapter", scorer_weights(self.model))
        if self.run.writes:
            write_training_report(self.run.path / "report.html", self.run.records())

    def _save_checkpoint(self, position: Position) -> None:
        self._average_sums()

        def save(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            if self.accelerator.is_main_process:
                self.state.save(folder)

        self.run.save_checkpoint(
            position,
            save=save,
            wait=self.accelerator.wait_for_everyone,
        )

    def _average_sums(self) -> None:
        """Makes the sums those of all processes.

        Raises:
            FloatingPointError: the loss is no number any more.
        """
        for name, total in self.state.sums.items():
            self.state.sums[name] = self.accelerator.reduce(total, "mean")
        if not all(math.isfinite(total) for total in self.state.sums.values()):
            raise FloatingPointError(
                "the loss is not finite any more; lower lr, set clip_grad or use amp=none, and start again "
                f"in another output. The newest checkpoint, {self.run.checkpoints.newest or 'none yet'}, may "
                "be close to this already"
            )

    def _log(self, record: dict[str, Any]) -> None:
        self.run.log(record, at=self.state.steps_before + record["step"])


class _Speed:
    """Images per second since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.images = 0

    def count(self, images: int) -> None:
        self.images += images

    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self.start)
