"""The model computes what the earlier submission 1081 computed: logits, losses, gradients, names and shapes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_support import (
    golden_arrays,
    golden_config,
    golden_json,
    golden_model,
    golden_state,
    golden_tensor,
    golden_values,
    grad_of,
)

import train_gpt

# Both sides are float32; the orders of summation differ. Seen here: logits 4e-6, gradient norms 2e-5 relative.
LOGIT_ATOL = 5e-5
GRAD_RTOL = 2e-4


@pytest.fixture(scope="module")
def record():
    return golden_json("model_1081")


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def batch():
    return golden_tensor("model_1081", "x"), golden_tensor("model_1081", "y")


@pytest.fixture(scope="module")
def trained(batch):
    """The model after backward of the training loss, and that loss."""
    model = golden_model()
    main, _, further = model.training_losses(*batch, qat=False)
    loss = main + 0.1 * further
    loss.backward()
    return model, loss.item()


def test_number_source_reproduces_the_recorded_weights(record):
    for name, tensor in golden_state().items():
        first = tensor.flatten()[:3].tolist()
        assert first == record["params"][name]["first3"], name


def test_tokens_follow_the_recorded_formula(batch):
    i = np.arange(193)
    stream = (31 * i * i + 7 * i) % 1024
    assert batch[0].flatten().tolist() == stream[:-1].tolist()
    assert batch[1].flatten().tolist() == stream[1:].tolist()
    assert np.all(np.abs(golden_values("any", 1000)) <= 1)


def test_state_dict_names_and_shapes_are_those_of_the_earlier_checkpoints(model, record):
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == record["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == record["n_params"]


def test_checkpoint_with_those_names_loads_strictly():
    state = golden_state()
    loaded = train_gpt.GPT(golden_config())
    result = loaded.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    del state["smear.gate"]
    with pytest.raises(RuntimeError, match=r"smear\.gate"):
        train_gpt.GPT(golden_config()).load_state_dict(state)


def test_logits(model, batch, record):
    arrays = golden_arrays("model_1081")
    with torch.no_grad():
        logits = model.logits(batch[0])
    assert logits.shape == (2, 96, 1024)
    assert logits.dtype == torch.float32
    rows = logits[tuple(arrays["positions"].T)].numpy()
    np.testing.assert_allclose(rows, arrays["logits_rows"], rtol=0, atol=LOGIT_ATOL)
    for name, value in (("mean", logits.mean()), ("std", logits.std()), ("absmax", logits.abs().max())):
        assert value.item() == pytest.approx(record[f"logits_{name}"], abs=LOGIT_ATOL), name


def test_every_blocks_output(model, batch):
    arrays = golden_arrays("model_1081")
    outputs = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for block in model.blocks]
    with torch.no_grad():
        model.logits(batch[0])
    for hook in hooks:
        hook.remove()
    rms = [out.square().mean().sqrt().item() for out in outputs]
    np.testing.assert_allclose(rms, arrays["block_out_rms"], rtol=2e-6)
    last = np.stack([out[1, 95].numpy() for out in outputs])
    np.testing.assert_allclose(last, arrays["block_out_1_95"], rtol=0, atol=5e-5)


def test_losses(model, trained, batch, record):
    with torch.no_grad():
        assert model.training_losses(*batch, False)[0].item() == pytest.approx(record["loss_eval_float64"], abs=2e-6)
    assert trained[1] == pytest.approx(record["loss_train_float64"], abs=2e-6)


def test_training_without_mtp_heads_is_the_main_loss(batch, record):
    main, _, further = golden_model(mtp_num_heads=0).training_losses(*batch, qat=False)
    assert main.item() == pytest.approx(record["loss_eval_float64"], abs=2e-6)
    assert further.item() == 0


def test_token_scores_against_the_reference_nll(model, batch):
    with torch.no_grad():
        logp, _, _ = model.token_scores(*batch, tail=96)
    np.testing.assert_allclose(-logp.numpy(), golden_arrays("model_1081")["nll"], rtol=0, atol=LOGIT_ATOL)


@pytest.mark.parametrize("tail", [96, 7, 1])
def test_token_scores_are_the_log_softmax_of_the_logits(model, batch, tail):
    with torch.no_grad():
        logp, entropy, _ = model.token_scores(*batch, tail=tail)
        everything = F.log_softmax(model.logits(batch[0]).double(), dim=-1)[:, -tail:]
    chosen = everything.gather(-1, batch[1][:, -tail:, None])[..., 0]
    assert logp.shape == entropy.shape == (2, tail)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), chosen, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(everything.exp() * everything).sum(-1), rtol=0, atol=1e-5)


def test_gradient_norm_of_every_parameter(trained, record):
    ours = {name: grad_of(p).norm().item() for name, p in trained[0].named_parameters()}
    assert set(ours) == set(record["grad_norm_float64"])
    for name, norm in ours.items():
        assert norm == pytest.approx(record["grad_norm_float64"][name], rel=GRAD_RTOL), name
    total = sum(norm**2 for norm in ours.values()) ** 0.5
    assert total == pytest.approx(record["grad_norm_total"], rel=1e-5)


@pytest.mark.parametrize("bank", train_gpt.BANK_NAMES)
def test_gradient_norm_of_every_bank_slice(trained, record, bank):
    norms = grad_of(trained[0].get_parameter(bank)).flatten(1).norm(dim=1).numpy()
    np.testing.assert_allclose(norms, record["grad_norm_bank_slices"][bank], rtol=GRAD_RTOL)


def test_gradients_of_small_tensors_element_by_element(trained):
    recorded = {k.removeprefix("grad/"): v for k, v in golden_arrays("model_1081").items() if k.startswith("grad/")}
    assert len(recorded) == 51
    for name, expected in recorded.items():
        ours = grad_of(trained[0].get_parameter(name)).numpy()
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=GRAD_RTOL * scale, err_msg=name)


def reference_angles(config: train_gpt.Config, seq_len: int) -> np.ndarray:
    """RoPE angles (T, rotated/2) in float64; base·(T/1024)^(d/(d-2)) beyond 1,024 positions."""
    rotated = config.rope_dims or config.model_dim // config.num_heads
    base = config.rope_base
    if seq_len > 1024:
        base *= (seq_len / 1024) ** (rotated / (rotated - 2))
    return np.arange(seq_len)[:, None] / base ** (np.arange(0, rotated, 2) / rotated)


@pytest.mark.parametrize("rope_dims", [8, 0])
@pytest.mark.parametrize("seq_len", [96, 1024, 1025, 2048])
def test_rope_base_grows_only_beyond_its_training_length(rope_dims, seq_len):
    config = golden_config(rope_dims=rope_dims)
    cos, sin = train_gpt.rope_tables(config, seq_len, torch.zeros(()))
    angles = reference_angles(config, seq_len)
    np.testing.assert_allclose(cos.squeeze().numpy(), np.cos(angles), rtol=0, atol=2e-4)
    np.testing.assert_allclose(sin.squeeze().numpy(), np.sin(angles), rtol=0, atol=2e-4)


def test_long_sequences_rescale_the_base_inside_the_model(batch):
    ids = batch[0]
    rescaled = 10_000.0 * (96 / 32) ** (8 / 6)
    with torch.no_grad():
        long = golden_model(rope_train_len=32).logits(ids)
        explicit = golden_model(rope_train_len=0, rope_base=rescaled).logits(ids)
        never = golden_model(rope_train_len=0).logits(ids)
        short = golden_model().logits(ids)
    torch.testing.assert_close(long, explicit, rtol=0, atol=LOGIT_ATOL)
    assert (long - never).abs().max() > 100 * LOGIT_ATOL
    assert torch.equal(short, never)


def test_relative_rotation_is_what_attention_sees():
    """Shifting queries and keys together changes no score between them: RoPE is relative."""
    config = golden_config()
    cos, sin = train_gpt.rope_tables(config, 64, torch.zeros(()))
    q = torch.tensor(golden_values("q", 16), dtype=torch.float32).expand(1, 64, 1, 16)
    k = torch.tensor(golden_values("k", 16), dtype=torch.float32).expand(1, 64, 1, 16)
    scores = train_gpt.apply_rope(q, cos, sin)[0, :, 0] @ train_gpt.apply_rope(k, cos, sin)[0, :, 0].T
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert (scores.diagonal(0)[0] - scores.diagonal(-17)[0]).abs() > 1e-3
