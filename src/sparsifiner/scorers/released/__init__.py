"""The low-rank scorer exactly as released."""
