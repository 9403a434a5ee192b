"""Function-preserving and advanced knowledge initialization: Net2Net's index maps for a whole transformer.

Chen et al., "bert2BERT", ACL 2022, arXiv:2110.07143 (FPI, section 3.2; AKI, section 3.3); Chen, Goodfellow, Shlens, "Net2Net",
ICLR 2016, arXiv:1511.05641; "AquilaMoE", arXiv:2408.06567 (AKI-Pro).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from growkern.errors import PlanError, raise_all
from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import STRONGEST, wrong_number, wrong_seed
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import even, positions, refuse, solve_ties, spaces

Maps = Literal["random", "cyclic"]
MAPS = ("random", "cyclic")


@dataclass(frozen=True)
class FPI:
    """Function-preserving initialization: new coordinates copy old ones, readers are divided by the number of copies.

    FPI is exact where no norm reads the space, and at whole multiples with a cyclic map; random maps are inexact under norms, as
    published. Equal copies with equal factors stay equal: FPI does not break their symmetry.

    Args:
        maps: ``"random"``: uniform draws behind the first copy, as published; ``"cyclic"``: ``i mod n``.
        seed: Seed of the random maps: one for the residual stream, one for heads, one for the FFNs of all blocks.

    Preserves:
        The trajectory with cyclic maps at whole multiples; with random maps nothing if a norm reads a space that grows.

    Example:
        >>> growkern.plan(model, to="2x", width=width.FPI(maps="cyclic"), dynamics="exact").preserves
        'trajectory'

    Reference:
        Chen et al., "bert2BERT: Towards Reusable Pretrained Language Models", ACL 2022, arXiv:2110.07143, section 3.2.
    """

    maps: Maps = "random"
    seed: int = 0

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for a size that does not grow."""
        who = type(self).__name__
        known = (
            []
            if self.maps in MAPS
            else [f"maps={self.maps!r} is unknown; pass 'random' or 'cyclic'."]
        )
        refuse(spec, sizes, who, [*known, *wrong_seed(self.seed)])
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        made: dict[tuple[str, int, int], tuple[IndexMap, StreamScale]] = {}
        for space in spaces(spec, sizes):
            kind = space.name.partition(".")[0]  # blocks share index maps
            key = kind, space.n_source, space.n_target
            if key not in made:
                index_map = self._map(kind, space.n_source, space.n_target)
                stream_scale = positions(index_map) if kind == "positions" else even(index_map)
                made[key] = index_map, stream_scale
            maps[space.name], stream_scale = made[key]
            stream_scales |= dict.fromkeys(space.streams, stream_scale)
        solve_ties(spec, sizes, maps, stream_scales)
        return WidthDecision(maps, stream_scales)

    def _map(self, kind: str, n_source: int, n_target: int) -> IndexMap:
        if kind == "positions":
            return IndexMap.tail(n_source, n_target)
        if self.maps == "cyclic" or n_source == n_target:
            return IndexMap.cyclic(n_source, n_target)
        return IndexMap.drawn(n_source, n_target, f"{self.seed} {kind} {n_source} {n_target}")


@dataclass(frozen=True)
class Net2Wider(FPI):
    """Net2Net's widening: FPI, with noise on the copies so that they diverge.

    Args:
        maps: See ``FPI``.
        seed: See ``FPI``.
        noise: Standard deviation of the noise, in standard deviations of the weight: ``+N`` on one copy's column, ``-N`` on its
            twin's, so that the function is preserved. The paper adds noise without a twin.

    Preserves:
        The same as ``FPI`` with ``noise=0``; at most the function with noise.

    Example:
        >>> growkern.plan(model, to="2x", width=width.Net2Wider(maps="cyclic", noise=0.1)).preserves
        'function'

    Reference:
        Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016, arXiv:1511.05641.
    """

    noise: float = 0.0

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for a size that does not grow."""
        wrong = wrong_number("noise", self.noise, 0, STRONGEST)
        raise_all(PlanError, f"cannot widen {spec.family} by Net2Wider:", [*wrong])
        return replace(super().widen(spec, sizes), noise=self.noise)


@dataclass(frozen=True)
class AKI(FPI):
    """Advanced knowledge initialization: new rows, biases and norm gains of a block are copied from the next layer.

    The last layer and the tensors outside the blocks fall back to FPI. The optimizer state of a row comes from the same layer as the
    row. Copies diverge, because their rows differ.

    Args:
        maps: See ``FPI``.
        seed: See ``FPI``.

    Preserves:
        Nothing.

    Example:
        >>> growkern.plan(model, to="2x", width=width.AKI()).preserves
        'nothing'

    Reference:
        Chen et al., "bert2BERT: Towards Reusable Pretrained Language Models", ACL 2022, arXiv:2110.07143, section 3.3.
    """

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for a size that does not grow, or one layer."""
        decision = super().widen(spec, sizes)
        who = type(self).__name__
        if spec.sizes.get("layers", 0) < 2 or spec.blocks is None:
            raise PlanError(
                f"{who}: new rows come from the next layer, and this {spec.family} has {spec.sizes.get('layers', 0)}; use FPI(), which "
                "needs no next layer."
            )
        if all(index_map.is_identity for index_map in decision.maps.values()):
            return decision
        last = "the last layer has no next one: copies of its heads and FFN units are equal, and remain so."
        reasons = ("new rows come from the next layer",)
        return replace(decision, next_layer=True, reasons=reasons, notes=(last,))


@dataclass(frozen=True)
class AKIPro(AKI):
    """AKI for grouped-query attention: query heads grow inside their groups, kv heads stay.

    AquilaMoE combines AKI-Pro with ``depth.Interpose()``. AKIPro refuses to grow kv heads.

    Args:
        maps: See ``FPI``.
        seed: See ``FPI``.

    Preserves:
        Nothing.

    Example:
        >>> growkern.plan(model, to={"hidden": 48, "kv_heads": 2}, width=width.AKIPro()).preserves
        'nothing'

    Reference:
        Zhang et al., "AquilaMoE: Efficient Training for MoE Models with Scale-Up and Scale-Out Strategies", arXiv:2408.06567.
    """

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError if kv heads would grow."""
        before, after = spec.sizes.get("kv_heads"), sizes.get("kv_heads")
        if before != after:
            raise PlanError(
                f'AKIPro keeps the kv heads ({before} -> {after}): pass to={{..., "kv_heads": {before}}}, or AKI().'
            )
        return super().widen(spec, sizes)
