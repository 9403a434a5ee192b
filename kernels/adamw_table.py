"""Arguments of ``adamw`` as integers on the device: a table that stays valid while no tensor moves, and an upload in every step.

A record of the table is a stretch of a tensor: the whole matrix of a tensor with slices, or a part of the flat memory of a tensor
without. The upload holds what changes every step: addresses of gradients, step counts, and the hyperparameters of each param group.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from math import log, prod
from struct import pack, unpack
from typing import Any

import torch
import triton.language as tl

from growkern.kernels.table import N_FIELDS

P, M, V, V_MAX, STEP, TENSOR, HYPER, N_ROWS, N_COLS, FIRST, WIDE, SLICED = map(
    tl.constexpr, range(1, 13)
)  # fields of a record after FIRST_TILE; SLICED: offset of the slice addresses in the table, 0 without slices
SLICES = (
    *(f"{name}_{side}" for name in ("lr", "eps", "decay", "born") for side in ("rows", "cols")),
    "rewarm",
)
LR_ROWS, LR_COLS, EPS_ROWS, EPS_COLS, DECAY_ROWS, DECAY_COLS, BORN_ROWS, BORN_COLS, REWARM = map(
    tl.constexpr, range(len(SLICES))
)
LR, LERP, KEEP, SQUARE, RATE1, RATE2, EPS, DECAY, SIGN = map(tl.constexpr, range(9))
N_HYPER = 9  # numbers per param group, 8 bytes each
LEAST_BETA = 1e-300  # has a logarithm, and its powers are negligible
Kind = tuple[torch.dtype, torch.dtype, torch.dtype]  # dtypes of parameter, gradient and moments


class Upload:
    """Numbers in pinned memory, which the device copies while the host goes on."""

    def __init__(self) -> None:
        self.pinned = torch.empty(0, dtype=torch.int64)
        self.copied: torch.cuda.Event | None = None

    def to(self, numbers: "array[int]", device: torch.device) -> torch.Tensor:
        """Return the numbers on a device; wait first until the device has read the numbers before them."""
        values = torch.frombuffer(numbers, dtype=torch.int64)
        if device.type != "cuda":
            return values.clone()
        if self.copied is not None:
            self.copied.synchronize()
        if len(self.pinned) != len(values):
            self.pinned = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        on_device = self.pinned.copy_(values).to(device, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record(torch.cuda.current_stream(device))
        return on_device


class Table:
    """Records of all tensors on one device, kept between steps."""

    def __init__(self) -> None:
        self.signature: list[Any] = []
        self.on_device = torch.empty(0, dtype=torch.int64)
        self.launches: list[tuple[Kind, bool, int, int, int]] = []
        self.hypers: list[tuple[int, torch.dtype]] = []
        self.maths: list[torch.dtype] = []  # of every tensor
        self.uploads = [Upload(), Upload()]  # in turn: one may still be read by its copy

    def prepare(
        self, updates: Sequence[Any], block_r: Callable[[int], int], block_c: Callable[[int], int]
    ) -> torch.Tensor:
        """Update the table, and upload (gradient address, step count) of every tensor, then the hyperparameters."""
        ids: dict[int, int] = {}
        hypers: list[Any] = []
        signature: list[Any] = []
        grads: list[int] = []
        for u in updates:
            if id(u.hyper) not in ids:
                ids[id(u.hyper)] = len(hypers)
                hypers.append(u.hyper)
            grad = u.grad.data_ptr()
            grads.append(grad)
            signature.append((
                ids[id(u.hyper)], grad % 16, u.grad.dtype, u.p.data_ptr(), u.p.dtype, u.p.shape,
                u.exp_avg.data_ptr(), u.exp_avg.dtype, u.exp_avg_sq.data_ptr(), _address(u.max_exp_avg_sq),
                u.step.data_ptr() if u.step.is_cuda else 0,
                [(key, u.slices[key].data_ptr()) for key in SLICES if key in u.slices] if u.slices else 0,
            ))  # fmt: skip
        if signature != self.signature:
            self.signature = []  # the table is invalid during the rebuild
            self._build(updates, [s[0] for s in signature], block_r, block_c)
            self.signature = signature
        counts = [0 if u.step.is_cuda else _bits(u.step.item(), math(u.p.dtype)) for u in updates]
        return self._upload(grads, counts, hypers, updates[0].p.device)

    def again(
        self, grads: Sequence[int], counts: Sequence[float], hypers: Sequence[Any]
    ) -> torch.Tensor:
        """Upload what changed since the step before: gradient addresses and counts of its tensors, in order, and every param group."""
        bits = {pair: _bits(*pair) for pair in {*zip(counts, self.maths, strict=True)}}
        own = [*map(bits.__getitem__, zip(counts, self.maths, strict=True))]
        return self._upload(grads, own, hypers, self.on_device.device)

    def _upload(
        self, grads: Sequence[int], counts: Sequence[int], hypers: Sequence[Any], device: torch.device
    ) -> torch.Tensor:  # fmt: skip
        now = array("q", bytes(16 * len(grads)))
        now[::2], now[1::2] = array("q", grads), array("q", counts)
        for index, dtype in self.hypers:
            now.extend(_bits(x, dtype) for x in numbers(hypers[index]))
        self.uploads.reverse()
        return self.uploads[0].to(now, device)

    def _build(
        self,
        updates: Sequence[Any],
        groups: Sequence[int],
        block_r: Callable[[int], int],
        block_c: Callable[[int], int],
    ) -> None:
        kinds: dict[Kind, list[int]] = {}
        self.maths = [math(u.p.dtype) for u in updates]
        for i, u in enumerate(updates):
            kinds.setdefault((u.p.dtype, u.grad.dtype, u.exp_avg.dtype), []).append(i)
        cuts = [list(stretches(u, block_c(u.p.itemsize))) for u in updates]
        at = sum(map(len, cuts)) * N_FIELDS.value  # slice addresses follow the records
        table, slices = array("q"), array("q")
        self.launches, self.hypers = [], []
        for kind, members in kinds.items():
            first, n_tiles, sliced = len(table), 0, False
            for i in members:
                u, hyper = updates[i], (groups[i], math(kind[0]))
                if hyper not in self.hypers:
                    self.hypers.append(hyper)
                place = 2 * len(updates) + N_HYPER * self.hypers.index(hyper)
                where = 0
                if u.slices:
                    where, sliced = at + len(slices), True
                    slices.extend(_address(u.slices.get(key)) for key in SLICES)
                fixed = (
                    u.p.data_ptr(), u.exp_avg.data_ptr(), u.exp_avg_sq.data_ptr(), _address(u.max_exp_avg_sq),
                    u.step.data_ptr() if u.step.is_cuda else 0, i, place,
                )  # fmt: skip
                for n_rows, n_cols, start, wide in cuts[i]:
                    record = (n_tiles, *fixed, n_rows, n_cols, start, int(wide), where)
                    table.extend((*record, *[0] * (N_FIELDS.value - len(record))))
                    n_tiles += -(-n_rows // block_r(kind[0].itemsize)) * -(
                        -n_cols // block_c(kind[0].itemsize)
                    )
            self.launches.append(
                (kind, sliced, first, (len(table) - first) // N_FIELDS.value, n_tiles)
            )
        device = updates[0].p.device
        content = table + slices or array("q", [0])  # torch.frombuffer refuses an empty buffer
        self.on_device = torch.frombuffer(content, dtype=torch.int64).to(device, copy=True)


def stretches(u: Any, width: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield stretches of a tensor: rows, columns, first element, True if all 16-byte groups are aligned.

    Tensors without slices are read as rows of ``width`` elements, the columns of a tile.
    """
    tensors = [u.p, u.grad, u.exp_avg, u.exp_avg_sq]
    tensors += [] if u.max_exp_avg_sq is None else [u.max_exp_avg_sq]
    n, n_wide = u.p.numel(), 16 // min(t.itemsize for t in tensors)
    aligned = not any(t.data_ptr() % 16 for t in tensors)
    if u.slices:
        n_cols = u.p.shape[-1] if u.p.ndim else 1
        if n:
            yield prod(u.p.shape[:-1]), n_cols, 0, aligned and n_cols % n_wide == 0
        return
    body = n // width * width
    rest = (n - body) // n_wide * n_wide if aligned else n - body
    for n_rows, n_cols, start, wide in (
        (body // width, width, 0, aligned),
        (1, rest, body, aligned),
        (1, n - body - rest, body + rest, False),
    ):
        if n_rows * n_cols:
            yield n_rows, n_cols, start, wide


def numbers(hyper: Any) -> tuple[float, ...]:
    """Numbers of a param group that the kernel reads, in the order ``LR`` ... ``SIGN``."""
    rates = (-log(max(beta, LEAST_BETA)) for beta in (hyper.beta1, hyper.beta2))
    return (
        hyper.lr, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, *rates,
        hyper.eps, hyper.lr * hyper.weight_decay, -1.0 if hyper.maximize else 1.0,
    )  # fmt: skip


def math(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a parameter's update is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bits(x: float, dtype: torch.dtype) -> int:
    return unpack("<q", pack("<d", x) if dtype == torch.float64 else pack("<f4x", x))[0]


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
