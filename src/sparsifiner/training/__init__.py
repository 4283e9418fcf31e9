"""Learning to be sparse: the scorer from the dense twin's attention, the network from its outputs."""

from typing import TYPE_CHECKING

from sparsifiner.lazy import loader

if TYPE_CHECKING:
    from sparsifiner.training.loop import TrainingResult, train
    from sparsifiner.training.plan import describe_plan, rehearse
    from sparsifiner.training.recipe import LossWeights, Recipe, Stage

__all__ = ["LossWeights", "Recipe", "Stage", "TrainingResult", "describe_plan", "rehearse", "train"]

# losses and stages are for calibration too, which needs nothing that training does
_HOMES = {
    "LossWeights": "sparsifiner.training.recipe",
    "Recipe": "sparsifiner.training.recipe",
    "Stage": "sparsifiner.training.recipe",
    "TrainingResult": "sparsifiner.training.loop",
    "describe_plan": "sparsifiner.training.plan",
    "rehearse": "sparsifiner.training.plan",
    "train": "sparsifiner.training.loop",
}

__getattr__ = loader(__name__, _HOMES)
