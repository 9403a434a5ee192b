"""HyperCloning: Samragh et al., "Scaling Smart", 2024, arXiv:2409.12903."""

from collections.abc import Mapping
from dataclasses import dataclass

from growkern.errors import PlanError, raise_all
from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import wrong_flag, wrong_number
from growkern.planning.decisions import WidthDecision
from growkern.planning.method_spaces import refuse, spaces
from growkern.width.lossless import Lossless

DECIBELS = -60, 600  # noise of 1e3 to 1e-30 standard deviations of the weight


@dataclass(frozen=True)
class HyperClone:
    """Tile and divide: ``W' = tile(W) / k``; biases, norms and embeddings are tiled. Exact.

    Args:
        noise_db: Signal-to-noise ratio of the twin noise in dB (the paper uses 5 and 10): ``+N`` on one block of columns, ``-N`` on
            its twin, with standard deviation ``std(W) / 10**(noise_db / 20)``. None for symmetric copies, which stay equal forever.
        general: True to grow to widths that are no whole multiples, which the paper does not cover, by ``Lossless``.

    Preserves:
        The trajectory, at whole multiples; with ``noise_db`` the function.

    Example:
        >>> growkern.plan(model, to="2x", width=width.HyperClone(noise_db=10)).preserves
        'function'

    Reference:
        Samragh et al., "Scaling Smart: Accelerating Large Language Model Pre-training with Small Model Initialization", 2024,
        arXiv:2409.12903, figure 1.
    """

    noise_db: float | None = None
    general: bool = False

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``.

        Raises:
            PlanError: A width is no whole multiple and ``general`` is False, or a size does not grow.
        """
        wrong = [*wrong_flag("general", self.general)]
        if self.noise_db is not None:
            wrong += wrong_number("noise_db", self.noise_db, *DECIBELS)
        raise_all(PlanError, f"cannot widen {spec.family} by HyperClone:", wrong)
        noise = 0.0 if self.noise_db is None else 10 ** (-self.noise_db / 20)
        if not self.general:
            refuse(spec, sizes, "HyperClone")
        broken = [s for s in spaces(spec, sizes) if not s.whole and s.name != "positions"]
        if broken and not self.general:
            space = broken[0]
            raise PlanError(
                f"HyperClone: {space.size} {space.n_source} -> {space.n_target} is no whole multiple, and the "
                "paper clones whole multiples; use HyperClone(general=True) or Lossless(), which grow to any width."
            )
        return Lossless(noise=noise).widen(spec, sizes)
