"""What a family adds to the trace of a small model of its class: names of sizes, and facts that one forward does not show."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Fixed = tuple[object, tuple[str, ...], str]


@dataclass(frozen=True, eq=False)
class Hint:
    """What tracing does not see in a class of models whose objects are built from a config.

    Attributes:
        name: Name of the family in messages.
        fields: Field of the config -> size that it holds. Without a field of ``head_dim``, hidden = heads x head_dim.
        derived: Size whose field may be None -> the size that it is a multiple of then, and the factor.
        follows: Field -> size that it holds where it equals that size; a field of another value keeps it.
        apart: Field of ``follows`` -> size of its own, where the value is another, and why this size is fixed.
        fixed_by: Field -> the value under which all sizes grow, the sizes that are fixed under other values, and why.
        only: Field -> the value for which the family is described.
        unused: Tensors that the forward of a model without ties does not use; their lengths say what their axes are.
        by_stack: True when the spaces of heads and ffn have the name of their stack (the encoder's beside the decoder's).
        lists: Fields that hold one entry per block.
        eps: Field that holds the epsilon of the norms.
        saves: Two sizes: transformers saves the model only if the first is a multiple of the second.
        divided: Field, cached by the model, that is divided by the factor of a size: field -> the size.
        config: Further fields, of configs of single modules, such as ``decoder.num_layers`` -> size.
    """

    name: str
    fields: Mapping[str, str]
    derived: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    follows: Mapping[str, str] = field(default_factory=dict[str, str])
    apart: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    fixed_by: Mapping[str, Fixed] = field(default_factory=dict[str, Fixed])
    only: Mapping[str, object] = field(default_factory=dict[str, object])
    unused: tuple[str, ...] = ()
    by_stack: bool = False
    lists: tuple[str, ...] = ()
    eps: str | None = None
    saves: tuple[str, str] | None = None
    divided: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, str] = field(default_factory=dict[str, str])
