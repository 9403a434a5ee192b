"""Runs resume from checkpoints across growths, and checkpoints from before a growth are refused."""

import copy
import random
import signal
from pathlib import Path

import processes
import pytest
import torch
from models import batch, grow, logits, make, train

import growkern
from growkern import width
from growkern.errors import CheckpointError, PlanError
from growkern.optimizer.update_scale import scale_of


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return torch.load(folder / "checkpoint.pt", weights_only=False)


def run(folder: Path, *die: str) -> None:
    """Run to the end, or to the death that was asked for."""
    log = folder / "log"
    process = processes.start("resume_worker", folder, *die, log=log)
    processes.end([process], log, -signal.SIGKILL if die else 0)


def same(folder: Path, expected: dict) -> bool:
    found = torch.load(folder / "checkpoint.pt", weights_only=False)
    return (
        all(torch.equal(found["model"][k], v) for k, v in expected["model"].items())
        and found["scheduler"] == expected["scheduler"]
        and found["schedule"]["history"] == expected["schedule"]["history"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [["2", "6", "10"], ["growing"], ["4", "growing", "8"]], ids=str)
@processes.together
def test_a_killed_run_ends_where_the_unbroken_one_ends(deaths, unbroken, tmp_path):
    """The process is killed before, right after, after and during growths."""
    for die in deaths:
        run(tmp_path, die)

    run(tmp_path)
    assert same(tmp_path, unbroken)


@pytest.mark.slow
@processes.together
def test_a_run_that_is_killed_at_a_random_moment_ends_there_too(unbroken, tmp_path):
    lines, log = random.SystemRandom().randrange(1, 11), tmp_path / "log"
    process = processes.start("resume_worker", tmp_path, log=log)
    processes.wait_for_lines(process, log, lines)
    process.kill()
    process.join()

    run(tmp_path)
    assert same(tmp_path, unbroken), f"killed after step {lines}"


def test_the_history_lives_in_the_config_and_makes_a_model_of_the_start_load_the_end(tmp_path):
    """``save_pretrained`` writes the history into the config, and ``resume`` replays it on a model and optimizer of the starting sizes."""
    model = make("gpt2", tied=True)
    start = copy.deepcopy(model.config)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    grow(model, optim, to={"hidden": 48}, seed=3)
    grow(model, optim, to={"layers": 3}, seed=4)
    train(model, optim, 1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert len(loaded.config.growkern_history) == 2
    assert torch.equal(logits(loaded.eval(), batch()), logits(model.eval(), batch()))

    again = type(model)(start)
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    growkern.resume(again, other, loaded.config.growkern_history)

    # NaN marks weights that are not loaded yet
    assert any(p.isnan().all() for p in again.parameters())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optim.state_dict()))  # load_state_dict shares tensors
    saved = {"dtype": None, "architectures": None}  # fields that save_pretrained adds
    assert again.config.to_dict() | saved == model.config.to_dict() | saved
    model.train(), again.train()
    train(model, optim, 2, first=5)
    train(again, other, 2, first=5)
    assert all(
        torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True)
    )


def test_hooks_that_carry_dynamics_are_put_back():
    model = make("llama", tied=False).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    quiet = dict(width=width.Lossless(noise=0), dynamics="exact")
    plan = growkern.plan(model, optim, to={"ffn": 60, "hidden": 48}, **quiet)
    grow(model, optim, plan=plan, dynamics="exact")

    again = make("llama", tied=False).double()
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    growkern.resume(again, other, [plan])
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optim.state_dict()))

    assert len(scale_of(other).scales) == len(scale_of(optim).scales)
    assert train(again, other, 3, first=2) == train(model, optim, 3, first=2)


def test_a_growth_that_dropped_the_state_is_replayed_on_an_optimizer_of_an_unknown_law():
    class Mine(torch.optim.SGD):
        """An optimizer whose constructor makes state, as that of Adagrad does."""

        def __init__(self, params, lr):
            super().__init__(params, lr, momentum=0.9)
            self.state |= {p: {"seen": torch.zeros(3)} for p in self.param_groups[0]["params"]}

    model = make("llama", tied=True)
    optim = Mine(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    grow(model, optim, to={"hidden": 48}, state="drop")
    train(model, optim, 1, first=2)

    again = make("llama", tied=True)
    other = Mine(again.parameters(), lr=1e-3)
    growkern.resume(again, other, model.config.growkern_history)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optim.state_dict()))

    assert train(again, other, 2, first=3) == train(model, optim, 2, first=3)


def test_master_weights_of_the_starting_sizes_take_those_of_the_target():
    def started():
        model = make("llama", tied=True).bfloat16()
        masters = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
        return model, masters, torch.optim.AdamW(masters.values(), lr=1e-3)

    model, masters, optim = started()
    grow(model, optim, to={"hidden": 48, "layers": 3}, master_weights=masters)
    again, others, other = started()
    growkern.resume(again, other, model.config.growkern_history, master_weights=others)

    assert {*others} == {*again.parameters()}
    assert all(master.shape == p.shape for p, master in others.items())
    rates = [[(g["lr"], len(g["params"])) for g in one.param_groups] for one in (optim, other)]
    assert rates[0] == rates[1]


def test_a_history_that_does_not_fit_changes_nothing():
    model, other = make("llama", tied=True), make("gpt2", tied=True)
    history = [growkern.plan(model, to={"layers": 3}), growkern.plan(model, to="2x")]

    with pytest.raises(
        PlanError, match="growth 2 of 2 does not fit: growth 2 starts at .*growth 1 ends at"
    ):
        growkern.resume(model, history=history)
    assert model.config.num_hidden_layers == 2 and not any(
        p.isnan().any() for p in model.parameters()
    )
    with pytest.raises(PlanError, match="growth 1 of 1 does not fit"):
        growkern.resume(other, history=history[:1])
    with pytest.raises(PlanError, match="cannot read the plan"):
        growkern.resume(other, history=["{}"])

    assert other.config.n_embd == 24 and len(other.transformer.h) == 2
    grow(other, to={"layers": 3})
    with pytest.raises(PlanError, match="growth 2 of 2 does not fit"):
        growkern.resume(other, history=history)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("to", "match"),
    [
        (
            "2x",
            r"before growth 1 .*hidden 24 -> 48.*has the shape \(66, 24\), in the model \(66, 48\)",
        ),
        ({"layers": 3}, r"before growth 1 .*layers 2 -> 3.*the checkpoint has no model.layers.2"),
    ],
    ids=["wider", "deeper"],
)
def test_a_checkpoint_from_before_a_growth_is_refused_by_name(to, match, strict):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optim, 1)
    weights, state = copy.deepcopy((model.state_dict(), optim.state_dict()))
    grow(model, optim, to=to)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(CheckpointError, match=match):
        model.load_state_dict(weights, strict=strict)
    with pytest.raises(CheckpointError, match="since growth 1|from before growth 1"):
        optim.load_state_dict(state)

    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    model.load_state_dict(before)
    optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    train(model, optim, 1)


def test_a_deeper_optimizer_checkpoint_says_what_to_do_where_a_schedule_is_attached():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters())
    train(model, optim, 1)
    grow(model, optim, to={"layers": 3})
    again = make("llama", tied=True)
    other = torch.optim.AdamW(again.parameters())
    attachment = growkern.GrowthSchedule([growkern.At(step=1)]).attach(again, other)

    with pytest.raises(CheckpointError, match=r"has 29 parameters .* has 20 .*growkern\.resume"):
        other.load_state_dict(optim.state_dict())

    assert attachment.schedule.attachment is attachment and not other.state


def test_checkpoints_of_every_earlier_size_are_refused_whole_or_in_part_by_the_growth_after_it():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters())
    train(model, optim, 1)
    weights, states = [], []
    for to in ({"hidden": 48}, {"ffn": 100}):
        weights.append(copy.deepcopy(model.state_dict()))
        states.append(copy.deepcopy(optim.state_dict()))
        grow(model, optim, to=to)
    names = {1: "model.norm.weight", 2: "model.layers.1.mlp.up_proj.weight"}
    left = sum(p.numel() for p in model.parameters())

    for number, old in enumerate(weights, 1):
        for part in (old, {names[number]: old[names[number]]}):
            with pytest.raises(CheckpointError, match=f"from before growth {number} "):
                model.load_state_dict(part, strict=False)
    for state in states:
        with pytest.raises(CheckpointError, match="growth 2 "):
            optim.load_state_dict(state)
    assert sum(p.numel() for p in model.parameters()) == left
    train(model, optim, 1)


def test_guards_go_with_copies_and_pickles_and_do_not_mind_parts(tmp_path):
    model = make("llama", tied=True)
    old = copy.deepcopy(model.state_dict())
    grow(model, to={"layers": 3})
    torch.save(model, tmp_path / "model.pt")

    for one in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with pytest.raises(CheckpointError, match="before growth 1"):
            one.load_state_dict(old, strict=False)
        one.load_state_dict({"model.norm.weight": torch.ones(24)}, strict=False)
        assert (one.model.norm.weight == 1).all()
    with pytest.raises(CheckpointError, match="before growth 1"):
        torch.nn.ModuleDict({"inner": model}).load_state_dict(
            {f"inner.{k}": v for k, v in old.items()}
        )


def test_a_second_growth_draws_other_noise_also_after_a_reload(tmp_path):
    model = make("llama", tied=True)
    seeds = [growkern.plan(model).seed]
    growkern.expand_inplace(model)
    seeds.append(growkern.plan(model).seed)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    seeds.append(growkern.plan(loaded).seed)
    growkern.expand_inplace(loaded)
    seeds.append(growkern.plan(loaded).seed)

    assert seeds == [0, 1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("to", [{"hidden": 48}, {"ffn": 60}])
def test_a_wider_optimizer_checkpoint_is_refused_before_the_growth_too(to):
    """A fused step would go beyond the memory of the smaller parameter."""
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(model, optim, 1)
    start = copy.deepcopy((model.state_dict(), optim.state_dict()))
    grown = make("llama", tied=True)
    other = torch.optim.AdamW(grown.parameters(), lr=1e-3, fused=True)
    train(grown, other, 1)
    growkern.expand_inplace(grown, other, to=to)
    growkern.GrowthSchedule([growkern.At(step=9, to={"layers": 4})]).attach(model, optim)

    with pytest.raises(
        CheckpointError, match=r"does not fit the optimizer: 'exp_avg' .*growkern\.resume"
    ):
        optim.load_state_dict(other.state_dict())

    optim.load_state_dict(start[1])
    train(model, optim, 1)


def test_a_loop_that_saves_tensors_alone_is_told_of_the_epsilons_and_the_way_out_is_exact():
    changes = {"rms_norm_eps": 1e-2}
    model = make("llama", tied=False, **changes)
    plan = growkern.plan(model, to={"hidden": 36})
    optim = torch.optim.AdamW(model.parameters())
    report = growkern.expand_inplace(model, optim, to={"hidden": 36})
    ids = batch()
    expected = model(ids).logits
    for text in (str(plan), str(report)):
        assert "the epsilons of 5 norms change" in text
        assert "model.layers.*.input_layernorm.variance_epsilon x 0.666667" in text

    again = make("llama", tied=False, **changes)
    growkern.resume(again, None, report.history)
    config = copy.deepcopy(model.config)
    config.rms_norm_eps = 1e-2  # a loop that builds the larger model by itself
    built = type(model)(config)
    for one in (again, built):
        one.load_state_dict(model.state_dict())

    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=0)
    assert (built(ids).logits - expected).abs().max() > 1e-4
    assert "epsilons" not in str(growkern.plan(make("llama", tied=False), to={"ffn": 60}))
