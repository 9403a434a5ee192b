"""The ties of matrices are the papers': LiGO's B_emb, B_q, B_k, B_v and B_ffn; Mango's operators over layers, axes and tensors."""

import pytest
import torch
from learned import COPIES, double, grown_of, parts, stirred
from models import batch, exact_norms, logits


def users(operators):
    """Return matrix -> the target tensors that use it, with the role of the axis."""
    found = {}
    for name, pieces in operators.pieces.items():
        for axis in (axis for piece in pieces for axis in piece.axes if axis.matrix):
            found.setdefault(axis.matrix, set()).add((name, axis.use.role))
    return found


def test_published_ties_are_those_of_ligo():
    *_, operators = parts(double("bert"), tie="published", **COPIES)

    found = users(operators)
    embedding = {name for name, _ in found["residual"]}

    def block(i, name):
        return f"bert.encoder.layer.{i}.{name}"

    assert {
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.LayerNorm.weight",
    } <= embedding
    assert {block(3, "attention.self.query.weight"), block(0, "output.dense.weight")} <= embedding
    own = {name: used for name, used in found.items() if "residual" not in name}
    assert len(own) == 4 * 4  # q, k, v and ffn of every target block
    of = {frozenset(used) for used in own.values()}
    for i in range(4):
        at = "attention.self"
        for name in ("query", "key"):
            both = [block(i, f"{at}.{name}.{kind}") for kind in ("weight", "bias")]
            assert {(one, "writer") for one in both} in of
        values = {(block(i, f"{at}.value.{kind}"), "writer") for kind in ("weight", "bias")}
        assert values | {(block(i, "attention.output.dense.weight"), "reader")} in of
        up = {(block(i, f"intermediate.dense.{kind}"), "writer") for kind in ("weight", "bias")}
        assert up | {(block(i, "output.dense.weight"), "reader")} in of


def test_use_ties_gate_and_up_and_keeps_readers_apart():
    *_, operators = parts(double("llama"), tie="use", **COPIES)

    found = users(operators)
    at = "model.layers.3.mlp"

    assert {
        (f"{at}.gate_proj.weight", "writer"),
        (f"{at}.up_proj.weight", "writer"),
    } in found.values()
    assert {(f"{at}.down_proj.weight", "reader")} in found.values()
    assert all(len({role for _, role in used}) == 1 for used in found.values())
    assert not any(used == "vocab" for used in found)


def test_heads_are_learned_as_wholes():
    *_, sources, _, operators = parts(double("llama"), {"hidden": "2x"}, **COPIES)

    shapes = {name.split()[-1]: tuple(p.shape) for name, p in operators.parameters.items()}

    assert shapes["head_dim:query"] == (8, 4)
    assert shapes["head_dim:key"] == (4, 2)
    assert sources["model.layers.0.self_attn.q_proj.weight"].shape == (24, 24)


def test_shared_operators_are_mangos_nested_sums():
    """``M2 = sum_b sum_l sum_o sum_i M1[b, o, i, l] S_B[b, b'] S_O[o, o'] S_L[l, l'] S_I[i, i']``, of rank 1."""
    model = double("bert")
    *_, sources, target, operators = parts(model, tie="shared", **COPIES)
    stirred(operators)
    names = ("query", "key", "value")

    grown = grown_of(target, sources, operators)

    def source(b, layer):
        return sources[f"bert.encoder.layer.{layer}.attention.self.{names[b]}.weight"]

    change = {name: p.detach() for name, p in operators.parameters.items()}
    (mixing,) = [change[name] for name in change if name.startswith("3 tensors")]
    s_b = torch.eye(3, dtype=torch.float64) + mixing
    copies = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    s_o = torch.kron(copies + change["writer heads x head_dim"], torch.eye(6, dtype=torch.float64))
    s_i = (torch.eye(24, dtype=torch.float64).repeat(2, 1) + change["reader residual"]) / 2
    for to in range(4):
        s_l = change[f"layers bert.encoder.layer.{to}"].clone()
        s_l[to % 2] += 1
        for b, name in enumerate(names):
            wanted = torch.zeros(48, 48, dtype=torch.float64)
            for c in range(3):
                for layer in range(2):
                    for o in range(24):
                        for i in range(24):
                            term = source(c, layer)[o, i] * s_b[b, c] * s_l[layer]
                            wanted += term * torch.outer(s_o[:, o], s_i[:, i])
            full = f"bert.encoder.layer.{to}.attention.self.{name}.weight"
            torch.testing.assert_close(grown[full].detach(), wanted, rtol=0, atol=1e-12)
        if to == 1:  # both source layers are covered
            break


def test_shared_operators_share_matrices_over_blocks_and_mix_fused_tensors():
    *_, operators = parts(double("gpt2"), tie="shared", **COPIES)

    names = [*operators.parameters]

    assert not any(".h.0" in name for name in names if not name.startswith("layers"))
    layers = sorted(name for name in names if name.startswith("layers"))
    assert layers == [f"layers transformer.h.{i}" for i in range(4)]
    assert [operators.parameters[n].shape for n in names if "tensors" in n] == [(3, 3)]  # q, k, v
    *_, published = parts(double("gpt2"), tie="published", **COPIES)
    *_, use = parts(double("gpt2"), **COPIES)
    assert operators.n_numbers < published.n_numbers < use.n_numbers


@pytest.mark.parametrize("tie", ["use", "published", "shared"])
def test_the_start_from_fpi_and_stack_is_the_stacked_source(tie, monkeypatch):
    """FPI keeps the function, so the target computes what the source computes with its blocks stacked."""
    exact_norms(monkeypatch)
    model = double("bert")
    *_, sources, target, operators = parts(model, tie=tie, **COPIES)
    *_, deep, _ = parts(model, {"layers": "2x"}, depth=COPIES["depth"])
    for name, value in grown_of(target, sources, operators).items():
        with torch.no_grad():
            target.get_parameter(name).copy_(value)

    torch.testing.assert_close(logits(target, batch()), logits(deep, batch()), rtol=0, atol=1e-12)
