"""The kernels compile for every target without a GPU; for sm_90 they do not spill, fit 64 registers and use 16-byte accesses.

Triton's interpreter and compiler cannot share a process: the tests run this file as a script and read its output.
"""

import json
import os
import re
import subprocess
import sys
from itertools import product
from tempfile import NamedTemporaryFile

import pytest

N_REGISTERS = 64  # an SM has 65536 registers, and so holds 1024 threads of 64
PAIRS = [  # dtypes of source and target: means are computed in float32
    *((d, d) for d in ("float32", "bfloat16", "float16", "float64", "int64")),
    ("float32", "bfloat16"),
    ("float32", "float16"),
]
BLOCKS = [1024, 2048, 4096, 8192]  # sizes of staged rows
FULL = [  # every specialisation: source dtype, target dtype, size of staged rows or 0
    *((src, dst, n) for src, dst in PAIRS for n in [0, *BLOCKS] if src != "int64" or not n)
]
FULL = [case for case in FULL if not (case[2] and case[0] == "float64")]
DISASSEMBLED = [("float32", "float32", 0), ("bfloat16", "bfloat16", 8192)]
SOME = [("bfloat16", "bfloat16", 0), ("float64", "float64", 0), ("float32", "float32", 4096)]
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sass": ("cuda", 90, 32),  # disassembled
    "gfx942": ("hip", "gfx942", 64),
}
COMPILE_ONLY = list(product(["sm_80", "sm_100", "gfx942"], SOME))
KINDS = [  # dtypes of parameter, gradient and moments of the AdamW kernel
    *((d, d, d) for d in ("float32", "bfloat16", "float16", "float64")),
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float32"),
]
ADAMW = [("adamw", *kind, options) for kind in KINDS for options in ("plain", "slices")]
ADAMW += [("adamw", *KINDS[0], "slices+scaler"), ("adamw", *KINDS[4], "scaler")]
SQUARES = [("squares", dtype) for dtype in ("float32", "bfloat16", "float16", "float64")]
SQUARES_ONLY = list(product(["sm_80", "sm_100", "gfx942"], SQUARES))
INHERIT = [  # dtype of the logits, teacher, softcap
    ("inherit", dtype, teacher, cap)
    for dtype, cap in (("float32", ""), ("bfloat16", ""), ("bfloat16", "capped"))
    for teacher in ("none", "dense", 10, 64, 1023)  # a number: indices per row
]
DISASSEMBLED += [ADAMW[-2], INHERIT[8]]
INHERIT_ONLY = list(product(["sm_80", "sm_100", "gfx942"], INHERIT[5:9]))
DIVISIBLE = "n_padded", "stride", "dense_stride"  # scalars that a launch finds divisible by 16
ADAMW_ONLY = list(product(["sm_80", "sm_100", "gfx942"], ADAMW[-2:]))


def case_id(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


pytestmark = [
    pytest.mark.xdist_group("compile"),
    pytest.mark.slow,
]  # one xdist worker compiles, once


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, int]]:
    """Compile every case; return, per target and case, registers, bytes of stack and local memory, and widths of accesses."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize(("target", "case"), COMPILE_ONLY, ids=case_id)
def test_expand_compiles(built, target, case):
    assert built[f"{target} {case_id(case)}"] == {"compiled": 1}


@pytest.mark.parametrize("case", FULL, ids=case_id)
def test_expand_fits_registers_and_moves_16_bytes_where_it_can(built, case):
    found = built[f"sm_90 {case_id(case)}"]

    assert (found["stack"], found["local"]) == (0, 0)  # where spills would go
    assert found["registers"] <= N_REGISTERS
    if case[2]:  # 4 adjacent columns per thread
        assert found["store"] == (128 if case[1] == "float32" else 64)
    else:
        assert (found["load"], found["store"]) == (128, 128)


@pytest.mark.parametrize(("target", "case"), ADAMW_ONLY, ids=case_id)
def test_adamw_compiles(built, target, case):
    assert built[f"{target} {case_id(case)}"] == {"compiled": 1}


@pytest.mark.parametrize("case", ADAMW, ids=case_id)
def test_adamw_fits_registers_and_moves_16_bytes_where_it_can(built, case):
    found = built[f"sm_90 {case_id(case)}"]

    assert (found["stack"], found["local"]) == (0, 0)  # where spills would go
    assert found["registers"] <= N_REGISTERS
    assert (found["load"], found["store"]) == (128, 128)


@pytest.mark.parametrize(("target", "case"), SQUARES_ONLY, ids=case_id)
def test_squares_compiles(built, target, case):
    assert built[f"{target} {case_id(case)}"] == {"compiled": 1}


@pytest.mark.parametrize("case", SQUARES, ids=case_id)
def test_squares_fits_registers_and_reads_16_bytes(built, case):
    found = built[f"sm_90 {case_id(case)}"]

    assert (found["stack"], found["local"], found["load"]) == (0, 0, 128)
    assert found["registers"] <= N_REGISTERS


@pytest.mark.parametrize(("target", "case"), INHERIT_ONLY, ids=case_id)
def test_inherit_compiles(built, target, case):
    assert built[f"{target} {case_id(case)}"] == {"compiled": 1}


@pytest.mark.parametrize("case", INHERIT, ids=case_id)
def test_inherit_fits_registers_and_moves_16_bytes(built, case):
    found = built[f"sm_90 {case_id(case)}"]

    assert (found["stack"], found["local"]) == (0, 0)  # where spills would go
    assert found["registers"] <= N_REGISTERS
    assert (found["load"], found["store"]) == (128, 128)


@pytest.mark.parametrize("case", DISASSEMBLED, ids=case_id)
def test_the_machine_code_spills_nothing_and_has_the_widths_of_the_ptx(built, case):
    """To disassemble every kernel takes ten times as long as to read its PTX."""
    found, sass = built[f"sm_90 {case_id(case)}"], built[f"sass {case_id(case)}"]

    n = sass.pop("instructions")
    assert sass == {"spills": 0, "load": found["load"], "store": found["store"]}
    if case == (
        "float32",
        "float32",
        0,
    ):  # else the model of bench/predicted.py is of another kernel: count again
        from benches import importable  # this file runs as a script too

        with importable():
            from bench.predicted import N_INSTRUCTIONS
        assert n == pytest.approx(
            N_INSTRUCTIONS["fp32"], rel=0.25
        )  # versions of triton differ by 22 %


@pytest.mark.parametrize("case", [*FULL, *ADAMW, *SQUARES, *INHERIT], ids=case_id)
def test_rows_are_addressed_in_64_bits(built, case):
    """In a tensor of 2**31 elements and more, a row index times a stride does not fit in 32 bits."""
    assert built[f"sm_90 {case_id(case)}"]["narrow_products"] == 0


def test_every_specialisation_is_compiled():
    """The sizes of staged rows in ``FULL`` are those that the launcher's own function ``staged`` gives."""
    import torch

    from growkern.kernels.permute import staged

    dtypes = {name: getattr(torch, name) for pair in PAIRS for name in pair}
    blocks = {
        (name, staged(n, dtype.itemsize))
        for name, dtype in dtypes.items()
        for n in range(1, 20000, 97)
    }

    assert blocks - {("int64", n) for n in BLOCKS} == {(src, n) for src, _, n in FULL}


def main() -> None:
    """Compile every case and print the measurements as JSON."""
    jobs = [("sm_90", case) for case in [*FULL, *ADAMW, *SQUARES, *INHERIT]]
    jobs += COMPILE_ONLY + ADAMW_ONLY + SQUARES_ONLY + INHERIT_ONLY
    jobs += [("sass", case) for case in DISASSEMBLED]
    print(json.dumps({f"{target} {case_id(case)}": build(target, case) for target, case in jobs}))


def build(target: str, case: tuple[str | int, ...]) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, options, pointers = {"adamw": adamw, "squares": squares, "inherit": inherit}.get(
        case[0], expand
    )(case)
    constants = {name: value for name, value in options.items() if name.isupper()}
    constants |= {name: None for name, kind in pointers.items() if kind == "constexpr"}
    scalars = {
        name: "i32" for name in ("first_piece", "n_pieces", "n_rows") if name in kernel.arg_names
    }
    signature = pointers | scalars | dict.fromkeys(constants, "constexpr")
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, kind) in enumerate(pointers.items())
        if "*" in kind or name in DIVISIBLE
    }
    source = ASTSource(kernel, signature, constants, aligned)
    rest = {
        name: value
        for name, value in options.items()
        if not name.isupper() and (name != "maxnreg" or TARGETS[target][0] == "cuda")
    }
    asm = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=rest).asm
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    if target == "sass":
        return accesses(dumped(cuobjdump, "-sass", asm["cubin"]))
    if target != "sm_90":
        return {"compiled": 1}
    found = resources(dumped(cuobjdump, "-res-usage", asm["cubin"]))
    found["load"] = widest_ptx("ld", asm["ptx"])
    if case[0] != "squares":
        found["store"] = widest_ptx("st", asm["ptx"])
    return found | {"narrow_products": narrow_products(asm["ttir"])}


def expand(case: tuple[str | int, ...]) -> tuple[object, dict[str, object], dict[str, str]]:
    """Return the kernel of a case, the options that its launch is specialised on, and the types of its pointers."""
    import torch

    from growkern.kernels.expand import expand_kernel, launch_options, permute_kernel

    src, dst, n_staged = case
    options = launch_options(getattr(torch, src), getattr(torch, dst), n_staged)
    return permute_kernel if n_staged else expand_kernel, options, {"table_ptr": "*i64"}


def adamw(case: tuple[str | int, ...]) -> tuple[object, dict[str, object], dict[str, str]]:
    import torch

    from growkern.kernels.adamw import adamw_kernel, launch_options

    _, *kind, flags = case
    scaler = "*fp32" if "scaler" in flags else "constexpr"
    dtypes = tuple(getattr(torch, name) for name in kind)
    options = launch_options(dtypes, "slices" in flags, "scaler" in flags)
    pointers = {"table_ptr": "*i64", "now_ptr": "*i64", "scale_ptr": scaler, "inf_ptr": scaler}
    return adamw_kernel, options, pointers


def squares(case: tuple[str | int, ...]) -> tuple[object, dict[str, object], dict[str, str]]:
    import torch

    from growkern.kernels.squares import launch_options, squares_kernel

    math = "*fp64" if case[1] == "float64" else "*fp32"
    pointers = {"table_ptr": "*i64", "inverses_ptr": math, "sums_ptr": "*i64"}
    return squares_kernel, launch_options(getattr(torch, case[1])), pointers


def inherit(case: tuple[str | int, ...]) -> tuple[object, dict[str, object], dict[str, str]]:
    from growkern.kernels.inherit import inherit_kernel, launch_options

    _, dtype, teacher, cap = case
    n_at = 1 if isinstance(teacher, str) else 1 << teacher.bit_length()
    options = launch_options(50257, n_at, teacher != "none", teacher == "dense", bool(cap))
    z = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
    floats = {
        "weight_ptr": "*fp32",
        "dense_ptr": "*fp32",
        "special_ptr": z,
        "ce_ptr": "*fp32",
        "kl_ptr": "*fp32",
    }
    pointers = {"z_ptr": z, "at_ptr": "*i64"} | floats
    scalars = dict.fromkeys(("n_columns", "n_padded", "stride", "dense_stride"), "i32")
    scalars |= dict.fromkeys(("hard", "soft", "inverse_tau", "scale", "cap"), "fp32")
    return inherit_kernel, options, pointers | scalars


def narrow_products(ttir: str) -> int:
    """Count the 32-bit products that reach a pointer's offset; the search ends at loads, splats, ranges and constants."""
    made = {m[1]: (m[2], m[3]) for m in re.finditer(r"(%\S+) = (\S+) ([^\n]*)", ttir)}

    def reaches(name: str, seen: frozenset[str]) -> int:
        operation, rest = made.get(name, ("", ""))
        if name in seen or operation in ("tt.load", "tt.splat", "tt.make_range", "arith.constant"):
            return 0
        if operation == "arith.muli":
            return int(re.search(r"tensor<.*i32>", rest.rpartition(":")[2]) is not None)
        return sum(
            reaches(n, seen | {name}) for n in re.findall(r"%[\w-]+", rest.partition(":")[0])
        )

    offsets = re.findall(r"tt\.addptr %[\w-]+, (%[\w-]+) : tensor<[\dx]+x!tt", ttir)
    return sum(reaches(name, frozenset()) for name in offsets)


def dumped(cuobjdump: str, what: str, cubin: bytes) -> str:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [cuobjdump, what, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout + done.stderr


def resources(usage: str) -> dict[str, int]:
    return {
        "registers": int(re.search(r"\bREG:(\d+)", usage)[1]),
        "stack": int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        "local": int(re.search(r"\bLOCAL:(\d+)", usage)[1]),
    }


def accesses(sass: str) -> dict[str, int]:
    return {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/ .*;", sass, re.MULTILINE)),
        "load": widest("LDG", sass),
        "store": widest("STG", sass),
    }


def widest_ptx(access: str, ptx: str) -> int:
    """Return the bits of the widest access to global memory: ``ld.global.v4.b32`` has 128."""
    found = re.findall(rf"\b{access}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return max(int(n or 1) * int(bits) for n, bits in found)


def widest(access: str, sass: str) -> int:
    """Return the bits of the widest access to global memory; a mnemonic without a width counts as 32 bits."""
    return max(
        int((re.search(r"\.U?(8|16|64|128)\b", found) or [0, 32])[1])
        for found in re.findall(rf"\b{access}\.E\S*", sass)
    )


if __name__ == "__main__":
    main()
