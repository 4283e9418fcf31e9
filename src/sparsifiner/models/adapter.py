"""Adapter files: a sparse configuration and the scorers' weights, apart from the backbone."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsifiner.attention import SparseAttention
from sparsifiner.config import SparsifyConfig, config_from_dict, config_to_dict
from sparsifiner.convert import sparse_layers
from sparsifiner.files import check_absent, write_aside

_KEY = "sparsifiner"


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Writes the configuration of a sparse model and the weights of its scorers, if they have any.

    Args:
        model: a sparse model, or a wrapper around one: weights have the names that the model gives them.
        path: a .safetensors file that is not there yet.

    Raises:
        FileExistsError: there is such a file.
        ValueError: the model is not sparse, has predictors of tokens or scorers with parts of a wrapper, or
            `path` has another ending.
    """
    path = check_new(path)
    layer = sparse_layers(model)[0]
    model = layer.grid.model
    if any(is_predictor(name) for name, _ in model.named_parameters()):
        raise ValueError(
            "model has DynamicViT's predictors, which are trained with the backbone and belong to its "
            "weights; save model.state_dict() instead"
        )
    scorers = {name: tensor.detach().cpu().contiguous() for name, tensor in scorer_weights(model).items()}
    known = _tensors_of_a_scorer(layer)
    strange = [name for name in scorers if name.rpartition(".scorer.")[2] not in known]
    if strange:
        raise ValueError(
            f"model has scorers with parts of a wrapper, such as {strange[0]}; merge or remove the wrapper"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {_KEY: json.dumps(config_to_dict(layer.config))}
    write_aside(path, lambda file: save_file(scorers, file, metadata))


def _tensors_of_a_scorer(layer: SparseAttention) -> set[str]:
    """Names of the tensors that a scorer has which nobody has wrapped."""
    with torch.device("meta"):
        scorer = layer.config.scorer.build(layer.place)
    return set(scorer.state_dict())


def is_scorer(name: str) -> bool:
    """Whether a parameter of this name belongs to a scorer."""
    return ".scorer." in name


def is_predictor(name: str) -> bool:
    """Whether a parameter of this name belongs to what chooses the tokens that stay."""
    return ".reducer." in name


def scorer_weights(model: nn.Module) -> dict[str, Tensor]:
    """The scorers' entries of the state dict."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_scorer(name)}


def check_new(path: str | Path) -> Path:
    """The path of an adapter that can be written.

    Raises:
        FileExistsError: there is such a file.
        ValueError: it has another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    check_absent(path)
    return path


def read_adapter_config(path: str | Path) -> SparsifyConfig | None:
    """The configuration that an adapter file holds, None for the scorers' weights alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"adapter={str(path)!r}: there is no such file")
    if path.suffix != ".safetensors":  # a torch checkpoint
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        return None if text is None else config_from_dict(json.loads(text))
    except (SafetensorError, json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"adapter={str(path)!r} cannot be read: {error}; make it again") from error
