"""What the model must be: causal, free of leaks across documents, wholly trainable, reproducible."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_support import grad_of, make_trainer, random_ids, randomize, tiny_config, tiny_recipe
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt

LENGTH = 24  # longer than rope_train_len of the tiny model, so the rescaled base is used too
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "xsa on all layers": dict(xsa_last_n=4),
    "no masks": dict(smear_bos_mask=False, ln_scale=False),
    "untied": dict(tie_embeddings=False),
    "plain": dict(xsa_last_n=0, ve_layers=(), mtp_num_heads=0, rope_dims=0, leaky_slope=0.0),
    "odd layers, full heads": dict(num_layers=3, num_kv_heads=4, ve_layers=(0, 2)),
    "parallel residuals, repeated layers": dict(parallel_residual_from=2, repeat_layers=(1, 2)),
    "one layer, one kv head": dict(num_layers=1, num_kv_heads=1, ve_layers=(0,), xsa_last_n=1),
}
MODELS: dict[str, train_gpt.GPT] = {}


def model_of(variant: str) -> train_gpt.GPT:
    if variant not in MODELS:
        MODELS[variant] = randomize(train_gpt.GPT(tiny_config(**VARIANTS[variant])))
    return MODELS[variant]


# Causality ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("qat", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    position=st.integers(0, LENGTH - 1),
    replacement=st.integers(0, 95),
    seed=st.integers(0, 5),
    bos=st.sets(st.integers(0, LENGTH - 1), max_size=3),
)
@example(position=0, replacement=train_gpt.BOS_ID, seed=0, bos=set())
@example(position=LENGTH - 1, replacement=train_gpt.BOS_ID, seed=0, bos={0})
def test_a_token_changes_no_earlier_logit(variant, qat, position, replacement, seed, bos):
    model = model_of(variant)
    ids = random_ids(model.config, 2, LENGTH, seed)
    ids[0, list(bos)] = train_gpt.BOS_ID
    changed = ids.clone()
    changed[0, position] = replacement
    with torch.no_grad():
        before, after = model.logits(ids, qat), model.logits(changed, qat)
    assert torch.equal(before[0, :position], after[0, :position])
    assert torch.equal(before[1], after[1])  # nor anything in another sequence
    if replacement != ids[0, position]:
        assert not torch.equal(before[0, position], after[0, position])


def test_a_token_reaches_every_later_logit():
    model = model_of("everything")
    ids = random_ids(model.config, 1, LENGTH)
    changed = ids.clone()
    changed[0, 3] += 1 if changed[0, 3] < 90 else -1
    with torch.no_grad():
        moved = (model.logits(ids) != model.logits(changed)).any(-1)[0]
    assert moved.tolist() == [False] * 3 + [True] * (LENGTH - 3)


# SmearGate ------------------------------------------------------------------------------------------------
def smear_output(bos_mask: bool, ids: torch.Tensor) -> torch.Tensor:
    """What the trunk's smear gate puts out for `ids`, its other input being the embedding of single tokens."""
    model = randomize(train_gpt.GPT(tiny_config(smear_bos_mask=bos_mask)))
    torch.nn.init.zeros_(model.bigram.scale)  # the bigram table sees the previous token by design
    seen: list[Any] = []
    hook = model.smear.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model.logits(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("bos_mask", [True, False])
def test_smear_gate_takes_nothing_across_a_documents_start_unless_told_to(bos_mask):
    ids = random_ids(tiny_config(), 1, LENGTH)
    ids[0, 10] = train_gpt.BOS_ID
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 7) % 90 + 2
    assert changed[0, 9] != ids[0, 9]
    moved = (smear_output(bos_mask, ids) != smear_output(bos_mask, changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == ([9] if bos_mask else [9, 10])


def test_smear_gate_formula():
    config = tiny_config()
    smear = train_gpt.SmearGate(config)
    torch.nn.init.normal_(smear.gate, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, train_gpt.BOS_ID, 7, 8]])
    x = torch.randn(1, 4, config.model_dim, generator=torch.Generator().manual_seed(1))
    g = torch.sigmoid(smear.gate)
    previous = torch.stack([torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), x[:, 1], x[:, 2]], dim=1)
    torch.testing.assert_close(smear(x, ids), (1 - g) * x + g * previous)


# Bigram hash ----------------------------------------------------------------------------------------------
def test_bigram_buckets():
    config = tiny_config(vocab_size=1024, bigram_vocab_size=2048)
    ids = torch.randint(0, 1024, (3, 50), generator=torch.Generator().manual_seed(0))
    buckets = train_gpt.pair_buckets(ids, config)
    for row, expected in zip(ids.tolist(), buckets.tolist()):
        by_hand = [2047] + [((36313 * now) ^ (27191 * before)) % 2047 for before, now in itertools.pairwise(row)]
        assert expected == by_hand


# XSA ------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(groups=st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3)]), seed=st.integers(0, 10_000))
def test_xsa_leaves_nothing_along_the_own_value(groups, seed):
    heads, kv_heads = groups
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(2, 5, heads, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 5, kv_heads, 8, generator=generator, dtype=torch.float64)
    cleaned = train_gpt.remove_own_value(y, v)
    own = v.repeat_interleave(heads // kv_heads, dim=2)
    assert (F.normalize(cleaned, dim=-1) * F.normalize(own, dim=-1)).sum(-1).abs().max() < 1e-9
    # What was taken away lies along the value: the rest of y is untouched.
    taken = y - cleaned
    along = (taken * F.normalize(own, dim=-1)).sum(-1, keepdim=True) * F.normalize(own, dim=-1)
    torch.testing.assert_close(taken, along)
    torch.testing.assert_close(train_gpt.remove_own_value(cleaned, v), cleaned)


@pytest.mark.parametrize("xsa_last_n", [0, 1, 3, 4])
def test_xsa_acts_on_the_last_layers_only(xsa_last_n, monkeypatch):
    """Also that the value is the one that attention used, value embedding included."""
    model = randomize(train_gpt.GPT(tiny_config(xsa_last_n=xsa_last_n, ve_layers=(3,))))
    attended: list[torch.Tensor] = []
    cleaned: list[torch.Tensor] = []
    original = train_gpt.remove_own_value

    def attend(q, k, v):
        attended.append(v)
        return train_gpt.sdpa_attention(q, k, v)

    def remove(y, v):
        cleaned.append(v)
        return original(y, v)

    model.attend = attend
    monkeypatch.setattr(train_gpt, "remove_own_value", remove)
    with torch.no_grad():
        model.logits(random_ids(model.config, 1, LENGTH))
    assert len(attended) == 4
    assert len(cleaned) == xsa_last_n
    assert all(torch.equal(a, b) for a, b in zip(attended[4 - xsa_last_n :], cleaned))


# Attention by blocks --------------------------------------------------------------------------------------
def attention_inputs(length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, each, 8) for each in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_blocks_give_the_output_and_the_gradients_of_sdpa(length, heads, kv_heads):
    inputs = attention_inputs(length, heads, kv_heads, torch.float64)
    found, expected = (attend(*inputs) for attend in (train_gpt.blocked_attention, train_gpt.sdpa_attention))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    found_gradients, gradients = (torch.autograd.grad(out, inputs, upstream) for out in (found, expected))
    torch.testing.assert_close(found_gradients, gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [1, 127, 128, 200])
def test_no_block_lets_anything_later_through(position, dtype):
    """To the bit, although a block's queries are multiplied with keys that most of them must not see."""
    inputs = attention_inputs(260, 4, 2, dtype)
    before = train_gpt.blocked_attention(*inputs)
    with torch.no_grad():
        for each in inputs:
            each[:, position:] *= -3
    after = train_gpt.blocked_attention(*inputs)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])


# Training reaches everything ------------------------------------------------------------------------------
def gradients_seen(config: train_gpt.Config, steps: int) -> dict[str, bool]:
    """Which parameters had a non-zero gradient in one of the first steps."""
    model = train_gpt.GPT(config)
    trainer = make_trainer(model, config)
    seen = dict.fromkeys(dict(model.named_parameters()), False)
    for step in range(steps):
        trainer.train_step(step, lr_scale=1.0)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
            seen[name] |= bool(parameter.grad.abs().sum() > 0)
    return seen


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_every_parameter_of_a_recipe_receives_a_gradient_within_three_steps(recipe):
    seen = gradients_seen(tiny_recipe(recipe), steps=3)
    assert [name for name, reached in seen.items() if not reached] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_a_variant_receives_a_gradient(variant):
    """Untied embeddings need one step more: all of the trunk waits for the zero output head."""
    config = tiny_config(**VARIANTS[variant])
    seen = gradients_seen(config, steps=3 if config.tie_embeddings else 4)
    silent = [name for name, reached in seen.items() if not reached]
    # A single layer has no U-net skip: that parameter has no elements.
    assert silent == (["skip_weights"] if config.num_layers == 1 else [])


def test_every_parameter_moves_in_training():
    config = tiny_config(muon_wd=0.0, adam_wd=0.0)
    model = train_gpt.GPT(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, config)
    for step in range(4):
        trainer.train_step(step, lr_scale=1.0)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_training_lowers_the_loss():
    config = tiny_config(train_batch_tokens=24 * 16, micro_batch_tokens=24 * 8, vocab_size=32)
    model = train_gpt.GPT(config)
    trainer = make_trainer(model, config)
    batches = [trainer.loader.batch(0)] * 40
    trainer.loader.batch = lambda step: batches[step]  # type: ignore[method-assign]
    losses = []
    for step in range(40):
        trainer.train_step(step, lr_scale=1.0)
        losses.append(trainer.train_loss.item())
    assert losses[0] == pytest.approx(torch.tensor(32.0).log().item(), abs=0.05)
    assert losses[-1] < 0.6 * losses[0]


# MTP ------------------------------------------------------------------------------------------------------
def test_mtp_heads_move_in_one_step_and_then_reach_the_trunk():
    config = tiny_config()
    model = train_gpt.GPT(config)
    trainer = make_trainer(model, config)
    trainer.train_step(0, lr_scale=1.0)
    for head in model.mtp_heads.parameters():
        assert head.abs().max() > 1e-3
    ids = random_ids(config, 2, LENGTH + 1)
    _, _, further = model.training_losses(ids[:, :-1], ids[:, 1:], qat=False)
    trunk = [model.qo_bank, model.kv_bank, model.mlp_up_bank, model.mlp_down_bank, model.tok_emb.weight]
    for gradient in torch.autograd.grad(further, trunk):
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_training_step_adds_the_mtp_loss_with_its_weight(weight):
    config = tiny_config(mtp_loss_weight=weight, grad_clip_norm=0.0)
    model, twin = (randomize(train_gpt.GPT(config)) for _ in range(2))
    trainer = make_trainer(model, config)
    batches = trainer.loader.batch(0)
    trainer.train_step(0, lr_scale=0.0)
    for ids, targets in batches:
        main, _, further = twin.training_losses(ids, targets, qat=False)
        ((main + weight * further) / len(batches)).backward()
    for (name, parameter), (_, expected) in zip(model.named_parameters(), twin.named_parameters()):
        reference = torch.zeros_like(expected) if expected.grad is None else expected.grad
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-7, msg=name)
    if weight == 0:
        assert grad_of(model.get_parameter("mtp_heads.0.weight")).abs().max() == 0


def test_mtp_head_k_predicts_k_plus_one_further():
    model = model_of("everything")
    ids = random_ids(model.config, 2, LENGTH + 1)
    ids, targets = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        main, _, further = model.training_losses(ids, targets, qat=False)
        hidden, head = model.forward_hidden(ids)
        losses = []
        for k in range(2):
            logits = 30 * torch.tanh(hidden @ model.get_parameter(f"mtp_heads.{k}.weight").T / 30)
            logp = logits.log_softmax(-1)
            picked = [logp[b, t, targets[b, t + k + 1]] for b in range(2) for t in range(LENGTH - k - 1)]
            losses.append(-torch.stack(picked).mean())
        plain = F.cross_entropy((30 * torch.tanh(hidden @ head.T / 30)).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(further, torch.stack(losses).mean())
    torch.testing.assert_close(main, plain)


# Configuration --------------------------------------------------------------------------------------------
def test_seed_decides_the_initial_weights():
    first, again, other = (train_gpt.GPT(tiny_config(seed=seed)) for seed in (7, 7, 8))
    torch.manual_seed(123)  # the global generator has no part in it
    later = train_gpt.GPT(tiny_config(seed=7))
    drawn = {"qo_bank", "kv_bank", "mlp_up_bank", "tok_emb.weight", "bigram.proj.weight", "ve_shared.embed.weight"}
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor, later.state_dict()[name]), name
        assert torch.equal(tensor, other.state_dict()[name]) == (name not in drawn), name


def test_initial_weights_are_as_described():
    config = tiny_config(tied_embed_init_std=0.005)
    model = train_gpt.GPT(config)
    ids = random_ids(config, 2, LENGTH)
    L = config.num_layers
    for bank in (model.qo_bank[:L], model.kv_bank, model.mlp_up_bank):
        for matrix in bank.detach().clone():
            short = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
            torch.testing.assert_close(short @ short.T, torch.eye(short.size(0)), rtol=0, atol=1e-5)
    for zero in (model.qo_bank[L:], model.mlp_down_bank, *model.mtp_heads.parameters()):
        assert zero.abs().max() == 0
    assert model.tok_emb.weight.std().item() == pytest.approx(0.005, rel=0.1)
    seen: list[Any] = []
    hook = model.smear.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    with torch.no_grad():
        model.logits(ids)
        hook.remove()
        embedded = model.tok_emb(ids)
    alone = embedded / (embedded.square().mean(-1, keepdim=True) + 2**-23).sqrt()
    torch.testing.assert_close(seen[0], alone, rtol=1e-5, atol=1e-6)  # the bigram path starts silent
    assert model.bigram.scale.item() == pytest.approx(0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_scores(variant):
    model = model_of(variant)
    ids = random_ids(model.config, 2, LENGTH)
    with torch.no_grad():
        logits = model.logits(ids)
    assert logits.shape == (2, LENGTH, model.config.vocab_size)
    assert torch.isfinite(logits).all()
    assert logits.abs().max() <= model.config.logit_softcap


def test_untied_head_is_its_own_parameter():
    model = model_of("untied")
    assert model.parameter_roles()["lm_head.weight"] == "output_head"
    ids = random_ids(model.config, 1, LENGTH)
    with torch.no_grad():
        before = model.logits(ids)
        hidden, head = model.forward_hidden(ids)
    assert torch.equal(head, model.lm_head.weight)
    torch.testing.assert_close(before, 30 * torch.tanh(hidden @ model.lm_head.weight.T / 30))
    assert "lm_head.weight" not in model_of("everything").state_dict()


def test_rope_on_all_dimensions_equals_the_full_width():
    ids = random_ids(tiny_config(), 1, LENGTH)
    logits = {}
    for dims in (0, 8, 4):
        model = randomize(train_gpt.GPT(tiny_config(rope_dims=dims)))
        with torch.no_grad():
            logits[dims] = model.logits(ids)
    assert torch.equal(logits[0], logits[8])
    assert not torch.equal(logits[0], logits[4])


@pytest.mark.parametrize("slope", [0.0, 0.5, 0.75])
def test_activation_is_the_squared_leaky_relu(slope):
    """One layer with attention silenced, against the formula of its MLP branch."""
    config = tiny_config(num_layers=1, ve_layers=(), xsa_last_n=0, leaky_slope=slope, mtp_num_heads=0)
    model = randomize(train_gpt.GPT(config))
    block: Any = model.blocks[0]
    torch.nn.init.zeros_(block.attn_scale)
    seen: list[Any] = []
    hook = block.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0], inputs[1], output)))
    with torch.no_grad():
        model.logits(random_ids(config, 1, LENGTH))
        hook.remove()
        x, x0, output = seen[0]
        x = block.resid_mix[0] * x + block.resid_mix[1] * x0
        z = (x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()) @ model.mlp_up_bank[0].T
        hidden = torch.where(z > 0, z, slope * z) ** 2
        expected = x + block.mlp_scale * (hidden @ model.mlp_down_bank[0].T)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_value_embedding_acts_on_its_layers_only():
    ids = random_ids(tiny_config(), 1, LENGTH)
    base = randomize(train_gpt.GPT(tiny_config(ve_layers=(1, 3))))
    values: list[torch.Tensor] = []

    def attend(q, _k, v):
        values.append(v)
        return torch.zeros_like(q)  # every layer's input is then the same for both models

    base.attend = attend
    with torch.no_grad():
        base.logits(ids)
        base.ve_layer_scales[1].zero_()
        base.ve_layer_scales[0].mul_(2)
        base.logits(ids)
        table = base.ve_shared.embed.weight[ids] @ base.ve_shared.proj.weight.T * base.ve_shared.scale
        scale = base.ve_layer_scales[0] / 2
    assert [not torch.equal(a, b) for a, b in zip(values[:4], values[4:])] == [False, True, False, True]
    torch.testing.assert_close(
        (values[5] - values[1]).flatten(2), (table * scale).expand_as(values[1].flatten(2)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("qat", [False, True])
def test_training_losses_trace_into_one_graph(qat):
    """No graph break, and the traced forward and backward equal the eager ones (no code generator is involved)."""
    config = tiny_config(num_layers=2, ve_layers=(1,), xsa_last_n=1)
    eager, traced = (randomize(train_gpt.GPT(config)) for _ in range(2))
    ids = random_ids(config, 2, LENGTH + 1)
    ours = torch.compile(traced.training_losses, fullgraph=True, backend="aot_eager")(ids[:, :-1], ids[:, 1:], qat)
    expected = eager.training_losses(ids[:, :-1], ids[:, 1:], qat)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    (ours[1] + ours[2]).backward()
    (expected[1] + expected[2]).backward()
    for (name, a), (_, b) in zip(traced.named_parameters(), eager.named_parameters()):
        torch.testing.assert_close(grad_of(a), grad_of(b), rtol=1e-3, atol=1e-6, msg=name)


def test_scores_trace_into_one_graph():
    """And the traced scores equal the eager ones; what a code generator makes of the graph is torch's own concern."""
    model = randomize(train_gpt.GPT(tiny_config(num_layers=1, ve_layers=(0,), xsa_last_n=1, mtp_num_heads=0)))
    ids = random_ids(model.config, 2, LENGTH + 1)
    traced = torch.compile(model.token_scores, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        expected = model.token_scores(ids[:, :-1], ids[:, 1:], 8)
        ours = traced(ids[:, :-1], ids[:, 1:], 8)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
