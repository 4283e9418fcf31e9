"""Linformer as a peer: its formula, its start from a dense model, its MACs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsifiner
from sparsifiner.models.linformer import linformer
from tests.models import make_images, make_model


def test_attention_is_the_formula():
    model = linformer(make_model("deit distilled").double(), 0.1)
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.key_mixture.normal_()
        attention.value_mixture.normal_()
    x = torch.randn(2, 198, 48, dtype=torch.float64)
    q, k, v = attention.qkv(x).view(2, 198, 3, 3, 16).permute(2, 0, 3, 1, 4)
    keys = torch.cat([k[:, :, :2], torch.einsum("nk,bhnd->bhkd", attention.key_mixture, k[:, :, 2:])], 2)
    values = torch.cat([v[:, :, :2], torch.einsum("nk,bhnd->bhkd", attention.value_mixture, v[:, :, 2:])], 2)
    assert keys.shape[2] == 20  # ceil(.1 * 198)
    out = (q @ keys.mT * 0.25).softmax(-1) @ values
    expected = attention.proj(out.transpose(1, 2).reshape(2, 198, 48))
    assert (attention(x) - expected).abs().max() < 1e-12


def test_mixtures_begin_as_means_of_all_patches_and_learn():
    model = linformer(make_model("deit"), 0.25)
    for name, mixture in model.named_parameters():
        if "mixture" in name:
            assert mixture.shape == (196, 49)
            assert (mixture.sum(0) - 1).abs().max() < 1e-6
            assert ((mixture > 0).sum(1) == 1).all()
            assert set((mixture > 0).sum(0).tolist()) == {4}
    model(make_images(224)).square().sum().backward()
    assert all(block.attn.key_mixture.grad.abs().max() > 0 for block in model.blocks)


def test_as_many_mixtures_as_patches_are_dense_attention():
    model = make_model("deit")
    with torch.no_grad():
        images = make_images(224)
        expected = model(images)
        assert (linformer(model, 1.0)(images) - expected).abs().max() < 1e-5


def test_macs_equal_torch_flop_counter():
    model = linformer(make_model("deit"), 0.1).requires_grad_(False)
    report = sparsifiner.count_macs(model).to_dict()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(make_images(224, batch=1))
    assert 2 * report["sparse"]["total"] == counter.get_total_flops()
    assert report["key_visits"] == pytest.approx(20 / 197)


def test_what_it_cannot_do_is_named():
    model = linformer(make_model("deit"), 0.1)
    model.set_input_size(img_size=96)
    with pytest.raises(ValueError, match="made for 196 patches, got 36"):
        model(make_images(96))
    with pytest.raises(ValueError, match="leaves 0 mixtures"):
        linformer(make_model("deit"), 0.001)
    assert "LinformerAttention" in sparsifiner.why_not(model)[0]
