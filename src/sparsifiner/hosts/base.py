"""What a model family tells of its models, so that nothing else has to know the family."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsifiner.attention import SparseAttention
from sparsifiner.blocks import TokenBlock, TokenBlocks
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.standin import StandIn, is_proxy
from sparsifiner.tokens.state import TokenState

# what is told of every attention: q and k, each [B, H, N, d]
Tell = Callable[[Tensor, Tensor], None]


class Host(ABC):
    """One model of a family: where its attention stands, what a call computes, why it may not do.

    A view without a state of its own, made whenever it is needed. A new family is a file with a subclass and
    its `SparseAttention`, and a row in `sparsifiner.hosts.HOSTS`.

    Args:
        model: the model.

    Attributes:
        FAMILY: what its models are called in messages.
        ATTENTION: name of the attention module in a block, with dots where it lies deeper.
        ATTENTIONS: classes of attention modules that can be replaced; subclasses of theirs cannot.
        BLOCKS: classes of blocks that are known; None for any.
        SPARSE_ATTENTION: what takes the place of these attention modules.
        TOKEN_BLOCK: what takes the place of a block where tokens are dropped; None where that is not known.
    """

    FAMILY: ClassVar[str]
    ATTENTION: ClassVar[str]
    ATTENTIONS: ClassVar[tuple[type[nn.Module], ...]]
    BLOCKS: ClassVar[tuple[type[nn.Module], ...] | None] = None
    SPARSE_ATTENTION: ClassVar[type[SparseAttention]]
    TOKEN_BLOCK: ClassVar[type[TokenBlock] | None] = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def owns(cls, model: nn.Module) -> bool:
        """Whether a model is of this family, whether or not it can be made sparse."""

    # Where attention stands

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order; each has one attention module."""

    def attention_of(self, block: nn.Module) -> Any:
        """The attention module of a block, None if there is none of that name."""
        found: Any = block
        for name in self.ATTENTION.split("."):
            found = getattr(found, name, None)
        return found

    def put_attention(self, block: nn.Module, attention: nn.Module) -> None:
        """Puts a module where the attention of a block stands."""
        path, _, name = self.ATTENTION.rpartition(".")
        setattr(block.get_submodule(path), name, attention)

    @property
    def attentions(self) -> list[Any]:
        """The attention modules, in order."""
        return [self.attention_of(block) for block in self.blocks]

    def heads_of(self, attention: Any) -> tuple[int, int]:
        """Number of heads H and head dim d of an attention module, dense or sparse."""
        return attention.num_heads, attention.head_dim

    def scale_of(self, attention: Any) -> float:
        """Factor of the logits of an attention module, dense or sparse: `d ** -0.5` unless it has another."""
        scale: float = getattr(attention, "scale", self.heads_of(attention)[1] ** -0.5)
        return scale

    @property
    def attention_names(self) -> list[str]:
        """Their names in the model, in order."""
        names = {id(module): name for name, module in self.model.named_modules(remove_duplicate=False)}
        return [names[id(attention)] for attention in self.attentions]

    def put_blocks(self, blocks: TokenBlocks) -> None:
        """Puts blocks that drop tokens where the model's own stand."""
        raise NotImplementedError(f"{type(self).__name__} names a TOKEN_BLOCK, so it must put blocks")

    # What its tokens are

    @property
    @abstractmethod
    def prefix(self) -> int:
        """Number of prefix tokens."""

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self.prefix > 0

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a token."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Classes of the logits, 0 for none."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model is made for."""

    @property
    @abstractmethod
    def native_grid(self) -> tuple[int, int]:
        """Patches along height and width of these images."""

    @property
    def native(self) -> TokenLayout:
        """Their tokens."""
        return TokenLayout(self.native_grid, self.prefix)

    @property
    def takes_any_size(self) -> bool:
        """Whether images may change size from call to call; then `grid_of` and `embedding` tell more."""
        return False

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches along height and width of images of this size in pixels, where any size is taken."""
        raise NotImplementedError(f"{type(self).__name__} takes any size, so it must tell their grids")

    @property
    def embedding(self) -> nn.Module:
        """The module that gives patches as [B, gh, gw, C], where images of any size are taken."""
        raise NotImplementedError(f"{type(self).__name__} takes any size, so it must tell what embeds them")

    def layout_for(self, size: tuple[int, int]) -> TokenLayout:
        """Tokens of images of this height and width in pixels.

        Raises:
            ValueError: the model does not take them.
        """
        height, width = size
        if self.takes_any_size:
            return TokenLayout(self.grid_of((height, width)), self.prefix)
        if (height, width) != self.image_size:
            raise ValueError(
                f"images of {height}x{width} px do not fit the model, which takes "
                f"{self.image_size[0]}x{self.image_size[1]}; call model.set_input_size((height, width)) "
                "first, or create it with img_size="
            )
        return self.native

    # What a call computes

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """What multiplies in front of the blocks, for counting: images [B, 3, H, W] to patches."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to tokens behind the blocks and the norm that follows them, [B, N, C]."""

    @abstractmethod
    def features_from(self, block: int, x: Tensor) -> Tensor:
        """The same from the tokens [B, N, C] in front of a block."""

    @property
    @abstractmethod
    def last_module(self) -> nn.Module:
        """The module whose output the features are."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Features [B, N, C] to logits [B, classes]."""

    def patch_tokens(self, features: Tensor, state: TokenState | None = None) -> Tensor:
        """Patch tokens behind the final norm: what a detection or segmentation head would see.

        Args:
            features: [B, N, C].
            state: which tokens these are, None for all.

        Returns:
            [B, patches, C], those that are left.
        """
        return features[:, self.prefix if state is None else state.prefix :]

    @abstractmethod
    def watch_projections(self, attention: Any, tell: Tell) -> RemovableHandle:
        """Tells q and k [B, H, N, d], as attention sees them, whenever an attention module is called.

        Args:
            attention: dense or sparse.
            tell: is called without gradients.
        """

    @property
    def computes_again(self) -> bool:
        """Whether layers are computed a second time for gradients (gradient checkpointing)."""
        return bool(getattr(self.model, "grad_checkpointing", False)) and torch.is_grad_enabled()

    def why_not_masked(self) -> str:
        """Why tokens that would be gone cannot be kept from the logits, see `masked`; empty if they can."""
        return f"the head of a {self.FAMILY} may look at all tokens"

    def masked(self, features: Tensor, policy: Tensor) -> Tensor:
        """Features of which the head makes what it makes of the tokens that stay.

        Args:
            features: [B, N, C].
            policy: [B, N] of 0 and 1.
        """
        raise NotImplementedError(f"{type(self).__name__} says that tokens can be masked, so it must do so")

    # What can go wrong

    def why_not(self, peers: Collection[type[nn.Module]] = ()) -> list[str]:
        """Reasons why the model cannot be made sparse, as ends of a sentence; empty if it can.

        Args:
            peers: classes of attention modules that will do, too.
        """
        reasons = self.why_no_model()
        if not len(self.blocks):
            reasons.append("it has no blocks")
        against: dict[str, list[int]] = {}
        for index, block in enumerate(self.blocks):
            reason = self._why_not_block(block, peers)
            if reason:
                against.setdefault(reason, []).append(index)
        for reason, indices in against.items():
            more = f" (and {len(indices) - 1} more)" if len(indices) > 1 else ""
            reasons.append(f"block {indices[0]} {reason}{more}")
        return reasons

    def why_no_tokens(self) -> str:
        """Why tokens cannot be dropped or merged in this model; empty if they can."""
        if self.TOKEN_BLOCK is None:
            return f"blocks of a {self.FAMILY} cannot pass on which tokens are left; use tokens=None"
        hooked = [
            index
            for index, block in enumerate(self.blocks)
            if not isinstance(block, TokenBlock) and (block._forward_hooks or block._forward_pre_hooks)
        ]
        if hooked:
            return (
                f"blocks {hooked} have forward hooks, which blocks that drop tokens would not call; "
                "remove them, and hook their attn or mlp"
            )
        for index, block in enumerate(self.blocks):
            own = "" if isinstance(block, TokenBlock) else own_parts(block, self.TOKEN_BLOCK.SHARED_MODULES)
            if own:
                return f"block {index} has {own}, which blocks that drop tokens would not have"
        return ""

    def why_no_size(self) -> str:
        """Why the image size that the model was made with cannot be computed with; empty if it can."""
        return ""

    def resampled(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with its embeddings at the model's patch size and grid.

        Raises:
            ValueError: they cannot be resampled.
        """
        raise ValueError(f"resample=True is not supported for a {self.FAMILY}; give weights of its size")

    def why_no_model(self) -> list[str]:
        """Reasons against the model besides its blocks."""
        return []

    def _why_not_block(self, block: nn.Module, peers: Collection[type[nn.Module]]) -> str:
        """Why a block will not do, as the end of a sentence; empty if it will."""
        known = self.BLOCKS
        if known is not None and type(block) not in known and not isinstance(block, TokenBlock):
            return f"is a {type(block).__name__}, which is not supported"
        attention = self.attention_of(block)
        if isinstance(attention, SparseAttention):
            return ""
        if type(attention) not in {*self.ATTENTIONS, *peers}:
            needed = " or ".join(kind.__name__ for kind in self.ATTENTIONS)
            article = "an" if needed[:1] in "AEIOU" else "a"
            return f"has a {type(attention).__name__} where {article} {needed} is needed"
        if isinstance(attention, StandIn):
            return ""
        own = own_parts(attention, self.SPARSE_ATTENTION.SHARED_MODULES)
        return own and f"has an attention with {own}, which would be lost"


class CurrentGrid:
    """The patch grid of the input being computed, shared by all layers of a model.

    It is the native one; where images may change size from call to call, a hook on what embeds them notes
    the size of this thread's call, once it is attached.

    Args:
        host: of the whole model.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self._call = threading.local()
        self._hook: RemovableHandle | None = None

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        model: nn.Module = self.host.model
        return model

    def current(self) -> tuple[int, int]:
        """Patches along height and width.

        Raises:
            ValueError: the model's gradient checkpointing would compute layers again after the grid of
                another call was noted.
        """
        if not self.host.takes_any_size:
            return self.host.native_grid
        if self.host.computes_again:
            raise ValueError(
                "dynamic_img_size and gradient checkpointing do not go together in a sparse model; create it "
                "with dynamic_img_size=False, or call model.set_grad_checkpointing(False)"
            )
        if hasattr(self._call, "grid"):
            grid: tuple[int, int] = self._call.grid
            return grid
        return self.host.native_grid

    def computes_again(self) -> bool:
        """Whether layers are computed a second time for gradients (gradient checkpointing)."""
        return self.host.computes_again

    def attach(self) -> None:
        """Puts the hook on the embedding that the model has now, if it needs one."""
        self.remove()
        if self.host.takes_any_size:
            self._hook = self.host.embedding.register_forward_hook(self._hear)

    def remove(self) -> None:
        """Takes the hook away."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def note(self, embedded: Tensor) -> Tensor:
        """Notes the grid of embedded patches [B, gh, gw, C], and gives them back."""
        self._call.grid = (embedded.shape[1], embedded.shape[2])
        return embedded

    def _hear(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        if is_proxy(output):  # the size is that of each call of the graph, of which this makes a node
            traced: Any = output
            return traced.tracer.create_proxy("call_function", self.note, (output,), {})
        return self.note(output)

    def __getstate__(self) -> dict[str, Any]:
        """All but the thread-local note, which neither copies nor pickles."""
        return {name: value for name, value in self.__dict__.items() if name != "_call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state with no call noted."""
        self.__dict__.update(state)
        self._call = threading.local()


def own_parts(module: nn.Module, known: Collection[str]) -> str:
    """What was put into a model's module, which another in its place would not have; empty for nothing."""
    if "forward" in vars(module):
        return "a forward of its own"
    names = [name for name, _ in module.named_children() if name not in known]
    if names:
        return f"modules of its own: {', '.join(names)}"
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return f"tensors of its own: {', '.join(name for name, _ in own)}" if own else ""
