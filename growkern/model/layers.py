"""Helpers to write a spec: the tensors of linear layers, embeddings and norms, by the axes that they read and write."""

from typing import Any, Literal

from growkern.errors import UnsupportedModelError
from growkern.model.spec import KEY, QUERY, RAW, Axis, AxisUse, Norm, Segment, TensorSpec
from growkern.support.argument_types import typed_arguments

typed = typed_arguments(UnsupportedModelError)
EXACT_EPS = 1e-10  # below this epsilon, a second normalization changes values by less than rounding in float32


def _segments(axis: Axis) -> tuple[Segment, ...]:
    if isinstance(axis, str):
        return ((axis,),)
    return (axis,) if isinstance(axis, tuple) else tuple(axis)  # pyright: ignore[reportReturnType]


def _writer(axis: Axis) -> AxisUse:
    return AxisUse("writer", _segments(axis))


def _reader(axis: Axis) -> AxisUse:
    return AxisUse("reader", _segments(axis))


@typed
def writer(axis: Axis) -> AxisUse:
    """Return an axis that produces its streams: the rows of a weight ``W[out, in]``, a bias, an embedding's features.

    Args:
        axis: A stream (``"ffn.0"``), a segment (a tuple of streams and fixed lengths, whose sizes multiply), or a list of segments, which
            lie side by side.

    Raises:
        UnsupportedModelError: ``axis`` has another type.

    Example:
        >>> print(growkern.writer(("heads.0", "head_dim")))
        writer heads.0 x head_dim
    """
    return _writer(axis)


@typed
def reader(axis: Axis) -> AxisUse:
    """Return an axis that contracts its streams: the columns of a weight ``W[out, in]``.

    Args:
        axis: See ``writer``.

    Raises:
        UnsupportedModelError: ``axis`` has another type.

    Example:
        >>> print(growkern.reader("ffn.0"))
        reader ffn.0
    """
    return _reader(axis)


@typed
def linear(
    name: str, *, reads: Axis, writes: Axis, bias: bool = True, transposed: bool = False
) -> dict[str, TensorSpec]:
    """Describe ``y = W x + b`` with ``W[out, in]`` (``W[in, out]`` when ``transposed``).

    Args:
        name: Name of the module.
        reads: What the layer reads, see ``writer``.
        writes: What the layer writes.
        bias: False for a layer without a bias.
        transposed: True for a weight that is stored as ``W[in, out]``, such as GPT-2's ``Conv1D``.

    Returns:
        Axes of ``name.weight`` and ``name.bias``, for ``ModelSpec.tensors``.

    Raises:
        UnsupportedModelError: An argument has another type.

    Example:
        >>> for tensor, axes in growkern.linear("blocks.0.up", reads="residual", writes="ffn.0").items():
        ...     print(f"{tensor}: {', '.join(map(str, axes))}")
        blocks.0.up.weight: writer ffn.0, reader residual
        blocks.0.up.bias: writer ffn.0
    """
    weight = (_reader(reads), _writer(writes)) if transposed else (_writer(writes), _reader(reads))
    return {f"{name}.weight": weight} | ({f"{name}.bias": (_writer(writes),)} if bias else {})


@typed
def embedding(name: str, *, rows: Axis, writes: Axis) -> dict[str, TensorSpec]:
    """Describe a table ``E[rows, features]`` that is looked up by row.

    Args:
        name: Name of the module.
        rows: What the rows count, such as ``"vocab"`` or ``"positions"``.
        writes: What a row writes, see ``writer``.

    Returns:
        Axes of ``name.weight``, for ``ModelSpec.tensors``.

    Raises:
        UnsupportedModelError: An argument has another type.

    Example:
        >>> for tensor, axes in growkern.embedding("wte", rows="vocab", writes="residual").items():
        ...     print(f"{tensor}: {', '.join(map(str, axes))}")
        wte.weight: writer vocab, writer residual
    """
    return {f"{name}.weight": (_writer(rows), _writer(writes))}


@typed
def norm(
    name: str,
    *,
    reads: str,
    writes: str,
    kind: Literal["rms", "layer"],
    bias: bool | None = None,
    eps: str | None = "eps",
    offset: float = 0.0,
) -> dict[str, TensorSpec]:
    """Describe a norm with gain ``offset + weight`` and, by default for LayerNorm, ``bias``.

    Args:
        name: Name of the module.
        reads: Stream that the norm reads, such as ``"residual"``.
        writes: Stream of the same space that the norm writes, such as ``"residual:normed"``.
        kind: ``"rms"`` divides by the root mean square, ``"layer"`` subtracts the mean first.
        bias: True for a norm with a bias; None: LayerNorm has one, RMSNorm has none.
        eps: Name of the module attribute that holds the epsilon; None if the epsilon cannot change, such as a number in ``forward``.
        offset: Constant that the module adds to its weight; 1 for Gemma's norms.

    Returns:
        Axes of ``name.weight`` and ``name.bias``, for ``ModelSpec.tensors``.

    Raises:
        UnsupportedModelError: An argument has another type.

    Example:
        >>> for tensor, axes in growkern.norm("ln_f", reads="residual", writes="residual:final", kind="layer").items():
        ...     print(f"{tensor}: {', '.join(map(str, axes))}")
        ln_f.weight: gain residual:final of layer(residual)
        ln_f.bias: writer residual:final
    """
    gain = AxisUse("gain", _segments(writes), Norm(reads, kind, eps, offset))
    has_bias = kind == "layer" if bias is None else bias
    return {f"{name}.weight": (gain,)} | ({f"{name}.bias": (_writer(writes),)} if has_bias else {})


def head_norms(attention: str) -> dict[str, TensorSpec]:
    """Describe the norms of queries and keys, which all heads share."""
    return {
        name: axes
        for which, stream in (("q_norm", QUERY), ("k_norm", KEY))
        for name, axes in norm(
            f"{attention}.{which}",
            reads=RAW[stream],
            writes=stream,
            kind="rms",
            eps="variance_epsilon",
        ).items()
    }


def rope_fixed(config: object) -> dict[str, str]:
    """Return why head_dim cannot grow, if the frequencies of the RoPE type depend on more than ``j / head_dim``; else an empty dict."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    kinds: set[str] = {
        r.get("rope_type", "default") for r in (rope, *rope.values()) if hasattr(r, "get")
    }
    strange = sorted(kinds - {"default", "linear", "llama3"})
    return {"head_dim": f"RoPE of type {strange[0]!r} depends on it"} if strange else {}


def post_norm_eps_reason(eps: float) -> tuple[str, ...]:
    """Return why a new post-norm block with this epsilon is not the identity: the block normalizes a normalized input again."""
    return (
        (f"new post-norm blocks are the identity only up to the epsilon of their norms, {eps:g}",)
        if eps > EXACT_EPS
        else ()
    )
