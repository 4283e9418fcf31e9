"""Model names that timm knows after `import sparsifiner`."""

from sparsifiner.models import lvvit as lvvit
from sparsifiner.models import registry as registry
