"""LV-ViT with its token-labelling head, which timm does not have.

After `import sparsifiner`: `timm.create_model("lvvit_s")`, and `lvvit_m`. The parameters carry the names of
the released checkpoints, so those load as they are.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, PatchEmbed, nchw_to, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import (
    Block,
    VisionTransformer,
    checkpoint_filter_fn,
    init_weights_vit_timm,
)
from torch import Tensor, nn

from sparsifiner.hosts import HOSTS
from sparsifiner.hosts.timm_vit import TimmViT
from sparsifiner.standin import is_proxy, leaf_node
from sparsifiner.tokens.state import take_tokens

_STEM_CHANNELS = 64
_RESIDUAL_DIVISOR = 2.0
_TOKEN_WEIGHT = 0.5  # of the best patch's logits beside those of the class token


class ConvolutionStem(PatchEmbed):  # type: ignore[misc]
    """Patch embedding of four convolutions: three look at the image, the last one cuts patches.

    ```
    7x7 stride 2, 3x3, 3x3        [B, 64, H/2, W/2], each without bias, with BatchNorm and ReLU
    projection, P/2 x P/2         [B, embed_dim, H/P, W/P], stride P/2
    ```

    Args:
        img_size: side of the image in pixels, or height and width.
        patch_size: P, even; or its height and width.
        in_chans: channels of the image.
        device: of the parameters.
        dtype: of the parameters.
        **options: the others of timm's `PatchEmbed`.

    Raises:
        ValueError: the patch size is odd.

    Source:
        Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
        NeurIPS 2021.
    """

    img_size: tuple[int, int]
    patch_size: tuple[int, int]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        super().__init__(img_size, _halved(patch_size), _STEM_CHANNELS, **options, **place)
        self._set_sizes(img_size, patch_size)
        self.conv1 = nn.Conv2d(in_chans, _STEM_CHANNELS, 7, stride=2, padding=3, bias=False, **place)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS, **place)
        self.conv2 = nn.Conv2d(_STEM_CHANNELS, _STEM_CHANNELS, 3, padding=1, bias=False, **place)
        self.bn2 = nn.BatchNorm2d(_STEM_CHANNELS, **place)
        self.conv3 = nn.Conv2d(_STEM_CHANNELS, _STEM_CHANNELS, 3, padding=1, bias=False, **place)
        self.bn3 = nn.BatchNorm2d(_STEM_CHANNELS, **place)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Changes the image and patch size; the projection's weight is resampled for the latter.

        Raises:
            ValueError: the patch size is odd; nothing has changed then.
        """
        if patch_size is None:
            super().set_input_size(img_size)
            return
        kernel = _halved(patch_size)
        # timm resamples the projection, which sees maps of half the image's size
        self.patch_size = _halved(self.patch_size)
        super().set_input_size(patch_size=kernel)
        self._set_sizes(img_size or self.img_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images [B, in_chans, H, W] as patches [B, N, C], or in timm's `output_fmt`.

        Raises:
            ValueError: the model was made for another size, or patches do not divide this one.
        """
        if is_proxy(x):  # sizes are checked in each call of the graph
            return leaf_node(self, x)
        height, width = x.shape[-2:]
        patch_height, patch_width = self.patch_size
        if self.strict_img_size and (height, width) != self.img_size:
            expected = "x".join(map(str, self.img_size))
            raise ValueError(
                f"images are {height}x{width}, but the model takes {expected}; "
                "call model.set_input_size((height, width)) first, or create it with img_size="
            )
        if self.dynamic_img_pad:
            x = F.pad(x, (0, -width % patch_width, 0, -height % patch_height))
        elif height % patch_height or width % patch_width:
            raise ValueError(
                f"images are {height}x{width}, which patches of {patch_height}x{patch_width} do not divide; "
                "resize them"
            )
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(convolution(x)), inplace=True)
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt)
        embedded: Tensor = self.norm(x)
        return embedded

    def _set_sizes(self, img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
        self.patch_size = to_2tuple(patch_size)
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(img_size)


class ResidualDivisor(nn.Module):
    """Divides a residual branch by a fixed number, in the place of timm's LayerScale."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x / self.divisor

    def extra_repr(self) -> str:
        """The number."""
        return f"{self.divisor:g}"


class LVViT(VisionTransformer):  # type: ignore[misc]
    """Vision Transformer with a convolutional stem, weaker residual branches and a head for every patch.

    ```
    x      = x + attention(norm1(x)) / 2, then x + mlp(norm2(x)) / 2, in every block
    logits = head(class token) + max over patches of aux_head(patch token) / 2
    ```

    The logits are the same in training; a token-labelling loss takes `token_logits` beside them.

    Args:
        **options: those of timm's `VisionTransformer`, except `embed_layer`, `block_fn` and `init_values`.

    Source:
        Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
        NeurIPS 2021.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(embed_layer=ConvolutionStem, block_fn=_make_block, init_values=None, **options)
        self.aux_head = self._make_aux_head()
        init_weights_vit_timm(self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces both heads by new ones, or by none for 0 classes."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._make_aux_head().train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classifies features [B, N, C]: [B, classes].

        With `pre_logits`, or without classes, it returns what `head` sees, [B, C]; without pooling the
        tokens stay apart, and each has only `head`'s logits.
        """
        logits: Tensor = super().forward_head(x, pre_logits)
        if pre_logits or self.num_classes == 0 or not self.global_pool:
            return logits
        return logits + _TOKEN_WEIGHT * self.token_logits(x).amax(dim=1)

    def token_logits(self, features: Tensor) -> Tensor:
        """Logits of every patch, for a token-labelling loss.

        Args:
            features: [B, N, C], what `forward_features` gave.

        Returns:
            [B, patches, classes].
        """
        logits: Tensor = self.aux_head(self.head_drop(TimmViT(self).patch_tokens(features)))
        return logits

    def _make_aux_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        weight = self.patch_embed.proj.weight
        return nn.Linear(self.embed_dim, self.num_classes, device=weight.device, dtype=weight.dtype)


class LVViTHost(TimmViT):
    """A timm `VisionTransformer` whose head looks at every patch."""

    model: LVViT

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        """See `Host.owns`."""
        return isinstance(model, LVViT)

    def why_not_masked(self) -> str:
        """See `Host.why_not_masked`."""
        if self.model.global_pool == "token":
            return ""
        return f"its head (global_pool={self.model.global_pool!r}) would look at all of them"

    def masked(self, features: Tensor, policy: Tensor) -> Tensor:
        """See `Host.masked`: of the largest logits of all patches, a patch twice changes nothing."""
        stays = policy.detach()[:, self.prefix :]
        one_that_stays = stays.argmax(1, keepdim=True) + self.prefix
        twice: Tensor = take_tokens(features, one_that_stays)
        return torch.where(policy[:, :, None] > 0, features, twice)


HOSTS.append(LVViTHost)


def _halved(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = to_2tuple(patch_size)
    if height % 2 or width % 2:
        raise ValueError(
            f"patch_size must be even, got {patch_size}: the first convolution has a stride of 2; "
            "use 16, as released"
        )
    return height // 2, width // 2


def _make_block(**options: Any) -> Block:
    block = Block(**options)
    block.ls1, block.ls2 = ResidualDivisor(_RESIDUAL_DIVISOR), ResidualDivisor(_RESIDUAL_DIVISOR)
    return block


def _released(file: str, crop_pct: float) -> dict[str, Any]:
    return {
        "url": f"https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/{file}",
        "fixed_input_size": True,
        "crop_pct": crop_pct,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
    }


# timm looks this name up
default_cfgs = generate_default_cfgs(
    {
        "lvvit_s.in1k": _released("lvvit_s-26M-224-83.3.pth.tar", crop_pct=0.9),
        "lvvit_m.in1k": _released("lvvit_m-56M-224-84.0.pth.tar", crop_pct=1.0),
    }
)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    # the released models keep torch's epsilon, which is not timm's
    common = {"mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5)}
    features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    model: nn.Module = build_model_with_cfg(
        LVViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=features,
        **{**common, **options},
    )
    return model


def lvvit_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LV-ViT-S: 16 layers, 26 M parameters.

    Args:
        pretrained: load the released weights.
        **kwargs: arguments of `LVViT`.
    """
    return _create("lvvit_s", pretrained, {"embed_dim": 384, "depth": 16, "num_heads": 6, **kwargs})


def lvvit_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LV-ViT-M: 20 layers, 56 M parameters.

    Args:
        pretrained: load the released weights.
        **kwargs: arguments of `LVViT`.
    """
    return _create("lvvit_m", pretrained, {"embed_dim": 512, "depth": 20, "num_heads": 8, **kwargs})


for _entry_point in (lvvit_s, lvvit_m):
    register_model(_entry_point)
