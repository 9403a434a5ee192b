"""Wrappers of blocks that the tests share, and what counts how often compiled graphs and modules run."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from models import Plain
from torch import nn

from growkern import ModelSpec


class Counted:
    """A backend of torch.compile that runs graphs eagerly.

    Attributes:
        n: Number of graphs that have run.
        forwards: Number of forwards of a class of modules outside of graphs, the recomputed ones of a checkpoint too.
    """

    n = forwards = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: object) -> object:
        def run(*args: object) -> object:
            self.n += 1
            return graph(*args)

        return run

    @contextmanager
    def count(self, kind: type[nn.Module]) -> Generator[None]:
        """Count the forwards of the modules of a class."""
        forward = kind.forward

        def counted(own: nn.Module, *args: object) -> object:
            if not torch.compiler.is_compiling():
                self.forwards += 1
            return forward(own, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "forward", counted)
            yield


def compiled(block: nn.Module, backend: object, **options: object) -> nn.Module:
    """Compile a block in place, and return it."""
    block.compile(backend=backend, **options)
    return block


class Keyed(Plain):
    """A model with its blocks in a ``ModuleDict``, as in torchtitan."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.ln_f(x))


def keyed(model: Plain) -> tuple[Keyed, ModelSpec]:
    """Move the blocks of a model into a ``ModuleDict``; return the model, and the spec of what it was."""
    spec = Plain.spec(model)
    model.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(model.blocks)})
    model.__class__ = Keyed
    return model, spec
