"""Recipes: the paper's numbers, and what is rejected by name."""

import math
from dataclasses import FrozenInstanceError

import pytest
import yaml

from sparsifiner.training import LossWeights, Recipe, Stage
from sparsifiner.training.recipe import STAGE_KINDS, recipe_settings

NAN = math.nan


def test_the_defaults_are_the_papers():
    recipe = Recipe()
    first, second = recipe.stages
    assert (first.name, first.epochs, first.warmup_epochs, first.lr, first.min_lr) == (
        *("reconstruct", 5, 3),
        *(3e-4, 2e-4),
    )
    assert (second.name, second.epochs, second.warmup_epochs, second.lr, second.min_lr) == (
        *("distil", 45, 3),
        *(8e-5, 2e-6),
    )
    weights = recipe.loss_weights
    assert (weights.classify, weights.distil, weights.token) == (1.0, 0.5, 0.5)
    assert weights.reconstruct == pytest.approx(1.68)
    assert weights.self_reconstruct == pytest.approx(0.336)
    assert recipe.weight_decay == 0.05
    assert recipe.ema_decay == 0.9999
    assert (recipe.mixup, recipe.cutmix, recipe.mixup_prob, recipe.mixup_switch) == (0.8, 1.0, 1.0, 0.5)
    assert (recipe.label_smoothing, recipe.erasing, recipe.color_jitter) == (0.1, 0.25, 0.4)
    assert recipe.auto_augment == "rand-m9-mstd0.5-inc1"


@pytest.mark.parametrize(
    ("name", "trains", "losses"),
    [
        ("reconstruct", "scorer", {"reconstruct"}),
        ("distil", "backbone", {"classify", "distil", "token"}),
        ("self", "scorer", {"self_reconstruct"}),
        ("classify", "backbone", {"classify"}),
        ("joint", "everything", {"classify", "distil", "token", "reconstruct"}),
    ],
)
def test_a_stage_trains_what_it_says_on_losses_that_have_weights(name, trains, losses):
    kind = Stage(name, 1).kind
    assert kind is STAGE_KINDS[name]
    assert kind.trains == trains
    assert set(kind.losses) == losses <= set(vars(LossWeights()))


def test_learning_rates_of_a_stage_can_be_given():
    assert (Stage("distil", 1, lr=1e-3).peak_lr, Stage("distil", 1, lr=1e-3).last_lr) == (1e-3, 2e-6)
    assert (Stage("distil", 1, lr=1e-3, min_lr=0).last_lr) == 0
    assert Stage("distil", 1, lr=1e-6).last_lr == 1e-6  # the paper's would be higher
    assert Stage("self", 1, lr=2e-4, min_lr=2e-4).last_lr == 2e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pretrain", "epochs": 1}, "name='pretrain' is unknown.*reconstruct.*joint"),
        ({"name": "distil", "epochs": 0}, "distil has epochs=0"),
        ({"name": "distil", "epochs": -2}, "distil has epochs=-2"),
        ({"name": "distil", "epochs": 2, "warmup_epochs": 2}, "distil has warmup_epochs=2 of 2 epochs"),
        ({"name": "distil", "epochs": 2, "warmup_epochs": -0.5}, "warmup_epochs=-0.5"),
        ({"name": "distil", "epochs": 2, "warmup_epochs": NAN}, "warmup_epochs=nan"),
        ({"name": "self", "epochs": 1, "lr": 1e-4, "min_lr": 2e-4}, "lr=0.0001 and min_lr=0.0002"),
        ({"name": "self", "epochs": 1, "min_lr": -1e-9}, "min_lr=-1e-09"),
        ({"name": "self", "epochs": 1, "lr": -1.0}, "lr=-1.0"),
        ({"name": "self", "epochs": 1, "lr": NAN}, "lr=nan"),
        ({"name": "self", "epochs": 1, "min_lr": NAN}, "min_lr=nan"),
    ],
)
def test_impossible_stages_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=f"^stages: .*{message}"):
        Stage(**arguments)


@pytest.mark.parametrize("name", [*vars(LossWeights())])
@pytest.mark.parametrize("weight", [-0.1, NAN])
def test_impossible_weights_are_rejected(name, weight):
    assert vars(LossWeights(**{name: 0}))[name] == 0
    with pytest.raises(ValueError, match=f"^loss_weights: {name} must be at least 0, got {weight}"):
        LossWeights(**{name: weight})


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("stages", [[]], "is empty"),
        ("batch_size", [1, 0, -4], "must be at least 2"),
        ("accumulate", [0, -1], "must be at least 1"),
        ("log_every", [0, -1], "must be at least 1"),
        ("workers", [-1], "must be at least 0"),
        ("checkpoint_every", [0, -1], "must be at least 1"),
        ("weight_decay", [-0.1, NAN], "must be at least 0"),
        ("warmup_lr", [-1e-9, NAN], "must be at least 0"),
        ("mixup", [-0.1, NAN], "must be at least 0"),
        ("cutmix", [-0.1, NAN], "must be at least 0"),
        ("color_jitter", [-0.1, NAN], "must be at least 0"),
        ("mixup_prob", [-0.1, 1.1, NAN], r"must lie in \[0, 1\]"),
        ("mixup_switch", [-0.1, 1.1, NAN], r"must lie in \[0, 1\]"),
        ("label_smoothing", [-0.1, 1.1, NAN], r"must lie in \[0, 1\]"),
        ("erasing", [-0.1, 1.1, NAN], r"must lie in \[0, 1\]"),
        ("hflip", [-0.1, 1.1, NAN], r"must lie in \[0, 1\]"),
        ("clip_grad", [0, -1.0, NAN], "must be positive.*None clips nothing"),
        ("ema_decay", [0, 1, -0.5, NAN], r"must lie in \(0, 1\).*None keeps no average"),
        ("crop_scale", [(0, 1), (0.5, 0.4), (0.5, 1.1), (NAN, 1)], "must be 0 < smallest <= largest <= 1"),
    ],
)
def test_impossible_values_are_rejected_by_name(name, values, message):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            Recipe(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("accumulate", 1), ("batch_size", 2), ("workers", 0), ("clip_grad", None), ("clip_grad", 1.0)],
        *[("ema_decay", None), ("mixup", 0), ("cutmix", 0), ("hflip", 1), ("erasing", 0)],
        *[("crop_scale", (1, 1)), ("checkpoint_every", 1), ("weight_decay", 0), ("auto_augment", None)],
    ],
)
def test_values_at_the_edge_are_accepted(name, value):
    assert vars(Recipe(**{name: value}))[name] == value


@pytest.mark.parametrize("before", ["distil", "classify", "joint"])
def test_reconstruct_comes_before_the_backbone_moves(before):
    stages = [Stage("self", 1), Stage(before, 1), Stage("self", 1), Stage("reconstruct", 1)]
    with pytest.raises(ValueError, match=f"^stages: reconstruct learns .* but {before} before it"):
        Recipe(stages=stages)
    Recipe(stages=[stages[0], stages[3], stages[1], stages[2]])


def test_recipes_do_not_change():
    for settings in (Recipe(), Stage("distil", 1), LossWeights()):
        with pytest.raises(FrozenInstanceError):
            settings.lr = 1
    first = Recipe()
    first.stages.clear()
    assert len(Recipe().stages) == 2


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(
            stages=[Stage("self", 2, 0.5, lr=1e-3, min_lr=1e-5), Stage("joint", 3)],
            loss_weights=LossWeights(token=0.1, reconstruct=0),
            crop_scale=(0.3, 0.9),
            mean=[0.5, 0.4, 0.3],
            clip_grad=1.0,
            ema_decay=None,
            auto_augment=None,
        ),
    ],
)
def test_settings_are_plain_and_give_the_recipe_again(recipe):
    settings = yaml.safe_load(yaml.safe_dump(recipe_settings(recipe)))
    assert settings == recipe_settings(recipe)
    settings["stages"] = [Stage(**stage) for stage in settings["stages"]]
    settings["loss_weights"] = LossWeights(**settings["loss_weights"])
    assert Recipe(**settings) == recipe
