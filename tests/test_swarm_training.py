"""What the swarm decides and the knowledge graph weighs must change the training step, on every rank alike."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_support import make_trainer, random_ids, randomize, tiny_config
from ranks import run_whole
from support import event, events_of, tiny_environ, train_rows

import swarm_agents
import train_gpt


class Lines:
    """A log that keeps its lines and rows."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def tell(self, event: str, **fields: Any) -> None:
        self.rows.append({"event": event, **fields})


def trainer_with_graph(**overrides: Any) -> train_gpt.Trainer:
    config = tiny_config(mtp_num_heads=2, swarm_enabled=True, kg_enabled=True, iterations=20_000, **overrides)
    model = randomize(train_gpt.GPT(config))
    importance = torch.linspace(0, 1, config.vocab_size)
    plain = make_trainer(model, config)
    log: Any = Lines()
    return train_gpt.Trainer(
        config, plain.runtime, log, train_gpt.GPT(config).requires_grad_(), plain.loader, plain.validation, importance
    )


def step_with(**controls: float) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients (after clipping) and the reported loss of one step, with some controls set."""
    trainer = trainer_with_graph()
    randomize(trainer.model)
    vars(trainer.controls).update(controls)
    trainer.train_step(0, lr_scale=0.0)
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return grads, trainer.train_loss.item()


@pytest.mark.parametrize(
    ("control", "value"), [("qat", 1.0), ("kg_weight", 0.5), ("mtp_weight", 0.05), ("clip_norm", 0.15)]
)
def test_each_control_changes_the_step(control, value):
    before, loss = step_with()
    after, other_loss = step_with(**{control: value})
    moved = [name for name in before if not torch.allclose(before[name], after[name], rtol=1e-4, atol=0)]
    assert set(train_gpt.BANK_NAMES) <= set(moved)
    assert (loss != other_loss) == (control == "qat")  # the reported loss is the plain cross-entropy of this forward


@pytest.mark.parametrize("clip_norm", [0.3, 0.15])
def test_the_clip_bounds_the_global_norm(clip_norm):
    grads, _ = step_with(clip_norm=clip_norm)
    assert math.sqrt(sum(g.square().sum().item() for g in grads.values())) == pytest.approx(clip_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("step", "elapsed_s", "lr_scale", "grad_norm", "expected"),
    [
        (800, 69.0, 1.0, 0.3, {"kg_weight": 0.5}),
        (1600, 138.0, 1.0, 5.0, {"clip_norm": 0.15, "kg_weight": 0.4}),
        (4800, 414.0, 0.58, 0.3, {"qat": True}),
        (5600, 483.0, 0.37, 0.3, {"qat": True, "kg_weight": 0.1, "mtp_weight": 0.05}),
    ],
)
def test_each_agent_fires_in_a_run_that_the_clock_ends_near_step_7000(step, elapsed_s, lr_scale, grad_norm, expected):
    """20,000 steps are planned, 600 s end the run at about 6,956: progress must follow the clock."""
    trainer = trainer_with_graph(max_wallclock_seconds=600.0)
    before = vars(trainer.controls).copy()
    trainer.step, trainer.elapsed_s = step, elapsed_s
    mesh = swarm_agents.VotingMesh(800)
    assert mesh.due(step)
    trainer.vote(mesh, torch.tensor(grad_norm), lr_scale)
    assert vars(trainer.controls) == before | expected
    log: Any = trainer.log
    assert log.lines[0].startswith(f"swarm cycle:1 step:{step} proposals:{len(expected)}")
    assert {row["parameter"]: row["new"] for row in log.rows} == expected
    assert all((row["event"], row["step"], row["passed"]) == ("vote", step, True) for row in log.rows)


def test_token_weights_have_mean_one_over_the_batch_and_follow_the_formula():
    trainer = trainer_with_graph()
    assert trainer.importance is not None
    batches = trainer.loader.batch(3)
    weights = trainer.token_weights(batches)
    assert weights is not None
    targets = torch.cat([t.flatten() for _, t in batches])
    assert weights[targets].mean().item() == pytest.approx(1.0, abs=1e-6)
    raw = 1 + trainer.controls.kg_weight * trainer.importance
    torch.testing.assert_close(weights, raw / raw[targets].mean())


def test_weighted_loss_is_the_weighted_mean_of_the_cross_entropies():
    config = tiny_config()
    model = randomize(train_gpt.GPT(config))
    ids = random_ids(config, 2, 20)
    weights = torch.rand(config.vocab_size) + 0.5
    main, weighted, _ = model.training_losses(ids[:, :-1], ids[:, 1:], False, weights)
    logp = F.log_softmax(model.logits(ids[:, :-1]), -1)
    nll = -logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(weighted, (nll * weights[ids[:, 1:]]).mean())
    torch.testing.assert_close(main, nll.mean())


def test_seeding_scales_embeddings_and_acts_through_the_tied_head_alone(tiny_data, blob):
    log: Any = type("Log", (), {"row": lambda *_args, **_fields: None})()
    sizes = dict(vocab_size=384, kg_enabled=True, kg_path=str(blob), mtp_num_heads=0)
    model, seeded = (train_gpt.GPT(tiny_config(**sizes)) for _ in range(2))
    tokenizer = train_gpt.Tokenizer(str(tiny_data / "tokenizer.model"), 384)
    importance = train_gpt.seed_embeddings(seeded, tokenizer, log)
    assert int((importance > 0).sum()) == 358
    expected = model.tok_emb.weight * (1 + 0.1 * importance[:, None])
    torch.testing.assert_close(seeded.tok_emb.weight, expected)
    ids = random_ids(model.config, 2, 20)
    # The normalisation after the lookup undoes the scale, but for its epsilon beside embeddings this small.
    torch.testing.assert_close(seeded.forward_hidden(ids)[0], model.forward_hidden(ids)[0], rtol=0, atol=2e-3)
    moved = (seeded.logits(ids) - model.logits(ids)).abs().max()
    assert moved > 0.01 * model.logits(ids).abs().max()


SWARM = dict(
    RECIPE="swarm", MTP_NUM_HEADS=2, ITERATIONS=40, SWARM_EVERY=4, LATE_QAT_THRESHOLD=0, WARMDOWN_ITERS=20,
    MIXER="none", TTT_ENABLED=0, TRAIN_LOG_EVERY=4, CROWN_Q_LAMBDA=1e7,
)  # fmt: skip


def test_two_ranks_decide_and_train_as_one(tiny_data, blob, tmp_path):
    runs = {}
    for nproc in (1, 2):
        environ = tiny_environ(tiny_data, tmp_path / str(nproc), KG_PATH=blob, **SWARM)
        process = run_whole(environ, nproc)
        assert process.returncode == 0, process.stderr
        decisions = [line.rsplit(",", 1)[0] for line in process.stdout.splitlines() if line.startswith("  cycle ")]
        runs[nproc] = events_of(environ), decisions
    (alone, decided), (together, decided_together) = runs[1], runs[2]
    assert decided == decided_together
    assert {line.split(":")[1].split()[0] for line in decided} >= {"qat_agent", "kg_weight_agent", "mtp_agent"}
    for row, other in zip(train_rows(alone), train_rows(together), strict=True):
        # Once QAT is on, a weight on the border between two levels can fall either way and moves the loss a little.
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=2e-3 if row["qat"] else 1e-4)
        controls = ("qat", "kg_weight", "mtp_weight", "clip_norm")
        assert [row[name] for name in controls] == [other[name] for name in controls]
        assert row.get("crown_q", 0) == pytest.approx(other.get("crown_q", 0), rel=1e-3)  # once, not by rank
    last = train_rows(alone)[-1]
    assert (last["qat"], last["kg_weight"], last["mtp_weight"]) == (1, 0.1, 0.05)


def test_validation_is_never_weighted(tiny_data, blob, run_main, tmp_path):
    """With every learning rate at zero the KG weight can change nothing but a weighted report."""
    frozen = dict(MATRIX_LR=0, TIED_EMBED_LR=0, SCALAR_LR=0, HEAD_LR=0, MUON_WD=0, ADAM_WD=0, ITERATIONS=2)
    scores = []
    for weight in (0, 1):
        overrides = SWARM | frozen | dict(KG_WEIGHT=weight, KG_PATH=blob)
        environ = tiny_environ(tiny_data, tmp_path / str(weight), **overrides)
        assert run_main(environ).returncode == 0
        scores.append(event(events_of(environ), "final_int8_zlib_roundtrip_exact")["val_loss"])
    assert scores[0] == scores[1]


def test_a_blob_for_another_tokenizer_is_refused(tiny_data, run_main, tmp_path):
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **SWARM))  # the committed blob is for another tokenizer
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert "another tokenizer" in outcome.stderr
    assert "tools/build_kg.py blob" in outcome.stderr


def test_a_missing_blob_file_is_named(tiny_data, run_main, tmp_path):
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **SWARM, KG_PATH=tmp_path / "absent.txt"))
    assert outcome.returncode == 2
    assert "absent.txt" in outcome.stderr


def test_the_default_recipe_is_the_swarm_with_everything_on():
    config = train_gpt.Config.from_env({})
    assert config.recipe == "swarm"
    assert (config.swarm_enabled, config.kg_enabled, config.mtp_num_heads, config.swarm_every) == (True, True, 2, 800)
    assert json.loads(config.to_json())["kg_weight"] == 0.3


def test_the_swarm_does_not_overrule_qat_bits(tiny_data, blob, run_main, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path, KG_PATH=blob, **SWARM | dict(QAT_BITS=0, ITERATIONS=20))
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert {row["qat"] for row in train_rows(events_of(environ))} == {0}
    assert "kg_weight_agent kg_weight 0.3->0.4 passed" in outcome.stdout
