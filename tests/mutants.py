"""A hand-made mutant breaks one place of growkern, and the tests named beside the mutant must fail: ``make mutants``.

``python tests/mutants.py [NAME ...]`` runs all mutants, or the named ones, two at a time, each in a copy of the checkout, and prints the
survivors. The exit status is 1 where a mutant survives.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = (
    "growkern",
    "kernels",
    "tests",
    "bench",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "Makefile",
    "constraints.txt",
)
N_WORKERS = 2


class Mutant(NamedTuple):
    """One wrong place of growkern, and the tests that must fail there.

    Attributes:
        path: File below ``growkern``.
        old: Text that occurs once in the file.
        new: Text that replaces it.
        tests: Arguments of pytest, below ``tests``.
    """

    path: str
    old: str
    new: str
    tests: str


MUTANTS = {
    # pictures
    "picture: every copy is a first copy": Mutant(
        "planning/plan_picture.py", 'kind = "further" if seen[source + start] else "first"', 'kind = "first"',
        "pictures/test_pictures.py -k index_map_of_a_space"),
    "picture: a growth without a fixed step happens at once": Mutant(
        "training/outlook.py", "start = (low, high) if step is None", "start = (low, low) if step is None",
        "pictures/test_pictures.py -k is_a_window"),
    "html: texts are not escaped": Mutant(
        "support/html.py", "{escape(text)}", "{text}", "pictures/test_pictures.py -k escapes"),
    # planning: the law, plans and their checks
    "report: the gradient norm takes all copies from the own layer": Mutant(
        "engine/grad_norm.py", "            shares = *shares[:at], first, *shares[at + 1 :]\n", "",
        "optimizer/test_describe_optimizer.py -k gradients_in_flight"),
    "report: the gradient norm knows no shares of single coordinates": Mutant(
        "engine/grad_norm.py", "        after += once * sum(_weighted(t, each, order) for each in shares if _uniform(each) is None)\n", "",
        "optimizer/test_describe_optimizer.py -k gradients_in_flight"),
    "plan: another layer's shape is not compared": Mutant(
        "planning/check.py", "            or spec.shape(row.next_layer_source) != spec.shape(row.source)\n", "",
        "engine/test_bad_input.py -k hand_has_edited"),
    "plan: epsilon factors may be infinite": Mutant(
        "planning/check.py", "*_of_eps(plan, spec, homes, factors)", "",
        "engine/test_bad_input.py -k 'hand_has_edited or numbers_that_are_none'"),
    "plan: split kv heads keep gradients": Mutant(
        "planning/axis_scales.py", "    if wide.joint:\n        return False\n", "",
        "model/test_families.py -k share_its_gradient"),
    "plan: the last space says whether copies are equal": Mutant(
        "planning/axis_scales.py", "equal.get(space, True) and has_equal[key]", "has_equal[key]",
        "methods/test_width.py -k 'stay_equal_are and Lemon'"),
    "plan: an odd number of copies is paired": Mutant(
        "planning/index_map.py", "if len(targets) % 2:", "if False:", "planning/test_index_map.py"),
    "perturb: every tensor has the same noise": Mutant(
        "execution/perturb.py", "axis_keys(seed, tensor_id(row.name))", "axis_keys(seed, 0)",
        "methods/test_shrink_perturb.py -k 'independent or new_blocks'"),
    "perturb: later rows have the noise of the first": Mutant(
        "execution/perturb.py", "ids[start : start + len(part)]", "ids[: len(part)]", "methods/test_shrink_perturb.py -k in_parts"),
    "perturb: the law's factor on readers shrinks them too": Mutant(
        "planning/perturbation.py", "shrink=wide.shrink / fan_in", "shrink=wide.shrink",
        "methods/test_shrink_perturb.py -k 'every_element and llama'"),
    "perturb: a head is drawn like a hidden matrix": Mutant(
        "planning/perturbation.py", "fan_in if is_output else sqrt(fan_in)", "sqrt(fan_in)",
        "methods/test_shrink_perturb.py -k 'every_element and llama'"),
    "perturb: the router of experts is drawn like a hidden matrix": Mutant(
        "planning/perturbation.py", 'FINITE = "vocab", "experts"', 'FINITE = ("vocab",)',
        "methods/test_shrink_perturb.py -k 'every_element and mixtral'"),
    "perturb: optimizer state is carried along": Mutant(
        "planning/perturbation.py", 'if state != "drop":', "if False:", "methods/test_shrink_perturb.py -k must_be_dropped"),
    "perturb: a plan may carry state": Mutant(
        "planning/check.py", 'if plan.state != "drop" and any', "if False and any", "methods/test_shrink_perturb.py -k edited"),
    "perturb: a plan may claim to preserve the function": Mutant(
        "planning/exactness.py", "    if any(row.is_perturbed for row in plan.tensors):\n", "    if False:\n",
        "methods/test_shrink_perturb.py -k edited"),
    "perturb: noise may overflow": Mutant(
        "execution/finite.py", " or row.noise_std:", ":", "methods/test_shrink_perturb.py -k cannot_hold"),
    "perturb: every plan has the new fields in its JSON": Mutant(
        "planning/growth_plan.py", "if values[key] == OMITTED[key]:", "if False:",
        "methods/test_shrink_perturb.py -k digests"),
    "report: a perturbed model has a gradient norm": Mutant(
        "engine/grad_norm.py", "    if any(row.is_perturbed for row in plan.tensors):\n        return None\n", "",
        "methods/test_shrink_perturb.py -k must_be_dropped"),
    "experts: router rows of source experts have noise too": Mutant(
        "planning/perturbation.py", "noise_std=wide.router_std, noise_from=n", "noise_std=wide.router_std, noise_from=1",
        "methods/test_copy_experts.py -k copies_equal"),
    "experts: every matrix of experts has noise": Mutant(
        "planning/perturbation.py", "if _is_router(row, spec) else row", 'if "mlp" in row.name else row',
        "methods/test_copy_experts.py -k copies_equal"),
    "experts: utility is not divided among copies": Mutant(
        "width/copy_experts.py", "(utility[i] / counts[i], ", "(utility[i], ", "methods/test_copy_experts.py -k copies_equal"),
    "experts: of equal utility the last is copied": Mutant(
        "width/copy_experts.py", "-counts[i], -i)", "-counts[i], i)", "methods/test_copy_experts.py -k copies_equal"),
    "experts: a copied router claims exact gradients": Mutant(
        "planning/build.py", "not (wide.noise or wide.perturbs) and", "not wide.noise and", "methods/test_copy_experts.py -k edited"),
    "experts: noise parts no copies": Mutant(
        "planning/axis_scales.py", " or wide.perturbs:", ":", "methods/test_copy_experts.py -k copies_equal"),
    "experts: the auxiliary loss weakens with experts": Mutant(
        "model/families/moe.py", '"router_aux_loss_coef": "top_k"', '"router_aux_loss_coef": "experts"',
        "methods/test_copy_experts.py -k auxiliary"),
    "experts: utility leaves out the square": Mutant(
        "analysis/utility.py", "p.grad.double().square()", "p.grad.double().abs()", "methods/test_copy_experts.py -k utility"),
    # learning: operators of a growth
    "learning: layers are mixed twice": Mutant(
        "learning/operators.py", "change = _sum(None if change is None else self._started(axis, dim, change), learned)",
        "change = learned if change is None else _sum(change, learned)", "learning/test_operators.py -k 'formula and drawn'"),
    "learning: the product of two changes is left out": Mutant(
        "learning/operators.py", "self._learned(axis, dim, _sum(start, change))", "self._learned(axis, dim, start)",
        "learning/test_operators.py -k 'formula and llama-use'"),
    "learning: the matrix ignores the plan's scales": Mutant(
        "learning/pieces.py", "return tuple(scale or 1.0 for scale in self.scales)", "return tuple(1.0 for _ in self.scales)",
        "learning/test_operators.py -k 'formula and llama-use'"),
    "learning: heads are mixed coordinate by coordinate": Mutant(
        "learning/pieces.py", "start = replace(start, whole=_size(segment[-1:], before))", "pass",
        "learning/test_ties.py -k heads_are_learned"),
    "learning: Mango mixes no layers of the other tensors": Mutant(
        "learning/operators.py", "weight * _sum(value, moved)", "weight * value", "learning/test_ties.py -k nested_sums"),
    "learning: coefficients over zeros are kept": Mutant(
        "learning/build.py", "if bool(tensor.any())}", "}", "learning/test_operators.py -k source_that_is_0"),
    "learning: noise changes the sum of coefficients": Mutant(
        "learning/build.py", "(start + drawn) / (1 + drawn.sum()) - start", "drawn", "learning/test_operators.py -k keeps_the_sum"),
    "learning: readers and writers share a matrix by default": Mutant(
        "learning/pieces.py", 'if tie == "use":', "if False:", "learning/test_ties.py -k keeps_readers_apart"),
    "learning: the last step is not written": Mutant(
        "learning/learner.py", "            optim.zero_grad()\n            learner.write()\n", "            optim.zero_grad()\n",
        "learning/test_learn.py -k lower_the_loss"),
    "learning: gradients of the operators add up over steps": Mutant(
        "learning/learner.py", "            optim.zero_grad()\n", "", "learning/test_learn.py -k 'functional_call'"),
    "learning: averages keep the closed form": Mutant(
        "learning/learn.py", "                _add(operators, sources, _by_name(average), undo)\n", "                pass\n",
        "learning/test_learn.py -k averages_grow"),
    "learning: gradients of the source stay": Mutant(
        "learning/learn.py", "if name in operators.pieces or p.grad is not None:", "if name in operators.pieces:",
        "learning/test_learn.py -k in_flight"),
    "learning: the weights are written outside the rollback": Mutant(
        "learning/learn.py", "            undo.storage(p, value, None)\n", "            p.copy_(value)\n            p.grad = None\n",
        "learning/test_learn.py -k bitwise_unchanged"),
    "learning: a learned growth claims to keep the function": Mutant(
        "learning/learn.py", 'report, preserves="nothing", reasons=(*report.reasons, REASON)', "report, reasons=report.reasons",
        "learning/test_learn.py -k apart_from_its_values"),
    # optimizer: state rules
    "state: Muon's update has the shape of its rows": Mutant(
        "optimizer/state_rules.py", "return 0.2 * sqrt(max(rows, cols))", "return 0.2 * sqrt(rows)",
        "optimizer/test_lr_scaling.py -k 'two_growths and uon'"),
    "state: Muon's step of a wide matrix shrinks": Mutant(
        "optimizer/state_rules.py", "sqrt(max(1, rows / cols))", "sqrt(rows / cols)", "optimizer/test_lr_scaling.py -k adjustment"),
    "state: Adagrad's sum of new elements is 0": Mutant(
        "optimizer/state_rules.py", 'Law(STEP | {"sum": SQUARE})', 'Law(STEP | {"sum": replace(SQUARE, missing="zero")})',
        "optimizer/test_describe_optimizer.py -k ancestor"),
    "state: RMSprop's average of new elements is 0": Mutant(
        "optimizer/state_rules.py", 'STEP | {"square_avg": SQUARE, "momentum_buffer"',
        'STEP | {"square_avg": replace(SQUARE, missing="zero"), "momentum_buffer"',
        "optimizer/test_describe_optimizer.py -k ancestor"),
    "state: AMSGrad's maximum of new elements is 0": Mutant(
        "optimizer/state_rules.py", '"max_exp_avg_sq": SQUARE', '"max_exp_avg_sq": replace(SQUARE, missing="zero")',
        "optimizer/test_describe_optimizer.py -k ancestor"),
    "state: ASGD's lambd is no decay": Mutant(
        "optimizer/state_rules.py", 'decays=("weight_decay", "lambd")', 'decays=("weight_decay",)',
        "planning/test_build.py -k own_learning_rate_law"),
    "state: Adamax starts new elements at 0": Mutant(
        "optimizer/state_rules.py", '"exp_inf": replace(GRADIENT, missing="mean")', '"exp_inf": GRADIENT',
        "optimizer/test_describe_optimizer.py -k ancestor"),
    "state: Adadelta starts new elements at 0": Mutant(
        "optimizer/state_rules.py", 'Rule(weight=2, missing="mean")}, lr=(0, 0)', "Rule(weight=2)}, lr=(0, 0)",
        "optimizer/test_describe_optimizer.py -k ancestor"),
    "state: Rprop starts new elements at 0": Mutant(
        "optimizer/state_rules.py", 'Rule(weight=1, missing="mean")', "Rule(weight=1)",
        "optimizer/test_describe_optimizer.py -k ancestor"),
    "state: second moments of new elements are 0": Mutant(
        "optimizer/state_rules.py", 'SQUARE = Rule(grad=2, missing="mean")', "SQUARE = Rule(grad=2)",
        "optimizer/test_describe_optimizer.py -k ancestor"),
    "state: second moments scale like gradients": Mutant(
        "optimizer/state_rules.py", "SQUARE = Rule(grad=2,", "SQUARE = Rule(grad=1,", "planning/test_build.py -k moments"),
    "state: fused SGD has momentum of some tensors": Mutant(
        "optimizer/state_rules.py", 'together=("momentum_buffer",)', "together=()",
        "optimizer/test_describe_optimizer.py -k goes_on_in_sgd"),
    "state: a block of 8 bits takes the scale of its first element": Mutant(
        "optimizer/eight_bit.py", "torch.where(alike, first_scale, largest)", "first_scale",
        "optimizer/test_state_rules.py -k eight"),
    # optimizer: learning rates and UpdateScale
    "rates: coupled decay has no units of its own": Mutant(
        "optimizer/lr_scaling.py", "units=ones if coupled else None", "units=None",
        "optimizer/test_lr_scaling.py -k groups_and_hooks"),
    "rates: gains of two growths are not multiplied": Mutant(
        "optimizer/lr_scaling.py", "old.gain * new.gain", "new.gain", "optimizer/test_lr_scaling.py -k two_growths"),
    "rates: pads take the factor of the first element": Mutant(
        "optimizer/lr_scaling.py", "torch.where(index == PAD, old.mean(), old[index.clamp(min=0)])", "old[index.clamp(min=0)]",
        "optimizer/test_lr_scaling.py -k mean_factor"),
    "rates: new slices have the old step": Mutant(
        "optimizer/lr_scaling.py", "step if fresh else 0.0", "0.0", "optimizer/test_state_rules.py -k step_of_their_own"),
    "rates: sparse gradients take all rows' factors": Mutant(
        "optimizer/factors.py", "f[rows] if i == 0 and isinstance(f, Tensor) else f for", "f for",
        "optimizer/test_lr_scaling.py -k sparse"),
    "rates: an infinite weight becomes NaN": Mutant(
        "optimizer/update_scale.py", ".masked_fill_(~seen.isfinite(), 0.0)", "", "optimizer/test_lr_scaling.py -k infinite"),
    "rates: a step that raised leaves the optimizer's units": Mutant(
        "optimizer/watched_step.py", "            except BaseException:\n                raised()\n",
        "            except BaseException:\n", "optimizer/test_lr_scaling.py -k as_soon_as"),
    "rates: parameters that join later train without a word": Mutant(
        "commit/optimizer_guard.py", "    _refuse_late(optim)\n", "", "commit/test_optimizer_guard.py -k join_after"),
    "report: a reset of the state is a trajectory": Mutant(
        "engine/run.py", "carried and not any(law and law.resets for law in laws)", "carried", "optimizer/test_lr_scaling.py -k reset"),
    "check: gradients may change": Mutant(
        "engine/forward_check.py", "id(p.grad), _writes(p), _writes(p.grad)", "_writes(p)",
        "engine/test_forward_check.py -k changes_a_param"),
    "rates: other hooks see the optimizer's units": Mutant(
        "optimizer/update_scale.py", "self._hooks[-1].id, last=False", "self._hooks[-1].id, last=True",
        "optimizer/test_lr_scaling.py -k models_units"),
    "rates: norms are taken in the optimizer's units": Mutant(
        "optimizer/update_scale.py", "return multiply_(square.clone(), factors) if factors else square", "return square",
        "optimizer/test_describe_optimizer.py -k norm_factor_of_second"),
    "rates: schedulers with a floor are said to follow": Mutant(
        "optimizer/schedulers.py", 'and not getattr(s, "eta_min", 0)', "",
        "optimizer/test_describe_optimizer.py -k 'schedulers_go_on or hooks_carry'"),
    "groups: min_lr stays": Mutant(
        "commit/param_groups.py", '    "min_lr",\n', "", "optimizer/test_describe_optimizer.py -k 'schedulers_go_on or plateau'"),
    "groups: min_lrs of schedulers stay": Mutant(
        "commit/param_groups.py", '("base_lrs", "min_lrs", "max_lrs")', '("base_lrs", "max_lrs")',
        "optimizer/test_describe_optimizer.py -k 'schedulers_go_on or plateau'"),
    "groups: NAdam's decay is never decoupled": Mutant(
        "commit/param_groups.py", 'if group.get("decoupled_weight_decay"):', "if False:",
        "optimizer/test_lr_scaling.py -k groups_and_hooks"),
    # execution
    "execute: every tensor has the same noise": Mutant(
        "execution/tiles.py", "axis_keys(self.plan.seed, reference.tensor_id(job.row.name))", "axis_keys(self.plan.seed, 0)",
        "execution/test_execute.py -k noise"),
    "execute: a mean is a sum": Mutant(
        "execution/axis_runs.py", "[s / max(1, self.n_copied) for s in sums]", "sums", "optimizer/test_describe_optimizer.py -k ancestor"),
    "execute: the mean of a power is no power mean": Mutant(
        "execution/tiles.py", "(sum(copied) / max(1, len(copied))) ** (1 / power)", "(sum(copied) / max(1, len(copied)))",
        "optimizer/test_state_rules.py -k 'gathered and dafactor'"),
    "execute: the high half of the seed does nothing": Mutant(
        "execution/torch_backend.py", "mix(mix(seed & 0xFFFFFFFF) ^ seed >> 32)",
        "mix(mix(seed & 0xFFFFFFFF))", "kernels/test_expand.py -k 'formula or seed'"),
    "perturb: offsets do not move with the scale": Mutant(
        "execution/perturb.py", "row.offset * (s - 1) for", "0.0 * (s - 1) for", "model/test_gemma2.py"),
    "execute: step counts are shared": Mutant(
        "execution/execute.py", "state[key] = value.clone() if isinstance(value, Tensor) else value", "state[key] = value",
        "optimizer/test_describe_optimizer.py -k stacked_blocks"),
    "execute: lean keeps its sources": Mutant(
        "execution/execute.py", "            self.sources.forget(tensor_set.tensors[0].source)\n", "",
        "execution/test_memory.py -k let_go"),
    "execute: lean frees nothing": Mutant(
        "execution/sets.py", 'n_freed if memory == "lean" else {}', "n_freed if False else {}", "execution/test_memory.py -k does_not"),
    "measures: operators on all cores read sources": Mutant(
        "execution/measures.py", "    read_each(range(len(tensors)), one, tensors.__getitem__)\n", "    [*map(one, range(len(tensors)))]\n",
        "execution/test_threads.py -k all_cores"),
    "fills: operators on all cores read sources": Mutant(
        "execution/fills.py", "read_each(own, one, lambda job: job[0].sources[0])", "[*map(one, own)]",
        "execution/test_threads.py -k all_cores"),
    "threads: all threads that begin meanwhile run torch alone": Mutant(
        "support/threads.py", "        torch.set_num_threads(n)  # of this thread, and of others as above\n", "",
        "execution/test_threads.py -k meanwhile"),
    "template: two threads trace at once": Mutant(
        "model/tracing/small.py", "    with _ALONE:\n", "    with nullcontext():\n", "execution/test_threads.py -k one_after"),
    "threads: temporaries take memory without bound": Mutant(
        "support/threads.py", "min(PER_CORE * n, max(FEW, n_bytes // PER_THREAD))", "PER_CORE * n",
        "execution/test_threads.py -k once_and_alone"),
    "template: every growth of a model traces a small model again": Mutant(
        "model/tracing/template.py", ', "growkern_history"', "", "model/test_hints.py -k all_growths"),
    "fills: small sources share a mean": Mutant(
        "execution/fills.py", "* rows).sum(1)", "* rows).sum(1).mean(0, keepdim=True).expand(len(sources))",
        "execution/test_tiles.py -k read_together"),
    "fills: a source that is read alone is summed in another order": Mutant(
        "execution/fills.py", "if sources[0].numel() <= FEW:", "if len(sources) > 1:", "execution/test_tiles.py -k read_together"),
    "names: modules are walked at every question": Mutant(
        "support/names.py", "        known[id(model)] = made\n", "        pass\n", "execution/test_tiles.py -k walked"),
    "finite: means are not tested": Mutant(
        "execution/finite.py", "flags[made[0].device].append((members, _broken(made)))", "pass", "execution/test_finite.py"),
    "fills: means of two kinds share an address of 16 bytes": Mutant(
        "execution/fills.py", "sums.new_empty(len(sums), 16 // sums.itemsize)", "sums.new_empty(len(sums), 1)",
        "execution/test_tiles.py -k aligned_alike"),
    "execute: tensors of another alignment are cut alike": Mutant(
        "execution/grouping.py", "t.data_ptr() % 16)", "0)", "execution/test_tiles.py -k aligned_alike"),
    "execute: the memory mode chooses which weight is measured": Mutant(
        "execution/tiles.py", "            seen.add(row.source)\n", "", "execution/test_memory.py -k master_weights"),
    "lean: nobody waits for a source to be written": Mutant(
        "engine/run.py", "        backups.wait()\n", "", "execution/test_memory.py -k 'no_later or full_disk'"),
    "lean: what could not be written is lost": Mutant(
        "support/memory.py", "return lambda: raw", "raise", "execution/test_memory.py -k full_disk"),
    "AdamW: a step repeats with transposed moments": Mutant(
        "optimizer/adamw_steady.py", "chain(grads, params, tensors)", "grads", "optimizer/test_adamw_class.py -k repeats"),
    "AdamW: a repeated step is not counted": Mutant(
        "optimizer/adamw_steady.py", "            count.value += 1\n", "            pass\n", "optimizer/test_adamw_class.py -k repeats"),
    "AdamW: a count of another dtype is written in the memory of a float": Mutant(
        "optimizer/adamw_steady.py", " and step.dtype in NUMBERS", "", "optimizer/test_adamw_class.py -k 'repeats and bfloat16'"),
    # commit
    "undo: attributes stay": Mutant(
        "commit/undo.py", "self.rollbacks.append(lambda: setattr(owner, name, before))", "del before",
        "commit/test_commit.py -k failure_at_any_stage"),
    "undo: gradients that were left are dropped": Mutant(
        "commit/undo.py", "p.grad = left if before_grad is None", "p.grad = None if before_grad is None",
        "commit/test_commit.py -k failure_at_any_stage"),
    "undo: nothing is tried again": Mutant(
        "commit/undo.py", "ATTEMPTS = 2", "ATTEMPTS = 1", "execution/test_memory.py -k tried_again"),
    "undo: the first write is taken back first": Mutant(
        "commit/undo.py", "in reversed([*enumerate(self.rollbacks, 1)])", "in enumerate(self.rollbacks, 1)",
        "commit/test_commit.py -k failure_at_any_stage"),
    "commit: Ctrl-C in the last step is forgotten": Mutant(
        "commit/commit.py", "            if held and not final:\n                raise KeyboardInterrupt\n", "",
        "commit/test_commit.py -k 'control_c or signal'"),
    "commit: new blocks have the source's buffers": Mutant(
        "commit/commit.py",
        "    memo |= {id(b): values[inner] for inner, b in named_buffers(block) if inner in values}\n", "",
        "methods/test_depth.py -k buffers"),
    "commit: new blocks of compiled ones run eagerly": Mutant(
        "commit/commit.py", "compile_alike(copy.deepcopy(block, memo), block, memo)", "copy.deepcopy(block, memo)",
        "engine/test_wrapped_blocks.py -k runs_its_compiled_graph"),
    "commit: a new block has a compiler of its own": Mutant(
        "commit/commit.py", "    memo |= contexts(block)\n", "", "engine/test_wrapped_blocks.py -k runs_its_compiled_graph"),
    "commit: hooks of a compiled module are lost": Mutant(
        "support/compiled.py", "            own |= copy.deepcopy(kept, memo)\n", "", "engine/test_wrapped_blocks.py -k hooks"),
    "commit: new parameters have names of a bare model": Mutant(
        "commit/optimizer.py", "new = {id(p): live[name]", "new = {id(p): name", "engine/test_wrapped_blocks.py -k param_names"),
    "commit: a layer in a wrapper is initialized twice": Mutant(
        "model/initial.py", "        if wrapped_in(module) is None:\n            function(module)\n", "        function(module)\n",
        "engine/test_wrapped_blocks.py -k 'every_method and layer'"),
    "fsdp: a new block is not under composable checkpointing": Mutant(
        "distributed/fsdp.py", "own[key] = _of_others(marks[key])", "own[key] = {}", "distributed/test_wrapped.py"),
    "compile cache: blocks use up the recompilations": Mutant(
        "engine/compile_cache.py", "    if not parts and n_growths", "    if n_growths", "engine/test_wrapped_blocks.py -k many_growths"),
    "compile cache: a check compiles": Mutant(
        "engine/forward_check.py", "torch.no_grad(), eagerly():", "torch.no_grad():", "engine/test_wrapped_blocks.py -k 'average'"),
    "describe: blocks may have any keys": Mutant(
        "model/describe.py", "    elif [*blocks] != numbers:", "    elif not numbers:", "engine/test_wrapped_blocks.py -k other_keys"),
    "commit: new blocks of frozen ones train": Mutant(
        "commit/commit.py", "nn.Parameter(values[inner], requires_grad=p.requires_grad)", "nn.Parameter(values[inner])",
        "methods/test_depth.py -k published_order"),
    "commit: the config keeps its epsilon": Mutant(
        "commit/commit.py", "getattr(config, plan.config_eps[0]) * plan.config_eps[1]", "getattr(config, plan.config_eps[0])",
        "model/test_families.py -k 'loads_with_equal and llama'"),
    "commit: a signal that came late is lost": Mutant(
        "support/interrupts.py", "[*pending, *(", "[*(", "commit/test_commit.py -k 'signal_handler or control_c'"),
    "guard: a deeper checkpoint is let through": Mutant(
        "commit/checkpoint_guard.py", "if whole and not new & shapes.keys() and (apart or new):", "if whole and apart:",
        "training/test_history.py training/test_replay.py engine/test_bad_input.py -k 'before or refused or load'"),
    "guard: optimizer state is let through": Mutant(
        "commit/optimizer_guard.py", "if not isinstance(value, Tensor) or rule is None:", "if True:",
        "training/test_history.py training/test_replay.py -k 'optim or before'"),
    "guard: a part of an older checkpoint is let through": Mutant(
        "commit/checkpoint_guard.py", "if grown.source.get(name) == shapes[name]:", "if False:",
        "training/test_replay.py -k every_earlier"),
    "guard: an optimizer's guard names its first growth": Mutant(
        "commit/commit.py", '        undo.attribute(own, "what", grown.what)\n', "", "training/test_replay.py -k every_earlier"),
    # engine and model
    "engine: a replaced head is not missed": Mutant(
        "engine/live_objects.py", " or p.shape in missing)", ")", "optimizer/test_state_rules.py -k 'dead or replaced'"),
    "engine: what was frozen is not seen": Mutant(
        "support/live_registry.py", "if frozen := gc.get_freeze_count() > 0:", "if frozen := False:",
        "engine/test_live_objects.py -k before_the_import"),
    "engine: copies are not registered": Mutant(
        "support/live_registry.py", "        set_state(self, state)\n        _register_module(self)\n", "        set_state(self, state)\n",
        "engine/test_live_objects.py -k module_outside"),
    "engine: earlier growths stay when a later one fails": Mutant(
        "engine/run.py", "            undo.rollback()\n            Ranks(", "            Ranks(",
        "training/test_history.py -k takes_the_earlier"),
    "upcycle: param_names stay": Mutant(
        "engine/upcycle.py",
        '                    undo.set_list(group["param_names"], [names[p] for p in kept])', "                    pass",
        "engine/test_upcycle.py -k names_of"),
    "upcycle: the mixture trains": Mutant(
        "engine/upcycle.py", "mixture.train(model.training)", "mixture", "engine/test_upcycle.py -k 'names_of or is_the_dense'"),
    "upcycle: the generation config is a new one": Mutant(
        "engine/upcycle.py", "    mixture.generation_config = model.generation_config\n", "", "engine/test_upcycle.py -k names_of"),
    "upcycle: all layers have the same router": Mutant(
        "engine/upcycle.py", "_experts(model, layer, experts, std, seed + i)", "_experts(model, layer, experts, std, seed)",
        "engine/test_upcycle.py -k router_of_its_own"),
    "upcycle: the attention is the default": Mutant(
        "engine/upcycle.py", "    grown._attn_implementation = config._attn_implementation\n", "",
        "engine/test_upcycle.py -k router_of_its_own"),
    "upcycle: factors of the dense model stay": Mutant(
        "engine/upcycle.py", "if any(scale_of(optim) is not None for optim in optims):", "if False:", "engine/test_upcycle.py -k factors"),
    "upcycle: the router is in the last group": Mutant(
        "engine/upcycle.py", "last = old[-1] if old else last", "last = moved[0][1][0]",
        "optimizer/test_several_optimizers.py -k experts_go"),
    "upcycle: experts get the second moment of the MLP": Mutant(
        "engine/upcycle.py", "/ experts**rule.grad", "/ experts", "engine/test_upcycle.py -k share_of_the_moments"),
    "model: overlapping tensors grow": Mutant(
        "model/describe.py", "elif p.layout is torch.strided and overlaps(p):", "elif False:",
        "engine/test_bad_input.py -k tensors_that_cannot"),
    # checkpoints
    "checkpoint: a full disk is found out late": Mutant(
        "checkpoints/grow.py", "if free < n_bytes + SPARE:", "if False:", "checkpoints/test_grow_checkpoint.py -k full"),
    "checkpoint: a source is read from a memory map": Mutant(
        "checkpoints/load.py", "return value if disk is None else self.stored.read(disk)", "return value",
        "checkpoints/test_source.py -k cut_short_while"),
    "checkpoint: the index is believed": Mutant(
        "checkpoints/source.py",
        'return [f"{one_line(name)}: is not in {shown}; copy the file again." for name in missing]', "return []",
        "checkpoints/test_grow_checkpoint.py -k not_whole"),
    "checkpoint: files are not synced": Mutant(
        "checkpoints/output.py", "            _sync(path)\n", "            pass\n",
        "checkpoints/test_grow_checkpoint.py -k 'fails or renamed or overwrite'"),
    "checkpoint: what was to be replaced is not given back": Mutant(
        "checkpoints/output.py", "            replaced.rename(out)\n", "            pass\n",
        "checkpoints/test_grow_checkpoint.py -k renamed"),
    "checkpoint: missing tensors are drawn": Mutant(
        "checkpoints/load.py", "    if problems:\n        raise CheckpointError(\n            f\"{folder} is incomplete:",
        "    if False:\n        raise CheckpointError(\n            f\"{folder} is incomplete:",
        "checkpoints/test_grow_checkpoint.py -k not_whole"),
    "checkpoint: the last dtype is the widest": Mutant(
        "checkpoints/load.py", "widest = torch.promote_types(widest, dtype)", "widest = dtype",
        "checkpoints/test_grow_checkpoint.py -k mixed"),
    "checkpoint: the rename is not synced": Mutant(
        "checkpoints/output.py", "        _sync(place.parent)\n", "", "checkpoints/test_output.py -k before_the_target"),
    "checkpoint: the folder is not synced": Mutant(
        "checkpoints/output.py", "for path in (*folder.iterdir(), folder):", "for path in folder.iterdir():",
        "checkpoints/test_output.py -k before_the_target"),
    "checkpoint: the lock stays": Mutant(
        "checkpoints/output.py", "            os.close(lock)\n        if place", "            pass\n        if place",
        "checkpoints/test_output.py -k complete_is_not"),
    "checkpoint: transformers stays silent": Mutant(
        "checkpoints/load.py", "        logging.set_verbosity(level)\n", "        pass\n", "checkpoints/test_source.py -k logs_after"),
    "checkpoint: tensors of mixed dtypes lie unaligned": Mutant(
        "checkpoints/shards.py", "key=lambda n: (-tensors[n].element_size(), n)", "key=lambda n: n",
        "checkpoints/test_grow_checkpoint.py -k multiple_of"),
    "checkpoint: headers are not padded": Mutant(
        "checkpoints/shards.py", "ALIGNMENT = 8 ", "ALIGNMENT = 1 ", "checkpoints/test_grow_checkpoint.py -k multiple_of"),
    "checkpoint: grown experts take each other's dtypes": Mutant(
        "checkpoints/load.py", "stored[i * len(stored) // len(after)]", "stored[i % len(stored)]",
        "checkpoints/test_grow_checkpoint.py -k new_experts"),
    "checkpoint: KB are KiB": Mutant(
        "checkpoints/shards.py", '"KB": 10**3', '"KB": 1 << 10', "checkpoints/test_grow_checkpoint.py -k sizes_of_shards"),
    # training
    "ramp: epsilons do not follow": Mutant(
        "training/ramp.py", "value * mean_square(c, norm)", "value", "training/test_ramp.py -k 'at_c_0 and hidden'"),
    "ramp: gains do not follow": Mutant(
        "training/ramp.py", " * sqrt(mean_square(c, self.norm))", "", "training/test_ramp.py -k 'at_c_0 and hidden'"),
    "update scale: steps of Rprop are converted as gains": Mutant(
        "optimizer/update_scale.py", "return offset if not key or key in VALUES else 0.0", "return offset",
        "model/test_gemma2.py -k rprop"),
    "report: a trajectory under a decay that is not the source's": Mutant(
        "engine/run.py", "continued &= not any(decayed_gains(", "_ = not any(decayed_gains(",
        "model/test_gemma2.py -k or_it_is_said"),
    "config: a longer model may have other blocks": Mutant(
        "model/tracing/config.py", "and all(b in known for b in built[n:])", "",
        "model/test_tracing_odd_models.py -k follows_from_their_number"),
    "tracing: any error is rounding": Mutant(
        "model/tracing/permutation.py", "return error < min(4 * moved, LARGEST)", "return True",
        "model/test_tracing_odd_models.py -k no_proof"),
    "ramp: offsets of gains are left out": Mutant(
        "training/ramp.py", "offset_of(key, mask.offset)", "0.0",
        "training/test_ramp.py -k gemma2"),
    "ramp: the optimizer sees offset gains without the offset": Mutant(
        "training/ramp.py", "offset=self._masks[p].offset", "offset=0.0", "training/test_ramp.py -k gemma2_gains"),
    "ramp: the optimizer sees masked weights": Mutant(
        "training/ramp.py", "            if (own := factors.get(p)) is not None\n", "            if (own := factors.get(p)) is None\n",
        "training/test_ramp.py -k trains_as"),
    "ramp: the first step is without new elements": Mutant(
        "training/ramp.py", "schedule.counts.n_steps - last[1] + 1, last", "schedule.counts.n_steps - last[1] + 2, last",
        "training/test_ramp.py -k trains_as"),
    "ramp: loaded weights are masked again": Mutant(
        "training/ramp.py", "            self.c = c\n            self._move(of, c)\n", "            self._move(of, c)\n",
        "training/test_ramp.py -k 'resumed or earlier_checkpoint'"),
    "ramp: a growth by hand does not see it": Mutant(
        "engine/run.py", "            refuse_mid_ramp(scale)\n", "", "training/test_ramp.py -k by_hand"),
    "ramp: a growth in a step removes hooks": Mutant(
        "engine/run.py", "if plan.shrinks and not request.undo else", "if not request.undo else", "training/test_ramp.py -k follow_each"),
    "ramp: modules keep the masked epsilon": Mutant(
        "training/ramp.py", "setattr(module, *vars(module).pop(EPS))", "vars(module).pop(EPS)", "training/test_ramp.py -k from_after"),
    "ramp: a growth without its ramp is recorded again": Mutant(
        "training/attachment.py", "            self._running = None\n            if n_growths", "            if n_growths",
        "training/test_ramp.py -k does_not_follow"),
    "ramp: a due event does not wait": Mutant(
        "training/attachment.py", "            if self.ramp.c < 1:\n                break  # the event waits until the ramp has ended\n",
        "",
        "training/test_ramp.py -k waits"),
    "ramp: the gradient keeps its mask": Mutant(
        "training/ramp.py", "Scale(own, tuple(1.0 / f for f in own), ", "Scale(own, ", "training/test_ramp.py -k 'trains_as or multiply'"),
    "curve: a step without new tokens counts": Mutant(
        "training/loss_curve.py", "if tokens <= self.last:", "if tokens < self.last:", "training/test_loss_curve.py"),
    "curve: a mean is a sum": Mutant(
        "training/loss_curve.py", "self.points.append((tokens, self.total / self.n_open))", "self.points.append((tokens, self.total))",
        "training/test_loss_curve.py"),
    "curve: NaN is a loss": Mutant("training/loss_curve.py", "if isfinite(loss)]", "]", "training/test_loss_curve.py"),
    "curve: a growth forgets the tokens": Mutant(
        "training/attachment.py", "LossCurve(last=schedule.counts.n_tokens)", "LossCurve()",
        "advice/test_advise.py -k survives_a_restart"),
    "schedule: a smaller size resets the order": Mutant(
        "training/triggers.py", "reached[what] = i, max(n, least)", "reached[what] = i, n", "training/test_triggers.py"),
    "attach: tokens from before the attachment are no compute": Mutant(
        "training/attachment.py", "counts.n_flops = counts.n_flops_of_size = 6.0 * counts.n_tokens * self.n_params", "pass",
        "training/test_schedule.py -k before_the_attachment"),
    "attach: the memory option is forgotten": Mutant(
        "training/attachment.py", 'memory=options.get("memory"), ', "", "training/test_schedule.py -k backend_and"),
    "attach: the backend option is forgotten": Mutant(
        "training/attachment.py", 'backend=options.get("backend"), ', "", "training/test_schedule.py -k backend_and"),
    "attach: the state rules of the growth are forgotten": Mutant(
        "training/attachment.py", 'state_rules=options.get("state_rules"), backend', "backend", "training/test_schedule.py -k state_rules"),
    "attach: the master weights are forgotten": Mutant(
        "training/attachment.py", 'master_weights=options.get("master_weights"), memory', "memory", "training/test_schedule.py -k master"),
    "attach: the plan does not see the master weights": Mutant(
        "training/attachment.py", '\n            state_rules=options.get("state_rules"), master_weights=options.get("master_weights"),',
        '\n            state_rules=options.get("state_rules"),', "training/test_schedule.py -k master"),
    "attach: a resumed growth has the first noise again": Mutant(
        "training/attachment.py", "before = max(len(self.schedule.history), n_growths(self.model))", "before = n_growths(self.model)",
        "integrations/test_accelerate.py -k save_state_and"),
    "attach: the hook on the forward stays": Mutant(
        "training/attachment.py", "            self._hooks.append(self._last_call)\n", "", "engine/test_forward_check.py -k last_batch"),
    "attach: calls are kept after the first step": Mutant(
        "training/attachment.py", "            self._last_call.remove()\n", "            pass\n", "training/test_last_call.py -k kept"),
    "attach: events of an unknown model are not examined": Mutant(
        "training/attachment.py", "        self._examine(self.optims)\n", "", "training/test_last_call.py -k examined"),
    "resume: a traced model of NaN cannot be described": Mutant(
        "model/tracing/forward.py", "bool(t.isnan().all())]", "False]", "training/test_last_call.py -k resumed"),
    "attach: the check holds the graph of the last batch": Mutant(
        "engine/forward_check.py", "kwargs = {name: _detached(value) for name, value in kwargs.items()}", "pass",
        "engine/test_forward_check.py -k no_graph"),
    "attach: the check forgets the autocast": Mutant(
        "engine/forward_check.py", "dtype=self.cast, enabled=self.cast is not None", "dtype=self.cast, enabled=False",
        "engine/test_forward_check.py -k autocast"),
    # who trains
    "freeze: gradients of frozen parameters are 0": Mutant(
        "commit/frozen.py", "            p.grad = None\n", "            p.grad = torch.zeros_like(p)\n",
        "training/test_trains.py -k stay_as_they_are"),
    "freeze: master weights keep their gradient": Mutant(
        "commit/frozen.py", "                masters[p].grad = None\n", "                pass\n",
        "training/test_trains.py -k master_weights"),
    "freeze: a tied embedding builds a graph": Mutant(
        "commit/frozen.py", "register_forward_hook(detached))", "register_forward_hook(lambda *_: None))",
        "training/test_trains.py -k cut_there"),
    "freeze: nobody looks at the input of the lowest block": Mutant(
        "commit/frozen.py", "for t in (*args, *kwargs.values())):", "for t in ()):", "training/test_trains.py -k from_below"),
    "freeze: what the user froze trains after all": Mutant(
        "commit/frozen.py", "p not in trained and p.requires_grad):", "p not in trained):", "training/test_trains.py -k user_froze"),
    "freeze: the upper blocks run in evaluation mode neither": Mutant(
        "commit/frozen.py", "        if module.training:\n", "        if True:\n", "training/test_sub_models.py -k evaluated"),
    "freeze: blocks stay away after an error": Mutant(
        "commit/frozen.py", "always_call=True", "always_call=False", "training/test_sub_models.py -k evaluated"),
    "freeze: a growth copies frozen blocks": Mutant(
        "engine/freezing.py", "(frozen := lift(model)) is not None", "(frozen := None) is not None", "training/test_trains.py -k mslt"),
    "freeze: a growth lets everything train": Mutant(
        "engine/freezing.py", "            lift(model)\n            freeze(", "            lift(model)\n            0 and freeze(",
        "training/test_trains.py -k keeps_the_choice"),
    "freeze: a failed growth lets everything train": Mutant(
        "engine/freezing.py", "        kept.freeze(None)\n", "", "training/test_trains.py -k fails_leaves"),
    "freeze: reducers are not built anew": Mutant(
        "engine/freezing.py", "        ranks.rebuild()\n", "", "engine/test_ddp.py -k numbers_that"),
    "freeze: compiled code stays": Mutant(
        "engine/freezing.py", "        reset()  # else", "        pass  # else", "training/test_trains.py -k recompilations"),
    "trains: all steps draw the same sub-model": Mutant(
        "training/trains.py", 'f"{self.seed},{n_steps}"', 'f"{self.seed}"', "training/test_sub_models.py -k draws"),
    "trains: FLOPs of a frozen block are those of one that trains": Mutant(
        "training/trains.py", "        if name not in frozen.names:\n            learned.add(p)", "        learned.add(p)",
        "training/test_procedures.py -k flops_are"),
    "trains: blocks that do not run cost as much": Mutant(
        "training/trains.py", "place[1] >= n_run:", "False:", "training/test_sub_models.py -k cost"),
    "slope: the bump before the steepest point fires": Mutant(
        "training/slope.py", "steepest <= -self.tau < now", "-self.tau < now", "training/test_triggers.py -k bump"),
    "slope: the compute is what was spent": Mutant(
        "training/attachment.py", "schedule.counts.n_flops_of_size *= self.n_params / n_params", "pass",
        "training/test_schedule.py -k six_times"),
    "rewind: the compute stays": Mutant(
        "training/attachment.py", "schedule.counts.n_flops_of_size /= event.rewind", "pass", "training/test_schedule.py -k six_times"),
    "rewind: the rates stay": Mutant(
        "training/rewind.py", "        _set(group, rate)\n    scheduler", "        pass\n    scheduler",
        "training/test_rewind.py -k earlier_position"),
    "rewarm: a step that raised leaves the rate low": Mutant(
        "training/rewind.py", "WatchedStep(optim, self._end)", "WatchedStep(optim, lambda: None)",
        "training/test_rewind.py -k raises"),
    "rewarm: schedulers of hooks see the low rate": Mutant(
        "training/rewind.py", "last=False", "last=True", "training/test_rewind.py -k in_a_hook"),
    "freeze: copies of frozen blocks stay frozen": Mutant(
        "commit/frozen.py", "        for p in opened:\n            p.requires_grad_(True)\n", "",
        "training/test_trains.py -k user_has_frozen"),
    "freeze: LBFGS moves what is frozen": Mutant(
        "engine/freezing.py", "        refuse_lbfgs(optim for optim, params in held if still & {*params})\n", "",
        "training/test_trains.py -k lbfgs"),
    "trains: any report will do": Mutant(
        "training/trains.py", "if report is not None and [*report.history]", "if False and [*report.history]",
        "training/test_trains.py -k without_a_growth"),
    "procedures: the state stays": Mutant(
        "training/stacking.py", 'depth=STACK, state="drop")\n        for n, at', 'depth=STACK)\n        for n, at',
        "training/test_procedures.py -k stack_bert"),
    "checkpoint: the whole target has to fit": Mutant(
        "execution/execute.py", "peak_of_stream(self.sets)) if streams", "peak_of_stream(self.sets)) if False",
        "checkpoints/test_grow_checkpoint.py -k largest_tensor"),
    "attach: a failed growth leaves found_inf": Mutant(
        "training/attachment.py", '        vars(optim).pop("grad_scale", None)\n', "", "training/test_schedule_refused.py -k scaler"),
    "attach: a deeper optimizer checkpoint is torch's own error": Mutant(
        "training/attachment.py", '                OptimGuard(known.rules, "", model=self.model).register(one)\n', "                pass\n",
        "training/test_replay.py -k where_a_schedule"),
    "resume: dropped state is not dropped": Mutant(
        "training/replay.py", 'partial(_plan, growth), growth.state == "drop"', "partial(_plan, growth), False",
        "training/test_replay.py -k dropped_the"),
    "resume: the averages stay": Mutant(
        "training/replay.py", "scheduler=scheduler, ema=ema, master", "scheduler=scheduler, master",
        "training/test_history.py -k takes_the_earlier"),
    "resume: the master weights stay": Mutant(
        "training/replay.py", "master_weights=master_weights, split", "split", "training/test_replay.py -k master"),
    "resume: the scheduler stays": Mutant(
        "training/replay.py", "backend=NOTHING, scheduler=scheduler, ", "backend=NOTHING, ",
        "optimizer/test_several_optimizers.py -k resumed"),
    "resume: a model of the final sizes replays": Mutant(
        "training/replay.py", "    if dict(sizes) == dict(growths[-1].target_sizes) != dict(start):\n        return\n", "",
        "integrations/test_accelerate.py -k save_state_and"),
    "rehearsal: only equal sizes are reached": Mutant(
        "training/rehearsal.py", "n <= spec.sizes.get", "n == spec.sizes.get", "training/test_rehearsal.py -k reached"),
    "rehearsal: one event that drops state vouches for all": Mutant(
        "training/rehearsal.py", "drop = all(event", "drop = any(event", "training/test_rehearsal.py -k unknown_law"),
    "rehearsal: master weights are not looked at": Mutant(
        "training/rehearsal.py", "state_rules=rules, master_weights=masters", "state_rules=rules", "training/test_schedule.py -k master"),
    "rehearsal: what was not yet collected counts": Mutant(
        "training/rehearsal.py", "        gc.collect()  # what is left is alive\n", "        pass\n",
        "training/test_rehearsal.py -k nothing_refers"),
    # integrations
    "hf: steps of a run without a schedule do not count": Mutant(
        "integrations/hf.py", "schedule.counts.n_steps = state.global_step", "pass", "integrations/test_hf.py -k without_a_schedule"),
    "hf: tokens of a resumed run count twice": Mutant(
        "integrations/hf.py", "            self.n_tokens = state.num_input_tokens_seen\n            if self", "            if self",
        "integrations/test_hf.py -k your_own"),
    "hf: the replay does not get the spec": Mutant(
        "integrations/hf.py", 'spec=spec_function(options.get("spec")),', "spec=None,", "integrations/test_hf.py -k your_own"),
    "hf: the replay leaves the scheduler": Mutant(
        "integrations/hf.py", "scheduler=trainer.lr_scheduler, ema=options", "ema=options", "integrations/test_hf.py -k your_own"),
    "hf: the replay leaves the averages": Mutant(
        "integrations/hf.py", 'ema=options.get("ema"),', "", "integrations/test_hf.py -k your_own"),
    "hf: the replay leaves the master weights": Mutant(
        "integrations/hf.py", 'master_weights=options.get("master_weights"), ', "", "integrations/test_hf.py -k master"),
    "hf: a removed callback replays": Mutant(
        "integrations/hf.py", "callback in trainer.callback_handler.callbacks and (saved", "(saved",
        "integrations/test_hf.py -k was_removed"),
    "accelerate: the replay leaves the averages": Mutant(
        "integrations/accelerate.py", 'ema=options.get("ema"),', "", "integrations/test_accelerate.py -k averages"),
    "accelerate: the replay leaves the master weights": Mutant(
        "integrations/accelerate.py", 'master_weights=options.get("master_weights"), spec', "spec",
        "integrations/test_accelerate.py -k averages"),
    "accelerate: schedulers of another model are taken": Mutant(
        "integrations/accelerate.py", " if driven_by(unwrapped(s)) in optims]", "]", "integrations/test_accelerate.py -k another_model"),
    "accelerate: a schedule is saved once per attachment": Mutant(
        "integrations/accelerate.py", "if not any(registered is schedule for registered in custom):", "if True:",
        "integrations/test_accelerate.py -k attached_again"),
    "accelerate: a removed schedule replays": Mutant(
        "integrations/accelerate.py", "schedule.attachment is attachment and file", "file",
        "integrations/test_accelerate.py -k attached_again"),
    "lightning: the replay leaves the averages": Mutant(
        "integrations/lightning.py", ', ema=self.options.get("ema")', "", "integrations/test_lightning.py -k your_own"),
    "lightning: the replay does not get the spec": Mutant(
        "integrations/lightning.py", "spec=spec,", "spec=None,", "integrations/test_lightning.py -k your_own"),
    "lightning: the replay leaves the schedulers": Mutant(
        "integrations/lightning.py", "scheduler=several, ", "", "integrations/test_lightning.py -k starting_sizes"),
    "lightning: a failed fit leaves its hooks": Mutant(
        "integrations/lightning.py",
        "        \"\"\"Detach the schedule, and remove the hook on the trainer's weight loading.\"\"\"\n        self._detach()\n",
        "        pass\n", "integrations/test_lightning.py -k raises_leaves"),
    # arguments and specs
    "arguments: text is a sequence": Mutant(
        "support/argument_types.py", "    if origin is Sequence and isinstance(value, str):\n        return False\n", "",
        "house/test_hostile_arguments.py -k was_accepted"),
    "arguments: tuples have any length": Mutant(
        "support/argument_types.py", "fits = parts[-1] is Ellipsis or len(entries) == len(parts)", "fits = True",
        "house/test_hostile_arguments.py -k 'field or was_accepted'"),
    "arguments: keys of mappings have any type": Mutant(
        "support/argument_types.py", "for problem in _misfits(key, parts[0], deep))", "for problem in ())",
        "house/test_hostile_arguments.py -k 'field or was_accepted'"),
    "arguments: True is a number": Mutant(
        "support/argument_types.py", "type(value) is not bool and isinstance", "isinstance",
        "house/test_hostile_arguments.py -k was_accepted"),
    "spec: ties may name what is no tensor": Mutant(
        "model/spec_check.py", "for tie in spec.ties.items():", "for tie in ():", "house/test_hostile_arguments.py -k was_accepted"),
    "spec: any fraction rotates": Mutant(
        "model/spec_check.py", "if not 0 <= spec.rotary <= 1:", "if False:", "house/test_hostile_arguments.py -k was_accepted"),
    "spec: a size may be 0": Mutant(
        "model/spec_check.py", "n < (name not in counts)", "n < 0",
        "house/test_hostile_arguments.py -k was_accepted"),
    "inherit: the teacher's positions are not compared": Mutant(
        "inherit/targets.py", "    if teacher != labels:", "    if False:", "inherit/test_inheritance.py -k other_positions"),
    "inherit: 0 of a teacher times -inf": Mutant(
        "inherit/rows.py", ".clamp_min_(torch.finfo(x.dtype).min)", "", "inherit/test_linear_loss.py -k nobody_gives"),
    "inherit: a second derivative of 0": Mutant(
        "inherit/linear_loss.py", "        if torch.is_grad_enabled():", "        if False:",
        "inherit/test_linear_loss.py -k second_derivative"),
    "attach: a growth comes before its impossible choice": Mutant(
        "training/attachment.py", "                refuse_reentrant_blocks(self.model)", "                ()",
        "training/test_trains.py -k choice_is_not_possible"),
    "engines: Accelerate loads shards before the replay": Mutant(
        "integrations/accelerate.py", "    accelerator.load_state = replay_and_load\n", "",
        "integrations/test_engines.py -k accelerate_grows"),
    "engines: Lightning loads shards before the replay": Mutant(
        "integrations/lightning.py", "trainer.strategy.load_checkpoint = replay_and_load_shards", "pass",
        "integrations/test_engines.py -k lightning_grows"),
    "engines: FSDPStrategy is not refused": Mutant(
        "integrations/lightning.py", "in kinds & REFUSED.keys():", "in set[str]():", "integrations/test_engines.py -k strategies"),
    "engines: a step that makes state counts": Mutant(
        "training/skipped.py", "return not any(bool(local(grad).any()) for grad in grads if grad is not None)", "return False",
        "integrations/test_engines.py -k makes_state"),
    "engines: the first step of a warmup does not count": Mutant(
        "training/skipped.py", "return not any(bool(local(grad).any()) for grad in grads if grad is not None)", "return True",
        "integrations/test_engines.py -k makes_state"),
    "tracing: a constant that differs along a size does not fix it": Mutant(
        "model/tracing/elementwise.py", "atoms(found) and not uniform(t, axis)", "False", "model/test_tracing.py -k constant_differs"),
    "tracing: a parameter that the example does not reach is described": Mutant(
        "model/tracing/traced.py", "not in found.tape.touched and not found.proved", "is None", "model/test_tracing.py -k reach"),
    "tracing: a description that fails the permutation test is used": Mutant(
        "model/tracing/traced.py", "if not (error < limit_of(model) or rounds_as_far(model, given, own, before, error)):", "if False:",
        "model/test_tracing.py -k leaves_torch"),
    "tracing: a stack is not tried with a block more": Mutant(
        "model/tracing/traced.py", "        if why is None:\n            kept", "        if True:\n            kept",
        "model/test_tracing.py -k Gated"),
    "tracing: a product of features does not ask for copies": Mutant(
        "model/tracing/elementwise.py", 'result.stream.bend("it is multiplied feature by feature")', "pass",
        "model/test_tracing.py -k copies_alone"),
    "tracing: rows of permuted weights are not moved": Mutant(
        "model/tracing/mapped_weights.py", "value = moved.add_(self.source[ids])", "value = self.source[ids].to(self.dtype)",
        "model/test_tracing_cost.py -k products_with"),
    "tracing: permuted weights are held in memory": Mutant(
        "model/tracing/permutation.py", "held = False\n", "held, before = True, run_mapped(model, inputs, own, {}, held=True)\n",
        "model/test_tracing_cost.py -k less_memory"),
    "tracing: copies are not counted": Mutant(
        "model/tracing/mapped_weights.py", "copies = [count if read else None", "copies = [None",
        "model/test_tracing_cost.py -k by_chance"),
    "tracing: numbers are powers by shapes": Mutant(
        "model/tracing/attributes.py", "best, ranks = self._sure(powers, exact(ranks), ranks, exact, float(\"inf\"))", "pass",
        "model/test_tracing_cost.py -k by_chance"),
    "reload: a number of the config is a power of a size": Mutant(
        "model/tracing/candidates.py", "if built is None:", "if True:", "model/test_tracing_heads.py -k literally"),
    "stacks: a number of one block is a constant": Mutant(
        "model/tracing/traced.py", "(len(values) > 1 or NUMBER.search(name))", "len(values) > 1", "model/test_tracing_heads.py -k hybrid"),
    "config: numbers that follow from the depth are forgotten": Mutant(
        "model/tracing/config.py", "numbers = not _floats(source).items() <= _floats(longer).items()", "numbers = False",
        "model/test_tracing_heads.py -k follow_from_the_depth"),
    "permutation: rounding is that of the source": Mutant(
        "model/tracing/permutation.py", "after = run_mapped(model, inputs, own, {}, mode=RandomRounding(seed))",
        "after = before", "model/test_tracing_cost.py -k chaotic"),
    "tracing: inference tensors are traced": Mutant(
        "model/tracing/traced.py", "with not_nan(model), torch.inference_mode(False):", "with not_nan(model):",
        "model/test_tracing_cost.py -k inference_mode"),
    "fills: all experts have one mean": Mutant(
        "execution/tiling.py", 'if slot == "mean row" and rows.lines:', "if False:", "execution/test_lines.py"),
    "config: a field counts two stacks": Mutant(
        "model/tracing/config.py", "others = _outside(longer, stack) != _outside(source, stack)", "others = False",
        "model/test_tracing_heads.py -k two_stacks"),
    "config: an epsilon is any field's": Mutant(
        "model/tracing/config.py", "if base <= _epsilons(built, 2 * value):", "if True:", "model/test_tracing_heads.py -k epsilon"),
    "reload: every growth may not load": Mutant(
        "engine/next_steps.py", "changed & spec.reload_sizes", "spec.reload_sizes", "model/test_zoo.py -k may_not_load"),
    "terms: the rests of a loop of slices nest": Mutant(
        "model/tracing/terms.py", "own[0].parts = segments(own[0])", "pass", "model/test_tracing_odd_models.py -k segments"),
    "tracing: the source runs with moved weights again": Mutant(
        "model/tracing/traced.py", "found.tape.output_dims, before=before)", "found.tape.output_dims)",
        "model/test_tracing_cost.py -k moved_weights_once"),
    "tracing: the first shapes are remembered": Mutant(
        "model/tracing/hollow.py", "_SHAPES.popitem(last=False)", "_SHAPES.popitem()", "model/test_tracing_cost.py -k latest"),
    "reload: other operations by shapes are accepted": Mutant(
        "model/tracing/reload.py", "return None if error < search.limit else why", "return None",
        "model/test_tracing_cost.py -k 'description_by_shapes and marian or gemma3n'"),
    "reload: an operation with another argument is the same": Mutant(
        "model/tracing/program.py", "a.shapes != b.shapes or not _equal(a.given, b.given)", "a.shapes != b.shapes",
        "model/test_program.py"),
    "reload: every constant is the same": Mutant(
        "model/tracing/program.py", "distance(a, b) < NEAR", "True", "model/test_program.py"),
    "reload: what is written over is compared": Mutant(
        "model/tracing/program.py", 'args[1:] if op == "copy_" else args', "args", "model/test_program.py"),
    "tracing: shapes of other arguments are taken": Mutant(
        "model/tracing/hollow.py", "return tree.shape, tree.stride(), tree.storage_offset(), tree.dtype", "return tree.shape",
        "model/test_tracing_cost.py -k description_by_shapes"),
    "tracing: a large model is traced with values": Mutant(
        "model/tracing/traced.py", "if hollow.is_large(model):\n        try", "if False:\n        try",
        "model/test_tracing_cost.py -k by_shapes"),
    "tracing: what is written into a constant is known": Mutant(
        "model/tracing/hollow.py", "data_ptr() in self.storages", "data_ptr() in ()", "model/test_tracing_cost.py -k asked_for"),
    "tracing: models with other attributes are alike": Mutant(
        "model/tracing/known.py", "parts.append((place, _of(value, paths, ())))", "_of(value, paths, ())",
        "model/test_tracing_cost.py -k differs"),
    "tracing: a bug in a rule is an operation without a rule": Mutant(
        "model/tracing/tape.py", "except Conflict as error:\n            self._opaque",
        "except Exception as error:\n            self._opaque",
        "model/test_tracing_cost.py -k bug_in"),
    "tracing: a growth is not checked on the traced inputs": Mutant(
        "api.py", "return traced_example(model, described, custom=spec is not None)", "return None",
        "model/test_tracing.py -k wrong_attribute"),
    "engines: parameters that an engine owns grow": Mutant(
        "model/wrappers.py", "MANAGED.keys() & vars(p).keys()", "()", "integrations/test_engines.py -k an_engine"),
    "engines: a rank's part of a ZeroRedundancyOptimizer grows": Mutant(
        "engine/live_objects.py", "    _refuse_part(model, optims, live)\n", "", "integrations/test_engines.py -k zero_redundancy"),
    "fsdp: parameters of one process grow": Mutant(
        "engine/sharded.py", "if shards is not None and id(p) not in shards.params", "if False", "distributed/test_fsdp.py"),
    "boxes: the noise of a part begins anew": Mutant(
        "execution/boxes.py", "first_id=copy.first_id + start,", "first_id=copy.first_id,", "execution/test_boxes.py -k default"),
    "boxes: a part has the scales of the first coordinates": Mutant(
        "execution/boxes.py", "_part(copy, slice(start, stop)),", "_part(copy, slice(0, stop - start)),",
        "execution/test_boxes.py -k random"),
    "boxes: indices of the first coordinates": Mutant(
        "execution/boxes.py", "return src, index[at]", "return src, index[: len(index[at])]", "execution/test_boxes.py -k random"),
    "fsdp: buffers of the old size stay": Mutant(
        "distributed/fsdp.py", "        one.all_gather_outputs, one.unsharded_accumulated_grad = [], None\n", "",
        "distributed/test_fsdp.py"),
    "fsdp: gradients that wait are lost": Mutant(
        "distributed/fsdp.py", "if waits or (whole is not None", "if False and (whole is not None", "distributed/test_fsdp.py"),
    "fsdp: a rollback leaves the grown shard": Mutant(
        "distributed/storage.py", "set_shard(p, whole.as_strided(*layout), spec)", "whole.as_strided(*layout)", "distributed/test_fsdp.py"),
    "dcp: state of new blocks is not zero": Mutant(
        "checkpoints/dcp_target.py", "torch.zeros(shape, dtype=stored.dtype)", "torch.ones(shape, dtype=stored.dtype)",
        "checkpoints/test_dcp.py -k zeros_for"),
    "dcp: written tensors stay in memory": Mutant(
        "checkpoints/dcp_target.py", "self._last.untyped_storage().resize_(0)", "self._last.size()", "checkpoints/test_dcp.py -k peak"),
    "dcp: large tensors are written at once": Mutant(
        "checkpoints/dcp_target.py", "or t.nbytes <= PART", "or True", "checkpoints/test_dcp.py -k 'in and parts or peak'"),
    "dcp: entries of other things are empty": Mutant(
        "checkpoints/dcp_target.py", "lambda _: self.source.contents([key])[key]", "lambda _: BytesIO()",
        "checkpoints/test_dcp.py -k byte_for_byte"),
    "dcp: the next layer is not read": Mutant(
        "checkpoints/dcp_target.py", "keys.get(row.next_layer_source)", "keys.get(row.source)", "checkpoints/test_dcp.py -k next"),
    "dcp: param groups are not split": Mutant(
        "checkpoints/dcp_replay.py", "split=split, memory", "split=None, memory", "checkpoints/test_dcp.py -k learning_rates"),
    "dcp: other groups are taken": Mutant(
        "checkpoints/dcp_replay.py", "if apart is not None:", "if False:", "checkpoints/test_dcp.py -k 'other and groups'"),
    "dcp: the last row of a range is not read": Mutant(
        "execution/boxwise.py", "last // n_row + 1", "max(last // n_row, first // n_row + 1)", "checkpoints/test_dcp.py -k 'load_on_any'"),
    "dcp: the box is the first one": Mutant(
        "execution/boxwise.py", "job(row, whole, target, rule, above, box)", "job(row, whole, target, rule, above, None if box is None "
        "else Box(tuple((0, n) for _, n in box.ranges), box.shape))", "checkpoints/test_dcp.py -k 'load_on_any'"),
    "dcp: every process reads all": Mutant(
        "execution/boxwise.py", "partly = box is not None and not", "partly = False and not", "checkpoints/test_dcp.py -k reads_the_rows"),
    "dcp: an error stays in its process": Mutant(
        "distributed/processes.py", "for rank, text in enumerate(said) if text}", "for rank, text in enumerate(said) if text and failed}",
        "checkpoints/test_dcp.py -k failure_at_load"),
    "dcp: no update scale at load": Mutant(
        "checkpoints/dcp_load.py", "        if self.factors:\n", "        if not self.factors:\n",
        "checkpoints/test_dcp.py -k 'at_load_as and mup'"),
    "dcp: epsilons are not checked": Mutant(
        "checkpoints/dcp_load.py", "if record is None and self.plan.eps:", "if False:", "checkpoints/test_dcp.py -k epsilon"),
    "dcp: stored options are not loaded": Mutant(
        "checkpoints/dcp_load.py", "group |= options", "pass", "checkpoints/test_dcp.py -k at_load_as"),
    "attributes: a quotient of sizes is a float": Mutant(
        "support/names.py", "int(value) if type(held) is int else value", "value", "engine/test_forward_check.py -k quotient"),
    # descriptions by hints
    "template: equal numbers are one size": Mutant(
        "model/tracing/template.py", "if axis.size(self.other_sizes) == other:", "if True:", "model/test_hints.py -k by_a_hint_equals"),
    "template: the small model is not permuted": Mutant(
        "model/tracing/template.py", "if not error < limit_of(self.model):", "if False:", "model/test_hints.py -k 'do_not_fit and leaves'"),
    "template: scores are scaled by attributes alone": Mutant(
        "model/tracing/template.py", " or self.axes.scaled_scores()", "", "model/test_hints.py -k by_a_hint_equals"),
    "hints: a list with an entry per block is forgotten": Mutant(
        "model/hints.py", 'if len(value) == depth and "layer" in name', "if False", "model/test_hints.py -k do_not_fit"),
    "hints: a field that there is not is taken": Mutant(
        "model/hints.py", "(*hint.follows, *hint.only, *hint.divided)", "()", "model/test_hints.py -k do_not_fit"),
    "hints: a field without a value is taken": Mutant(
        "model/hints.py", 'if getattr(config, name, None) is None and size not in ("head_dim", *hint.derived):', "if False:",
        "model/test_hints.py -k do_not_fit"),
    "alterations: a forward of an instance": Mutant(
        "model/tracing/alterations.py", 'if path and "forward" in vars(module):', "if False:", "model/test_altered.py"),
    "alterations: a module of another class": Mutant(
        "model/tracing/alterations.py", "is not template.modules.get(own)", "is None", "model/test_altered.py"),
    "alterations: an attribute of another value": Mutant(
        "model/tracing/alterations.py", "    yield from _attributes(model, spec)\n", "", "model/test_altered.py"),
    # what stands beside a grown checkpoint
    "card: every folder is of the Hub": Mutant(
        "checkpoints/card.py", 'parts[1] != "snapshots" or ', "", "checkpoints/test_card.py -k only_snapshots"),
    "card: the command takes any revision": Mutant(
        "checkpoints/card.py", 'f"{name}@{source.absolute().name}" if name', "name if name", "cli/test_contact.py -k by_its_id"),
    "card: any value is a field": Mutant(
        "checkpoints/card.py", "if _is_text(fields.get(key))", "if key in fields", "checkpoints/test_card.py -k no_card_has"),
    "recipe: any dtype fits": Mutant(
        "checkpoints/recipe.py", "if self.dtype not in (None, stored := _text(dtype)):", "if (stored := None):",
        "checkpoints/test_recipe.py -k another_source"),
    "recipe: any plan fits": Mutant(
        "checkpoints/recipe.py", "if self.digest not in (None, made := digest(plan)):", "if (made := None):",
        "checkpoints/test_recipe.py -k another_source"),
    "recipe: a method that is no text is left out": Mutant(
        "checkpoints/recipe.py", "plan=plan.to_json() if whole else None", "plan=None", "checkpoints/test_recipe.py -k text_does_not"),
    "check: rounding is not measured": Mutant(
        "engine/run.py", "                check.measure_rounding()\n", "                pass\n",
        "engine/test_forward_check.py -k above_rounding"),
    "check: one element hides the others": Mutant(
        "engine/forward_check.py", "            wrong |= moved.mean", "            moved.mean",
        "engine/test_forward_check.py -k above_rounding"),
    "check: positions are rounded": Mutant(
        "model/tracing/rounding.py", "torch.where(t == t.round(), t, moved)", "moved", "engine/test_forward_check.py -k at_random"),
    "attributes: an int becomes a fraction": Mutant(
        "engine/run.py", "    refuse_fractions(plan, model)\n", "", "engine/test_forward_check.py -k quotient"),
    "fsdp: gains shift by those of the first shard": Mutant(
        "execution/perturb.py", "shifts[box.slices[0]]", "shifts[: len(target)]", "distributed/test_fsdp.py"),
    "fsdp: factors of the first shard": Mutant(
        "optimizer/factors.py", "(f[at[i]] if", "(f[: at[i].stop - at[i].start] if", "distributed/test_fsdp.py"),
    "fsdp: new blocks are roots of their own": Mutant(
        "commit/commit.py", "        shards.join(undo.set_list)\n", "        pass\n", "distributed/test_fsdp.py"),
    "fsdp: replicas count in the gradient norm": Mutant(
        "engine/grad_norm.py", "once = n_parts(t) / n_ranks", "once = 1.0", "distributed/test_tensor_parallel.py"),
    "fsdp: shares of the first shard": Mutant(
        "engine/grad_norm.py", "at = box_of(t, t.shape).slices if", "at = [slice(0, n) for n in local(t).shape] if",
        "distributed/test_fsdp.py"),
    "fsdp: the gathered source stays while the next is gathered": Mutant(
        "execution/rows.py", "            del source, other  # before the next source is gathered\n", "",
        "distributed/test_sharded_memory.py"),
    "fsdp: constant rows are gathered": Mutant(
        "execution/rows.py", "            if job.row.constant is None:\n", "            if True:\n",
        "distributed/test_sharded_memory.py"),
    "rows: a mean that is not finite is used": Mutant(
        "execution/rows.py", "if mean.isfinite():", "if True:", "distributed/test_gather.py -k moment"),
    "rows: a broken weight is read by rows": Mutant(
        "execution/rows.py", "if job.rule.is_weight and job.row.source in self._broken:", "if False:",
        "distributed/test_gather.py -k weight"),
    "rows: no process votes": Mutant(
        "distributed/gather.py", "            self._vote()\n            dist.all_to_all", "            dist.all_to_all",
        "distributed/test_gather.py -k arrive"),
    "rows: always fewer than the whole": Mutant(
        "execution/rows.py", "return rows if rows.pays else None", "return rows", "execution/test_rows.py"),
    "rows: a mean is of the own rows": Mutant(
        "execution/rows.py", "like=members[0][2]).sum(0)", "like=members[0][2])[0]", "distributed/test_fsdp.py"),
    "rows: reversed process groups": Mutant(
        "distributed/shards.py", "return dims[0] if _in_order(t.device_mesh, dims[0]) else None", "return dims[0]",
        "distributed/test_gather.py"),
    "cost: lean frees nothing": Mutant(
        "execution/cost.py", 'freed = one.n_freed if mode == "lean" else 0', "freed = 0", "execution/test_cost.py"),
    "tensor parallel: a half of a head": Mutant(
        "model/spec.py", 'if "head_dim" not in str(c)]', "]", "distributed/test_tensor_parallel.py"),
    "tensor parallel: rows of fully_shard must divide": Mutant(
        "distributed/fsdp.py", "one is not None and one.fsdp_placement.dim == 0", "False", "distributed/test_fsdp.py"),
    "tensor parallel: sizes need not divide": Mutant(
        "engine/sharded.py", "if after % n_parts and not", "if False and not", "distributed/test_tensor_parallel.py"),
    "first blocks: any group takes them": Mutant(
        "engine/first_blocks.py", "[i for i in filled if p.dim() in dims[i]]", "filled[:1]",
        "engine/test_first_blocks.py -k as_many_dimensions"),
    "first blocks: out of model order": Mutant(
        "engine/first_blocks.py", "            grown = [grown[i] for i in order]\n", "", "engine/test_first_blocks.py -k keeps_its_state"),
    "first blocks: a config of their own": Mutant(
        "engine/first_blocks.py", "            module.config = model.config\n", "            pass\n",
        "engine/test_first_blocks.py -k as_transformers_builds_it"),
    "first blocks: a failure leaves them": Mutant(
        "engine/first_blocks.py", "            undo.rollback()\n", "            pass\n", "engine/test_first_blocks.py -k changes_nothing"),
    "first blocks: count as source": Mutant(
        "engine/run.py", " - n_first", "", "engine/test_first_blocks.py -k as_transformers_builds_it"),
    "fresh: the function is forgotten": Mutant(
        "commit/commit.py", "init or initial.initializer(model, name)", "initial.initializer(model, name)",
        "model/test_initial.py -k in_place_of_the_models"),
    "fresh: a replay draws": Mutant("training/replay.py", "init=nothing, ", "", "model/test_initial.py -k replayed_from_its_plan"),
    "attach: the depth method is forgotten": Mutant(
        "training/attachment.py", "depth=event.depth, on_progress", "on_progress", "model/test_initial.py -k by_a_function"),
    "middle: the upper of two": Mutant(
        "depth/middle.py", "(len(order) // size - 1) // 2", "len(order) // size // 2", "planning/test_growth_plan.py -k midas"),
    # inherit: the loss of a teacher
    "inherit: the temperature is not squared": Mutant(
        "inherit/linear_loss.py", "terms.alpha * terms.tau**2 * divergence", "terms.alpha * terms.tau * divergence",
        "inherit/test_linear_loss.py -k kl_div"),
    "inherit: the gradient forgets the held mass": Mutant(
        "inherit/rows.py", "exp_(), mass, value=soft)", "exp_(), mass / mass, value=soft)",
        "inherit/test_linear_loss.py -k 'plain_formula and top'"),
    "inherit: equal columns do not add up": Mutant(
        "inherit/targets.py", "is_new[:, 1:] = index[:, 1:] != index[:, :-1]\n", "pass\n",
        "inherit/test_linear_loss.py -k counts"),
    "inherit: a softcap without its derivative": Mutant(
        "inherit/rows.py", "        g.mul_(1 - (x / cap) ** 2)\n", "        pass\n",
        "inherit/test_linear_loss.py -k 'plain_formula and capped'"),
    "inherit: the kernel forgets the label among the teacher's columns": Mutant(
        "kernels/inherit.py", "q = tl.where(at == label, tl.sum(tl.where(at == label, q, 0.0), 0), q)", "pass",
        "kernels/test_inherit_kernel.py -k 67-top"),
    "inherit: the kernel sums scratch columns": Mutant(
        "kernels/inherit.py", 'x = tl.where(i < n_columns, x, -float("inf"))', "pass",
        "kernels/test_inherit_kernel.py -k 67-none"),
    "inherit: a denominator per micro-batch": Mutant(
        "inherit/linear_loss.py", "max(len(keep) if n_items is None else n_items, 1)", "max(len(keep), 1)",
        "inherit/test_linear_loss.py -k micro_batches"),
    "inherit: alpha counts micro-batches": Mutant(
        "inherit/inheritance.py", "        self._n_calls += 1\n", "        self._n_calls += 1\n        self.n_steps += 1\n",
        "inherit/test_inheritance.py -k counts_optimizer_steps"),
    "inherit: the teacher stays when alpha is 0": Mutant(
        "inherit/inheritance.py", "            self._teacher = None\n", "            pass\n",
        "inherit/test_inheritance.py -k released"),
    "inherit: the head's own logits are not compared": Mutant(
        "inherit/head.py", "            self._compare(caught, output)\n", "",
        "inherit/test_inheritance.py -k cannot_be_inherited"),
    "inherit: a logit scale is forgotten": Mutant(
        "inherit/head.py", '("logit_scale", 1), ', "",
        "inherit/test_inheritance.py -k cohere"),
    "inherit: stored tokens are not compared": Mutant(
        "inherit/stored.py", "        if len(differ):\n", "        if False:\n",
        "inherit/test_store.py -k masks"),
    "inherit: a resumed store draws other samples": Mutant(
        "inherit/store.py", "((header.seed << 40) + first) % (1 << 63)", "torch.seed() % (1 << 62)",
        "inherit/test_store.py -k interrupted"),
    "inherit: float16 weights lose the held mass": Mutant(
        "inherit/stored.py", "prob = prob / total  # float16 has rounded the weights", "pass",
        "inherit/test_store.py -k float16"),
}  # fmt: skip


def copied(folder: Path) -> Path:
    """Copy the checkout into a folder, without build outputs."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(source, folder / name)
    return folder


def killer_of(mutant: Mutant, checkout: Path) -> str:
    """Run the tests of a mutant in a copy of the checkout; give the test that fails, or an empty text where none does.

    Raises:
        SystemExit: The tests cannot be run, or the failing test fails without the mutant too.
    """
    path = checkout / "growkern" / mutant.path
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    words = [f"tests/{word}" if ".py" in word else word for word in shlex.split(mutant.tests)]
    try:
        status, output = _pytest(words, checkout)
    finally:
        path.write_text(text)
    if status == 0:
        return ""
    lines = [line.split(" - ")[0] for line in output.splitlines()]
    failed = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status != 1 or not failed or _pytest([failed[0]], checkout)[0] != 0:
        raise SystemExit(f"pytest {mutant.tests} fails without the mutant too:\n{output[-3000:]}")
    return failed[0]


def _pytest(words: list[str], checkout: Path) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def main(names: list[str]) -> int:
    """Run mutants; print, for each mutant, the test that fails, or SURVIVES."""
    chosen = {name: MUTANTS[name] for name in names or MUTANTS}
    survivors: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(N_WORKERS) as pool:
        checkouts: Queue[Path] = Queue()
        for i in range(N_WORKERS):
            (place := Path(folder, str(i))).mkdir()
            checkouts.put(copied(place))

        def run(item: tuple[str, Mutant]) -> tuple[str, str]:
            checkout = checkouts.get()
            try:
                return item[0], killer_of(item[1], checkout)
            finally:
                checkouts.put(checkout)

        for number, (name, killer) in enumerate(pool.map(run, chosen.items()), 1):
            survivors += [] if killer else [name]
            print(f"{number}/{len(chosen)} {name}: {killer or 'SURVIVES'}", flush=True)
    print(
        f"{len(survivors)} of {len(chosen)} survive" + "".join(f"\n  {name}" for name in survivors)
    )
    return bool(survivors)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
