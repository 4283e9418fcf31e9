"""Learning to be sparse: the scorer from the dense twin's attention, the network from its outputs."""

from sparsifiner.training.loop import TrainingResult, train
from sparsifiner.training.plan import describe_plan, rehearse
from sparsifiner.training.recipe import LossWeights, Recipe, Stage

__all__ = ["LossWeights", "Recipe", "Stage", "TrainingResult", "describe_plan", "rehearse", "train"]
