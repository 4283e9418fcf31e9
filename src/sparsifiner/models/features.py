"""What a Vision Transformer gives besides its logits."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def patch_tokens(model: VisionTransformer, features: Tensor) -> Tensor:
    """Patch tokens behind the final norm: what a detection or segmentation head would see.

    Args:
        model: the model.
        features: [B, N, C], what `model.forward_features` gave.

    Returns:
        [B, patches, C].
    """
    tokens = features[:, model.num_prefix_tokens :]
    if isinstance(model.norm, nn.Identity):  # average pooling puts the final norm behind it
        tokens = model.fc_norm(tokens)
    return tokens
