"""Every kind of write to a live object is undone, latest first, also where an undo fails at first."""

import pytest
import torch
from torch import nn

from growkern.commit.undo import Undo

FAILURES: list[BaseException] = []  # the next changes of the objects below raise these


def fail():
    if FAILURES:
        raise FAILURES.pop()


class Owner:
    value = "of the class"

    def __init__(self):
        vars(self)["value"] = 0

    def __setattr__(self, name, value):
        fail()
        super().__setattr__(name, value)


class List(list):
    def __setitem__(self, at, value):
        fail()
        super().__setitem__(at, value)


class Dict(dict):
    def clear(self):
        fail()
        super().clear()


def keep(t):
    copy = t.clone()
    return lambda: (fail(), copy)[1]


def fixture(kind):
    """An object with its two writes, and a function that reads it."""
    undo = Undo(keep)
    if kind == "attribute":
        owner = Owner()
        return undo, lambda n: undo.attribute(owner, "value", n), lambda: dict(vars(owner))
    if kind == "list":
        entries = List([0, 7])
        return undo, lambda n: undo.set_list(entries, [n] * 3), lambda: list(entries)
    if kind == "dict":
        target = Dict(a=0, b=7)
        return undo, lambda n: undo.set_dict(target, {"a": n, "c": n}), lambda: dict(target)
    if kind == "tensors in a dict":
        state = Dict(a=torch.zeros(2), kept=7)
        read = lambda: {k: v.tolist() if k == "a" else v for k, v in state.items()}  # noqa: E731
        return undo, lambda n: undo.set_dict(state, state | {"a": torch.full((3,), n)}), read
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2) if kind == "storage with a gradient" else None
    read = lambda: (p.tolist(), p.grad if p.grad is None else p.grad.tolist())  # noqa: E731
    grad = lambda n: None if p.grad is None else torch.full((n + 2,), 5.0)  # noqa: E731
    return undo, lambda n: undo.storage(p, torch.full((n + 2,), float(n)), grad(n)), read


KINDS = ["attribute", "list", "dict", "tensors in a dict", "storage", "storage with a gradient"]


@pytest.mark.parametrize("n_failures", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_two_writes_of_one_object_are_undone_though_undos_fail_at_first(kind, n_failures):
    undo, write, read = fixture(kind)
    before = read()
    write(1)
    write(2)
    assert read() != before
    FAILURES.extend(MemoryError() for _ in range(n_failures))

    undo.rollback()

    assert read() == before and not FAILURES
