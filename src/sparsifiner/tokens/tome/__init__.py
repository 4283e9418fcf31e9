"""ToMe: merges the pairs of tokens that are most alike."""
