"""What growth cannot do for a model whose parameters are sharded: refused before anything changes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from growkern.distributed.shards import has_shards, is_sharded, placement
from growkern.engine.request import Request
from growkern.errors import PlanError, UnsupportedModelError, raise_all
from growkern.model.spec import ModelSpec
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.names import named_parameters

if TYPE_CHECKING:
    from growkern.distributed.fsdp import FullySharded


def refuse_request(
    request: Request, averages: Sequence[nn.Module], shards: "FullySharded | None"
) -> None:
    """Refuse parameters that ``fully_shard`` has left out of a model, averages that are sharded otherwise, and arguments.

    Raises:
        UnsupportedModelError: ``fully_shard`` manages some parameters of the model, and not all.
        PlanError: An average or an argument is not supported for sharded models.
    """
    left = {
        name: p
        for name, p in named_parameters(request.model)
        if shards is not None and id(p) not in shards.params
    }
    for name, p in left.items():
        if is_sharded(p):
            raise UnsupportedModelError(
                f"{name}: is sharded with a wrapper of the model, and not with the model; apply fully_shard to the model, then "
                "model.compile(), or torch.compile(model) around it."
            )
        raise UnsupportedModelError(
            f"{name}: is not sharded, and other parameters are, so its gradients are of one process alone; apply fully_shard to the "
            "whole model, without ignored_params."
        )
    if has_shards(request.model):
        problems = [*_arguments(request, shards), *_apart(request.model, averages)]
        raise_all(PlanError, "cannot grow this sharded model:", problems)


def _arguments(request: Request, shards: "FullySharded | None") -> Iterator[str]:
    if request.first and (shards is None or shards.tensor_parallel):
        yield (
            "the model has no blocks, and its parameters are tensor parallel, which the first blocks would not be; grow the model "
            "before parallelize_module."
        )
    masters: Any = request.master_weights if isinstance(request.master_weights, Mapping) else {}
    for name, p in named_parameters(request.model):
        if (master := masters.get(p)) is not None and placement(master) != placement(p):
            yield (
                f"master_weights: the copy of {name} is not sharded as the parameter is; make the copy from the parameter, as by "
                "nn.Parameter(p.detach().float())."
            )
            return


def _apart(model: nn.Module, averages: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the first parameter of every average that is not sharded as the model's is."""
    params = dict(named_parameters(model))
    for average in averages:
        own = dict(named_parameters(average))
        if name := next((n for n, p in params.items() if placement(p) != placement(own[n])), None):
            yield f"ema: {name} of the average is not sharded as the model's is; shard the average as the model, before the growth."


def refuse_plan(
    model: nn.Module, spec: ModelSpec, plan: GrowthPlan, shards: "FullySharded | None"
) -> None:
    """Refuse a plan for a sharded model whose axes do not divide over the processes.

    Raises:
        PlanError: The plan cannot be carried out on shards.
    """
    if not has_shards(model):
        return
    uneven = dict.fromkeys(_uneven(model, spec, plan, shards))
    raise_all(PlanError, "this growth does not divide over the processes:", [*uneven])


def _uneven(
    model: nn.Module, spec: ModelSpec, plan: GrowthPlan, shards: "FullySharded | None"
) -> Iterator[str]:
    """Yield the sizes that do not divide over a dimension of the mesh, where the source's do; ``fully_shard`` pads rows."""
    params: dict[str, Any] = dict(named_parameters(model, remove_duplicate=False))
    for row in plan.tensors:
        p = params.get(row.source)
        if p is None or row.new or not is_sharded(p):
            continue
        for i, place in enumerate(p.placements):
            axis: int | None = getattr(place, "dim", None)
            if axis is None or (shards is not None and shards.pads(p, i)):
                continue
            n_parts, names = p.device_mesh.size(i), p.device_mesh.mesh_dim_names
            use, where = spec.tensors[row.source][axis], names[i] if names else i
            size, before = use.whole_heads(plan.source_sizes)
            _, after = use.whole_heads(plan.target_sizes)
            if after % n_parts and not before % n_parts:
                below = after - after % n_parts
                nearest = ", ".join(str(n) for n in (below, below + n_parts) if n)
                yield f"{size}={after} does not divide over the {n_parts} ranks of mesh dim {where!r}; nearest: {nearest}."
