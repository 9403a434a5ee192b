"""How far rounding moves the outputs of a forward: the forward runs again, and every result of an operation is rounded at random.

This is Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic", 1997): it measures the condition of the model on its inputs in whatever
dtypes its operations compute, such as norms that round to float32 inside a float64 model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# dtype as precise as the inputs of float32 matrix products
HALF = 1e-4  # machine epsilons of half precision are larger
PRECISION = {"high": torch.float16, "medium": torch.bfloat16}


class RandomRounding(TorchDispatchMode):
    """Moves every floating-point result of an operation by about a unit in the last place.

    Args:
        seed: Seed of the movements.

    Attributes:
        eps: The largest machine epsilon of a result.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.eps = seed, 0.0
        self.generators: dict[torch.device, torch.Generator] = {}
        self.products = PRECISION.get(torch.get_float32_matmul_precision(), torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and move what it returns."""
        out = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None for r in func._schema.returns) or not _computes(func):
            return out  # a view, or written in place
        if isinstance(out, Tensor):
            return self._moved(out)
        return type(out)(map(self._moved, out)) if type(out) in (list, tuple) else out

    def _moved(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.is_meta or not t.numel():
            return t
        eps = torch.finfo(self.products if t.dtype == torch.float32 else t.dtype).eps
        self.eps = max(self.eps, eps)
        if t.device not in self.generators:
            self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
        noise = torch.rand(
            t.shape, dtype=t.dtype, device=t.device, generator=self.generators[t.device]
        )
        # in half precision an operation rounds once, in others also inside its sums
        moved = torch.addcmul(t, t, noise.sub_(0.5), value=eps if eps > HALF else 2 * eps)
        return torch.where(t == t.round(), t, moved)  # positions, masks and infinities are exact


def _computes(func: Any) -> bool:
    """True for an operation that rounds: not for copies, new tensors and random numbers."""
    return (
        func.overloadpacket.__name__ not in EXACT
        and torch.Tag.nondeterministic_seeded not in func.tags
    )


EXACT = {
    "abs", "amax", "amin", "arange", "cat", "clone", "constant_pad_nd", "embedding", "empty", "empty_like", "empty_strided", "eye", "full",
    "full_like", "gather", "index", "index_select", "masked_fill", "max", "min", "neg", "new_empty", "new_full", "new_ones", "new_zeros",
    "one_hot", "ones", "ones_like", "relu", "repeat", "scalar_tensor", "sort", "stack", "topk", "tril", "triu", "where", "zeros",
    "zeros_like",
}  # fmt: skip
