"""Spellings of the release before: they warn once for each call, at its line, and give the same model."""

import json
import warnings

import pytest
import timm
import torch

import sparsifiner
from sparsifiner import BigBird, Impact, LowRank, Pooled, Random, Released, SparsifyConfig
from sparsifiner.cli import main
from sparsifiner.config import change_config, config_from_dict, config_to_dict, make_config
from sparsifiner.convert import about_to_train, sparse_layers

TINY = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
PAPER = {"preset": "paper", "keep": 0.3}
TILES = {"tile": 4, "summary": 2, "keep": 0.2}
# old options, new ones, and what the warning says
OLD_AND_NEW = [
    ({**TILES, "pool": 1}, {**TILES, "scorer": Impact(pool=1)}, "pool=1: .* scorer=Impact(pool=1)"),
    ({**TILES, "scorer": "impact", "pool": 4}, {**TILES, "scorer": Impact(pool=4)}, "Impact(pool=4)"),
    ({**PAPER, "basis": 6, "coef_topk": 2}, {**PAPER, "scorer": LowRank(basis=6, coef_topk=2)}, "(basis=6"),
    ({**PAPER, "reduced_dim": 3}, {**PAPER, "scorer": LowRank(reduced_dim=3)}, "LowRank(reduced_dim=3)"),
    (
        {**PAPER, "basis_threshold": 0.0},
        {**PAPER, "scorer": LowRank(basis_threshold=0.0)},
        "LowRank(basis_threshold=0.0)",
    ),
    (
        {**TILES, "scorer": "lowrank", "basis": 9},
        {**TILES, "scorer": LowRank(basis=9)},
        "scorer=LowRank(basis=9)",
    ),
    ({**PAPER, "legacy": True}, {**PAPER, "scorer": Released()}, "legacy=True: .* scorer=Released()"),
    (
        {**PAPER, "legacy": True, "coef_topk": 3, "basis": 16},
        {**PAPER, "scorer": Released(coef_topk=3)},
        "scorer=Released(coef_topk=3), and refuses basis",
    ),
    ({**PAPER, "legacy": False}, PAPER, "scorer=LowRank()"),
    ({**TILES, "scorer": "random", "seed": 5}, {**TILES, "scorer": Random(seed=5)}, "Random(seed=5)"),
    ({**TILES, "scorer": "bigbird", "seed": 1}, {**TILES, "scorer": BigBird(seed=1)}, "BigBird(seed=1)"),
    # formerly ignored
    ({**TILES, "scorer": "pooled", "pool": 4}, {**TILES, "scorer": Pooled()}, "refuses pool, which changes"),
    ({**TILES, "basis": 64, "seed": 3}, TILES, "scorer=Impact(), and refuses basis, seed"),
    ({**TILES, "scorer": Impact(pool=1), "legacy": False}, {**TILES, "scorer": Impact(pool=1)}, "pool=1"),
]


@pytest.fixture(autouse=True)
def _trained():
    with about_to_train():
        yield


def make_sparse(options):
    torch.manual_seed(0)
    return sparsifiner.sparsify(timm.create_model("vit_tiny_patch16_224", **TINY).eval(), **options)


def once(call, text):
    """What a call gives, that warns once: at the line of the user's, which is here."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = call()
    told = [each for each in told if issubclass(each.category, DeprecationWarning)]
    assert [each.filename for each in told] == [__file__]
    message = str(told[0].message)
    assert message.startswith("sparsifiner: ")
    for part in text.split(" .* "):
        assert part in message
    return result


def config_of(model):
    return sparse_layers(model)[0].config


@torch.no_grad()
@pytest.mark.parametrize(("old", "new", "text"), OLD_AND_NEW)
def test_sparsify_gives_the_same_model(old, new, text):
    before, now = once(lambda: make_sparse(old), text), make_sparse(new)
    assert config_of(before) == config_of(now)
    images = torch.randn(2, 3, 64, 64)
    with sparsifiner.trace(before) as own, sparsifiner.trace(now) as other:
        assert torch.equal(before(images), now(images))
    for layer in own:
        assert torch.equal(own[layer].connectivity.indices, other[layer].connectivity.indices)


@pytest.mark.parametrize(("old", "new", "text"), OLD_AND_NEW)
def test_configurations_are_equal(old, new, text):
    assert once(lambda: make_config(**old), text) == make_config(**new)
    if "preset" not in old:
        assert once(lambda: SparsifyConfig(**old), text) == SparsifyConfig(**new)
        assert once(lambda: change_config(SparsifyConfig(), **old), text) == SparsifyConfig(**new)


def test_other_options_of_the_scorer_stay():
    model = make_sparse({**PAPER, "scorer": LowRank(basis=6, coef_topk=2, reduced_dim=3)})
    once(lambda: sparsifiner.sparsify(model, basis=8), "LowRank(basis=8, reduced_dim=3, coef_topk=2)")
    assert config_of(model).scorer == LowRank(basis=8, coef_topk=2, reduced_dim=3)
    once(lambda: sparsifiner.sparsify(model, legacy=True), "Released(reduced_dim=3, coef_topk=2)")
    once(lambda: sparsifiner.sparsify(model, legacy=False, keep=0.2), "LowRank(reduced_dim=3, coef_topk=2)")
    assert config_of(model).keep == 0.2


def test_the_name_of_the_scorer_that_is_there_keeps_its_options():
    model = make_sparse({**PAPER, "scorer": LowRank(basis=6, coef_topk=2)})
    scorer = sparse_layers(model)[0].scorer
    sparsifiner.sparsify(model, scorer="lowrank", keep=0.5)
    assert sparse_layers(model)[0].scorer is scorer
    assert config_of(model).scorer == LowRank(basis=6, coef_topk=2)
    sparsifiner.sparsify(model, scorer="pooled")
    assert config_of(model).scorer == Pooled()


def test_a_configuration_for_a_model_of_timm_warns_where_it_is_made():
    config = once(lambda: SparsifyConfig(tile=1, scorer="lowrank", basis=4, coef_topk=2), "LowRank(basis=4")
    model = timm.create_model("sparsifiner_deit_tiny_patch16_224", sparsify_config=config, depth=1)
    assert config_of(model).scorer == LowRank(basis=4, coef_topk=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"legacy": True}, "legacy=True is the released method and needs scorer='lowrank', got 'impact'"),
        (
            {**PAPER, "legacy": True, "tile": 2},
            "is the released method and needs tile=1, got 2",
        ),
        ({**PAPER, "legacy": True, "backend": "torch"}, "runs on backend='reference' only"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"tile": 8, "pool": 3}, "pool=3 must divide tile=8"),
        ({**PAPER, "coef_topk": 64}, "coef_topk=64 exceeds basis=32"),
        ({"scorer": "random", "seed": 2**32}, "seed must be below"),
    ],
)
@pytest.mark.filterwarnings("ignore:sparsifiner.*next release:DeprecationWarning")
def test_what_was_refused_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_config(**options)


FLAT = {
    "keep": 0.25, "profile": "even", "tile": 1, "summary": None, "scorer": "lowrank", "pool": None,
    "basis": 16, "reduced_dim": None, "coef_topk": 4, "basis_threshold": 0.02, "legacy": False, "share": 1,
    "backend": "auto", "min_tokens": 0, "seed": 0, "tokens": {"method": "evit", "keep": 0.5, "at": [1]},
}  # fmt: skip


def test_files_are_read_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_from_dict(FLAT)
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
        released = config_from_dict({**FLAT, "legacy": True, "tokens": None})
        pooled = config_from_dict({**FLAT, "scorer": "impact", "tile": 4, "pool": 2, "tokens": None})
    assert config.scorer == LowRank(basis=16, coef_topk=4)
    assert config.tokens == sparsifiner.EViT(keep=0.5, at=(1,))
    assert released.scorer == Released(coef_topk=4)
    assert pooled.scorer == Impact(pool=2)


MACS = ["macs", "--model", "vit_tiny_patch16_224", "--img-size", "64", "--json", "--model-args"]
MACS += [json.dumps({name: value for name, value in TINY.items() if name != "img_size"})]
COMMANDS = [
    (["--pool", "4"], ["--scorer.pool", "4"]),
    (["--scorer", "impact", "--pool", "2"], ["--scorer.pool", "2", "--scorer", "impact"]),
    (
        [
            "--preset",
            "paper",
            "--basis",
            "4",
            "--coef-topk=2",
            "--reduced-dim",
            "3",
            "--basis-threshold",
            "0",
        ],
        [
            *("--preset", "paper", "--scorer.basis=4", "--scorer.coef-topk", "2"),
            *("--scorer.reduced-dim", "3", "--scorer.basis-threshold", "0"),
        ],
    ),
    (["--preset", "paper", "--legacy"], ["--preset", "paper", "--scorer", "released"]),
    (["--scorer", "random", "--scorer-seed", "3"], ["--scorer", '{"method": "random", "seed": 3}']),
]


@pytest.fixture
def chosen(monkeypatch):
    """Configurations that the command line made."""
    configs = []
    monkeypatch.setattr(
        "sparsifiner.cli.commands.load_model",
        lambda name, config, **rest: configs.append(config) or torch.nn.Identity(),
    )
    return configs


@pytest.mark.parametrize(("old", "new"), COMMANDS)
@pytest.mark.parametrize("in_file", [False, True])
def test_flags_and_keys_of_files_mean_the_same_and_say_so_once(old, new, in_file, tmp_path, capsys, chosen):
    if in_file:
        words = [word for each in old for word in each.split("=")]
        values, name = {}, None
        for word in words:
            if word.startswith("--"):
                name = word[2:].replace("-", "_")
                values[name] = True
            else:
                values[name] = word if word.isalpha() else json.loads(word)
        (tmp_path / "old.yaml").write_text(json.dumps({"legacy": False, "pool": None, **values}))
        old = ["--config", str(tmp_path / "old.yaml")]
    for words in (old, new):
        main([*MACS, *words])
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparsifiner: ")]
        assert len(said) == (words is old)
        assert all(
            "the next release does not know --" in line and "write --scorer '{" in line for line in said
        )
    assert chosen[0] == chosen[1] != make_config("fast")


def test_a_file_names_a_scorer_and_the_command_line_its_option(tmp_path, chosen):
    (tmp_path / "own.yaml").write_text("scorer: random\ntokens: {method: evit, keep: 0.6}\n")
    words = ["--config", str(tmp_path / "own.yaml"), "--scorer.seed", "7", "--tokens.fuse", "false"]
    main([*MACS, *words])
    assert chosen[0].scorer == Random(seed=7)
    assert chosen[0].tokens == sparsifiner.EViT(keep=0.6, fuse=False)
