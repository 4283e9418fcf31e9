"""The paper's accounting against its published tables."""

import pytest
import timm

import sparsifiner
from sparsifiner.published import paper_mhsa
from sparsifiner.ratios import exact_ratio

DEIT_S = {"layers": 12, "heads": 6, "width": 384}
LV_VIT_S = {"layers": 16, "heads": 6, "width": 384}

# method.md, table A: keep -> MHSA in MMACs
TABLE_A = {
    0.9: 396.8, 0.8: 360.6, 0.7: 324.6, 0.6: 290.3, 0.5: 254.2, 0.4: 218.0, 0.3: 183.6, 0.2: 147.5,
    0.1: 111.4, 0.05: 93.3, 0.01: 78.9,
}  # fmt: skip


@pytest.mark.parametrize(("keep", "published"), TABLE_A.items())
def test_table_a(keep, published):
    assert paper_mhsa(**DEIT_S, keep=exact_ratio(keep)) / 1e6 == pytest.approx(published, abs=0.2)


def test_keeping_everything_by_the_paper_method_costs_more_than_dense():
    assert paper_mhsa(**DEIT_S, keep=(1, 1)) / 1e6 == pytest.approx(431.1, abs=0.2)


@pytest.mark.parametrize(("shape", "published"), [(DEIT_S, 357.7), (LV_VIT_S, 476.9)])
def test_dense_rows(shape, published):
    assert paper_mhsa(**shape, keep=None) / 1e6 == pytest.approx(published, abs=0.2)


@pytest.mark.parametrize(("keep", "published"), [(0.5, 339.7), (0.25, 221.7), (0.1, 149.5)])
def test_sparsifiner_lv_vit_s_rows(keep, published):
    assert paper_mhsa(**LV_VIT_S, keep=exact_ratio(keep)) / 1e6 == pytest.approx(published, abs=0.2)


def test_models_without_a_published_row_have_none():
    assert paper_mhsa(12, 3, 192, keep=(1, 10)) is None


def test_paper_accounting_is_only_for_the_paper_method():
    model = timm.create_model("deit_small_patch16_224")
    assert sparsifiner.count_macs(sparsifiner.sparsify(model, keep=0.1)).paper_mhsa is None
