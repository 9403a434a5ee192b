"""Errors that users meet: each names what is at fault, says why, and offers a way out."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from models import LLAMA, Plain, batch, make, train
from saved import invoke, said, save

import growkern
from growkern import At, GrowthSchedule, depth, shrink, vocab, width
from growkern.checkpoints.grow import grow as grow_saved
from growkern.errors import GrowthError
from growkern.execution import sets
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord

CURVE = [(1e6 * i, 1.5 + 0.9 * i**-0.35) for i in range(1, 60)]


def grow(family="llama", changes=(), **growth):
    return growkern.expand_inplace(make(family, tied=True, **dict(changes)), **growth)


def plan(**planning):
    return growkern.plan(make("llama", tied=True), **planning)


def shrunk(**shrinking):
    return growkern.shrink_inplace(make("llama", tied=True), **shrinking)


def started():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    return model, optim


def another_optimizer():
    model, optim = started()
    growkern.expand_inplace(model)
    assert optim


def a_head_put_in_later():
    model = make("llama", tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.lm_head = torch.nn.Linear(24, 66, bias=False)
    growkern.expand_inplace(model, optim)


def a_tied_head_outside():
    model = make("llama", tied=True)
    head = torch.nn.Linear(24, 66, bias=False)
    head.weight = model.lm_head.weight
    growkern.expand_inplace(model)
    assert head


def an_average():
    model = make("llama", tied=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    growkern.expand_inplace(model)
    assert average


def on_the_meta_device():
    with torch.device("meta"):
        config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 32})
        growkern.expand_inplace(transformers.LlamaForCausalLM(config))


def a_parametrized_model():
    model = make("llama", tied=True, num_hidden_layers=32)
    for layer in model.model.layers:
        torch.nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    growkern.expand_inplace(model)


def an_old_checkpoint():
    model = make("llama", tied=True)
    before = copy.deepcopy(model.state_dict())
    growkern.expand_inplace(model)
    model.load_state_dict(before)


def an_old_optimizer_checkpoint():
    model, optim = started()
    before = copy.deepcopy(optim.state_dict())
    growkern.expand_inplace(model, optim)
    optim.load_state_dict(before)


def in_the_wrong_order():
    model = make("llama", tied=True)
    start = copy.deepcopy(model)
    growkern.expand_inplace(model, to="2x")
    growkern.expand_inplace(model, to={"layers": 4})
    growkern.resume(start, None, model.config.growkern_history[::-1])


def a_model_that_has_grown():
    model = make("llama", tied=True)
    growkern.expand_inplace(model)
    growkern.resume(model, torch.optim.AdamW(model.parameters()))


def a_later_record():
    record = json.loads(GrowthRecord.of(plan()).to_json())
    growkern.resume(make("llama", tied=True), None, [json.dumps(record | {"version": 9})])


def an_unknown_class():
    class Own(torch.optim.Adam):
        pass

    model = make("llama", tied=True)
    optim = Own(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    growkern.expand_inplace(model, optim)


def a_strange_state(key, value):
    model, optim = started()
    optim.state[model.model.norm.weight][key] = value
    growkern.expand_inplace(model, optim)


def a_closure():
    model, optim = started()

    def closure():
        growkern.expand_inplace(model, optim)

    optim.step(closure)


def one_rate_by_hand():
    model = make("llama", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optim)
    growkern.expand_inplace(model, optim, width=width.Lossless(noise=1), scheduler=scheduler)
    for group in optim.param_groups:
        group["lr"] = 1e-4
    train(model, optim, 1)


def twice_attached():
    model, optim = started()
    for _ in range(2):
        GrowthSchedule([At(step=1)]).attach(model, optim)


def without_tokens():
    model, optim = started()
    GrowthSchedule([At(tokens=1000)]).attach(model, optim)
    train(model, optim, 2)


def another_schedule():
    model, optim = started()
    schedule = GrowthSchedule([At(step=1, to={"layers": 3})])
    schedule.attach(model, optim)
    train(model, optim, 1)
    GrowthSchedule([At(step=1, to={"layers": 4})]).load_state_dict(schedule.state_dict())


def a_tensor_left_out():
    model = Plain(tied=True)
    spec = model.spec()
    tensors = {name: axes for name, axes in spec.tensors.items() if name != "ln_f.bias"}
    growkern.expand_inplace(model, spec=replace(spec, tensors=tensors))


def too_large():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "free_bytes", lambda device: 1 << 10)
        grow()


def on_disk(call, **config):
    with TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        save(source)
        if config:
            found = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps(found | config))
        call(source)


def without_a_shard(source):
    next(source.glob("*00002-of-*.safetensors")).unlink()
    grow_saved(source, source.parent / "out")


def command(*arguments):
    result = invoke(*arguments)
    if result.exit_code:
        raise GrowthError(said(result))


def advised(**options):
    return growkern.advise(CURVE, **dict(source=1e5, target=3e5, budget=1e14) | options)


def trainer():
    with TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(output_dir=folder, use_cpu=True, report_to=[])
        return transformers.Trainer(make("llama", tied=True), args)


def attached_twice_to_a_trainer():
    own = trainer()
    for _ in range(2):
        growkern.hf.attach(own, GrowthSchedule([At(step=1)]))


def inherited(student=None, teacher=(), **changes):
    student = make("llama", tied=True) if student is None else student
    teacher = student if teacher is None else make("llama", tied=False, **changes)
    optim = torch.optim.SGD(student.parameters())
    growkern.inherit.KnowledgeInheritance(teacher).attach(student, optim, shift=True)


ERRORS = {  # what is done; what the error must name, the reason it must say, and the way out that it must offer
    # sizes
    "a size that there is not": (
        lambda: grow(to={"hiden": 48}), "'hiden'", "unknown size", "did you mean 'hidden'"),
    "a size that is smaller": (
        lambda: grow(to={"ffn": 20}), "ffn", "the target 20 is smaller than the source 40", "by shrink_inplace"),
    "a factor that is none": (lambda: grow(to="twice"), "'twice'", "cannot read", "pass a factor such as '2x'"),
    "a width that is not whole": (lambda: grow(to={"ffn": "1.33x"}), "ffn: 1.33x of 40", "not whole", "nearest: 53, 54"),
    "nothing grows": (lambda: grow(to={"hidden": 24}), "hidden=24", "equals its source", "name a larger size"),
    "heads that do not fit": (
        lambda: grow(to={"heads": 5}), "heads: 5", "not a multiple of kv_heads=2", "nearest: 4, 6"),
    "heads beside the hidden size": (
        lambda: grow("gpt2", to={"hidden": 48, "heads": 4}), "heads", "48 is not 4 x 6", "hidden=24 or heads=8 fits"),
    "a head of another length": (
        lambda: grow(to={"head_dim": 9}), "head_dim", "RoPE keep their angles at whole multiples of 6", "nearest: 6, 12"),
    "blocks that know their depth": (
        lambda: grow("gpt2", changes={"scale_attn_by_inverse_layer_idx": True}, to={"layers": 3}),
        "layers: cannot grow in this gpt2", "makes a block depend on its depth", "leave layers out of to="),
    "post-norm": (
        lambda: grow("bert", to={"hidden": 36}), "hidden 24 to 36", "norms write the residual", "nearest whole multiples: 24, 48"),
    # width and depth
    "norms of another kind": (
        lambda: grow(width=width.Lossless(norms="mean_pad")), "mean_pad", "these are rms norms", "leave norms= out"),
    "a depth method as width": (
        lambda: grow(width=depth.Stack()), "Stack", "expected a width method", "expand_inplace takes it as depth="),
    "a way to shrink as width": (
        lambda: grow(width=shrink.FirstCopies()), "FirstCopies", "expected a width method", "shrink_inplace takes it as method="),
    "a width that is not cloned": (
        lambda: grow(to={"hidden": 36}, width=width.HyperClone()), "hidden 24 -> 36", "no whole multiple", "general=True"),
    "an expansion for other norms": (
        lambda: grow(width=width.Lemon(expansion="average")), "average", "these are rms norms", "pass expansion='zero'"),
    "kv heads that stay": (
        lambda: grow(width=width.AKIPro()), "AKIPro", r"keeps the kv heads \(2 -> 4\)", '"kv_heads": 2'),
    "an odd depth": (
        lambda: grow(to={"layers": 3}, width=width.Lossless(), depth=depth.DepthUpscale()), "DepthUpscale",
        "to an even number up to 4, not to 3", r"use Interpose\(\) or Stack\(\)"),
    "a layer left out": (
        lambda: grow(to={"layers": 3}, depth=depth.Layers((0, 0, 0))), "layers 1", "are left out", "name every layer from 0 to 1"),
    # vocabulary
    "a vocabulary by a width method": (
        lambda: grow(to={"vocab": 80}), "vocab", r"Lossless does not grow it \(66 -> 80\)", r"growkern\.vocab grows vocab"),
    "a vocabulary that is another": (
        lambda: grow(to={"vocab": 80, "hidden": 48}, width=vocab.Zero()), "hidden", "Zero does not grow it",
        "width.Lossless grows hidden, in a call of its own"),
    "a tokenizer of another length": (
        lambda: grow(to={"vocab": 80}, width=vocab.CLPTransfer(torch.ones(80, 2), [*range(66)])), "tokens has 66 entries",
        "the target 80 tokens", "pass one per token"),
    # shrinking
    "copies that are not even": (
        lambda: shrunk(to={"hidden": 16}, method=shrink.FirstCopies()), "hidden", "16 does not divide 24",
        r"use WeightSelection\(\)"),
    "state of copies": (lambda: shrunk(state="asymmetric"), "'asymmetric'", "not known to a shrinking", "pass 'exact', 'copy', 'drop'"),
    "a plan that shrinks": (
        lambda: grow(plan=plan(to="0.5x", shrink=shrink.WeightSelection())), "plan",
        "targets are smaller than their sources", "run the plan by shrink_inplace"),
    # options and plans
    "a state that there is not": (lambda: grow(state="keep"), "'keep'", "unknown state", "pass 'exact', "),
    "no memory": (too_large, "cpu with memory='lean'", "free: 0.00 GiB", "choose a smaller target"),
    "a plan and a wish": (
        lambda: grow(plan=plan(), to="3x"), "plan", "already says what", "leave to=, width="),
    "no plan at all": (lambda: grow(plan={}), "plan", "expected a GrowthPlan, got dict", r"GrowthPlan\.from_json reads"),
    "a plan for another model": (lambda: grow("gpt2", plan=plan()), "a llama of", "this gpt2 has", "plan again"),
    "a plan of a later version": (
        lambda: GrowthPlan.from_json('{"version": 9}'), "version 9", "reads versions up to", "install the growkern that wrote it"),
    # models
    "no weights": (
        on_the_meta_device, r"model.layers.\*.self_attn.q_proj.weight", r"on the meta device.*\(32 times\)", "load the weights first"),
    "a parametrized model": (
        a_parametrized_model, r"model.layers.\*.mlp.up_proj: is parametrized", r"\(32 times\)", "remove the parametrization"),
    "a model that is not known": (
        lambda: growkern.expand_inplace(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear", "no family describes", "Pass spec="),
    "a wrapper that is not known": (
        lambda: growkern.expand_inplace(torch.nn.DataParallel(make("llama", tied=True))), "DataParallel", "not supported",
        "pass model.module"),
    "a tensor left out of the spec": (
        a_tensor_left_out, "ln_f.bias", "the spec does not cover this tensor", r"name every parameter.*ModelSpec\.tensors"),
    "a head outside": (
        a_tied_head_outside, r"Linear \(model.embed_tokens.weight\)", "would not grow", "Pass the whole model"),
    "an average that was forgotten": (an_average, "AveragedModel", "would not grow", "pass the average as ema="),
    "an old checkpoint": (
        an_old_checkpoint, r"growth 1 \(hidden 24 -> 48", "has the shape", "then grow the model; or load a checkpoint from after"),
    # optimizers and schedulers
    "an optimizer that was forgotten": (another_optimizer, "AdamW", "would not grow", "Pass that optimizer as optim"),
    "an optimizer of another model": (
        lambda: grow(optim=torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())), "AdamW",
        "no parameter of this LlamaForCausalLM", "pass the optimizer that trains the model"),
    "an optimizer that is not known": (an_unknown_class, "Own", "law of .* is not known", "state_rules="),
    "an optimizer of a head that is gone": (
        a_head_put_in_later, "has 1 parameters", "no module has any more", "Build a new optimizer"),
    "a state without a law": (
        lambda: a_strange_state("own", torch.ones(24)), "model.norm.weight", "unknown state 'own'", 'state_rules={"own"'),
    "an old optimizer checkpoint": (
        an_old_optimizer_checkpoint, r"growth 1 \(hidden 24 -> 48", "'exp_avg' of parameter 0", "Load a checkpoint from before"),
    "a closure": (a_closure, r"optimizer.step\(\)", "half a step", "grow between steps"),
    "one rate for all groups": (one_rate_by_hand, "learning rate of groups", "undoes the factors", r"Set lr \* group"),
    "a scheduler that is none": (
        lambda: growkern.expand_inplace(*started(), scheduler=object()), "object", "not a learning-rate scheduler",
        "expected a torch.optim.lr_scheduler"),
    # schedules
    "two schedules": (
        twice_attached, "this AdamW", "a schedule of 1 events drives", r"into one schedule, or call remove\(\)"),
    "a step and tokens": (lambda: At(step=1, tokens=1), r"At\(step=1, tokens=1\)", "either", "pass either step or tokens"),
    "events that have changed": (another_schedule, "layers=3 at", "with .*layers=4", "Keep the events that fired"),
    "tokens that nobody counts": (
        without_tokens, "1,?000", "have reported no tokens", r"Call schedule\.observe\(tokens="),
    "a history in the wrong order": (
        in_the_wrong_order, "growth 2 of 2 does not fit", "growth 1 ends at", "Pass all growths, in their order"),
    "a model that has grown": (
        a_model_that_has_grown, "this model has grown", "the optimizer has not", "from the config of the start"),
    "a record of a later version": (a_later_record, "version 9", "reads version", "install the growkern that wrote"),
    # upcycle, compare, advise
    "no mixture": (
        lambda: growkern.upcycle(make("gpt2", tied=True), experts=2), "GPT2LMHeadModel", "no mixture", "growkern upcycles Llama"),
    "more experts than there are": (
        lambda: growkern.upcycle(make("llama", tied=True), experts=2, top_k=3), "experts=2, top_k=3", "std=", "pass 1 <= top_k <= experts"),
    "nothing to compare": (
        lambda: growkern.compare(*started(), methods=[], batch=batch()), "methods", r"got \[\]", "expected width methods"),
    "a target that is not larger": (
        lambda: advised(target=1e4), "target=10,000", "not larger than source=100,000", "Name the larger model"),
    "a schedule without a model": (
        lambda: growkern.advise(GrowthSchedule([At(step=1)]), budget=1e12), "schedule of 1 events", "not attached to a model",
        r"call schedule\.attach\("),
    # checkpoints and the command line
    "a checkpoint over another": (
        lambda: on_disk(lambda at: (at.parent / "out").mkdir() or grow_saved(at, at.parent / "out")), "out", "exists",
        "pass --overwrite"),
    "a quantized checkpoint": (
        lambda: on_disk(lambda at: grow_saved(at, at.parent / "out"), quantization_config={}), "source", "is quantized",
        "grow the checkpoint from before"),
    "a checkpoint without a file": (
        lambda: on_disk(without_a_shard), "00002-of-.*safetensors", r"is missing, with \d+ tensors", "copy the file again"),
    "sizes on the command line": (
        lambda: command("plan", "small", "--to", "hidden="), "--to", "cannot read 'hidden='", "write 2x, or hidden=1024"),
    "a method on the command line": (
        lambda: command("plan", "small", "--width", "Stack()"), "--width", "no method 'Stack'", "the methods are .*Lossless"),
    "too many tokens": (
        lambda: on_disk(lambda at: command("verify", at, at, "--tokens", "99")), "99 tokens", "has 64 positions", "--tokens 62"),
    # integrations
    "two schedules of a trainer": (
        attached_twice_to_a_trainer, "cannot attach this schedule", "another schedule is attached", "trainer.remove_callback"),
    "tokens that the trainer does not count": (
        lambda: growkern.hf.attach(trainer(), GrowthSchedule([At(tokens=9)])), "an event needs tokens", "does not count",
        'include_num_input_tokens_seen="all"'),
    "a checkpoint without a schedule": (
        lambda: growkern.hf.resume(trainer(), "missing"), "'missing'", "has no schedule", "growkern.hf.attach"),
    # teachers
    "a teacher of another vocabulary": (
        lambda: inherited(vocab_size=80), "vocabulary of 80, and the student of 66", "another tokenizer cannot teach",
        r"vocab=len\(tokenizer\)"),
    "a teacher that trains along": (
        lambda: inherited(teacher=None), "the teacher has parameters of the student", "would change with it", "copy.deepcopy"),
    "more weights than columns": (
        lambda: growkern.inherit.KnowledgeInheritance(make("llama", tied=True), 67), "top_k: 67", "more than the vocabulary of 66",
        "pass at most 66"),
    "a student without a head": (
        lambda: inherited(student=make("llama", tied=True).model), "LlamaModel", "names no output head", "from_hidden"),
    "logits that nobody stored": (
        lambda: growkern.inherit.KnowledgeInheritance("missing"), "missing", "no complete stored logits", "growkern.inherit.store"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "names", "why", "way_out"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_what_is_at_fault_says_why_and_offers_a_way_out(call, names, why, way_out):
    with pytest.raises(GrowthError) as raised:
        call()

    text = str(raised.value)
    assert [one for one in (names, why, way_out) if not re.search(one, text, re.DOTALL)] == [], text
    assert len(text.splitlines()) <= 9 and not re.match(r"[A-Z][a-z]+ ", text), text


WAYS_OUT = [  # what is refused, and what the error says to pass instead
    (dict(to={"ffn": "1.33x"}), dict(to={"ffn": 54})),
    (dict(to={"heads": 5}), dict(to={"heads": 6})),
    (dict(to={"head_dim": 9}), dict(to={"head_dim": 12})),
    (dict(to={"hidden": 36}, width=width.HyperClone()), dict(to={"hidden": 36}, width=width.HyperClone(general=True))),
    (dict(width=width.Lossless(norms="mean_pad")), dict(width=width.Lossless())),
    (dict(width=width.Lemon(expansion="average")), dict(width=width.Lemon(expansion="zero"))),
    (dict(width=width.AKIPro()), dict(to={"hidden": 48, "kv_heads": 2}, width=width.AKIPro())),
    (dict(width=width.Sparkling("zero", "zero")), dict(width=width.Sparkling("random", "zero"))),
    (dict(to={"layers": 3}, depth=depth.DepthUpscale()), dict(to={"layers": 3}, depth=depth.Stack())),
]  # fmt: skip


@pytest.mark.parametrize(("refused", "said_to_pass"), WAYS_OUT)
def test_the_way_out_works(refused, said_to_pass):
    with pytest.raises(GrowthError):
        grow(**refused)

    assert grow(**said_to_pass).n_params_target > 0
