"""DynamicViT: a small network predicts which patches stay."""
