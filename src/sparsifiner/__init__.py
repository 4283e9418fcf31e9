"""Vision Transformers that attend only to the token pairs that matter for this image."""
