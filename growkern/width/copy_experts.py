"""Expert upcycling: more experts at an unchanged top_k, by copies whose router rows get noise. Dwivedi et al., arXiv:2604.19835."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import STRONGEST, wrong_number
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import refuse, spaces
from growkern.planning.vector import Vector
from growkern.support.text import short
from growkern.width.head_dim_and_experts import stream_scales as scales_of

LARGEST = 1e100  # utility of an expert
REASON = ("the router chooses other experts", "router rows of copies have noise")
NOTE = (
    "while the router's scores of copies are close, a token goes to several copies of one expert, in place of different experts.",
)


@dataclass(frozen=True)
class CopyExperts:
    """Add copies of experts at an unchanged ``top_k``: a token costs the same compute as before.

    Source experts keep their places and router rows; copies follow, with equal weights and normal noise on their router rows. (The paper
    adds the noise to the router's bias, which the supported families do not have.) Equal router rows would tie, and training could not
    part the copies, so the noise is above 0. The tokens of an expert are divided among its ``C`` copies, so the expected gradient of each
    is ``1 / C`` of the source's, by which first-order state is scaled; second-order state by its square.

    Where the model does not normalize the weights of the chosen experts (``norm_topk_prob=False`` of Qwen3-MoE), these shrink, because the
    copies share the softmax. One choice of experts holds for all layers. ``width.Lossless()`` grows ``top_k`` with the experts, and
    preserves the function.

    Args:
        utility: Utility of each source expert, at least 0, such as the sum of the squared gradients of its weights over all layers
            (``growkern.expert_utility``). A new expert copies the expert of the largest utility per copy. None to copy all in turn.
        noise: Standard deviation of the noise, in units of the router's weights.

    Preserves:
        Nothing.

    Example:
        >>> growkern.plan(mixture, to={"experts": "2x"}, width=width.CopyExperts()).preserves
        'nothing'

    Reference:
        Dwivedi et al., "Expert Upcycling: Shifting the Compute-Efficient Frontier of Mixture-of-Experts", arXiv:2604.19835.
    """

    utility: Sequence[float] | None = None
    noise: float = 0.01

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``.

        Raises:
            PlanError: The model has no experts, no expert is added, another size grows, or ``utility`` or ``noise`` is not valid.
        """
        refuse(spec, sizes, "CopyExperts", self._problems(spec, sizes), grows=("experts",))
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        for space in spaces(spec, sizes):
            if space.name == "experts":
                maps[space.name] = IndexMap.of(self.sources(space.n_source, space.n_target), space.n_source)  # fmt: skip
                stream_scales |= scales_of(space, maps[space.name])
                continue
            ones = Vector.full(1.0, space.n_target)
            maps[space.name] = IndexMap.identity(space.n_target)
            stream_scales |= dict.fromkeys(space.streams, StreamScale(ones, ones))
        return WidthDecision(maps, stream_scales, reasons=REASON, notes=NOTE, router_std=self.noise)

    def sources(self, n_source: int, n_target: int) -> list[int]:
        """Return the source expert of every target expert."""
        utility = self.utility or [1.0] * n_source
        sources, counts = [*range(n_source)], [1] * n_source
        while len(sources) < n_target:
            best = max(range(n_source), key=lambda i: (utility[i] / counts[i], -counts[i], -i))
            counts[best] += 1
            sources.append(best)
        return sources

    def _problems(self, spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[str]:
        """Yield an error for a model without experts or with as many as before, and for a utility or noise that is not valid."""
        for wrong in wrong_number("noise", self.noise, 0, STRONGEST, above=True):
            yield f"{wrong} Equal router rows tie, and copies that tie stay equal."
        n = spec.sizes.get("experts")
        if n is None:
            yield f"{spec.family} has no experts; growkern.upcycle makes a dense model a mixture of experts."
        elif sizes["experts"] == n:
            yield f'experts: there is none to add to {n}; pass to={{"experts": "2x"}}.'
        elif self.utility is not None and not _are_utilities(self.utility, n):
            yield f"utility={short(self.utility)} is not valid; pass {n} finite numbers, one per expert: at least 0, not all 0."


def _are_utilities(values: Any, n: int) -> bool:
    """True for a list or tuple of ``n`` finite numbers of at least 0, not all 0."""
    if not isinstance(values, list | tuple):
        return False
    numbers = cast(Sequence[Any], values)
    wrong = [x for x in numbers if [*wrong_number("utility", x, 0, LARGEST)]]
    return not wrong and len(numbers) == n and any(numbers)
