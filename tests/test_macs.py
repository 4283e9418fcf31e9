"""MAC counts against torch's flop counter."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsifiner
from tests.models import ARCHITECTURES, make_images, make_model


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_report_of_the_paper_model():
    model = timm.create_model("deit_small_patch16_224")
    dense = sparsifiner.count_macs(model).to_dict()
    assert dense["tokens"] == 197
    assert dense["dense"] == {"attention": 12 * 2 * 384 * 197**2, "total": dense["sparse"]["total"]}
    assert dense["sparse"]["scorer"] == 0
    assert dense["key_visits"] == 1
    assert dense["paper"]["mhsa"] / 1e6 == pytest.approx(357.7, abs=0.2)

    sparsifiner.sparsify(model, preset="paper", keep=0.1)
    report = sparsifiner.count_macs(model, (3, 224, 224)).to_dict()
    assert report["dense"] == dense["dense"]
    assert report["paper"]["mhsa"] == pytest.approx(111.4e6, abs=0.2e6)
    assert report["sparse"]["attention"] == 12 * 2 * 384 * (196 * 20 + 197)
    assert report["key_visits"] == pytest.approx(20 / 197)
    # projections of q and k, k_down, coefficients, eight basis rows per query
    per_head = (196 + 197) * 64 * 32 + 197 * 32 * 32 + 196 * 32 * 32 + 196 * 8 * 197
    assert report["sparse"]["scorer"] == 12 * 6 * per_head
    other = dense["dense"]["total"] - dense["dense"]["attention"]
    assert report["sparse"]["total"] == report["sparse"]["attention"] + report["sparse"]["scorer"] + other


def test_key_visits_count_summaries_and_are_the_mean_over_layers():
    model = make_model("deit", img_size=192)  # 145 tokens
    sparsifiner.sparsify(model, keep=(0.2,) + (1.0,) * (len(model.blocks) - 1), tile=4, summary=4)
    report = sparsifiner.count_macs(model, (3, 192, 192))
    assert [layer.key_visits for layer in report.layers] == [(29 + 9) / 145] + [1] * (len(model.blocks) - 1)
    assert report.to_dict()["key_visits"] == pytest.approx(
        (38 / 145 + len(model.blocks) - 1) / len(model.blocks)
    )


def flops(model, images):
    model.requires_grad_(False)  # the counter cannot track views of parameters that want gradients
    # the math backend is matrix products, which the counter sees
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dense_totals_equal_torch_flop_counter(name):
    model = make_model(name)
    size = ARCHITECTURES[name][2][0]
    report = sparsifiner.count_macs(model, (3, size, size)).to_dict()
    assert 2 * report["dense"]["total"] == flops(model, make_images(size, batch=1))


@pytest.mark.parametrize(
    ("options", "unseen"),
    [
        ({"tile": 4, "summary": 2}, 0),
        ({"tile": 4, "summary": None, "scorer": "window"}, 0),
        ({"tile": 1, "summary": None}, 0),
        ({"tile": 2, "summary": 4, "scorer": "oracle"}, 0),
        # the sparse product is an embedding bag, which the counter does not see
        ({"tile": 1, "summary": None, "scorer": "lowrank", "backend": "torch"}, 2 * 3 * 144 * 8 * 145),
        ({"tile": 1, "summary": None, "scorer": "released", "backend": "reference"}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_sparse_totals_equal_torch_flop_counter(options, unseen):
    model = sparsifiner.sparsify(make_model("deit", img_size=192), keep=0.1, **options)
    report = sparsifiner.count_macs(model, (3, 192, 192)).to_dict()
    counted = flops(model, make_images(192, batch=1))
    if unseen is None:  # the reference computes every pair
        report["sparse"]["total"] += report["dense"]["attention"] - report["sparse"]["attention"]
        unseen = 0
    assert 2 * (report["sparse"]["total"] - unseen) == counted


def test_dynamic_and_resized_inputs():
    dynamic = sparsifiner.sparsify(make_model("internvit dynamic"), keep=0.2, tile=2, summary=2)
    assert sparsifiner.count_macs(dynamic, (3, 154, 112)).tokens == 89
    model = make_model("deit")
    with pytest.raises(ValueError, match=r"256x256 px do not fit .* 224x224; call model.set_input_size"):
        sparsifiner.count_macs(model, (3, 256, 256))
    model.set_input_size((256, 256))
    assert sparsifiner.count_macs(model, (3, 256, 256)).tokens == 257


def test_unsupported_model_is_named():
    with pytest.raises(ValueError, match="ResNet is not a timm VisionTransformer"):
        sparsifiner.count_macs(timm.create_model("test_resnet"))
