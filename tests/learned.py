"""Operators of tiny models, for the tests of learned growth."""

import copy

import torch
from models import make, spec_of

import growkern
from growkern import depth, width
from growkern.learning.build import build_operators
from growkern.model.describe import describe

BOTH = {"hidden": "2x", "layers": "2x"}
COPIES = {"width": width.FPI(maps="cyclic"), "depth": depth.Stack()}


def parts(model, to=BOTH, tie="use", noise=0.0, **methods):
    """Return plan, spec, sources, grown copy and operators of a model."""
    spec = describe(model, spec_of(model))
    plan = growkern.plan(model, to=to, spec=spec_of(model), state="drop", **methods)
    target = copy.deepcopy(model)
    growkern.expand_inplace(target, plan=plan, spec=spec_of(model))
    params = model.named_parameters(remove_duplicate=False)
    sources = {name: p.detach() for name, p in params if name not in spec.ties}
    operators = build_operators(spec, plan, sources, tie=tie, noise=noise)
    return plan, spec, sources, target, operators


def double(family, **options):
    return make(family, tied=family not in ("encoder_post", "vit"), **options).double().eval()


def closed_of(target):
    return {n: p.detach().clone() for n, p in target.named_parameters(remove_duplicate=False)}


def grown_of(target, sources, operators):
    closed = closed_of(target)
    return {n: closed[n] + operators.change(n, sources) for n in operators.pieces}


def stirred(operators, size=0.1):
    """Move all operators away from their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in operators.parameters.values():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
