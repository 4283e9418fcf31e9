"""Modules that take the place of a model's own and give it back."""

import weakref
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import Proxy

# torch keeps all but the last in dictionaries: handles are good for two modules that have the same ones
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    "_is_full_backward_hook",
)


class StandIn(nn.Module):
    """Takes the place of a module of a model, with its submodules, hooks and mode, and gives them back.

    Attributes:
        SHARED_MODULES: submodules that both have, by the names that checkpoints know.
    """

    SHARED_MODULES: ClassVar[tuple[str, ...]] = ()

    _dense: tuple[nn.Module]  # in a tuple: not a child, its weights are this module's already

    def stand_in_for(self, present: nn.Module) -> None:
        """Takes over what a module has, which stays as it is.

        Args:
            present: the model's module, or another that stands in for it.
        """
        self._dense = present._dense if isinstance(present, StandIn) else (present,)
        hand_over(present, self, self.SHARED_MODULES)

    def dense_module(self) -> nn.Module:
        """The module that this one stands in for, with the submodules, hooks and mode of now."""
        dense = self._dense[0]
        hand_over(self, dense, self.SHARED_MODULES)
        _tell_hooks(dense)
        return dense

    def _load_from_state_dict(self, *arguments: Any) -> None:
        _tell_hooks(self)
        super()._load_from_state_dict(*arguments)


def hand_over(source: nn.Module, target: nn.Module, names: Collection[str]) -> None:
    """Gives one module the submodules of these names, the hooks and the mode of another."""
    for name in names:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    for hooks in _HOOKS:
        setattr(target, hooks, getattr(source, hooks))
    target.training = source.training


def is_proxy(x: object) -> bool:
    """Whether torch.fx traces: what it passes stands for a tensor of later calls."""
    return isinstance(x, Proxy)


def leaf_node(module: nn.Module, proxy: Any, **options: Any) -> Tensor:
    """The call of a module as one node of the graph that torch.fx traces, whatever its parts are."""
    tracer = proxy.tracer
    node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(module), (proxy,), options)
    return node


def _tell_hooks(module: nn.Module) -> None:
    """Hooks of loading that want to know the module are told this one, whoever they were registered with."""
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    for hook in hooks.values():
        if hook.with_module:
            hook.module = weakref.ref(module)
