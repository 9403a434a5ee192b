"""First blocks of models that have none: built from the config, or copied from a given block. They stand in while a growth runs.

The engine grows blocks from source blocks. In a model with 0 blocks, a block of zeros takes the place of block 0 in the model, its
averages, its master weights and its param groups; a growth drops it, and a failure takes it out again.
"""

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from growkern.commit.commit import copied, shared_by
from growkern.commit.undo import Undo
from growkern.distributed.shards import first_of_zeros
from growkern.engine.ddp import Ranks
from growkern.engine.live_objects import averages_of
from growkern.engine.request import Request
from growkern.errors import PlanError, UnsupportedModelError
from growkern.model.describe import describe
from growkern.model.spec import Blocks, ModelSpec
from growkern.support.live_registry import Live
from growkern.support.names import named_buffers, named_modules, named_parameters


def first_blocks(model: nn.Module, spec: ModelSpec | None, given: object) -> dict[str, nn.Module]:
    """Return a block on the meta device for every stack of the model that has no blocks, by the path of the stack.

    Args:
        model: The model.
        spec: Description of a custom model; None for a model of a known family.
        given: The depth method's block; None to build the block from the config.

    Raises:
        PlanError: The model has no config to build a block from, or ``given`` is no module.
        UnsupportedModelError: The spec does not describe block 0, or the config has entries per block.
    """
    lists = [m for _, m in named_modules(model) if isinstance(m, nn.ModuleList | nn.ModuleDict)]
    if all(map(len, lists)):
        return {}
    described = describe(model, spec, values=False)
    empty = [stack for stack in described.stacks if not described.sizes[stack.size]]
    return {stack.path: _block(model, described, stack, given, spec is None) for stack in empty}


def _block(
    model: nn.Module, spec: ModelSpec, stack: Blocks, given: object, known: bool
) -> nn.Module:
    """Return the block of one stack, on the meta device, in the model's data type."""
    if not any(name.startswith(f"{stack.path}.0.") for name in spec.tensors):
        raise UnsupportedModelError(
            f"cannot deepen this {spec.family} from 0 {stack.size}: its ModelSpec does not describe {stack.path}.0; describe this block "
            "as if the model had it, or start from a model of one block."
        )
    if given is None and not known:
        raise PlanError(
            f"cannot deepen {spec.family} from 0 {stack.size}: there is no block to copy, and no config of transformers to build one from; "
            "pass depth.Fresh(block=...) a block of the model. To load a checkpoint of the grown model, build the model with its blocks."
        )
    if given is not None and not isinstance(given, nn.Module):
        raise PlanError(f"block: expected a torch.nn.Module, got {type(given).__name__}.")
    block = _built(model, spec, stack) if given is None else given
    like = next(model.parameters())
    tensors: list[tuple[str, Tensor]] = [*named_parameters(block), *named_buffers(block)]
    dtypes = {n: like.dtype if t.is_floating_point() else t.dtype for n, t in tensors}
    own = {n: torch.empty_like(t, dtype=dtypes[n], device="meta") for n, t in tensors}
    made = copied(block, f"{stack.path}.0", own, shared_by(model)).requires_grad_()
    return made.train(model.training)


def _built(model: nn.Module, spec: ModelSpec, stack: Blocks) -> nn.Module:
    """Return block 0 of a model of one block, built on the meta device from the config of a model of transformers."""
    config: Any = copy.deepcopy(model.config)
    lists = [name for name in spec.config_lists if isinstance(getattr(config, name, None), list)]
    if lists:
        raise UnsupportedModelError(
            f"cannot deepen this {spec.family} from 0 {stack.size}: its config has one entry of {lists[0]} per block, and none to "
            "copy; start from a model of one block."
        )
    for field in (name for name, size in spec.config.items() if size == stack.size):
        setattr(config, field, 1)
    with torch.device("meta"):
        built: Any = type(model)(config)
    block: Any = built.get_submodule(stack.path)[0]
    checkpoints: Any = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in block.modules():
        if isinstance(vars(module).get("config"), type(config)):
            module.config = model.config
        if "_is_hf_initialized" in vars(model):  # init_weights() leaves such modules as they are
            module._is_hf_initialized = True
        if checkpoints and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = checkpoints[0]._gradient_checkpointing_func
    return block


@contextmanager
def standing_in(request: Request) -> Generator[Request]:
    """Put first blocks of zeros into a model without blocks, its averages and its param groups; take them out if the growth fails.

    Yields:
        The request, with its first blocks.
    """
    undo = request.undo or Undo()
    try:
        with Ranks(request.model, Live.now().modules).together():
            seeded = _seeded(request, undo)
        yield seeded
    except BaseException:
        if undo is not request.undo and undo.rollbacks:
            undo.rollback()
        raise


def _seeded(request: Request, undo: Undo) -> Request:
    """Return a request with its first blocks, which are put into the model; the request itself if the model has blocks."""
    blocks = first_blocks(request.model, request.spec, request.block)
    if not blocks:
        return request
    averages = averages_of(request.model, request.ema)
    first, *_ = [_put(model, blocks, undo) for model in (request.model, *averages)]
    _join_groups(request, first, undo)
    return replace(request, first=first)


def _put(model: nn.Module, blocks: Mapping[str, nn.Module], undo: Undo) -> dict[str, nn.Module]:
    """Put copies of blocks, of zeros on the device of the model, into its empty stacks, and return the copies."""
    first: dict[str, nn.Module] = {}
    for path, block in blocks.items():
        first[path] = first_of_zeros(partial(_of_zeros, block, path, model), model, path)
        undo.set_dict(model.get_submodule(path)._modules, {"0": first[path]})  # pyright: ignore[reportPrivateUsage]
    return first


def _of_zeros(block: nn.Module, path: str, model: nn.Module, device: torch.device) -> nn.Module:
    tensors: list[tuple[str, Tensor]] = [*named_parameters(block), *named_buffers(block)]
    values = {name: torch.zeros_like(t, device=device) for name, t in tensors}
    return copied(block, f"{path}.0", values, shared_by(model))


def _join_groups(request: Request, first: Mapping[str, nn.Module], undo: Undo) -> None:
    """Put the parameters of first blocks into param groups, in model order; the new blocks will take their places."""
    masters = request.master_weights or {}
    live = dict(request.model.named_parameters())
    new = {id(p) for block in first.values() for p in block.parameters()}
    held = {name: masters.get(p, p) for name, p in live.items()}
    groups = [group for optim in request.optims for group in optim.param_groups]
    dims = [{held[n].dim() for n in held if any(held[n] is p for p in g["params"])} for g in groups]
    if masters:
        dtype = next(iter(masters.values())).dtype
        copies = {n: p.detach().to(dtype, copy=True) for n, p in live.items() if id(p) in new}
        held |= {n: nn.Parameter(copy) for n, copy in copies.items()}
        own = {p: held[n] for n, p in live.items() if id(p) in new}
        undo.set_dict(request.master_weights or {}, {**masters, **own})
    places = {id(p): i for i, p in enumerate(held.values())}
    for name, p in live.items():
        if id(p) not in new or not groups:
            continue
        filled = [i for i, own in enumerate(dims) if own]
        fitting = filled if len(filled) == 1 else [i for i in filled if p.dim() in dims[i]]
        if len(fitting) != 1:
            raise PlanError(
                f"cannot tell which param group takes the new {name}: {len(fitting)} of the {len(groups)} param groups hold parameters of "
                f"{p.dim()} dimensions; keep the parameters of a model without blocks in one group, or those of equal dimensions."
            )
        group = groups[fitting[0]]
        params: list[nn.Parameter] = group["params"]
        grown, names = [*params, held[name]], [*group.get("param_names", ()), name]
        at = [places.get(id(q), -1) for q in params]
        if at == sorted(at) and -1 not in at:
            order = sorted(range(len(grown)), key=lambda i: places[id(grown[i])])
            grown = [grown[i] for i in order]
            names = [names[i] for i in order] if "param_names" in group else names
        undo.set_list(params, grown)
        if "param_names" in group:
            undo.set_list(group["param_names"], names)
