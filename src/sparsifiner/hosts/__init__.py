"""Model families: what each tells of its models, behind one protocol."""

from collections.abc import Collection

from torch import nn

from sparsifiner.hosts.base import CurrentGrid, Host
from sparsifiner.hosts.timm_vit import TimmViT

__all__ = ["HOSTS", "CurrentGrid", "Host", "find_host", "host_of", "image_size_of", "reasons_against"]

# a row for each family; of several that own a model the last one counts, so that others may refine it
HOSTS: list[type[Host]] = [TimmViT]


def find_host(model: nn.Module) -> Host | None:
    """The host of a model, None if it is of no family that is known here."""
    owners = [kind for kind in HOSTS if kind.owns(model)]
    return owners[-1](model) if owners else None


def host_of(model: nn.Module) -> Host:
    """The host of a model.

    Raises:
        ValueError: it is of no family that is known here.
    """
    host = find_host(model)
    if host is None:
        raise ValueError(_why_no_host(model))
    return host


def image_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels of the images that a model is made for, None where nobody can tell.

    Args:
        model: any module.
    """
    host = find_host(model)
    return None if host is None or host.why_no_model() else host.image_size


def reasons_against(model: nn.Module, peers: Collection[type[nn.Module]] = ()) -> list[str]:
    """Reasons why a model cannot be made sparse, or is none of blocks that are known here; empty if it can.

    Args:
        model: any module.
        peers: classes of attention modules that will do, besides those that can be replaced.
    """
    host = find_host(model)
    return [_why_no_host(model)] if host is None else host.why_not(peers)


def _why_no_host(model: nn.Module) -> str:
    inside = (name for name, each in model.named_modules() if name and find_host(each) is not None)
    found = next(inside, None)
    hint = "" if found is None else f", but its {found} is one, which can be made sparse in its place"
    families = " or ".join(dict.fromkeys(kind.FAMILY for kind in HOSTS))
    return f"{type(model).__name__} is not a {families}{hint}"
