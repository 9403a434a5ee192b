"""Work that a growth does once, and not once per tensor, block or chunk."""

import pytest
import torch
from models import grow, make, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkern import plan
from growkern.commit import commit
from growkern.engine.sources import tensors_of
from growkern.execution import execute, measures
from growkern.execution.fills import FEW, weighted_sums
from growkern.execution.grouping import grouped
from growkern.execution.tiles import Tiler
from growkern.model.describe import describe
from growkern.optimizer.state_rules import GRADIENT, SQUARE
from growkern.support.named_tensors import Tensors
from growkern.width import Lemon, Lossless


class Counted(TorchDispatchMode):
    """Counts the operations that it sees."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_on_a_device_are_one_operation_for_all_tensors(dtype):
    tensors = [torch.empty(4096, 4096, dtype=dtype, device="meta") for _ in range(20)]
    with Counted() as counted:
        norms = measures.norms_of(tensors, 2)

    assert norms.shape == (20,) and norms.dtype == torch.float32
    assert counted.n <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 2])
def test_norms_of_low_precision_are_those_of_float64(dtype, order):
    t = torch.randn(300, 7000, generator=torch.Generator().manual_seed(0)).to(dtype).abs()

    norms = measures.norms_of([t, t[:1]], order)
    (together,) = torch._foreach_norm([t], order, dtype=torch.float32)  # on a device

    for norm in (norms[0], together):
        assert float(norm) == pytest.approx(float(t.double().norm(order)), rel=1e-3)


def n_uploads(n_layers, monkeypatch):
    """Count the Python lists of more than one number that a growth turns into tensors."""
    model = make("llama", tied=True, num_hidden_layers=n_layers)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    lists, made = [], torch.tensor

    def counted(data, *args, **kwargs):
        if isinstance(data, list | tuple) and len(data) > 1:
            lists.append(len(data))
        return made(data, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", counted)
        grow(model, optim, to={"hidden": 42})
    return len([n for n in lists if n in (24, 40)])  # hidden and ffn of the source


def test_factors_of_a_mean_are_uploaded_once_per_axis(monkeypatch):
    assert 0 < n_uploads(2, monkeypatch) == n_uploads(6, monkeypatch)


def groups_of(n_layers, monkeypatch, *, moved=()):
    """Return the groups that a growth cuts its targets into; ``moved``: parameters that begin at another byte of 16."""
    model = make("llama", tied=True, num_hidden_layers=n_layers)
    for name in moved:
        p = model.get_parameter(name)
        p.data = torch.empty(p.numel() + 1)[1:].view_as(p).copy_(p.data)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    found, run = [], execute._run
    with monkeypatch.context() as patch:
        patch.setattr(
            execute, "_run", lambda groups, *rest: [found.extend(groups), run(groups, *rest)]
        )
        grow(model, optim, to={"hidden": 48, "ffn": 80})
    return found


def test_the_tensors_of_all_blocks_are_cut_alike_where_their_memory_is_aligned_alike(monkeypatch):
    few, many = (groups_of(n, monkeypatch) for n in (2, 6))
    apart = groups_of(6, monkeypatch, moved=["model.layers.1.mlp.up_proj.weight"])

    assert len(few) == len(many) == len(apart) - 1
    assert max(len(group.targets) for group in many) >= 2 * max(len(group.targets) for group in few)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [Lossless(), Lemon()], ids=str)
def test_the_mean_of_a_source_does_not_depend_on_what_is_read_together_with_it(width, dtype):
    model = make("llama", tied=False, num_hidden_layers=6).to(dtype)
    spec, rules = describe(model), {"exp_avg": GRADIENT, "exp_avg_sq": SQUARE}
    sources = tensors_of(model, (), spec)
    sources.states = {
        name: {key: torch.rand_like(t) for key in rules} for name, t in sources.values.items()
    }
    made = plan(model, to={"hidden": 36, "ffn": 50}, width=width)
    execution = execute.Execution(made, sources, lambda _: rules)
    jobs = [job for one in execution.sets for job in execution.jobs(one, Tensors())]
    tiler = Tiler(made)
    tiler.measure(jobs, lambda device: None)

    together = grouped(tiler, jobs).statistics
    pairs = [pair for members, means in together for pair in zip(members, means, strict=True)]
    alone = {id(job): grouped(tiler, [job]).statistics for job in jobs}

    assert max(len(members) for members, _ in together) >= 6
    for job, mean in pairs:
        assert any(torch.equal(mean, own) for _, (own,) in alone[id(job)]), job.row.name
    assert len({float(mean.double().sum()) for _, mean in pairs}) > len(pairs) // 2


def apart(t):
    """Return a tensor with the elements of another, which lie apart in memory."""
    wide = t.new_zeros(*t.shape, 2)
    wide[..., 0] = t
    return wide[..., 0]


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else apart(t)


@pytest.mark.parametrize("lie", [apart, transposed])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("what", ["weight", "moments"])
def test_a_tensor_that_lies_otherwise_than_those_of_its_kind_grows_to_the_same_values(what, name, lie):  # fmt: skip
    grown = []
    for layout in (torch.clone, lie):
        model = make("llama", tied=False)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, optim, 1)
        p = model.get_parameter(name)
        if what == "weight":
            p.data = layout(p.data)
        else:
            optim.state[p] |= {
                key: layout(optim.state[p][key]) for key in ("exp_avg", "exp_avg_sq")
            }
        grow(model, optim, to={"hidden": 36, "ffn": 50})
        grown.append([*model.state_dict().values()])
        grown[-1] += [t for q in model.parameters() for t in optim.state[q].values()]

    assert all(torch.equal(a, b) for a, b in zip(*grown, strict=True))


@pytest.mark.parametrize("shape", [(40, 64, 128), (200, 1, 8192), (300, 37, 5), (3, 96, 128)])
def test_sums_of_matrices_that_are_read_together_have_the_bits_of_each(shape):
    sources = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows, cols = torch.rand(shape[1]), torch.rand(shape[2])

    sums = weighted_sums(sources, rows, cols)

    if shape[1] * shape[2] <= FEW:
        alone = [weighted_sums(source[None], rows, cols)[0] for source in sources]
        assert torch.equal(sums, torch.stack(alone))
    exact = torch.einsum("nij,i,j->n", sources.double(), rows.double(), cols.double())
    assert torch.allclose(sums.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("to", [{"hidden": 48}, {"hidden": 48, "layers": 9}], ids=str)
def test_the_modules_of_a_model_are_walked_a_few_times(to, monkeypatch):
    model, walks, walk = make("llama", tied=True), [], nn.Module.named_modules

    def counted(self, *args, **kwargs):
        walks.extend([self] if self is model else [])
        return walk(self, *args, **kwargs)

    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    monkeypatch.setattr(nn.Module, "named_modules", counted)
    grow(model, optim, to=to)

    assert 0 < len(walks) <= 8  # 51 without ``same_modules``


def test_the_modules_of_a_model_are_listed_once_for_all_new_blocks(monkeypatch):
    calls, listed = [], commit.shared_by
    monkeypatch.setattr(commit, "shared_by", lambda model: calls.append(model) or listed(model))

    grow(make("llama", tied=True), to={"layers": 9})

    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_strength_of_noise_depends_on_no_order_of_summation(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    for scale in (1.0, 1e-3, 3e2, 1e-30 if dtype in (torch.float32, torch.float64) else 0.5):
        t = (torch.randn(700, 1500, generator=generator, dtype=torch.float64) * scale).to(dtype)
        (root,) = measures.roots_of_mean_squares([t])
        shuffled = t.flatten()[torch.randperm(t.numel(), generator=generator)].view(1500, 700)
        with monkeypatch.context() as patch:
            patch.setattr(measures, "CHUNK", 777)
            (other,) = measures.roots_of_mean_squares([shuffled.T])

        assert root.dtype == torch.float64 and torch.equal(root, other)
        assert float(root) == pytest.approx(float(t.double().square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "small"), [(torch.float32, 1e-36), (torch.bfloat16, 1e-37), (torch.float64, 1e-300)]
)
def test_the_strength_of_noise_of_the_smallest_normal_numbers(dtype, small):
    t = torch.full((6,), small, dtype=dtype)

    (root,) = measures.roots_of_mean_squares([t])

    assert float(root) == pytest.approx(float(t[0]), rel=0.1, abs=0)


def test_the_strength_of_noise_of_numbers_that_are_not_finite_is_not_finite():
    for value in (float("nan"), float("inf")):
        (root,) = measures.roots_of_mean_squares([torch.tensor([1.0, value, 2.0])])

        assert not root.isfinite()
    assert float(measures.roots_of_mean_squares([torch.zeros(3)])[0]) == 0
