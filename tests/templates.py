"""Copies of modules by pickle: ten times as fast as building a model of transformers, and five times as fast as ``copy.deepcopy``."""

import io
import pickle

import torch
from torch import Tensor, nn


class Template:
    """A module, of which ``copy`` makes independent copies, and the state of torch's generator right after the module was made."""

    def __init__(self, module: nn.Module) -> None:
        self.random_state = torch.get_rng_state()
        file = io.BytesIO()
        pickler = _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.dump(module)
        self.bytes, self.tensors = file.getvalue(), pickler.tensors

    def copy(self) -> nn.Module:
        """Return a copy with tensors of its own, and set torch's generator as making the module did."""
        torch.set_rng_state(self.random_state)
        return _Unpickler(io.BytesIO(self.bytes), self.tensors).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out of the stream, which holds their numbers; a tied tensor has one number."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}

    def persistent_id(self, found: object) -> int | None:
        if not isinstance(found, Tensor):
            return None
        if id(found) not in self.numbers:
            self.numbers[id(found)] = len(self.tensors)
            self.tensors.append(found)
        return self.numbers[id(found)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors, self.copies = tensors, {}

    def persistent_load(self, number: int) -> Tensor:
        if number not in self.copies:
            self.copies[number] = _copy(self.tensors[number])
        return self.copies[number]


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, tensor.requires_grad)
    vars(copied).update(vars(tensor))  # transformers marks what it has initialized
    return copied
