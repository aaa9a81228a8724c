"""The model computes what the earlier submission 700 computed, from a checkpoint with one matrix a layer."""

import convert_checkpoint
import numpy as np
import pytest
import torch
from golden_support import golden_arrays, golden_config, golden_json, golden_state, golden_tensor, grad_of

import train_gpt

LOGIT_ATOL = 5e-5
GRAD_RTOL = 2e-4


@pytest.fixture(scope="module")
def record():
    return golden_json("model_700")


@pytest.fixture(scope="module")
def batch():
    return golden_tensor("model_700", "x"), golden_tensor("model_700", "y")


@pytest.fixture(scope="module")
def model(batch):
    """With the reference weights, after backward of the training loss."""
    model = train_gpt.GPT(golden_config("model_700"))
    model.load_state_dict(convert_checkpoint.to_banks(golden_state("model_700"), model.config.num_layers))
    main, _, _ = model.training_losses(*batch, qat=False)
    main.backward()
    return model


def test_number_source_reproduces_the_recorded_weights(record):
    for name, tensor in golden_state("model_700").items():
        assert tensor.flatten()[:3].tolist() == record["params"][name]["first3"], name
        assert list(tensor.shape) == record["state_dict"][name], name


def test_logits_and_losses(model, batch, record):
    arrays = golden_arrays("model_700")
    with torch.no_grad():
        logits = model.logits(batch[0])
        logp, _, _ = model.token_scores(*batch, tail=96)
        assert model.training_losses(*batch, False)[0].item() == pytest.approx(record["loss_eval_float64"], abs=2e-6)
    rows = logits[tuple(arrays["positions"].T)].numpy()
    np.testing.assert_allclose(rows, arrays["logits_rows"], rtol=0, atol=LOGIT_ATOL)
    np.testing.assert_allclose(-logp.numpy(), arrays["nll"], rtol=0, atol=LOGIT_ATOL)
    for name, value in (("mean", logits.mean()), ("std", logits.std()), ("absmax", logits.abs().max())):
        assert value.item() == pytest.approx(record[f"logits_{name}"], abs=LOGIT_ATOL), name


def test_every_blocks_output(model, batch):
    arrays = golden_arrays("model_700")
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


def layered_gradients(model: train_gpt.GPT) -> dict[str, torch.Tensor]:
    """Gradients by the names of a checkpoint with one matrix a layer."""
    gradients = {name: grad_of(p) for name, p in model.named_parameters() if name not in train_gpt.BANK_NAMES}
    layers = model.config.num_layers
    for bank, parts in convert_checkpoint.BANK_PARTS.items():
        for part, matrices in zip(parts, grad_of(model.get_parameter(bank)).split(layers)):
            gradients |= {f"blocks.{layer}.{part}.weight": grad for layer, grad in enumerate(matrices)}
    return gradients


def test_gradient_norm_of_every_parameter(model, record):
    ours = {name: grad.norm().item() for name, grad in layered_gradients(model).items()}
    assert set(ours) == set(record["grad_norm_float64"])
    for name, norm in ours.items():
        assert norm == pytest.approx(record["grad_norm_float64"][name], rel=GRAD_RTOL), name
    assert sum(norm**2 for norm in ours.values()) ** 0.5 == pytest.approx(record["grad_norm_total"], rel=1e-5)
