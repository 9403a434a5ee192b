"""In the engines that shard, two gloo processes grow and train as one process on the joined batch does, and resume."""

import re
from collections.abc import Callable
from functools import cache

import processes
import pytest
import torch
from models import batch, loss_of, make
from scheduled import WIDER

import growkern
from growkern.errors import UnsupportedModelError

pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning.pytorch")
callbacks = pytest.importorskip("growkern.integrations.lightning")


WORLD = 2
WAYS_OUT = {
    "fsdp1": r"FSDP1 keeps flat parameters: use fully_shard, or save the gathered model, grow it \(growkern grow\)",
    "deepspeed": r"or save, grow the checkpoint \(growkern grow\), and initialize anew",
    "zero": "Load its consolidated state into an optimizer of the class that it wraps, grow with this one",
}


@pytest.fixture(scope="module")
def found_in(tmp_path_factory) -> Callable[[str], list[dict]]:
    """Return a function that runs a case of engines_worker.py in two processes, once, and returns the saved results of each rank."""

    @cache
    def found(case: str) -> list[dict]:
        folder = tmp_path_factory.mktemp("engines")
        log = folder / "log"
        started = [
            processes.start("engines_worker", folder, rank, WORLD, case, log=log)
            for rank in range(WORLD)
        ]
        processes.end(started, log)
        return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]

    return found


def assert_same(run: dict, expected: dict) -> None:
    """Compare a run, or what is left of it after a checkpoint, with one process on the joined batch."""
    losses = expected["losses"][-len(run["losses"]) :]
    assert run["losses"] == pytest.approx(losses, rel=0, abs=1e-9)
    assert run["weights"].keys() == expected["weights"].keys()
    for name, p in expected["weights"].items():
        torch.testing.assert_close(run["weights"][name], p, rtol=0, atol=1e-8, msg=name)


@processes.together
@pytest.mark.slow
def test_accelerate_and_transformers_drop_fsdp_on_cpus_so_that_these_tests_force_it(
    found_in,
):
    for found in found_in("unforced"):
        assert found["accelerate"] == found["trainer"] == "MULTI_CPU" and not found["fsdp"]


@processes.together
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "accelerate",
        "accelerate tied, full",
        "accelerate, checkpointed",
        "accelerate, checkpointed, full",
    ],
)
def test_accelerate_grows_by_hand_and_by_its_hook_and_resumes(case, found_in):
    alone = found_in(case)[0]["alone"]

    for found in found_in(case):
        for how in ("by hand", "by the hook"):
            assert found[how]["type"] == "FSDP" and found[how]["kept"]
            assert_same(found[how], alone)
        for at in (4, 7):  # before and after the growth
            run = found["resumed", at]
            assert run["counted"] == at and run["fired"] == [5] and len(run["losses"]) == 15 - at
            assert_same(run, alone)


@processes.together
@pytest.mark.slow
@pytest.mark.parametrize("case", ["trainer", "trainer, sharded"])
def test_trainer_grows_under_fsdp_and_resumes(case, found_in):
    alone = found_in(case)[0]["alone"]

    for found in found_in(case):
        for key, n in {"unbroken": 15, ("resumed", 2): 13, ("resumed", 6): 9}.items():
            run = found[key]
            assert run["kept"] and run["fired"] == [5] and len(run["losses"]) == n
            assert run["managed"] == 7  # three blocks, the embedding, the norm, the head, the model
            assert_same(run, alone)


@processes.together
@pytest.mark.slow
def test_a_model_that_transformers_has_sharded_grows_in_trainer_as_it_is(found_in):
    alone = found_in("sharded by transformers")[0]["alone"]

    for found in found_in("sharded by transformers"):
        assert found["kept"] and found["fired"] == [5] and found["managed"] == 7
        assert_same(found, alone)
        assert_same({"losses": found["losses"], "weights": found["saved"]}, alone)


@processes.together
@pytest.mark.slow
def test_the_example_under_trainer_grows(found_in):
    for found in found_in("example"):
        assert (found["hidden"], found["steps"], found["managed"]) == (48, 4, 6)


@processes.together
@pytest.mark.slow
@pytest.mark.parametrize("case", ["lightning", "lightning, full"])
def test_lightning_grows_under_model_parallel_strategy_and_resumes(case, found_in):
    alone = found_in(case)[0]["alone"]

    for found in found_in(case):
        for key, n in {"unbroken": 15, ("resumed", 3): 12, ("resumed", 6): 9}.items():
            assert found[key]["kept"] and found[key]["fired"] == [5]
            assert len(found[key]["losses"]) == n
            assert_same(found[key], alone)


@processes.together
@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero adamw", "zero sgd", "zero exact"])
def test_zero_redundancy_grows_in_place_and_is_partitioned_anew(case, found_in):
    alone = found_in(case)[0]["alone"]

    for found in found_in(case):
        for how, n in {"by hand": 15, "by a schedule": 15, "resumed": 9}.items():
            run = found[how]
            assert len(run["losses"]) == n
            assert run["kept"] and run["held"][0] == run["held"][1] < run["held"][2]
            assert_same(run, alone)
        inner, none = found["by hand"]["refused"]
        assert "the optimizer is the part of a ZeroRedundancyOptimizer" in inner
        assert "another live optimizer has state of its parameters" in none
        for place, message, unchanged, seconds in found["by hand"]["failed"]:
            assert unchanged and seconds < 30, place
            assert re.search("only here|KeyboardInterrupt|another process", str(message)), place
    assert sum(found["by hand"]["held"][0] for found in found_in(case)) == run["held"][2]
    consolidated = found_in(case)[0]["state"]  # of the wrapper, in the order of one process's state
    assert consolidated["state"].keys() == alone["state"]["state"].keys()
    for i, state in alone["state"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(consolidated["state"][i][key], value, rtol=0, atol=1e-9)


@processes.together
@pytest.mark.slow
def test_zero_redundancy_with_buckets_is_refused_and_its_way_out_works(found_in):
    alone = found_in("zero way out")[0]["alone"]

    for found in found_in("zero way out"):
        run = found["way out"]
        assert "parameters_as_bucket_view= are not supported" in run["refused"][2]
        assert WAYS_OUT["zero"] in run["refused"][2]
        assert run["kept"] and run["held"][0] < run["held"][2]
        assert_same(run, alone)


@processes.together
@pytest.mark.slow
def test_fsdp1_is_refused_outside_and_inside_and_its_way_out_works(found_in):
    for found in found_in("fsdp1"):
        assert len(found["refused"]) == 4 and len(found["attached"]) == 2
        for error in (*found["refused"], *found["attached"]):
            assert re.search(WAYS_OUT["fsdp1"], error), error
        assert found["hidden"] == 36
        assert found["after"] == pytest.approx(found["before"], rel=0, abs=1e-9)


@pytest.mark.parametrize(
    ("attribute", "engine"),
    {"ds_id": "ZeRO stage 3", "_hp_mapping": "ZeRO stage 1 or 2", "_fsdp_flattened": "FullyShardedDataParallel"}.items(),
)  # fmt: skip
def test_parameters_of_an_engine_are_refused_on_the_model_inside(attribute, engine):
    """DeepSpeed is not installed here: the attributes are those that it gives parameters, set by hand."""
    model = make("llama", tied=False)
    setattr(model.model.layers[0].mlp.up_proj.weight, attribute, 0)
    optim = torch.optim.AdamW(model.parameters())
    way_out = WAYS_OUT["fsdp1" if attribute == "_fsdp_flattened" else "deepspeed"]

    for call in (
        lambda: growkern.expand_inplace(model, optim, to=WIDER),
        lambda: growkern.GrowthSchedule([growkern.At(step=1, to=WIDER)]).attach(model, optim),
    ):
        with pytest.raises(UnsupportedModelError, match=f"up_proj.weight: a .*{engine}.* owns") as error:  # fmt: skip
            call()
        assert error.match(way_out)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_lightnings_other_strategies_are_refused_before_they_wrap(name):
    """Lightning makes neither on a CPU: the strategy is put into a trainer by hand, and that of DeepSpeed is not initialized."""
    kind = getattr(lightning.strategies, name)
    strategy = kind() if name == "FSDPStrategy" else kind.__new__(kind)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False
    )
    trainer._accelerator_connector.strategy = strategy
    callback = callbacks.GrowthCallback(growkern.GrowthSchedule([growkern.At(step=1)]))

    with pytest.raises(UnsupportedModelError, match=f"under {name}, .* use ModelParallelStrategy"):
        callback.setup(trainer, lightning.LightningModule(), "fit")


def test_a_checkpoint_that_makes_state_by_a_step_does_not_count_and_does_not_grow():
    """torch.distributed.checkpoint.state_dict calls ``optim.step`` at a rate of 0 where an optimizer has no state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters())
    schedule = growkern.GrowthSchedule([growkern.At(step=1, to=WIDER)])
    schedule.attach(model, optim)

    get_optimizer_state_dict(model, optim)
    assert schedule.counts.n_steps == 0 and len(optim.state) == len([*model.parameters()])
    for group in optim.param_groups:
        group["lr"] = 0.0  # the first step of a warmup is a step
    loss_of(model, batch()).backward()
    optim.step()

    assert schedule.fired == [1] and model.config.hidden_size == 48
