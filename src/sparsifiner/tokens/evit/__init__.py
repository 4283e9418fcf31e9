"""EViT: keeps the patches that the class token attends to most."""
