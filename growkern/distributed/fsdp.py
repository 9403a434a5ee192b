"""What growth needs of ``torch.distributed.fsdp.fully_shard``. All private attributes of FSDP2 that growkern reads or writes are here.

A sharded parameter is a ``DTensor``, and an ``FSDPParam`` has its sizes, its padded shard and its buffers. A growth gives the DTensor a new
shard in place, and initializes the FSDPParam anew on a tensor without data, so that no process needs the whole target.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from growkern.distributed.shards import box_of, is_sharded, joined
from growkern.distributed.storage import Swap, kept_shard, set_shard, swapped, whole_storage
from growkern.errors import PlanError, UnsupportedModelError
from growkern.support.memory import Backup
from growkern.support.names import named_parameters

HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
MARKS = "_is_fsdp_managed_module", "_fsdp_use_orig_params"
STATE = (
    "_is_root",
    "_state_ctx",
    "_comm_ctx",
    "_modules",
    "_mp_policy",
    "_auto_reshard_after_forward",
    "_init_fqns",
)
GROUP = (
    "fsdp_params", "mesh_info", "post_forward_mesh_info", "offload_policy", "comm_ctx", "_partial_reduce_output", "_module_fqn",
    "lazy_init",
)  # fmt: skip
PARAM = (
    "sharded_param", "_sharded_param_data", "fsdp_placement", "mesh_info", "post_forward_mesh_info",
    "padded_sharded_param_size", "_sharding_spec", "all_gather_outputs", "unsharded_accumulated_grad", "_module_info", "device",
    "_init_sharded_param", "_init_sharded_post_forward_param_metadata", "_setattr_on_modules", "_init_extensions",
    "reset_sharded_param",
)  # fmt: skip
UID = "_orig_param_uid"  # since torch 2.12
UNKNOWN = "this torch's fully_shard is not one that growkern knows (attribute {} is missing): grow the model before it is sharded."
SETTINGS = (  # of a param group, which the user may have set after ``fully_shard``
    "reduce_grads", "all_reduce_grads", "reshard_after_backward", "gradient_divide_factor", "force_sum_reduction_for_comms",
    "reduce_scatter_unused_params", "reduce_scatter_max_input_buffers", "unshard_async_op", "unshard_in_backward", "_all_reduce_hook",
    "_all_gather_comm", "_reduce_scatter_comm", "_all_reduce_hook_stream",
)  # fmt: skip


class FullySharded:
    """The parameters of a model and of its averages that ``fully_shard`` manages.

    Attributes:
        models: The model, and its averages.
        params: ``FSDPParam`` of every sharded parameter, by ``id`` of the parameter.
    """

    def __init__(self, *models: nn.Module) -> None:
        """Find the parameters.

        Raises:
            UnsupportedModelError: This version of torch has other private attributes.
            PlanError: Gradients wait to be reduced.
        """
        self.models = models
        self.params: dict[int, Any] = {}
        for model in models:
            for state in _states(model):
                _probe(state)
                _refuse_waiting(state)
            self.index(model)

    def index(self, model: nn.Module) -> None:
        """Find the ``FSDPParam`` of every parameter of a module."""
        for state in _states(model):
            for one in (one for group in _groups(state) for one in group.fsdp_params):
                info = one._module_info
                p = getattr(info.module, info.param_name)
                if is_sharded(p) and p is not one.sharded_param:  # loaded by assignment
                    one.reset_sharded_param()  # as the first forward would
                self.params[id(one.sharded_param)] = one

    def pads(self, p: Tensor, mesh_dim: int) -> bool:
        """True for a dimension of a parameter's mesh along which ``fully_shard`` shards rows, and pads them."""
        one = self.params.get(id(p))
        return (
            one is not None and one.fsdp_placement.dim == 0 and mesh_dim < one.mesh_info.mesh.ndim
        )

    @property
    def tensor_parallel(self) -> bool:
        """True when a parameter was sharded before ``fully_shard``."""
        return any(_parallel(one) is not None for one in self.params.values())

    def swap(self, p: Any, keep: Backup) -> Swap:
        """Return a function that gives a parameter the storage of another tensor, and one that puts the old storage back."""
        if id(p) not in self.params:
            return swapped(p, keep)
        one, before = self.params[id(p)], kept_shard(p, keep)
        kept: dict[str, Any] = {**one.__dict__}
        n_data: int = kept.pop("_sharded_param_data").numel()

        def back() -> None:
            whole = before()
            vars(one).clear()
            vars(one).update(kept)
            one._sharded_param_data = whole[:n_data]
            one._setattr_on_modules(p)

        return lambda value: self._renew(one, p, value), back

    def _renew(self, one: Any, p: Any, value: Any) -> nn.Parameter:
        """Initialize an ``FSDPParam`` for a tensor of another size, whose shard is that of ``value``; return the parameter."""
        placement, local = one.fsdp_placement, value._local_tensor
        own: dict[str, Any] = one.__dict__
        uid = own.get(UID)
        like = nn.Parameter(_blank(one, value), p.requires_grad)
        meshes = () if uid is None else (one.mesh_info,)
        one._init_sharded_param(like, one.device, _Placed({id(like): placement}), *meshes)
        if one.post_forward_mesh_info:
            one._init_sharded_post_forward_param_metadata(like)
        if uid is not None:
            own[UID] = uid
        one.all_gather_outputs, one.unsharded_accumulated_grad = [], None
        vars(one).pop("_unsharded_param", None)
        one._sharded_param_data = whole_storage(local)[: prod(one.padded_sharded_param_size)]
        if p.is_meta:  # of a new block
            p = nn.Parameter(
                DTensor(local, one._sharding_spec, requires_grad=False), p.requires_grad
            )  # pyright: ignore
        else:
            set_shard(p, local, one._sharding_spec)
        one.sharded_param = p
        one._setattr_on_modules(p)
        one._init_extensions()
        self.params[id(p)] = one
        return p

    def copied(
        self, block: nn.Module, values: Mapping[str, Tensor], copy: Callable[[dict[str, Tensor]], nn.Module]
    ) -> nn.Module:  # fmt: skip
        """Copy a block with its ``fully_shard``.

        Args:
            block: The block.
            values: Tensors of the copy by name.
            copy: Function from tensors to a copy of the block's modules that has them.
        """
        own = {name: self.params.get(id(p)) for name, p in named_parameters(block)}
        blank = {n: t if (one := own.get(n)) is None else _blank(one, t) for n, t in values.items()}
        with bare(block):
            made = copy(blank)
        _shard_alike(made, block)
        self.index(made)
        for name, p in [*named_parameters(made)]:
            if (one := self.params.get(id(p))) is not None:
                self._renew(one, p, values[name])
            elif own.get(name) is not None:
                raise UnsupportedModelError(
                    f"cannot add blocks: {name} of a block is sharded with the model around it, and not with its block; apply fully_shard "
                    "to every block before the model, as its documentation says."
                )
        return made

    def join(self, set_list: Callable[[list[Any], list[Any]], object]) -> None:
        """Make the states of new blocks members of the root's iteration, as its first forward would have.

        Args:
            set_list: Replaces the content of a list, so that it can be undone.
        """
        roots = [s for model in self.models for s in _states(model) if s._is_root]
        for root in roots:
            order = list(dict.fromkeys(_states(root._modules[0])))
            for state in order:
                if state is root or state._is_root is not None:
                    continue
                state._is_root = False
                state._state_ctx, state._comm_ctx = root._state_ctx, root._comm_ctx
                for i, group in enumerate(groups := _groups(state)):
                    group.comm_ctx, group._param_group_index = root._comm_ctx, i
                    group._num_param_groups = len(groups)
                    group.lazy_init()
            set_list(root._state_ctx.all_states, order)
            for state in order:
                for group in _groups(state):
                    group._module_fqn = None
            root._init_fqns()


def _parallel(one: Any) -> Any:
    """Return how a parameter was sharded before ``fully_shard``; None if it was not."""
    return one.__dict__.get("_unsharded_dtensor_spec", one.__dict__.get("_tp_spec"))


def _blank(one: Any, value: Tensor) -> Tensor:
    """Return a tensor without data of the size of another, placed as the parameter of an ``FSDPParam`` was before ``fully_shard``."""
    if (spec := _parallel(one)) is None:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    own = torch.empty(box_of(spec, value.shape).sizes, dtype=value.dtype, device="meta")
    return joined(own, spec, value.shape)


def _probe(state: Any) -> None:
    """Raise UnsupportedModelError if a state of FSDP lacks an attribute that growth reads or writes."""
    groups = _groups(state)
    params = [one for group in groups for one in group.fsdp_params[:1]]
    for names, things in ((STATE, [state]), (GROUP, groups), (PARAM, params)):
        for name in (name for name in names for thing in things if not hasattr(thing, name)):
            raise UnsupportedModelError(UNKNOWN.format(name))


def _groups(state: Any) -> list[Any]:
    """Return the param groups of a state of FSDP; until torch 2.11, it has one at most."""
    several: Any = getattr(state, "_fsdp_param_groups", None)
    if several is None and not hasattr(state, "_fsdp_param_group"):
        raise UnsupportedModelError(UNKNOWN.format("_fsdp_param_groups"))
    return [g for g in ([state._fsdp_param_group] if several is None else several) if g is not None]


def _refuse_waiting(state: Any) -> None:
    """Raise PlanError if gradients wait to be reduced."""
    for group in _groups(state):
        for one in group.fsdp_params:
            whole = getattr(one, "_unsharded_param", None)
            waits = (
                one.unsharded_accumulated_grad is not None
                or group._partial_reduce_output is not None
            )
            if waits or (whole is not None and whole.grad is not None):
                raise PlanError(
                    "gradients wait to be reduced (set_requires_gradient_sync(False)): grow at an optimizer's step."
                )


def _states(module: nn.Module) -> list[Any]:
    """Return the states of FSDP in a module, each once."""
    managed: list[Any] = [m for m in module.modules() if isinstance(m, FSDPModule)]
    return [*dict.fromkeys(m._get_fsdp_state() for m in managed)]


@contextmanager
def bare(model: nn.Module) -> Generator[None]:
    """Take FSDP off a module and all modules in it while they are copied."""
    saved: list[tuple[Any, Any, dict[str, dict[Any, Any]], dict[Any, Any]]] = []
    try:
        for module in model.modules():
            own: dict[Any, Any] = module.__dict__
            hooks: dict[str, dict[Any, Any]] = {
                name: dict(own[name]) for name in HOOKS if name in own
            }
            kind: Any = module.__class__
            marks: dict[Any, Any] = {}
            if isinstance(module, FSDPModule):
                marks = {
                    k: own[k]
                    for k in own
                    if not isinstance(k, str) or k in MARKS or "composable" in k.lower()
                }
            saved.append((module, kind, hooks, marks))
            for key in marks:
                del own[key]
                if isinstance(marks[key], dict):
                    own[key] = _of_others(marks[key])
            for name, table in hooks.items():
                for key, hook in table.items():
                    if name.endswith("_hooks") and _is_of_fsdp(hook):
                        del own[name][key]
            if isinstance(module, FSDPModule):
                module.__class__ = kind.__mro__[kind._orig_cls_mro_index]
        yield
    finally:
        for module, kind, hooks, marks in saved:
            module.__class__ = kind
            vars(module).update(marks)
            for name, table in hooks.items():
                vars(module)[name].clear()
                vars(module)[name].update(table)


def _of_others(states: dict[Any, Any]) -> dict[Any, Any]:
    """Return the states of the other composable functions of a module, such as ``checkpoint``, by function or by its name."""
    return {of: s for of, s in states.items() if getattr(of, "__name__", of) != "fully_shard"}


def _is_of_fsdp(hook: Any) -> bool:
    """True for a hook that ``fully_shard`` has registered: a function or a bound method of torch's, or a wrapper of one."""
    inner = getattr(hook, "hook", hook)
    owner: Any = getattr(inner, "__self__", None)
    places = (str(getattr(h, "__module__", "")) for h in (hook, inner, owner))
    return any(place.startswith("torch.distributed.fsdp") for place in places)


def _shard_alike(made: nn.Module, block: nn.Module) -> None:
    """Apply ``fully_shard`` to a copy of a block as it was applied to the block, innermost modules first."""
    pairs: list[tuple[Any, Any]] = [*zip(made.modules(), block.modules(), strict=True)]
    for new, old in reversed([pair for pair in pairs if isinstance(pair[1], FSDPModule)]):
        state = old._get_fsdp_state()  # pyright: ignore
        if len(state._modules) != 1 or len(_groups(state)) > 1:
            raise UnsupportedModelError(
                "a block shares one fully_shard([...]) group with other modules, or has several meshes: wrap every block by itself."
            )
        for group in _groups(state):  # one, or none in a module whose parts are all wrapped
            _shard(new, state, group, dict(_placements(group, old, new)))


def shard_first(block: nn.Module, model: nn.Module, path: str) -> None:
    """Apply ``fully_shard`` to the first block of a stack, at this path in a model, with the settings of the closest module around it."""
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1)]
    states: list[Any] = [m._get_fsdp_state() for m in around if isinstance(m, FSDPModule)]  # pyright: ignore
    states += _states(model)  # where the closest module has no parameters of its own
    state, group = next((state, group) for state in states for group in _groups(state))
    _shard(block, state, group, {})


def _shard(module: Any, state: Any, like: Any, places: dict[int, Any]) -> None:
    """Apply ``fully_shard`` to a module with the settings of a state of FSDP and of one of its param groups."""
    fully_shard(
        module, mesh=like.mesh_info.mesh, reshard_after_forward=_reshards(state, like), shard_placement_fn=_Placed(places),
        mp_policy=state._mp_policy, offload_policy=like.offload_policy,
    )  # fmt: skip
    for group in _groups(module._get_fsdp_state()):
        for name in SETTINGS:
            if hasattr(like, name):
                setattr(group, name, getattr(like, name))


class _Placed:
    """A ``shard_placement_fn``: the placement of every parameter by its ``id``."""

    def __init__(self, places: dict[int, Any]) -> None:
        self.places = places

    def __call__(self, p: nn.Parameter) -> Any:
        return self.places.get(id(p))


def _placements(group: Any, old: nn.Module, new: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield the ``id`` of every parameter of a copy, and the placement that its original has."""
    modules: list[tuple[str, nn.Module]] = [*old.named_modules()]  # pyright: ignore
    paths = {id(module): path for path, module in modules}
    for one in group.fsdp_params:
        info = one._module_info
        owner = new.get_submodule(paths[id(info.module)])
        yield id(getattr(owner, info.param_name)), one.fsdp_placement


def _reshards(state: Any, group: Any) -> bool | int | None:
    if state._auto_reshard_after_forward:
        return None
    after = group.post_forward_mesh_info
    return False if after is None else True if after is group.mesh_info else after.shard_mesh_size
