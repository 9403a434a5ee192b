"""Turn a dense model into a mixture of experts in the middle of training (sparse upcycling: Komatsuzaki et al., arXiv:2212.05055)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.commit.undo import Undo
from growkern.distributed.shards import refuse_shards
from growkern.engine.claims import claimed
from growkern.engine.live_objects import refuse_mid_pass
from growkern.errors import (
    PlanError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
    raise_all,
)
from growkern.model.describe import describe
from growkern.optimizer.describe import Optimizers, describe_optimizers, optimizers
from growkern.optimizer.state_rules import Law, Rule
from growkern.optimizer.update_scale import scale_of
from growkern.planning.argument_checks import STRONGEST, wrong_int, wrong_number
from growkern.support.argument_types import typed_arguments
from growkern.support.interrupts import uninterrupted
from growkern.support.names import named_parameters
from growkern.support.text import short
from growkern.support.wrappers import unwrapped

MOST_EXPERTS, MOST_SEED = 1 << 12, 1 << 62


@dataclass(frozen=True)
class Twin:
    """The mixture class of transformers for a dense class.

    Attributes:
        name: Class name of the mixture.
        fields: Config field of the mixture -> dense config field with its value, for fields that only the mixture has.
        without: Dense config field that the mixture lacks -> the only value that the mixture supports.
        own: Config field of the mixture -> value, for fields without a dense counterpart.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=dict[str, str])
    without: Mapping[str, object] = field(default_factory=dict[str, object])
    own: Mapping[str, object] = field(default_factory=dict[str, object])


TWINS = {
    "LlamaForCausalLM": Twin(
        "MixtralForCausalLM", without={"attention_bias": False, "mlp_bias": False}
    ),
    "MistralForCausalLM": Twin("MixtralForCausalLM"),
    "Qwen3ForCausalLM": Twin(
        "Qwen3MoeForCausalLM",
        {"moe_intermediate_size": "intermediate_size"},
        own={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
}


@typed_arguments(
    PlanError,
    "optim",
    "experts",
    "top_k",
    "std",
    "seed",
    "optim",
    model=UnsupportedModelError,
)
def upcycle(
    model: nn.Module, optim: Optimizers = None, *, experts: int, top_k: int = 2, std: float = 0.02, seed: int = 0
) -> nn.Module:  # fmt: skip
    """Replace every MLP of a dense model by a layer of experts: copies of the MLP behind a random router.

    The routing weights of the chosen experts sum to one, so any router preserves the function; the experts diverge because they see
    different tokens. The mixture shares everything but the MLPs with ``model``, Parameter objects included. In the optimizer, changed
    in place, the experts replace the MLPs. An expert sees a share of the tokens, so its expected gradient is ``1 / experts`` of the
    MLP's: first-order state and gradients in flight are scaled by this factor, second-order state by its square. The router starts
    without state. The mixture has no ``growkern_history``: save the mixture itself, and to load the optimizer's state, build the
    optimizer with the same param groups.

    Args:
        model: ``LlamaForCausalLM``, ``MistralForCausalLM`` (they become Mixtral) or ``Qwen3ForCausalLM`` (Qwen3-MoE) of transformers.
        optim: Optimizer of the model, or a list of optimizers; that of an MLP gets its experts and its router.
        experts: Number of experts per layer.
        top_k: Number of experts per token.
        std: Standard deviation of the router's weights.
        seed: Seed of the router's weights.

    Returns:
        The mixture, a new model; train it in place of ``model``.

    Raises:
        UnsupportedModelError: The model has no mixture class, or uses an option that the mixture lacks; the tensors of an MLP are
            partly frozen or not in one param group.
        UnsupportedOptimizerError: The optimizer's state cannot be grown.
        PlanError: ``top_k`` is not between 1 and ``experts``, ``std`` is not above 0, or the optimizer has an ``UpdateScale``.

    Example:
        >>> logits = model(**batch).logits
        >>> moe = growkern.upcycle(model, optim, experts=4)
        >>> type(moe).__name__, torch.allclose(moe(**batch).logits, logits, atol=1e-5)
        ('MixtralForCausalLM', True)

    Reference:
        Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", ICLR 2023, arXiv:2212.05055.
    """
    model, optims = unwrapped(model), optimizers(optim)
    refuse_shards(model, "upcycle")
    twin = TWINS.get(type(model).__name__)
    if twin is None or type(model).__module__.partition(".")[0] != "transformers":
        raise UnsupportedModelError(
            f"{type(model).__name__} has no mixture-of-experts class of the same attention; growkern upcycles {', '.join(TWINS)}."
        )
    wrong = [
        *wrong_int("experts", experts, 1, MOST_EXPERTS),
        *wrong_int("seed", seed, 0, MOST_SEED),
    ]
    wrong += wrong_number("std", std, 0, STRONGEST, above=True)
    if wrong or [*wrong_int("top_k", top_k, 1, experts)]:
        said = (
            f"experts={short(experts)}, top_k={short(top_k)}, std={short(std)}, seed={short(seed)}"
        )
        raise PlanError(f"{said}: pass 1 <= top_k <= experts, std > 0, and an int as seed.")
    refuse_mid_pass(model, *optims)
    with claimed(model, optims):
        return _upcycled(model, optims, twin, experts, top_k, std, seed)


def _upcycled(
    model: nn.Module, optims: Sequence[Optimizer], twin: Twin, experts: int, top_k: int, std: float, seed: int
) -> nn.Module:  # fmt: skip
    """Return the mixture of a dense model; see ``upcycle``."""
    spec = describe(model)
    config: Any = model.config
    strange = [
        f"{name}={getattr(config, name)!r}: {twin.name} does not have this option; set it to {value!r}."
        for name, value in twin.without.items()
        if getattr(config, name, value) != value
    ]
    strange += [*_apart(model, optims)]
    raise_all(UnsupportedModelError, f"cannot make this {type(model).__name__} a mixture:", strange)
    laws = [described.law for described in describe_optimizers(model, optims, spec)]
    if any(scale_of(optim) is not None for optim in optims):
        raise PlanError(
            "the optimizer has an UpdateScale, whose factors are the dense model's; call its remove() first."
        )
    with torch.no_grad(), torch.inference_mode(False):
        mixture = _mixture(model, config, twin, experts, top_k)
        layers = [
            _experts(model, layer, experts, std, seed + i)
            for i, layer in enumerate(mixture.model.layers)
        ]
        moved = [pair for layer in layers for pair in layer]
        states = [_states(*pair, moved, experts) for pair in zip(optims, laws, strict=True)]
        _hand_over(optims, moved, states, mixture)
    return mixture.train(model.training)


def _mixture(model: nn.Module, config: Any, twin: Twin, experts: int, top_k: int) -> Any:
    """Build the mixture around the dense model's own parameters, with experts on the meta device."""
    import transformers

    kind: Any = getattr(transformers, twin.name)
    known = kind.config_class().to_dict().keys() - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    fields = {k: v for k, v in config.to_dict().items() if k in known}
    fields |= {name: getattr(config, own) for name, own in twin.fields.items()}
    grown = kind.config_class(
        **fields, num_local_experts=experts, num_experts_per_tok=top_k, **twin.own
    )
    grown._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        mixture = kind(grown)
    for name, p in named_parameters(model, remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if ".mlp." not in name:
            mixture.get_submodule(owner)._parameters[last] = p
    like = next(model.parameters())
    mixture.model.rotary_emb = type(mixture.model.rotary_emb)(grown).to(like.device)
    mixture.generation_config = model.generation_config
    return mixture


def _apart(model: nn.Module, optims: Sequence[Optimizer]) -> Iterator[str]:
    """Yield an error for each MLP whose tensors are partly frozen, in several param groups, or in none."""
    every = [(optim, group) for optim in optims for group in optim.param_groups]
    groups = {id(p): i for i, (_, group) in enumerate(every) for p in group["params"]}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if ".mlp." in name:
            parts.setdefault(name.partition(".mlp.")[0] + ".mlp", []).append(p)
    for name, own in parts.items():
        held = {groups.get(id(p)) for p in own}
        if len({p.requires_grad for p in own}) > 1:
            yield f"{name}: has frozen and trained tensors, which become one tensor; freeze all of them, or none."
        elif optims and (len(held) > 1 or None in held):
            yield (
                f"{name}: has tensors in several param groups, or in none, which become one tensor; put all of them in one group."
            )


Moved = tuple[nn.Parameter, list[nn.Parameter]]  # a new parameter, and the parameters it replaces


def _experts(model: nn.Module, layer: Any, experts: int, std: float, seed: int) -> list[Moved]:
    """Give a layer its experts, copies of the dense MLP, and its router."""
    at = f"model.layers.{layer.self_attn.layer_idx}.mlp"
    gate, up, down = (model.get_parameter(f"{at}.{n}_proj.weight") for n in ("gate", "up", "down"))
    own: Any = layer.mlp
    drawn = torch.randn(own.gate.weight.shape, generator=torch.Generator().manual_seed(seed)) * std
    own.gate.weight = nn.Parameter(drawn.to(down))
    for name, parts in (("gate_up_proj", [gate, up]), ("down_proj", [down])):
        new = nn.Parameter(_copies(parts, experts), requires_grad=down.requires_grad)
        if (grads := [p.grad for p in parts if p.grad is not None]) and len(grads) == len(parts):
            new.grad = _copies(grads, experts) / experts
        setattr(own.experts, name, new)
    return [
        (own.experts.gate_up_proj, [gate, up]),
        (own.experts.down_proj, [down]),
        (own.gate.weight, []),
    ]


def _copies(parts: Sequence[Tensor], n: int) -> Tensor:
    return torch.cat([part.detach() for part in parts]).expand(n, -1, -1).contiguous()


def _states(
    optim: Optimizer, law: Law | None, moved: Sequence[Moved], experts: int
) -> dict[nn.Parameter, object]:
    """Return the state of the experts that replace parameters of one optimizer.

    Raises:
        UnsupportedOptimizerError: The optimizer trains matrices only, or a state cannot be copied.
    """
    own = {p for group in optim.param_groups for p in group["params"]}
    if law is not None and law.matrix and any(p in own for _, old in moved for p in old):
        raise UnsupportedOptimizerError(
            f"this {type(optim).__name__} trains matrices, and the experts of a layer are one tensor: move the MLPs to another "
            "optimizer, such as AdamW, first."
        )
    rules = law.grown("exact") if law else dict[str, Rule | None]()
    return {new: state for new, old in moved if (state := _state(optim, old, rules, experts))}


def _state(
    optim: Optimizer, old: Sequence[nn.Parameter], rules: Mapping[str, Rule | None], experts: int
) -> dict[str, object]:
    """Return the state of the experts: copies of the MLP's state, scaled by powers of ``1 / experts``."""
    states = [optim.state.get(p, {}) for p in old]
    if not states or not all(states):
        return {}
    copied: dict[str, object] = dict(states[0])
    for key, value in states[0].items():
        if not isinstance(value, Tensor) or not value.dim():
            continue
        rule = rules.get(key)
        if rule is None or rule.reduced is not None or value.shape != old[0].shape:
            raise UnsupportedOptimizerError(
                f"state {key!r} is not one number per element of its parameter; clear the state (optim.state.clear()) to go on without it."
            )
        copied[key] = _copies([state[key] for state in states], experts) / experts**rule.grad
    return copied


def _hand_over(
    optims: Sequence[Optimizer],
    moved: Sequence[Moved],
    states: Sequence[Mapping[Any, object]],
    mixture: nn.Module,
) -> None:
    """Replace MLPs by experts in the param groups, add routers behind them, and roll back on failure."""
    gone = {p for _, old in moved for p in old}
    takes: dict[nn.Parameter, list[nn.Parameter]] = {}
    last: nn.Parameter | None = None
    for new, old in moved:
        last = old[-1] if old else last
        takes.setdefault(old[0] if old else cast(nn.Parameter, last), []).append(new)
    names = {p: name for name, p in mixture.named_parameters()}
    undo = Undo()
    with uninterrupted():
        try:
            for group in (group for optim in optims for group in optim.param_groups):
                params: list[nn.Parameter] = group["params"]
                kept = [q for p in params for q in takes.get(p, [] if p in gone else [p])]
                undo.set_list(params, kept)
                if "param_names" in group:
                    undo.set_list(group["param_names"], [names[p] for p in kept])
            for optim, own in zip(optims, states, strict=True):
                rest = {p: state for p, state in optim.state.items() if p not in gone}
                undo.set_dict(optim.state, rest | dict(own))
        except BaseException:
            undo.rollback()
            raise
