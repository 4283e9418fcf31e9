"""Model names that timm knows once this is imported, which the first use of `sparsifiner` does."""

from sparsifiner.models import lvvit as lvvit
from sparsifiner.models import registry as registry
