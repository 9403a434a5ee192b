"""Tensors of a model and its optimizer by name."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Tensors:
    """Tensors of a model and its optimizer by name: live ones as sources, staged ones as targets.

    Attributes:
        values: Parameters and buffers.
        grads: Gradients in flight.
        states: Parameter name -> state key -> tensor (or a scalar that is no tensor).
    """

    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    grads: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    states: dict[str, dict[str, object]] = field(default_factory=dict[str, dict[str, object]])

    def all(self) -> Iterator[Tensor]:
        """Yield every tensor."""
        yield from self.values.values()
        yield from self.grads.values()
        yield from (
            t for state in self.states.values() for t in state.values() if isinstance(t, Tensor)
        )

    def forget(self, name: str) -> None:
        """Drop the references to the tensors of a name."""
        for tensors in (self.values, self.grads, self.states):
            tensors.pop(name, None)

    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.all())
