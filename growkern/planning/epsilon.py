"""Epsilons of norms: they change by the factors by which the mean squares of the norms' inputs change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from growkern.model.spec import ModelSpec
from growkern.planning.targets import Homes, targets
from growkern.support.text import fold


@dataclass(frozen=True)
class Eps:
    """Factors on the epsilons of norms, equal to the factors on the mean squares of their inputs.

    Attributes:
        modules: ``"module.attribute"`` of the source -> factor.
        config: Field of the config and factor on it; None if the config has no such field, or the field does not change.
        notes: Notes for the user.
    """

    modules: Mapping[str, float]
    config: tuple[str, float] | None
    notes: tuple[str, ...]

    def of_targets(self, spec: ModelSpec, homes: Homes) -> dict[str, float]:
        """Return ``"module.attribute"`` of the target -> factor, for factors other than 1."""
        return {
            name: factor
            for source, factor in self.modules.items()
            for name, _ in targets(spec, homes, source)
            if factor != 1
        }

    @staticmethod
    def of(spec: ModelSpec, factors: Mapping[str, float | None]) -> "Eps":
        """Derive the factors of modules and config from the factors on the mean squares."""
        modules = {
            f"{name.rpartition('.')[0]}.{norm.eps}": factors[norm.reads] or 1.0
            for name, _, norm in spec.norms()
            if norm.eps is not None
        }
        values, config = set(modules.values()), None
        if spec.config_eps and values - {1.0}:
            config = spec.config_eps, max(values, key=lambda f: f != 1)
        changed = (*_changed({name: f for name, f in modules.items() if f != 1}, spec.config_eps),)
        shared = f"config.{spec.config_eps} feeds norms of several widths; the live model is exact, a reload takes it for all of them"
        unsaved = "no field of the config holds the epsilon of the norms, which grew: the live model is exact, a reload has the source's"
        if spec.config_eps and len(values) > 1:
            return Eps(modules, config, (*changed, shared))
        unheld = spec.config and not spec.config_eps and values - {1.0}
        return Eps(modules, config, (*changed, unsaved) if unheld else changed)


def _changed(factors: Mapping[str, float], field: str | None) -> Iterator[str]:
    """Yield a note that names the epsilons that change."""
    if factors:
        kinds = dict.fromkeys(f"{fold(name)} x {f:.6g}" for name, f in factors.items())
        kept = (
            f", which config.{field} holds and no state_dict"
            if field
            else ", which no state_dict holds"
        )
        yield (
            f"the epsilons of {len(factors)} norms change ({', '.join(kinds)}). They are attributes{kept}: a loop that saves tensors "
            "alone calls growkern.resume before it loads them, or sets the epsilons again."
        )
