"""Resolve the user's request (``"2x"``, ``{"hidden": 1024}``) to the target of every named size."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fractions import Fraction
from operator import index
from typing import Any

from growkern.errors import PlanError, raise_all
from growkern.model.spec import ModelSpec
from growkern.support.text import short

WIDTHS = ("hidden", "heads", "kv_heads", "ffn")  # sizes that "2x" grows; others grow if named
MAX_SIZE = 1 << 18  # larger than any model: a typo must not fill the host's memory
MAX_LAYERS = 1 << 12  # and the largest head_dim
MAX_AXIS = (
    1 << 20
)  # longest axis of a tensor: a product or a sum of sizes, such as heads x head_dim
MAX_DIGITS = 100  # characters of a factor: more would take long to multiply, and cannot be printed
Target = str | Mapping[str, int | str]


def width_of(name: str) -> str:
    """Return the kind of a size: a model may have several of a kind, ``ffn``, ``ffn2``, ``ffn3``."""
    return name.rstrip("0123456789")


def limit_of(name: str) -> int:
    """Return the largest target of a size; a source above the limit may stay."""
    return MAX_LAYERS if name.endswith("layers") or name == "head_dim" else MAX_SIZE


def resolve_sizes(spec: ModelSpec, to: Target, *, shrink: bool = False) -> dict[str, int]:
    """Return every target size.

    Sizes that are not named follow ``hidden``: ffn, heads and kv heads grow in proportion if the result is whole (heads and kv heads
    together, with groups of unchanged size), else stay. All other sizes stay. A factor for all widths leaves those that cannot grow;
    the notes of the plan name them.

    Args:
        spec: Description of the source model.
        to: A factor for all widths (``"2x"``, ``"1.5x"``), or a mapping from size name, or field of the config, to an int or a factor.
        shrink: True for targets below the source, False for those above.

    Returns:
        The target of every size of ``spec.sizes``.

    Raises:
        PlanError: A size name is unknown, or a target is not whole, is on the wrong side of the source, or is impossible in the
            model. The error lists every problem, with the nearest possible sizes.
    """
    for problem in wrong_target(to, ", ".join(spec.sizes)):
        raise PlanError(problem)
    source, problems = spec.sizes, list[str]()
    named = _named(spec, _by_size(spec, to), problems, shrink)
    target = dict(source) | named
    if "hidden" in source and not problems:
        ratio = Fraction(target["hidden"], source["hidden"])
        _follow(spec, named, target, ratio, problems)
    for name, n in target.items():
        limit = MAX_LAYERS if name in {s.size for s in spec.stacks} else limit_of(name)
        if wrong := _wrong_side(name, n, source[name], shrink):
            problems.append(wrong)
        elif n > max(limit, source[name]):
            problems.append(_too_large(name, n, limit))
        elif n != source[name] and name in spec.fixed:
            verb = "shrink" if shrink else "grow"
            problems.append(
                f"{name}: cannot {verb} in this {spec.family}: {spec.fixed[name]}; leave {name} out of to=."
            )
        elif name in spec.whole_multiples and n % source[name]:
            problems.append(
                f"{name}: {n} is no whole multiple of {source[name]}, and {spec.whole_multiples[name]}; name {_nearest(n, source[name])}."
            )
    if not problems and "kv_heads" in target:
        problems += _groups(source, target, shrink)
    if not problems:
        problems += _long_axes(spec, target)
    if not problems and target == dict(source):
        problems.append(_nothing_changes(spec, shrink))
    raise_all(
        PlanError,
        f"cannot {'shrink' if shrink else 'grow'} {spec.family} to {short(to, 300)}:",
        problems,
    )
    return target


def _by_size(spec: ModelSpec, to: Target) -> Target:
    """Return a request in which the fields of the config are replaced by the sizes that they hold.

    Raises:
        PlanError: A size is named twice.
    """
    if isinstance(to, str):
        return to
    named: dict[str, int | str] = {}
    for name, value in to.items():
        held = spec.config.get(name)
        size = held if isinstance(held, str) and name not in spec.sizes else name
        if size in named:
            raise PlanError(
                f"cannot read to={short(to, 300)}: {name!r} is the size {size!r}, which is named too; leave one out."
            )
        named[size] = value
    return named


def wrong_target(to: object, known: str = "size names") -> Iterator[str]:
    """Yield a problem for anything but a factor, or a mapping from names to ints or factors, as far as types tell."""
    named: Mapping[Any, Any] = to if isinstance(to, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(to, str | Mapping) or (isinstance(to, str) and _factor(to) is None):
        yield f"cannot read to={short(to)}; pass a factor such as '2x' or '1.5x', or a mapping of {known}."
    elif strange := [name for name in named if not isinstance(name, str)]:
        yield f"cannot read to={short(to)}: {short(strange[0])} is no name of a size; pass a mapping of {known}."  # pyright: ignore


def _nothing_changes(spec: ModelSpec, shrink: bool) -> str:
    """Return the problem of a target that is the source: the sizes, those that are fixed and why, and the way out."""
    sizes = (
        ", ".join(f"{k}={v}" for k, v in spec.sizes.items()) or "no size was found that can grow"
    )
    fixed = "".join(f" {size} cannot grow: {why}." for size, why in spec.fixed.items() if size != "head_dim")  # fmt: skip
    out = f"name a {'smaller' if shrink else 'larger'} size"
    if spec.sizes.keys() <= spec.fixed.keys():
        out = "print(growkern.describe(...)) shows why each axis is fixed; pass spec=ModelSpec(...) to describe the model yourself"
    return f"every target equals its source ({sizes}); {out}.{fixed}"


def _groups(source: Mapping[str, int], target: Mapping[str, int], shrink: bool) -> Iterator[str]:
    """Yield the problems of the target's ratio of heads to kv heads."""
    heads, kv_heads, group = (
        target["heads"],
        target["kv_heads"],
        source["heads"] // source["kv_heads"],
    )
    if heads % kv_heads:
        yield (
            f"heads: {heads} is not a multiple of kv_heads={kv_heads}; nearest: {_nearest(heads, kv_heads)}."
        )
        return
    change = heads // kv_heads - group
    split = not kv_heads % source["kv_heads"] and heads == source["heads"]  # only kv heads grow
    if change > 0 if shrink else change < 0 and not split:
        way_out = f"heads={kv_heads * group}" if shrink else f"kv_heads={source['kv_heads']}"
        yield (
            f"heads: {heads} over kv_heads={kv_heads} would {'grow' if shrink else 'shrink'} the groups of {group}; "
            f"name {way_out} to keep them."
        )


def _long_axes(spec: ModelSpec, target: Mapping[str, int]) -> Iterator[str]:
    """Yield a problem for every tensor axis that would be too long, as products of sizes can be."""
    for axis in spec.axes:
        if (n := axis.size(target)) > max(MAX_AXIS, axis.size(spec.sizes)):
            yield f"the axis {str(axis)!r} would have {digits(n)} coordinates, and an axis has at most {MAX_AXIS:,}: name smaller sizes."


def digits(n: int) -> str:
    """Return a number as text, of however many digits."""
    return f"{n:,}" if abs(n) < 10**MAX_DIGITS else f"of more than {MAX_DIGITS} digits"


def _too_large(name: str, n: int, limit: int) -> str:
    return f"{name}: the target {digits(n)} is above the limit of growkern; name at most {limit:,}."


def _wrong_side(name: str, n: int, source: int, shrink: bool) -> str | None:
    if shrink and n > source:
        return f"{name}: the target {short(n)} is larger than the source {source}; grow the model by expand_inplace."
    if shrink and n < 1:
        return f"{name}: the target {short(n)} is not a size; name at least 1."
    if not shrink and n < source:
        return f"{name}: the target {short(n)} is smaller than the source {source}; shrink the model by shrink_inplace."
    return None


def _named(spec: ModelSpec, to: Target, problems: list[str], shrink: bool) -> dict[str, int]:
    if isinstance(to, str):
        if "hidden" in spec.sizes and "hidden" not in spec.fixed:
            return {"hidden": _scaled("hidden", spec, to, problems)}
        tied = ("heads", "kv_heads") if spec.hidden_is_heads else ()  # they grow with hidden only
        free = [s for s in spec.sizes if width_of(s) in WIDTHS and s not in {*spec.fixed, *tied}]
        grown = {name: _scaled(name, spec, to, problems) for name in free}
        return {
            s: n
            for s, n in grown.items()
            if s not in spec.whole_multiples or n % spec.sizes[s] == 0
        }
    named: dict[str, int] = {}
    for name, value in to.items():
        if name not in spec.sizes:
            close = get_close_matches(short(name).strip("'"), spec.sizes, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            hint = f"it cannot grow: {spec.fixed[name]}; " if name in spec.fixed else hint
            problems.append(
                f"unknown size {short(name)}: {hint}sizes of {spec.family}: {', '.join(spec.sizes)}."
            )
        elif isinstance(value, str) and _factor(value) is None:
            problems.append(
                f"{name}: cannot read {short(value)}; pass an int, or a factor such as '1.5x'."
            )
        elif isinstance(value, str):
            named[name] = _scaled(name, spec, value, problems)
        elif (n := _int(value)) is None:
            problems.append(
                f"{name}: cannot read {short(value)}; pass an int, or a factor such as '1.5x'."
            )
        elif n.bit_length() > 64:  # too long to be printed
            problems.append(f"{name}: the target is above 2**64; name at most {MAX_SIZE:,}.")
        elif wrong := _wrong_side(name, n, spec.sizes[name], shrink):
            problems.append(wrong)
        elif n > max(limit_of(name), spec.sizes[name]) and n > MAX_SIZE:
            problems.append(_too_large(name, n, limit_of(name)))
        else:
            named[name] = n
    return named


def _int(value: Any) -> int | None:
    """Return a value as an int; None for a bool, a float, text, or a tensor of several or of fractional elements."""
    try:
        return None if isinstance(value, bool) else index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _factor(text: str) -> Fraction | None:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*x\s*", text) if len(text) <= MAX_DIGITS else None
    return Fraction(match[1]) if match and Fraction(match[1]) > 0 else None


def _scaled(name: str, spec: ModelSpec, factor: str, problems: list[str]) -> int:
    exact = spec.sizes[name] * (_factor(factor) or 1)
    if exact.denominator != 1 and not (name == "hidden" and spec.hidden_is_heads):
        low = int(exact)
        problems.append(
            f"{name}: {factor} of {spec.sizes[name]} is {float(exact):g}, not whole; nearest: {low}, {low + 1}."
        )
    return int(exact)


def _follow(
    spec: ModelSpec,
    named: dict[str, int],
    target: dict[str, int],
    ratio: Fraction,
    problems: list[str],
) -> None:
    source = spec.sizes
    for name in source:
        if (
            name not in {*named, "hidden", "heads", "kv_heads"} | spec.fixed.keys()
            and width_of(name) in WIDTHS
        ):
            target[name] = _followed(spec, name, ratio)
    if {"heads", "kv_heads"} & spec.fixed.keys():
        return
    if spec.hidden_is_heads:
        _hidden_is_heads(spec, named, target, problems)
    elif "kv_heads" in source:
        group = source["heads"] // source["kv_heads"]
        if "kv_heads" not in named:
            follow = _followed(spec, "kv_heads", ratio)
            target["kv_heads"] = (
                follow
                if target["heads"] % follow == 0 or "heads" not in named
                else source["kv_heads"]
            )
        if "heads" not in named:
            target["heads"] = target["kv_heads"] * group
    elif "heads" in source and "heads" not in named:
        target["heads"] = _followed(spec, "heads", ratio)


def _followed(spec: ModelSpec, name: str, ratio: Fraction) -> int:
    """Return the target of a size that follows hidden: in proportion if that is possible, else the source."""
    n = _whole(spec.sizes[name], ratio)
    return spec.sizes[name] if name in spec.whole_multiples and n % spec.sizes[name] else n


def stays(spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield a note for every width that stays although others grow, because it cannot grow, or not by the factor of the others."""
    grown = [s for s in sizes if width_of(s) in WIDTHS and sizes[s] != spec.sizes[s]]
    for size, why in {**spec.whole_multiples, **spec.fixed}.items():
        if grown and width_of(size) in WIDTHS and sizes.get(size, 0) == spec.sizes.get(size):
            only = "" if size in spec.fixed else "it grows by whole multiples only, because "
            yield f"{size} stays at {sizes[size]}: {only}{why}"
        elif grown and width_of(size) in WIDTHS and size not in spec.sizes:
            yield f"{size} cannot grow: {why}"


def _hidden_is_heads(
    spec: ModelSpec, named: dict[str, int], target: dict[str, int], problems: list[str]
) -> None:
    head_dim = target["head_dim"]
    if {"heads", "head_dim"} & set(named) and "hidden" not in named:
        target["hidden"] = target["heads"] * head_dim
        if "ffn" in target and "ffn" not in named:
            target["ffn"] = _whole(
                spec.sizes["ffn"], Fraction(target["hidden"], spec.sizes["hidden"])
            )
        return
    if target["hidden"] % head_dim:
        problems.append(
            f"hidden: {target['hidden']} is not a multiple of head_dim={head_dim}, and {spec.family} needs "
            f"hidden = heads x head_dim; nearest: {_nearest(target['hidden'], head_dim)}."
        )
    elif named.get("heads", target["hidden"] // head_dim) != target["hidden"] // head_dim:
        problems.append(
            f"heads: {spec.family} needs hidden = heads x head_dim, but {target['hidden']} is not {named['heads']} x {head_dim}; "
            f"hidden={named['heads'] * head_dim} or heads={target['hidden'] // head_dim} fits."
        )
    else:
        target["heads"] = target["hidden"] // head_dim
        for name, n in spec.sizes.items():
            base = width_of(name)  # of a model with several towers
            if base in ("hidden", "heads") and target[name] * spec.sizes[base] != n * target[base]:
                problems.append(
                    f"{name}: the target of {n} is {target[name]}, but {base} of this {spec.family} grows from {spec.sizes[base]} to "
                    f"{target[base]}, and both grow by one factor; name hidden alone, with a factor that gives whole sizes."
                )


def _whole(n: int, ratio: Fraction) -> int:
    return int(n * ratio) if (n * ratio).denominator == 1 else n


def _nearest(n: int, unit: int) -> str:
    low = n // unit * unit
    return ", ".join(str(k) for k in (low, low + unit) if k)
