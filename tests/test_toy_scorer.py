"""A stranger's scorer: what one file and one registration give it."""

import json
import warnings
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import sparsifiner
from sparsifiner.cli import main
from sparsifiner.cli.options import SparsityOptions
from sparsifiner.config import SparsifyConfig, config_from_dict, config_to_dict, make_config
from sparsifiner.convert import about_to_train, sparse_layers
from sparsifiner.models.loading import load_model
from sparsifiner.scorers import SCORERS, LowRank, Released, Scorer, ScorerOptions

# the file begins


class ToyScorer(Scorer):
    """Likes keys that are long, in one of two ways to measure it."""

    def row_scores(self, q, k, v, spec):
        """See `Scorer.row_scores`."""
        length = (k if self.options.of == "keys" else v).float().norm(dim=-1, p=self.options.power)
        return lambda start, stop: length[:, :, None].expand(-1, -1, stop - start, -1)

    def macs(self, spec, num_heads, head_dim):
        """See `Scorer.macs`."""
        return 1000 * self.options.power


@dataclass(frozen=True, kw_only=True)
class Toy(ScorerOptions):
    """The longest keys, for every row.

    Attributes:
        power: of the norm.
        of: whose norm it is.
    """

    SCORER: ClassVar = ToyScorer

    power: int = 2
    of: Literal["keys", "values"] = "keys"


# the file ends


class LearnedScorer(Scorer):
    """Coefficients by a matrix that it learns, times a basis that it learns."""

    def __init__(self, options, place):
        super().__init__(options, place)
        self.mix = nn.Parameter(torch.randn(place.head_dim, options.size) / 4)
        self.basis = nn.Parameter(torch.randn(place.native.tokens, options.size))

    def factors(self, q, k, layout, tile):
        """See `Scorer.factors`."""
        query = layout.square_means(q[:, :, layout.prefix :].float(), tile)
        return (query @ self.mix * self.options.heat).softmax(-1), self.basis

    def row_scores(self, q, k, v, spec):
        """See `Scorer.row_scores`."""
        coefficients, basis = self.factors(q, k, spec.layout, spec.tile)
        return lambda start, stop: coefficients[:, :, start:stop] @ basis.mT

    def macs(self, spec, num_heads, head_dim):
        """See `Scorer.macs`."""
        return num_heads * spec.rows * self.options.size * (head_dim + spec.layout.tokens)


@dataclass(frozen=True)
class Learned(ScorerOptions):
    """Two matrices.

    Attributes:
        size: of the basis.
        heat: factor of the coefficients' logits.
    """

    SCORER: ClassVar = "tests.test_toy_scorer:LearnedScorer"
    LEARNS: ClassVar = True
    TITLE: ClassVar = "two-matrix scorer"

    size: int = 4
    heat: float = 1.0


TINY = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
MODEL = ["--model", "vit_tiny_patch16_224", "--img-size", "64", "--model-args", json.dumps(TINY)]


def make_dense():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, **TINY).eval()


@pytest.fixture(autouse=True)
def _registered():
    known = dict(SCORERS._kinds)
    SCORERS.add("toy", Toy)
    SCORERS.add("learned", Learned)
    yield
    SCORERS._kinds = known


@torch.no_grad()
def test_it_chooses_keys_is_traced_and_counted():
    model, images = make_dense(), torch.randn(2, 3, 64, 64)
    sparsifiner.sparsify(model, keep=0.2, tile=4, summary=2, scorer=Toy(power=3))
    with sparsifiner.trace(model) as traces:
        model(images)
    lists = traces[0].connectivity.indices
    assert torch.equal(lists[:, :, :1].expand_as(lists), lists)
    counted = [layer.scorer for layer in sparsifiner.count_macs(model, (3, 64, 64)).layers]
    assert counted == [3000, 3000]
    sparsifiner.sparsify(model, scorer=Toy())
    assert sparsifiner.count_macs(model, (3, 64, 64)).layers[0].scorer == 2000


def test_it_is_calibrated_and_comes_back_from_an_adapter(tmp_path):
    model, images = make_dense(), torch.randn(4, 3, 64, 64)
    sparsifiner.sparsify(model, keep=0.3, tile=2, scorer=Toy(of="values"))
    sparsifiner.calibrate(model, [images], progress=False)
    sparsifiner.save_adapter(model, tmp_path / "toy.safetensors")
    loaded = sparsifiner.load_adapter(make_dense(), tmp_path / "toy.safetensors")
    assert sparse_layers(loaded)[0].config == sparse_layers(model)[0].config
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_the_command_line_knows_it(tmp_path, capsys):
    assert main(["macs", *MODEL, "--scorer", "toy", "--scorer.power", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparse"]["scorer"] == 10_000
    (tmp_path / "toy.yaml").write_text("scorer: {method: toy, power: 7}\n")
    assert main(["macs", *MODEL, "--config", str(tmp_path / "toy.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparse"]["scorer"] == 14_000
    output = tmp_path / "toy.safetensors"
    calibrating = [
        "--data",
        "digits",
        "--limit",
        "8",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    words = ["--keep", "0.3", "--tile", "2", "--scorer", "toy", "--scorer.of", "values"]
    assert main(["calibrate", *MODEL, *calibrating, *words, "--output", str(output)]) == 0
    model = load_model("vit_tiny_patch16_224", img_size=64, model_args=TINY, adapter=output)
    assert sparse_layers(model)[0].config.scorer == Toy(of="values")


def test_help_lists_it(capsys):
    with pytest.raises(SystemExit):
        main(["macs", "--help"])
    text = capsys.readouterr().out
    assert "  toy                   The longest keys, for every row.\n" in text
    assert "    .power              of the norm. (type: int, default: 2)\n" in text
    assert """.of whose norm it is. (type: 'keys' | 'values', default: "keys")""" in " ".join(text.split())
    assert "tome" in text
    assert "--pool" not in text  # old flags are not told of


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scorer", "toyy"], "scorer: method='toyy' is unknown; choose one of ('impact', "),
        (
            ["--scorer", "toy", "--scorer.pool", "2"],
            "pool do not fit toy, whose options are power, of",
        ),
        (["--scorer", "toy", "--scorer.power", "x"], "scorer: power of toy must be int, got 'x'"),
        (["--scorer", "toy", "--scorer.of", "queries"], "of of toy must be 'keys' | 'values', got 'queries'"),
        (["--scorer.power", "2"], "scorer: power do not fit impact, whose options are pool"),
        (["--scorer", "[1]"], "scorer"),
        (["--tokens.keep", "0.5"], "tokens: method=None is unknown; choose one of ('evit', "),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    try:
        code = main(["macs", *MODEL, *words])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert "Traceback" not in err


class TestLearned:
    def test_it_is_untrained_until_it_has_weights_and_keeps_them_where_they_fit(self):
        model = make_dense()
        with pytest.warns(UserWarning, match="the two-matrix scorer is untrained and chooses keys by chance"):
            sparsifiner.sparsify(model, keep=0.3, tile=2, scorer=Learned(size=3))
        scorer = sparse_layers(model)[0].scorer
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparsifiner.sparsify(model, scorer=Learned(3, heat=2.0))
        assert sparse_layers(model)[0].scorer is scorer
        assert scorer.options.heat == 2.0
        with pytest.warns(UserWarning, match="two-matrix scorer is untrained"):
            sparsifiner.sparsify(model, scorer=Learned(5))
        with warnings.catch_warnings(), about_to_train():
            warnings.simplefilter("error", DeprecationWarning)
            sparsifiner.sparsify(model, scorer=Learned(6))

    def test_it_is_fitted_and_its_weights_come_back_from_adapters(self, tmp_path):
        model, images = make_dense(), torch.randn(4, 3, 64, 64)
        with about_to_train():
            sparsifiner.sparsify(model, keep=0.3, tile=2, scorer="learned")
        before = sparse_layers(model)[0].scorer.mix.detach().clone()
        sparsifiner.calibrate(model, [images], fit_steps=3, progress=False)
        assert not torch.equal(sparse_layers(model)[0].scorer.mix, before)
        sparsifiner.save_adapter(model, tmp_path / "a.safetensors")
        loaded = sparsifiner.load_adapter(make_dense(), tmp_path / "a.safetensors")
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))
        torch.nn.utils.parametrize.register_parametrization(
            sparse_layers(model)[1].scorer, "mix", torch.nn.Identity()
        )
        with pytest.raises(ValueError, match="scorers with parts of a wrapper, such as"):
            sparsifiner.save_adapter(model, tmp_path / "b.safetensors")

    def test_weights_that_do_not_fit_are_named(self, tmp_path):
        with about_to_train():
            model = sparsifiner.sparsify(make_dense(), scorer=Learned(3))
        weights = model.state_dict()
        weights["blocks.0.attn.scorer.mix"] = torch.zeros(1, 1)
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"mix is \[1, 1\] in the file and \[16, 3\] in the model"):
            load_model(
                "vit_tiny_patch16_224",
                img_size=64,
                model_args=TINY,
                config=SparsifyConfig(scorer=Learned(3)),
                weights=tmp_path / "w.safetensors",
            )


def test_the_released_scorer_goes_on_with_the_learned_parameters_and_back():
    with about_to_train():
        model = sparsifiner.sparsify(make_dense(), preset="paper", keep=0.3, scorer=LowRank(basis=10))
    parameters, learned = dict(model.named_parameters()), sparse_layers(model)[0].scorer
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is untrained
        sparsifiner.sparsify(model, scorer="released")  # 65 // 6 = 10
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        released = sparse_layers(model)[0].scorer
        assert released is not learned
        assert (released.temperature, released.used_coefficients) == (2**-0.5, 10)
        sparsifiner.sparsify(model, scorer=LowRank(basis=10, coef_topk=3))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert sparse_layers(model)[0].scorer.temperature == 8**-0.5
    with pytest.warns(UserWarning, match="the low-rank scorer is untrained"):
        sparsifiner.sparsify(model, scorer=LowRank(basis=12))
    with pytest.warns(UserWarning, match="the low-rank scorer is untrained"):
        sparsifiner.sparsify(model, scorer=Released())


@pytest.mark.parametrize("name", list(SCORERS))
def test_every_scorer_is_described_as_plain_values(name):
    config = make_config("paper", scorer=name)
    described = json.loads(json.dumps(config_to_dict(config)))
    assert described["scorer"]["method"] == name == SCORERS.name_of(config.scorer)
    assert config_from_dict(described) == config
    hash(config)


def test_what_cannot_be_registered_is_refused():
    class NoDataclass(ScorerOptions):
        pass

    for kind in (NoDataclass, Toy(), int):
        with pytest.raises(TypeError, match="must be a frozen dataclass and a subclass of ScorerOptions"):
            SCORERS.add("other", kind)
    with pytest.raises(ValueError, match="name='toy' is taken by Toy"):
        SCORERS.add("toy", Learned)
    with pytest.raises(ValueError, match="name='to y' must be a word"):
        SCORERS.add("to y", Toy)
    unknown = dataclass(frozen=True)(type("Unknown", (Toy,), {}))
    with pytest.raises(TypeError, match=r"scorer=.*Unknown.* is none of impact, .*, with add\(name, class\)"):
        SCORERS.name_of(unknown())


def test_the_command_line_has_the_fields_of_the_configuration():
    of_config = [field.name for field in fields(SparsifyConfig)]
    assert sorted(field.name for field in fields(SparsityOptions)) == sorted(["preset", *of_config])
