"""What a growth did, as data and as a table."""

from dataclasses import dataclass

from growkern.planning.growth_plan import KEPT, Preserves
from growkern.support.text import table


@dataclass(frozen=True)
class GrowthReport:
    """What a growth did.

    Attributes:
        family: Of the model.
        source_sizes: Named sizes before.
        target_sizes: Named sizes after.
        n_params_source: Parameters before.
        n_params_target: Parameters after.
        n_new_blocks: Blocks that were added.
        preserves: ``"nothing"``, ``"function"``, ``"gradient"`` or ``"trajectory"``; see ``GrowthPlan.preserves``.
        reasons: Why not, when not.
        n_bytes_read: Bytes of source tensors that were read: once each, and once more where noise or a mean is measured.
        n_bytes_written: Bytes of target tensors that were written, once each.
        seconds: Wall time of the growth.
        memory: ``"stage"``: all targets beside all sources. ``"lean"``: one set of tensors after the other.
        peak_bytes: What that takes at most beyond what was there, on the device that takes most.
        lr_factors: Learning-rate factor of the law -> number of parameter tensors; None where it is not one number.
        lr_applied: True when param groups were split by these factors.
        grad_norm_factor: The law's factor on the global gradient norm of what the source had; None without second moments or gradients.
        noisy: True when twin noise was added or something copies nothing: gradients then hold more than the law says.
        notes: What the user should do or know next.
    """

    family: str
    source_sizes: dict[str, int]
    target_sizes: dict[str, int]
    n_params_source: int
    n_params_target: int
    n_new_blocks: int
    preserves: Preserves
    reasons: tuple[str, ...]
    n_bytes_read: int
    n_bytes_written: int
    seconds: float
    memory: str
    peak_bytes: int
    lr_factors: dict[float | None, int]
    lr_applied: bool
    grad_norm_factor: float | None
    noisy: bool
    notes: tuple[str, ...]

    @property
    def function_preserving(self) -> bool:
        """True when the target computes what the source computed, up to rounding."""
        return self.preserves != "nothing"

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = [
            (name, f"{n:,}", f"{self.target_sizes[name]:,}", f"x {self.target_sizes[name] / n:.4g}")
            for name, n in self.source_sizes.items()
            if self.target_sizes[name] != n
        ]
        ratio = self.n_params_target / max(1, self.n_params_source)
        rows.append(
            (
                "parameters",
                f"{self.n_params_source:,}",
                f"{self.n_params_target:,}",
                f"x {ratio:.4g}",
            )
        )
        rate = (self.n_bytes_read + self.n_bytes_written) / max(self.seconds, 1e-9) / 1e9
        preserved = KEPT.get(self.preserves, "nothing: ").removeprefix("preserves ")
        factors = ", ".join(
            f"{'per element' if f is None else f'x {f:.4g}'} ({n})"
            for f, n in self.lr_factors.items()
        )
        facts: list[tuple[object, ...]] = [
            ("preserves", preserved + "; ".join(self.reasons)),
            (
                "moved",
                f"{_size(self.n_bytes_read)} read, {_size(self.n_bytes_written)} written, {self.seconds:.3g} s, {rate:.3g} GB/s",
            ),
            ("peak memory", f"{_size(self.peak_bytes)} beyond the source ({self.memory})"),
            (
                "learning rate",
                f"{factors or 'as it was'}{'' if self.lr_applied or not factors else ' recommended, not applied'}",
            ),
        ]
        if self.grad_norm_factor is not None:
            advice = (
                "what is new adds to it: measure"
                if self.noisy
                else "scale a clipping threshold alike"
            )
            facts.append(("gradient norm", f"x {self.grad_norm_factor:.3g} by the law; {advice}"))
        shrank = any(self.target_sizes[name] < n for name, n in self.source_sizes.items())
        text = [
            f"{'Shrank' if shrank else 'Grew'} {self.family}",
            table(["size", "source", "target", ""], rows),
            "\n".join(f"{k:<20} {v}" for k, v in facts),
        ]
        return "\n\n".join(
            [*text, *(["\n".join(f"note: {note}" for note in self.notes)] if self.notes else [])]
        )


def _size(n_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes} B"
