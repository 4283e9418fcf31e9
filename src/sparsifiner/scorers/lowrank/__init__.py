"""The paper's learned scorer."""
