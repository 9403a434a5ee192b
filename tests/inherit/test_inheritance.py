"""Training with a teacher: the head of stock models is caught, alpha falls, the teacher leaves, and the rest is refused by name."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from inherited import distillation, formula, spread
from models import VOCAB, Encoding, Plain, batch, logits, make, train

import growkern
from growkern.errors import PlanError, UnsupportedModelError
from growkern.inherit import KnowledgeInheritance, linear_loss, sampled, top

FAMILIES = [(name, True) for name in ("llama", "gpt2", "bert", "gemma2", "modernbert", "t5")]
FAMILIES += [("llama", False), ("gpt_neox", False)]
EXTRA = {  # classes that scale their logits
    "cohere": ("Cohere", dict(logit_scale=0.25, pad_token_id=0)),
    "granite": ("Granite", dict(logits_scaling=3.0)),
}


def scaled(kind):
    name, options = EXTRA[kind]
    sizes = dict(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        num_hidden_layers=1,
    )
    config = getattr(transformers, f"{name}Config")(
        **sizes, **options, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def data(model, seed=0):
    ids = batch(seed)
    labels = ids.clone()
    if type(model).__name__.endswith("MaskedLM"):
        labels[:, ::3] = -100
    return {"input_ids": ids, "labels": labels}


def pairs_of(model, given):
    """Return the stock model's logits and labels of the predicted positions."""
    inputs = {"input_ids": given["input_ids"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model._shift_right(given["labels"])
    z, labels = model(**inputs).logits, given["labels"]
    if type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        z, labels = z[:, :-1], labels[:, 1:]
    keep = labels.flatten() != -100
    return z.flatten(0, 1)[keep], labels.flatten()[keep]


def grads_of(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    worst = max(float((actual[n] - expected[n]).abs().max()) for n in actual)
    assert worst <= tolerance * largest, worst / largest


@pytest.mark.parametrize(("family", "tied"), [*FAMILIES, *((name, False) for name in EXTRA)])
def test_loss_and_gradients_of_a_stock_model_are_those_of_its_own_logits(family, tied):
    model = scaled(family) if family in EXTRA else make(family, tied=tied)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    given = data(model)
    z, labels = pairs_of(model, given)
    with torch.no_grad():
        teacher_z = pairs_of(teacher, given)[0]
    ce, kl = F.cross_entropy(z, labels), distillation(z, teacher_z, 2.0)
    (0.6 * ce + 0.4 * kl).backward()
    expected, shapes = grads_of(model), []
    loss = KnowledgeInheritance(teacher, until=10, peak=0.4)
    loss.attach(model, adamw(model))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda m, args, out: shapes.append(out.shape))

    for _ in range(2):  # the head sees one position the first time, and none afterwards
        value = loss(given)
        value.backward()
        close(grads_of(model), expected, 3e-5)

    assert float(value.detach()) == pytest.approx(float((0.6 * ce + 0.4 * kl).detach()), rel=1e-5)
    assert [s[-2] for s in shapes] == [1, 0]
    assert float(loss.ce) == pytest.approx(float(ce.detach()), rel=1e-5)
    # a divergence near 0 is the difference of numbers near log(VOCAB)
    assert 4 * float(loss.kl) == pytest.approx(float(kl.detach()), rel=1e-5, abs=1e-6)
    inputs = {"input_ids": given["input_ids"]}
    inputs |= {"decoder_input_ids": given["labels"]} if family == "t5" else {}
    assert model(**inputs).logits.shape == (2, 16, VOCAB)  # outside of the loss, all logits


@pytest.mark.parametrize(("options", "expected"), [
    (dict(until=4), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (dict(until=4, peak=0.4), [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]),
    (dict(until=4, alpha="heaviside"), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    (dict(alpha="constant", peak=0.5), [0.5] * 6),
    (dict(), [1 - t / 55_000 for t in range(6)]),
], ids=str)  # fmt: skip
def test_alpha_counts_optimizer_steps_and_the_teacher_runs_only_while_it_is_positive(
    options, expected
):
    model, teacher = make("llama", tied=True), make("llama", tied=False)
    optim, runs, seen = adamw(model), [], []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    loss = KnowledgeInheritance(teacher, **options)
    loss.attach(model, optim)

    for _ in expected:
        for _ in range(2):  # two micro-batches
            loss(data(model)).backward()
        seen.append(loss.alpha)
        optim.step()
        optim.zero_grad()

    assert seen == pytest.approx(expected)
    assert len(runs) == 2 * sum(a > 0 for a in expected)


def test_the_teacher_is_released_and_the_loss_goes_on_as_cross_entropy():
    model, teacher = make("llama", tied=True), make("llama", tied=False)
    optim = adamw(model)
    loss = KnowledgeInheritance(teacher, until=1)
    loss.attach(model, optim)
    gone = weakref.ref(teacher)
    del teacher
    loss(data(model)).backward()
    assert gone() is not None

    optim.step()
    gc.collect()

    assert gone() is None
    expected = model(**data(model)).loss
    torch.testing.assert_close(loss(data(model)), expected, rtol=1e-6, atol=0)


def test_validation_is_cross_entropy_whatever_alpha_is():
    model = make("llama", tied=True)
    loss = KnowledgeInheritance(make("llama", tied=False), until=10)
    loss.attach(model, adamw(model))

    with torch.no_grad():
        value = loss(data(model))
        expected = model(**data(model)).loss

    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert loss.alpha == 1.0


def test_a_student_in_eval_mode_still_learns_from_its_teacher():
    """``from_pretrained`` returns models in eval mode, and few loops call ``model.train()``."""
    model = make("llama", tied=True).eval()
    loss = KnowledgeInheritance(make("llama", tied=False), until=10)
    loss.attach(model, adamw(model))

    loss(data(model))

    assert float(loss.kl) > 0


@pytest.mark.parametrize("options", [dict(top_k=5), dict(top_k=5, renormalize=True), dict(sampled=9)], ids=str)  # fmt: skip
def test_a_live_teacher_gives_its_top_or_samples(options):
    model, teacher = make("llama", tied=True), make("llama", tied=False, seed=1)
    given = data(model)
    z, labels = pairs_of(model, given)
    teacher_z = pairs_of(teacher, given)[0].detach()
    loss = KnowledgeInheritance(teacher, until=10, **options)
    loss.attach(model, adamw(model))
    if "sampled" in options:
        index, weight = sampled(teacher_z, 9, 2.0, torch.Generator().manual_seed(0))
    else:
        index, weight = top(teacher_z, 5, 2.0, renormalize="renormalize" in options)
        probs = (teacher_z / 2).softmax(-1).topk(5).values
        torch.testing.assert_close(weight, probs / probs.sum(1, keepdim=True) if "renormalize" in options else probs)  # fmt: skip

    expected = formula(z, labels, spread(index, weight, VOCAB), 1.0, 2.0)

    torch.testing.assert_close(loss(given), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_of_a_wider_padding_teaches_the_tokens_that_both_have():
    model = make("llama", tied=True)
    for width in (VOCAB + 14, VOCAB - 2):
        teacher = make("llama", tied=False, vocab_size=width)
        given = {k: v.clamp_max(VOCAB - 3) for k, v in data(model).items()}
        z = pairs_of(model, given)[0]
        teacher_z = pairs_of(teacher, given)[0].detach()
        padded = torch.full((len(z), VOCAB), -math.inf)
        padded[:, : VOCAB - 2] = teacher_z[:, : VOCAB - 2]
        loss = KnowledgeInheritance(teacher, until=10, vocab=VOCAB - 2)
        loss.attach(model, adamw(model))

        value = loss(given)

        torch.testing.assert_close(value, distillation(z, padded, 2.0), rtol=1e-5, atol=1e-6)
        loss.remove()


def test_several_teachers_are_a_function_of_the_batch():
    model = make("llama", tied=True)
    teachers = [make("llama", tied=False, seed=s) for s in (1, 2)]

    @torch.no_grad()
    def by_domain(given):
        rows = [teachers[d](ids[None]).logits[0] for d, ids in zip(given["domain"], given["input_ids"], strict=True)]  # fmt: skip
        pairs = [top(z, 6, 2.0) for z in rows]
        return torch.stack([i for i, _ in pairs]), torch.stack([w for _, w in pairs])

    loss = KnowledgeInheritance(by_domain, until=10)
    loss.attach(model, adamw(model))
    given = data(model)
    weights = [
        spread(*top(t(given["input_ids"][i : i + 1]).logits[0, :-1].detach(), 6, 2.0), VOCAB)
        for i, t in enumerate(teachers)
    ]
    z, labels = pairs_of(model, given)

    value = loss(Batch(given, domain=[0, 1]))

    torch.testing.assert_close(value, formula(z, labels, torch.cat(weights), 1.0, 2.0), rtol=1e-5, atol=1e-6)  # fmt: skip


class Batch(dict):
    """A batch that the model sees without the domains."""

    def __init__(self, given, domain):
        super().__init__(given)
        self.domain = domain

    def __getitem__(self, key):
        return self.domain if key == "domain" else super().__getitem__(key)


def test_a_model_of_your_own_calls_the_loss_from_its_hidden_states():
    model, teacher = Plain(), Plain()
    loss = KnowledgeInheritance(lambda given: top(teacher(given["ids"]).detach(), VOCAB, 2.0), until=10, peak=0.5)  # fmt: skip
    optim = adamw(model)
    loss.attach(None, optim)
    ids, caught = batch(), []
    model.head.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    z = model(ids)
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]

    value = loss.from_hidden(caught[0], model.head.weight, labels, {"ids": ids})

    z, teacher_z = z[:, :-1].flatten(0, 1), teacher(ids)[:, :-1].flatten(0, 1)
    expected = 0.5 * F.cross_entropy(z, ids[:, 1:].flatten()) + 0.5 * distillation(z, teacher_z, 2.0)  # fmt: skip
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    value.backward()
    optim.step()
    assert loss.n_steps == 1


def test_accumulated_micro_batches_of_unequal_counts_have_one_denominator():
    model, teacher = make("llama", tied=True), make("llama", tied=False)
    whole = data(model)
    whole["labels"][0, :9] = -100
    loss = KnowledgeInheritance(teacher, until=10, peak=0.4)
    loss.attach(model, adamw(model))
    loss(whole).backward()
    expected = grads_of(model)

    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(2)]
    n_items = loss.count(parts)
    for part in parts:
        loss(part, n_items=n_items).backward()

    assert n_items == 7 + 15
    close(grads_of(model), expected, 1e-5)


def test_the_router_loss_of_a_mixture_of_experts_is_kept():
    model = make("mixtral", tied=False, output_router_logits=True, router_aux_loss_coef=0.5)
    loss = KnowledgeInheritance(make("llama", tied=False), until=10)
    loss.attach(model, adamw(model))

    with torch.no_grad():
        torch.testing.assert_close(loss(data(model)), model(**data(model)).loss, rtol=1e-6, atol=0)


def test_the_source_before_a_growth_teaches_the_target_from_a_divergence_of_zero():
    model = make("llama", tied=True)
    optim = adamw(model)
    train(model, optim, 1)
    loss = KnowledgeInheritance(copy.deepcopy(model), until=10, tau=1.0)
    loss.attach(model, optim)
    growkern.expand_inplace(model, optim)

    value = loss(data(model))

    assert model.config.hidden_size == 48
    assert abs(float(value.detach())) < 1e-5
    value.backward()
    optim.step()
    assert loss.n_steps == 1
    assert float(loss(data(model)).detach()) > 1e-4


def test_a_vocabulary_that_grows_while_the_teacher_teaches_is_refused():
    model = make("llama", tied=True)
    optim = adamw(model)
    loss = KnowledgeInheritance(make("llama", tied=False), until=10)
    loss.attach(model, optim)
    growkern.expand_inplace(model, optim, to={"vocab": 80}, width=growkern.vocab.MeanCov())

    with pytest.raises(PlanError, match="vocabulary of 66, and the student of 80"):
        loss(data(model))


def test_sampling_leaves_the_random_state_of_the_student_alone():
    model = make("llama", tied=True)
    loss = KnowledgeInheritance(make("llama", tied=False), until=10, sampled=4)
    loss.attach(model, adamw(model))
    state = torch.get_rng_state()

    values = [float(loss(data(model)).detach()) for _ in range(2)]

    assert torch.equal(torch.get_rng_state(), state) and values[0] != values[1]


def test_a_resumed_run_goes_on_with_its_alpha():
    model = make("llama", tied=True)
    optim = adamw(model)
    loss = KnowledgeInheritance(make("llama", tied=False), until=4)
    loss.attach(model, optim)
    for _ in range(3):
        optim.step()
    other = KnowledgeInheritance(make("llama", tied=False), until=4)

    other.load_state_dict(loss.state_dict())

    assert other.alpha == loss.alpha == 0.25


def test_remove_leaves_no_hook():
    model = make("llama", tied=True)
    optim = adamw(model)
    loss = KnowledgeInheritance(make("llama", tied=False), until=4)

    for _ in range(2):
        loss.attach(model, optim)
        loss.remove()

    assert not model.lm_head._forward_pre_hooks and not optim._optimizer_step_post_hooks


def test_a_copy_of_an_attached_student_is_a_plain_model(tmp_path):
    model = make("llama", tied=True)
    loss = attached(model)
    loss(data(model))

    average = torch.optim.swa_utils.AveragedModel(model)
    torch.save(model, tmp_path / "model.pt")

    for other in (average.module, torch.load(tmp_path / "model.pt", weights_only=False)):
        torch.testing.assert_close(logits(other, batch()), logits(model, batch()))
    assert float(loss(data(model)).detach()) > 0


@pytest.mark.slow
def test_a_compiled_student_has_the_same_loss_and_keeps_its_own_forward():
    model = make("llama", tied=True)
    loss = KnowledgeInheritance(make("llama", tied=False), until=4)
    loss.attach(model, adamw(model))
    expected = [float(loss(data(model)).detach()) for _ in range(2)]
    own = logits(model, batch())
    compiled = torch.compile(model, backend="eager")

    actual = [float(loss(data(model), model=compiled).detach()) for _ in range(2)]

    assert actual == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(compiled(batch()).logits, own)


def test_a_head_under_autocast_inside_the_forward_is_computed_in_its_dtype(monkeypatch):
    """Accelerate's autocast ends with the forward, and the loss comes after it."""
    model, seen = make("llama", tied=True), []
    loss = KnowledgeInheritance(make("llama", tied=False), until=10)
    loss.attach(model, adamw(model))
    run = linear_loss.row_gradients
    monkeypatch.setattr(linear_loss, "row_gradients", lambda z, *a, **k: seen.append(z.dtype) or run(z, *a, **k))  # fmt: skip
    plain = float(loss(data(model)).detach())

    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    value = float(loss(data(model)).detach())
    del model.forward
    with torch.autocast("cpu", torch.bfloat16):
        around = float(loss(data(model)).detach())

    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert [value, around] == pytest.approx([plain] * 2, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_student_and_a_teacher_of_other_dtypes_learn_together(family):
    for own, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float16)):  # fmt: skip
        model, source = make(family, tied=True).to(own), make(family, tied=True, seed=1).to(dtype)
        loss = KnowledgeInheritance(source, until=10)
        loss.attach(model, adamw(model))
        z, teacher_z = pairs_of(model, data(model))[0], pairs_of(source, data(model))[0]

        value = loss(data(model))
        value.backward()

        expected = distillation(z.double(), teacher_z.double(), 2.0)
        coarse = max(torch.finfo(d).eps for d in (own, dtype))
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=4 * coarse)


class Squared(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class OddForCausalLM(transformers.LlamaForCausalLM):
    """A model that changes its logits after the head."""

    factor = 1.1

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


def student(family="llama", **changes):
    return make(family, tied=False, **changes)


def with_head(head):
    model = student()
    model.lm_head = head
    return model


def attached(model, teacher=None, **options):
    shift = options.pop("shift", None)
    loss = KnowledgeInheritance(student() if teacher is None else teacher, until=10, **options)
    loss.attach(model, adamw(model), shift=shift)
    return loss


def itself():
    model = student()
    attached(model, model)


def twice():
    model = student()
    loss = attached(model)
    loss.attach(model, adamw(model))


def called(function):
    model = student()
    attached(model, function)(data(model))


def changed_logits(factor=1.1, dtype=torch.float32):
    torch.manual_seed(0)
    model = OddForCausalLM(student().config).to(dtype)
    model.factor = factor
    attached(model, shift=True).__call__(data(model))


def resized():
    model = student()
    loss = attached(model)
    model.resize_token_embeddings(VOCAB + 8)
    loss(data(model))


def of_nan():
    teacher = student()
    torch.nn.init.constant_(teacher.model.norm.weight, math.nan)
    model = student(seed=1)
    attached(model, teacher)(data(model))


REFUSED = {
    "another vocabulary": (lambda: attached(student(), student(vocab_size=80)), "vocabulary of 80, and the student of 66"),
    "a tokenizer larger than a vocabulary": (lambda: attached(student(), student(vocab_size=80), vocab=70), "70 tokens are more than"),
    "more than the vocabulary": (lambda: KnowledgeInheritance(student(), 67), "top_k: 67 is more than the vocabulary of 66"),
    "no head": (lambda: attached(make("encoder", tied=False), shift=False), "names no output head"),
    "a head that is not linear": (lambda: attached(with_head(Squared(24, VOCAB))), "is a Squared, and not a linear map"),
    "a head of layers": (lambda: attached(with_head(torch.nn.Sequential(torch.nn.Linear(24, VOCAB)))), "is a Sequential"),
    "a model that changes its logits": (changed_logits, "changes the logits of its head in a way that growkern does not know"),
    "logits in bfloat16 times 0.95": (lambda: changed_logits(0.95, torch.bfloat16), "changes the logits of its head"),
    "logits in float16 times 0.99": (lambda: changed_logits(0.99, torch.float16), "changes the logits of its head"),
    "a head that was replaced": (resized, "If the head was replaced, as resize_token_embeddings does, call loss.remove"),
    "a teacher of NaN": (of_nan, "logits of this LlamaForCausalLM are not finite"),
    "labels of an unknown kind": (lambda: attached(Plain()), "cannot see whether the labels of a Plain"),
    "itself as teacher": (itself, "would change with it; pass copy.deepcopy"),
    "attached twice": (twice, "already attached; call remove"),
    "not attached": (lambda: KnowledgeInheritance(student())(data(student())), "attach the loss to a model first"),
    "two choices": (lambda: KnowledgeInheritance(student(), 5, sampled=5), "exclude each other"),
    "a choice from weights": (lambda: KnowledgeInheritance(lambda b: b, 5), "this teacher gives weights; leave them out"),
    "no weights": (lambda: KnowledgeInheritance(student(), 0), "top_k: 0 is no number"),
    "a constant with an end": (lambda: KnowledgeInheritance(student(), alpha="constant", until=5), "has no end"),
    "no steps": (lambda: KnowledgeInheritance(student(), until=0), "until: 0 is no number of steps"),
    "an unknown form": (lambda: KnowledgeInheritance(student(), alpha="cosine"), "'linear' or 'constant' or 'heaviside', got 'cosine'"),
    "a share above 1": (lambda: KnowledgeInheritance(student(), peak=2.0), "pass a number from 0 to 1"),
    "a function without weights": (lambda: called(lambda b: b["input_ids"]), "return a tuple of columns and weights"),
    "columns outside": (lambda: called(lambda b: (b["input_ids"][..., None] + VOCAB, torch.ones(2, 16, 1))), "outside 0 ... 65"),
    "a count of unknown labels": (lambda: KnowledgeInheritance(student()).count([data(student())]), "count needs to know"),
    "no labels": (lambda: attached(student())({"input_ids": batch()}), "the batch has no labels"),
    "no folder": (lambda: KnowledgeInheritance("nowhere"), "nowhere has no index.json"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_inherited_is_refused_with_a_way_out(call, match):
    with pytest.raises(growkern.errors.GrowthError, match=match):
        call()


def test_a_refused_attach_leaves_no_hook():
    model = student()
    with pytest.raises(PlanError, match="vocabulary of 80"):
        attached(model, student(vocab_size=80))
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(UnsupportedModelError):
        attached(Encoding(tied=False, norm_first=True))


@pytest.mark.parametrize("kind", ["model", "stored"])
@pytest.mark.parametrize("part", [slice(0, -1), slice(0, 4)])
def test_a_teacher_of_other_positions_than_the_labels_is_refused(kind, part, tmp_path):
    """Flattened, its rows would be those of other positions, from the second sequence on."""
    teacher, student, ids = make("llama", tied=True, seed=1), make("llama", tied=True), batch()
    store = growkern.inherit.store
    given = teacher if kind == "model" else store(teacher, [{"input_ids": ids}], tmp_path, sampled=4)  # fmt: skip
    loss = KnowledgeInheritance(given, until=9)
    loss.attach(None, adamw(student))
    hidden, weight = torch.randn(*ids.shape, 24), student.lm_head.weight
    inputs = {"input_ids": ids, "teacher_at": torch.arange(len(ids)) * ids.shape[1]}

    with pytest.raises(PlanError, match=r"the teacher has outputs for positions \(2, 16\)"):
        loss.from_hidden(hidden[:, part], weight, ids[:, part], inputs)
    padded = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert loss.from_hidden(hidden, weight, padded, inputs).isfinite()


def test_labels_that_are_shifted_already_are_not_shifted_again():
    model, ids = make("llama", tied=True), batch()
    loss = KnowledgeInheritance(lambda b: b, until=9, peak=0.0)
    loss.attach(model, adamw(model))
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    given = {"input_ids": ids, "labels": torch.zeros_like(ids)}

    value = loss({**given, "shift_labels": shifted})

    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert loss.count([{**given, "shift_labels": shifted}]) == ids[:, 1:].numel()
