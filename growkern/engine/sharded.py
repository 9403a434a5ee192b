"""What growth cannot do yet for a model whose parameters are sharded: refused before anything changes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from growkern.distributed.shards import is_sharded
from growkern.engine.request import Request
from growkern.errors import PlanError, UnsupportedModelError, raise_all
from growkern.planning.growth_plan import GrowthPlan

if TYPE_CHECKING:
    from growkern.distributed.fsdp import FullySharded

YET = "which is not supported yet for sharded models"


def refuse_request(request: Request, shards: "FullySharded | None") -> None:
    """Refuse parameters that are sharded by other means than ``fully_shard`` alone, and arguments.

    Raises:
        UnsupportedModelError: A parameter is sharded by tensor parallelism.
        PlanError: An argument is not supported for sharded models.
    """
    managed = {} if shards is None else shards.plain
    for name, p in request.model.named_parameters():
        if shards is not None and not is_sharded(p):
            raise UnsupportedModelError(
                f"{name}: is not sharded, and other parameters are, so its gradients are of one process alone; apply fully_shard to the "
                "whole model, without ignored_params."
            )
        if is_sharded(p) and id(p) not in managed:
            raise UnsupportedModelError(
                f"{name}: is a DTensor that fully_shard alone has not made (parallelize_module), which is not supported yet: grow the "
                "model before it is parallelized."
            )
    if shards is not None:
        raise_all(PlanError, "cannot grow this sharded model:", [*_arguments(request)])


def _arguments(request: Request) -> Iterator[str]:
    if request.memory == "lean":
        yield f"memory='lean', {YET}; leave it out: every process stages its own shards, and one whole tensor at a time."
    if request.ema is not None:
        yield f"ema=, {YET}; build the average anew after the growth."
    if request.first:
        yield f"the model has no blocks, {YET}; grow it before it is sharded."
    if request.master_weights:
        yield f"master_weights=, {YET}; fully_shard keeps float32 shards under MixedPrecisionPolicy(param_dtype=torch.bfloat16)."


def refuse_plan(plan: GrowthPlan, shards: "FullySharded | None") -> None:
    """Raise PlanError for a plan that draws weights of which no process has the whole."""
    if shards is None:
        return
    if plan.drawn:
        raise PlanError(
            f"depth.Fresh initializes whole blocks, {YET}; grow the model before it is sharded."
        )
    if any(row.is_perturbed for row in plan.tensors):
        raise PlanError(
            f"{plan.width} perturbs whole matrices, {YET}; grow the model before it is sharded."
        )
