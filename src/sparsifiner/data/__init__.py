"""Reading labelled images, for evaluation and training."""

from sparsifiner.data.images import ImageSet, UnreadableImageError, open_images
from sparsifiner.data.loader import evaluation_transform, make_loader

__all__ = ["ImageSet", "UnreadableImageError", "evaluation_transform", "make_loader", "open_images"]
