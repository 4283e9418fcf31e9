"""Builds a model by name, makes it sparse and loads weights, with errors that say what is wrong."""

import difflib
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from sparsifiner.attention import SparseAttention, rename_released_keys
from sparsifiner.config import SparsifyConfig
from sparsifiner.convert import about_to_train, plan_sparsity, sparsify
from sparsifiner.hosts import find_host, host_of
from sparsifiner.models.adapter import is_predictor, is_scorer, read_adapter_config
from sparsifiner.scorers import SCORERS, Scorer

_SHOWN_KEYS = 3
_RELEASED = ".mask_predictor."  # the scorer's name in released checkpoints


def load_model(
    name: str,
    *,
    config: SparsifyConfig | None = None,
    weights: str | Path | None = None,
    adapter: str | Path | None = None,
    resample: bool = False,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Creates a timm model, sparse if asked, in evaluation mode.

    Args:
        name: a timm model name.
        config: how to make it sparse; None leaves it as timm made it.
        weights: file of weights, `.safetensors` or a torch checkpoint; those of the dense model fit
            the sparse one.
        adapter: file of the scorers' weights, as training or calibration writes it.
        resample: fit patch and position embeddings of `weights` made at another image or patch size, as
            timm does with the weights that it fetches.
        img_size: side, or height and width, of the input in pixels; the model's own by default.
        pretrained: load timm's weights from the hub.
        model_args: more arguments for timm, such as `{"num_classes": 10}`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no file `weights` or `adapter`.
        ValueError: the name, an argument, the image size, the weights or the adapter do not fit.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() lists all"
        raise ValueError(f"model={name!r} is not a timm model{hint}")
    arguments = dict(model_args or {})
    if img_size is not None:
        arguments["img_size"] = img_size
    state = None if weights is None else read_weights(weights)
    if adapter is not None:
        config = _config_of_adapter(adapter, config)
    scorers = None if adapter is None else _read_adapter(adapter, config)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError, ArithmeticError, LookupError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"model_args={arguments} do not fit {name}: {reason}") from error
    host = find_host(model)
    reason = "" if host is None else host.why_no_size()
    if reason:
        raise ValueError(f"model={name!r}: {reason}")
    if config is not None:
        scorer = scorers is not None or (state is not None and _holds_scorer(state))
        predictor = state is not None and any(is_predictor(key) for key in state)
        with about_to_train(scorer=scorer, predictor=predictor):
            sparsify(model, config)
    if state is not None:
        if resample:
            state = host_of(model).resampled(state)
        _load_checked(model, state, f"weights={str(weights)!r}", may_resample=not resample)
    if scorers is not None:
        learning = {
            f"{name}.": module for name, module in model.named_modules() if isinstance(module, Scorer)
        }
        _check_scorers(learning, scorers, f"adapter={str(adapter)!r}")
        _load_scorers(learning, scorers)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, *, resample: bool = False) -> None:
    """Loads a file of weights into a model.

    Args:
        model: what they are for.
        path: the file.
        resample: fit embeddings of another image or patch size, as for `load_model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or does not fit.
    """
    state = read_weights(path)
    state = host_of(model).resampled(state) if resample else state
    _load_checked(model, state, f"weights={str(path)!r}", may_resample=not resample)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file or a torch checkpoint, without running its code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, LookupError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"weights={str(path)!r} cannot be read: it may be corrupt or cut off, or hold more than tensors "
            "and numbers; fetch it again, or save its state dict as .safetensors"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"weights={str(path)!r} holds no state dict of tensors")
    # DistributedDataParallel and torch.compile put a word before the names of their inner model
    return dict(clean_state_dict(content))


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Makes a model sparse as an adapter file says, in place, with its scorers' weights.

    Args:
        model: the dense model that the adapter was made for, or a sparse one.
        path: what `save_adapter` or `sparsifiner calibrate` wrote.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no configuration, or does not fit the model, which is then as it was.
    """
    config = read_adapter_config(path)
    if config is None:
        raise ValueError(
            f"path={str(path)!r} holds scorers' weights alone, as training writes them; give the "
            "configuration they were trained with: load_model(name, config=..., weights=..., adapter=...)"
        )
    scorers = _read_adapter(path, config)
    plan = plan_sparsity(model, config)
    learning = {
        f"{name}.scorer.": layer.scorer
        for name, layer in zip(plan.host.attention_names, plan.layers, strict=True)
    }
    _check_scorers(learning, scorers, f"path={str(path)!r}")
    with about_to_train(predictor=False):  # the scorer's weights are about to come
        for warning in plan.warnings:
            warnings.warn(warning, stacklevel=2)
    plan.carry_out()
    _load_scorers(learning, scorers)
    return model


def _config_of_adapter(path: str | Path, config: SparsifyConfig | None) -> SparsifyConfig | None:
    """The configuration that an adapter brings, else the one that is given; both must agree."""
    brought = read_adapter_config(path)
    if brought is not None and config is not None and brought != config:
        raise ValueError(
            f"adapter={str(path)!r} brings its own configuration, which differs from config; leave config out"
        )
    return brought or config


def _read_adapter(path: str | Path, config: SparsifyConfig | None) -> dict[str, Tensor]:
    scorers = read_weights(path)
    learns = config is not None and config.scorer.LEARNS
    if not scorers and config is not None and not learns:
        return scorers
    if not learns:
        chosen = "preset='dense'" if config is None else f"scorer={SCORERS.name_of(config.scorer)!r}"
        raise ValueError(f"adapter={str(path)!r} holds learned scorers, but {chosen}; use preset='paper'")
    strange = [key for key in scorers if not is_scorer(key)]
    if strange:
        raise ValueError(
            f"adapter={str(path)!r} holds more than scorers ({_shorten(strange)}); load it as weights"
        )
    return scorers


def _load_checked(
    model: nn.Module, state: dict[str, Tensor], source: str, *, may_resample: bool = False
) -> None:
    """Loads a state whole, or says what does not fit and leaves the model as it was."""
    state = dict(state)
    own, scorers = model.state_dict(), {}
    for name, module in model.named_modules():
        if isinstance(module, SparseAttention):
            rename_released_keys(module, state, f"{name}.")
        if isinstance(module, Scorer):
            scorers[f"{name}."] = module
    problems = _misfits(own, scorers, state)
    if problems:
        hint = ", or give --resample if only the image or patch size differs" if may_resample else ""
        raise ValueError(
            f"{source} does not fit the model: {_shorten(problems)}; "
            f"set --model-args and --img-size to those that it was made with{hint}"
        )
    missing = [key for key in own if key not in state]
    if not _holds_scorer(state):  # dense weights have no scorer: that is what training adds
        missing = [key for key in missing if not is_scorer(key)]
    if not any(is_predictor(key) for key in state):
        missing = [key for key in missing if not is_predictor(key)]
    _check_names(missing, state.keys() - own.keys(), scorers, source)
    model.load_state_dict(state, strict=False)


def _check_scorers(scorers: Mapping[str, Scorer], state: Mapping[str, Tensor], source: str) -> None:
    """Checks that a state is the whole state of these scorers, whose names begin with the keys."""
    own = {
        prefix + name: tensor
        for prefix, scorer in scorers.items()
        for name, tensor in scorer.state_dict().items()
    }
    problems = _misfits(own, scorers, state)
    if problems:
        raise ValueError(f"{source} does not fit the model: {_shorten(problems)}")
    _check_names([key for key in own if key not in state], state.keys() - own.keys(), scorers, source)


def _load_scorers(scorers: Mapping[str, Scorer], state: Mapping[str, Tensor]) -> None:
    for prefix, scorer in scorers.items():
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        scorer.load_state_dict(own)


def _misfits(
    own: Mapping[str, Tensor], scorers: Mapping[str, Scorer], state: Mapping[str, Tensor]
) -> list[str]:
    """What of a state does not fit the tensors of the same names; scorers take over the size of theirs."""
    problems: list[str] = []
    sized: set[str] = set()
    for prefix, scorer in scorers.items():
        sized.update(prefix + name for name in scorer.SIZED_BY_FILES)
        problems += scorer.misfits(state, prefix)
    for key in state.keys() & own.keys():
        there, here = state[key], own[key]
        if key not in sized and there.shape != here.shape:
            problems.append(f"{key} is {list(there.shape)} in the file and {list(here.shape)} in the model")
        elif _kind(there) != _kind(here):
            problems.append(f"{key} is {there.dtype} in the file and {here.dtype} in the model")
    return sorted(problems)


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Kinds of numbers that stay what they are in each other's place."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _check_names(
    missing: Iterable[str], unexpected: Iterable[str], scorers: Mapping[str, Scorer], source: str
) -> None:
    lacked = {prefix + name for prefix, scorer in scorers.items() for name in scorer.LACKED_BY_FILES}
    missing = [key for key in missing if key not in lacked]
    problems = [f"{key} is missing from the file" for key in missing]
    problems += [f"{key} is unknown to the model" for key in sorted(unexpected)]
    if problems:
        raise ValueError(f"{source} does not fit the model: {_shorten(problems)}")


def _holds_scorer(state: dict[str, Tensor]) -> bool:
    return any(is_scorer(key) or _RELEASED in key for key in state)


def _shorten(problems: list[str]) -> str:
    more = len(problems) - _SHOWN_KEYS
    return "; ".join(problems[:_SHOWN_KEYS]) + (f"; and {more} more" if more > 0 else "")
