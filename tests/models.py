"""Small models for the tests: real timm architectures, two layers deep and narrow."""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import timm
import torch
from timm.layers import Attention, LayerNorm

import sparsifiner.models  # noqa: F401, which registers LV-ViT
from sparsifiner.attention import SparseAttention

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}

# name -> (timm name, arguments, image sizes)
ARCHITECTURES = {
    "deit": ("deit_tiny_patch16_224", {}, (224, 96)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}, (224, 96)),
    "augreg": ("vit_small_patch16_224", {}, (160, 224)),
    "augreg patch 32": ("vit_small_patch32_224", {}, (224, 384)),
    "clip tower": ("vit_base_patch16_clip_224", {}, (96, 128)),
    "siglip tower": ("vit_base_patch16_siglip_224", {}, (96, 128)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 98}, (98, 140)),
    "deit3 layer scale": ("deit3_small_patch16_224", {}, (96, 128)),
    "internvit dynamic": ("vit_intern300m_patch14_448", {"img_size": 112}, (112, 154)),
    "qk norm": ("deit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}, (96, 128)),
    "gated": ("deit_tiny_patch16_224", {}, (96, 128)),
    "average pooling": ("vit_base_patch16_gap_224", {}, (96, 128)),
    "post norm": ("vit_base_patch16_rpn_224", {}, (96, 128)),
    "lv-vit": ("lvvit_s", {}, (96, 128)),
    "map pooling, registers": ("vit_so150m_patch16_reg4_map_256", {"img_size": 128}, (128, 96)),
}


@contextmanager
def summaries_of_single_patches():
    """Lists and a summary of every single patch: exact sparse attention, which no layer would choose."""
    plan = SparseAttention.plan

    def exact_plan(layer, q, tokens):
        config, layer.config = layer.config, replace(layer.config, summary=10**6)  # a single window
        spec = plan(layer, q, tokens)
        layer.config = config
        return spec and replace(spec, summary=1)

    with patch.object(SparseAttention, "plan", exact_plan):
        yield


def make_model(name, **options):
    timm_name, arguments, sizes = ARCHITECTURES[name]
    arguments = {**SMALL, "img_size": sizes[0], **arguments, **options}
    model = timm.create_model(timm_name, **arguments)
    if name == "gated":
        for block in model.blocks:
            block.attn = Attention(48, 3, qkv_bias=True, gated=True, norm_layer=LayerNorm)
    # timm starts layer scales near 0 and biases at 0, which would hide errors
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_images(size, batch=2):
    return torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))
