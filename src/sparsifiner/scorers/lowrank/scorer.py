"""The paper's connectivity predictor: a learned low-rank sketch of the attention map."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, trunc_normal_
from torch import Tensor, nn

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout
from sparsifiner.ops.operator import Operator
from sparsifiner.ops.precision import accumulation_dtype
from sparsifiner.ops.select import operators
from sparsifiner.scorers.base import ListSpec, Origin, RowScores, Scorer
from sparsifiner.scorers.lowrank.options import LowRank
from sparsifiner.scorers.options import Place, ScorerOptions
from sparsifiner.scorers.released.options import Released

# Standard deviation of a basis as trained, before its sign is dropped; entries of at most .02 count as zero.
_TRAINED_SPREAD = 0.05


class LowRankScorer(Scorer):
    """Scores Â = C̃ Ũᵀ: a few coefficients per query times a sparse basis over the keys.

    ```
    q', k'  = q W_q + b_q, k W_k + b_k                      [B, H, N, c]
    k_down  = W_downᵀ k'                                    [B, H, K, c]
    C       = softmax_K(s · q' k_downᵀ)                     [B, H, rows, K], s = c ** -0.5
    C̃       = the `coef_topk` largest of each row of C, the others 0
    Ũ       = |W_up| where it exceeds `basis_threshold`, else 0     [N, K]
    Â       = C̃ Ũᵀ                                          [B, H, rows, N]
    ```

    A row of a tile starts from the tile's mean query. `W_down` and `W_up` keep the size of the
    native grid and are resampled for any other.

    Args:
        options: sizes and thresholds.
        place: its layout is kept with the weights.

    Source:
        Wei et al., "Sparsifiner", CVPR 2023, section 3.2.
    """

    FUSED: Operator | None = operators.select_lowrank
    TAKES_SIZES = False  # its projections are of head dim
    # released checkpoints keep the parameters under these names
    RELEASED_NAMES = (("proj_c_q", "query"), ("proj_c_k", "key"), ("proj_back_n", "up"), ("proj_n", "down"))

    SIZED_BY_FILES = ("native_grid", "down", "up")
    LACKED_BY_FILES = ("native_grid",)  # older files do not tell

    options: LowRank | Released
    native_grid: Tensor

    def __init__(self, options: LowRank | Released, place: Place) -> None:
        super().__init__(options, place)
        layout, head_dim = place.native, place.head_dim
        basis, reduced_dim = self.sizes_of(options, place)
        self.native_layout = layout
        self.register_buffer("native_grid", torch.tensor(layout.grid))
        self.query = nn.Linear(head_dim, reduced_dim)
        self.key = nn.Linear(head_dim, reduced_dim)
        self.down = nn.Parameter(torch.empty(layout.tokens, basis))
        self.up = nn.Parameter(torch.empty(layout.tokens, basis))
        self.register_load_state_dict_pre_hook(_adopt_native_size)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    @classmethod
    def sizes_of(cls, options: Any, place: Place) -> tuple[int, int]:
        """K and c that options ask for."""
        reduced_dim = max(1, place.head_dim // 2) if options.reduced_dim is None else options.reduced_dim
        return cls.basis_size(options, place.native), reduced_dim

    @classmethod
    def basis_size(cls, options: Any, layout: TokenLayout) -> int:
        """K that options ask for."""
        basis: int = options.basis
        return basis

    @property
    def temperature(self) -> float:
        """s, the factor of the coefficients' logits."""
        reduced_dim: int = self.query.out_features
        return float(reduced_dim**-0.5)

    @property
    def kept_coefficients(self) -> int:
        """Coefficients that are kept per row."""
        return min(self.options.coef_topk, self.up.shape[1])

    @property
    def used_coefficients(self) -> int:
        """Coefficients that a row of scores is the product of."""
        return self.kept_coefficients

    def continued(self, options: ScorerOptions, place: Place) -> Scorer | None:
        """See `Scorer.continued`: weights keep their grid, and serve as the released scorer's too."""
        kind = options.scorer_class()
        if not issubclass(kind, LowRankScorer):
            return None
        here = replace(place, native=self.native_layout)
        if kind.sizes_of(options, here) != (self.up.shape[1], self.query.out_features):
            return None
        if type(self.options) is type(options):
            return self
        with torch.device("meta"):  # its own weights would only be thrown away
            other = options.build(here)
        # the same parameters: optimizers hold them
        other._modules.update(self._modules)
        other._parameters.update(self._parameters)
        other._buffers.update(self._buffers)
        return other.train(self.training)

    def misfits(self, state: Mapping[str, Tensor], prefix: str) -> list[str]:
        """See `Scorer.misfits`."""
        try:
            self.layout_of(state, prefix)
        except ValueError as error:
            return [str(error)]
        return []

    def imitate_training(self) -> None:
        """See `Scorer.imitate_training`: entries of the basis lie on both sides of the threshold."""
        self.up.data.copy_(_TRAINED_SPREAD * torch.randn_like(self.up).abs())

    def layout_of(self, state: Mapping[str, Tensor], prefix: str) -> TokenLayout:
        """Tokens that the weights of a state dict are for; those that it lacks are the ones of now.

        Args:
            state: the state dict.
            prefix: what it puts before the names.

        Raises:
            ValueError: `native_grid` is no grid, or W_down or W_up do not have its size.
        """
        grid: list[int] = list(self.native_layout.grid)
        told = state.get(prefix + "native_grid")
        if told is not None:
            is_whole = not (told.is_floating_point() or told.is_complex() or told.dtype == torch.bool)
            if not is_whole or told.shape != (2,) or told.amin() < 1:
                raise ValueError(f"{prefix}native_grid must be height and width of a grid, got {told}")
            grid = told.tolist()
        layout = TokenLayout((grid[0], grid[1]), self.native_layout.prefix)
        for name in ("down", "up"):
            own: Tensor = getattr(self, name)
            shape = list(state.get(prefix + name, own).shape)
            if shape != [layout.tokens, own.shape[1]]:
                raise ValueError(
                    f"{prefix}{name} is {shape}, but a grid of {grid[0]}x{grid[1]} patches after "
                    f"{layout.prefix} prefix tokens asks for {[layout.tokens, own.shape[1]]}"
                )
        return layout

    def reset_parameters(self) -> None:
        """Truncated normal of standard deviation .02, biases 0."""
        for weight in (self.query.weight, self.key.weight, self.down, self.up):
            trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.key.bias)

    def coefficients(
        self, q: Tensor, k: Tensor, layout: Layout, tile: int = 1, origin: Origin | None = None
    ) -> Tensor:
        """C, all K coefficients of every row: [B, H, rows, K], rows sum to 1.

        Args:
            q: [B, H, N, d] unscaled queries.
            k: [B, H, N, d] keys.
            layout: where the tokens lie.
            tile: side of a tile.
            origin: where they come from, if some of the image's are gone.
        """
        accurate = accumulation_dtype(q.dtype)
        query = layout.square_means(q[:, :, layout.prefix :].to(accurate), tile)
        projections = (each.to(accurate) for each in self._projections(q))
        query_weight, query_bias, key_weight, key_bias = projections
        reduced_query = F.linear(query, query_weight, query_bias)
        reduced_key = F.linear(k.to(accurate), key_weight, key_bias)
        if origin is None:
            down = self._resampled_down(whole_layout(layout)).to(accurate)
        else:
            of_image = self._resampled_down(origin.layout).to(accurate)
            # a quadrature, whose sum stays when patches go
            gain = torch.ones(layout.tokens, 1, device=q.device, dtype=accurate)
            gain[layout.prefix :] = origin.layout.patches / layout.patches
            down = (of_image[origin.tokens] * gain)[:, None]  # [B, 1, N, K]
        key_down = (reduced_key.mT @ down).mT  # [B, H, K, c]
        logits: Tensor = reduced_query @ key_down.mT * self.temperature
        return logits.softmax(-1)

    def basis(self, layout: TokenLayout) -> Tensor:
        """Ũ, the sparse basis: [N, K], never negative.

        Its gradient with respect to W_up is sign(W_up) everywhere (straight through the threshold), so
        that entries below the threshold can grow back.
        """
        magnitude = self._resampled_up(layout).abs()
        sparse = F.threshold(magnitude.detach(), self.options.basis_threshold, 0.0)
        return sparse + (magnitude - magnitude.detach()) if torch.is_grad_enabled() else sparse

    def factors(self, q: Tensor, k: Tensor, layout: Layout, tile: int) -> tuple[Tensor, Tensor]:
        """See `Scorer.factors`: C̃ and Ũ."""
        largest = self._largest_coefficients(q, k, layout, tile)
        sparse = largest.values.new_zeros(*largest.values.shape[:-1], self.up.shape[1])
        return sparse.scatter(-1, largest.indices, largest.values), self.basis(whole_layout(layout))

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        largest = self._largest_coefficients(q, k, spec.layout, spec.tile, spec.origin)
        if spec.origin is None:
            basis = self.basis(whole_layout(spec.layout)).to(largest.values.dtype).mT.contiguous()  # [K, N]
            first_row = torch.zeros(1, dtype=torch.long, device=q.device)
        else:
            of_image = self.basis(spec.origin.layout).to(largest.values.dtype)
            basis = of_image[spec.origin.tokens].mT.flatten(0, 1).contiguous()  # [B * K, N]
            first_row = torch.arange(q.shape[0], device=q.device) * self.up.shape[1]

        def scores(start: int, stop: int) -> Tensor:
            # a sparse product: `coef_topk` basis rows per row of scores instead of all K
            index = largest.indices[:, :, start:stop] + first_row[:, None, None, None]
            weight = largest.values[:, :, start:stop]
            flat = F.embedding_bag(
                index.reshape(-1, index.shape[-1]),
                basis,
                per_sample_weights=weight.reshape(-1, weight.shape[-1]),
                mode="sum",
            )
            return flat.view(*index.shape[:-1], basis.shape[1])

        return scores

    def can_fuse(self, spec: ListSpec) -> bool:
        """See `Scorer.can_fuse`: weights of single tokens that are left are not known to kernels."""
        return spec.origin is None

    def fused_sizes(self, spec: ListSpec, head_dim: int) -> dict[str, int]:
        """See `Scorer.fused_sizes`."""
        return {
            "scored_keys": spec.layout.tokens - spec.forced,
            "basis_elements": self.up.shape[1] * head_dim,
            "reduced_dim": self.query.out_features,
        }

    def fused_lists(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec, backend: str) -> Connectivity:
        """See `Scorer.fused_lists`."""
        layout = whole_layout(spec.layout)
        weights = (*self._projections(q), self._resampled_down(layout), self.basis(layout).mT)
        geometry = layout.for_kernels(spec.tile)
        sizes = (self.temperature, self.kept_coefficients, spec.budget, spec.forced)
        return spec.connectivity(operators.select_lowrank(q, k, *weights, geometry, *sizes, backend))

    def macs(self, spec: ListSpec, num_heads: int, head_dim: int) -> int:
        """See `Scorer.macs`: projections, k_down, coefficients and the sparse product, in this order.

        The kernels sum the keys up before they project them, which takes somewhat fewer.
        """
        N, rows = spec.layout.tokens, spec.rows
        reduced_dim, basis = self.query.out_features, self.up.shape[1]
        per_head = (
            (rows + N) * head_dim * reduced_dim
            + N * basis * reduced_dim
            + rows * basis * reduced_dim
            + rows * self.used_coefficients * N
        )
        return num_heads * per_head

    def extra_repr(self) -> str:
        """Sizes and thresholds."""
        tokens, basis = self.up.shape
        return f"tokens={tokens}, basis={basis}, coef_topk={self.options.coef_topk}"

    def _projections(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_q, b_q, W_k and b_k, where queries [B, H, N, d] are."""
        return *_affine_map(self.query, q), *_affine_map(self.key, q)

    def _largest_coefficients(
        self, q: Tensor, k: Tensor, layout: Layout, tile: int, origin: Origin | None = None
    ) -> torch.return_types.topk:
        """Values and indices of the coefficients that are kept, [B, H, rows, coef_topk]."""
        coefficients = self.coefficients(q, k, layout, tile, origin)
        return coefficients.topk(self.kept_coefficients, -1)

    def _resampled_down(self, layout: TokenLayout) -> Tensor:
        """W_down at another grid: a quadrature over patches, so its sum over them is kept."""
        if layout.grid == self.native_layout.grid:
            return self.down
        resampled = self._resample(self.down, layout)
        gain = torch.ones(layout.tokens, 1, device=resampled.device)
        gain[layout.prefix :] = self.native_layout.patches / layout.patches
        return resampled * gain

    def _resampled_up(self, layout: TokenLayout) -> Tensor:
        """W_up at another grid, with the spread that the threshold was learned for."""
        if layout.grid == self.native_layout.grid:
            return self.up
        resampled = self._resample(self.up, layout)
        prefix, patches = resampled[: layout.prefix], resampled[layout.prefix :]
        spread = self.up[layout.prefix :].std() / patches.std()
        return torch.cat([prefix, patches * spread])

    def _resample(self, weight: Tensor, layout: TokenLayout) -> Tensor:
        resampled = resample_abs_pos_embed(
            weight.unsqueeze(0),
            new_size=list(layout.grid),
            old_size=list(self.native_layout.grid),
            num_prefix_tokens=layout.prefix,
        )
        assert isinstance(resampled, Tensor)
        return resampled.squeeze(0)


def whole_layout(layout: Layout) -> TokenLayout:
    """The layout of a whole image, for which weights can be resampled.

    Raises:
        TypeError: patches are gone, and it is not told which.
    """
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"low-rank scores for a {layout} take the origin of its tokens; give ListSpec.origin")
    return layout


def _affine_map(projection: nn.Module, q: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [c, d] and bias [c] that a projection applies, which need not be those that it holds.

    Weights may lie elsewhere until the projection is called (offloaded), be no plain tensors (quantised), or
    only be part of what is applied (parametrised, low-rank adapters): what it makes of the axes tells.
    """
    weight: Any = projection.weight
    if type(projection) is nn.Linear and type(weight) in {Tensor, nn.Parameter} and weight.device == q.device:
        return projection.weight, projection.bias
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
    origin_and_axes = torch.eye(q.shape[-1] + 1, q.shape[-1], dtype=dtype, device=q.device).roll(1, 0)
    applied: Tensor = projection(origin_and_axes)
    return (applied[1:] - applied[0]).mT, applied[0]


def _adopt_native_size(
    module: LowRankScorer,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Takes over the native grid of weights that were made at another image size, if all of them fit it."""
    own = {prefix + name: getattr(module, name) for name in ("native_grid", "down", "up")}
    if not own.keys() & state_dict.keys():
        return
    if prefix + "up" in state_dict:  # released checkpoints do not tell
        state_dict.setdefault(prefix + "native_grid", module.native_grid)
    try:
        layout = module.layout_of(state_dict, prefix)
    except ValueError as error:
        errors.append(str(error))
        state_dict.update(own)  # loaded into themselves, these stay as they are
        return
    if layout != module.native_layout:
        module.native_layout = layout
        for weight in (module.down, module.up):
            # the same parameters: optimizers hold them, and frozen ones stay frozen
            weight.data = weight.data.new_empty(layout.tokens, weight.shape[1])
            weight.grad = None
