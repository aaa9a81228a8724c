"""The swarm: rules, votes, vetoes, bounds, log, checkpoint. Run: python -m pytest tests/test_swarm.py"""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import swarm_agents  # noqa: E402
from swarm_agents import BOUNDS, Decision, TrainingMetrics, VotingMesh  # noqa: E402

GOLDEN = json.loads((ROOT / "tests/data/swarm_golden.json").read_text())
# Decisions of pull request 1081's own code on scripted metrics; its names -> the names of our controls.
GOLDEN_NAMES = {
    "qat_enable_now": "qat",
    "kg_weight": "kg_weight",
    "mtp_loss_weight": "mtp_weight",
    "grad_clip_norm": "clip_norm",
}
METRICS = TrainingMetrics(
    step=800,
    total_steps=20_000,
    train_loss=3.0,
    grad_norm=0.3,
    elapsed_ms=0.0,
    max_wallclock_ms=0.0,
    current_lr_scale=1.0,
    qat_enabled=False,
    kg_weight=0.3,
    mtp_weight=0.1,
    clip_norm=0.3,
)


def at(progress: float, **changes: Any) -> TrainingMetrics:
    """Metrics at a fraction of a run of 10,000 steps."""
    return dataclasses.replace(
        METRICS, **{"step": round(progress * 10_000), "total_steps": 10_000, **changes}
    )


def quiet(progress: float, **changes: Any) -> TrainingMetrics:
    """Metrics in a run without knowledge graph and MTP heads, so that only QAT and clipping can be moved."""
    return at(progress, **{"kg_weight": 0.0, "mtp_weight": 0.0, **changes})


def changes(decisions: list[Decision]) -> dict[str, float]:
    return {decision.parameter: decision.new for decision in decisions}


def golden_decisions(row: list[Any]) -> list[Decision]:
    return [
        Decision(GOLDEN_NAMES[parameter], old, new, agent, confidence, reason)
        for agent, parameter, old, new, confidence, reason in row[5]
    ]


def golden_metrics(row: list[Any], total_steps: int, **controls: Any) -> TrainingMetrics:
    step, grad_norm, lr_scale, *_ = row
    return dataclasses.replace(
        METRICS,
        step=step,
        total_steps=total_steps,
        grad_norm=grad_norm,
        current_lr_scale=lr_scale,
        **controls,
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_the_original_where_controls_are_not_fed_back(name: str):
    """Same agents, order, values, confidences and reasons, except for one veto that the original lacks.

    The original was told `qat_enabled` by the script and never learned of its own clip and MTP decisions, so
    the same is done here.
    """
    mesh = VotingMesh(every=800)
    kg_weight = 0.3
    for row in GOLDEN[name]["rows"]:
        step, _, _, qat_enabled, due, _ = row
        if step % 800 or step == 0:
            assert mesh.due(step) == due
            continue
        metrics = golden_metrics(
            row, GOLDEN[name]["total_steps"], qat_enabled=bool(qat_enabled), kg_weight=kg_weight
        )
        expected = golden_decisions(row)
        if (name, step) == ("scripted_total_10000", 8800):  # QAT came on after cycle 8000
            expected = [decision for decision in expected if decision.parameter != "clip_norm"]
        assert mesh.due(step) == due
        decisions = mesh.vote(metrics)
        assert decisions == expected, step
        kg_weight = changes(decisions).get("kg_weight", kg_weight)


def replay(rows: list[Any], total_steps: int, budget_steps: int = 0) -> list[tuple[int, Decision]]:
    """Decisions with controls fed back, as training does; the wallclock ends at `budget_steps` if given."""
    mesh = VotingMesh(every=800)
    controls = {"qat": 0.0, "kg_weight": 0.3, "mtp_weight": 0.1, "clip_norm": 0.3}
    made = []
    for row in rows:
        named = {name: value for name, value in controls.items() if name != "qat"}
        metrics = golden_metrics(row, total_steps, qat_enabled=bool(controls["qat"]), **named)
        if budget_steps:
            metrics = dataclasses.replace(
                metrics, elapsed_ms=600_000 * row[0] / budget_steps, max_wallclock_ms=600_000.0
            )
        decisions = mesh.vote(metrics)
        controls.update(changes(decisions))
        made += [(row[0], decision) for decision in decisions]
    return made


def without_repeats(rows: list[Any]) -> list[tuple[int, Decision]]:
    seen: set[tuple[str, float]] = set()
    kept = []
    for row in rows:
        for decision in golden_decisions(row):
            if (decision.parameter, decision.new) not in seen:
                kept.append((row[0], decision))
            seen.add((decision.parameter, decision.new))
    return kept


def test_differs_from_the_original_by_not_repeating_what_is_so_already():
    """The original proposes QAT and the MTP weight anew each cycle; here each is decided once."""
    rows = GOLDEN["honest_total_6956"]["rows"]
    repeated = sum(len(row[5]) for row in rows)
    made = replay(rows, 6956)
    assert made == without_repeats(rows)
    assert len(made) == 6 < repeated == 9


def test_differs_from_the_original_by_counting_the_wallclock():
    """A capped run of 6,956 of 20,000 steps decides all that one planned for 6,956 steps would.

    As submitted, progress ended at 0.35, and of all agents only that of the KG schedule could act, twice.
    """
    rows = GOLDEN["as_submitted_20000"]["rows"]
    assert [decision.parameter for row in rows for decision in golden_decisions(row)] == ["kg_weight"] * 2
    made = replay(rows, 20_000, budget_steps=6956)
    assert made == without_repeats(GOLDEN["honest_total_6956"]["rows"])
    assert {decision.parameter for _, decision in made} == {"qat", "kg_weight", "mtp_weight"}


def test_every_agent_acts_in_a_capped_run():
    """About 7,000 of 20,000 steps in 600 s, warm-down over the last 3,700, one spike in the gradients."""
    mesh = VotingMesh(every=800)
    controls = {"qat": 0.0, "kg_weight": 0.3, "mtp_weight": 0.1, "clip_norm": 0.3}
    step_ms, last = 85.7, 7000
    for step in range(last):
        if not mesh.due(step):
            continue
        metrics = TrainingMetrics(
            step=step,
            total_steps=20_000,
            train_loss=2.5,
            grad_norm=3.0 if step == 2400 else 0.3,
            elapsed_ms=step * step_ms,
            max_wallclock_ms=600_000.0,
            current_lr_scale=min(1.0, (last - step) / 3700),
            qat_enabled=bool(controls["qat"]),
            kg_weight=controls["kg_weight"],
            mtp_weight=controls["mtp_weight"],
            clip_norm=controls["clip_norm"],
        )
        controls.update(changes(mesh.vote(metrics)))
    assert controls == {"qat": 1.0, "kg_weight": 0.1, "mtp_weight": 0.05, "clip_norm": 0.15}
    made = [line.split(":")[1].split()[0] for line in mesh.summary()[1:]]
    assert set(made) == {"qat_agent", "kg_weight_agent", "grad_health_agent", "mtp_agent"}


@pytest.mark.parametrize(
    ("step", "elapsed_ms", "budget_ms", "expected"),
    [
        (5000, 0, 0, 0.25),
        (5000, 300_000, 600_000, 0.5),
        (15_000, 60_000, 600_000, 0.75),
        (0, 0, 600_000, 0.0),
    ],
)
def test_progress_is_the_further_of_steps_and_clock(
    step: int, elapsed_ms: float, budget_ms: float, expected: float
):
    metrics = dataclasses.replace(METRICS, step=step, elapsed_ms=elapsed_ms, max_wallclock_ms=budget_ms)
    assert metrics.progress == expected


@pytest.mark.parametrize(
    ("progress", "lr_scale", "confidence"),
    [(0.40, 0.1, None), (0.41, 0.15, None), (0.41, 0.149, 0.90), (0.65, 0.5, None), (0.66, 0.5, 0.95)],
)
def test_qat_thresholds(progress: float, lr_scale: float, confidence: float | None):
    decisions = VotingMesh().vote(quiet(progress, current_lr_scale=lr_scale))
    expected = [] if confidence is None else [("qat", 1.0, confidence)]
    assert [(d.parameter, d.new, d.confidence) for d in decisions] == expected


@pytest.mark.parametrize(
    ("progress", "old", "new"),
    [
        (0.149, 0.3, 0.5),
        (0.15, 0.5, 0.4),
        (0.40, 0.4, 0.3),
        (0.69, 0.3, None),
        (0.70, 0.3, 0.1),
        (0.10, 0.45, None),  # moves by no more than 0.05
        (0.10, 0.0, None),  # the knowledge graph is off
    ],
)
def test_kg_weight_stages(progress: float, old: float, new: float | None):
    decisions = VotingMesh().vote(at(progress, kg_weight=old, mtp_weight=0.0, qat_enabled=True))
    assert changes(decisions) == ({} if new is None else {"kg_weight": new})


@pytest.mark.parametrize(
    ("progress", "old", "new"), [(0.75, 0.1, None), (0.76, 0.1, 0.05), (0.76, 0.0, None), (0.76, 0.05, None)]
)
def test_mtp_weight_is_lowered_late_and_only_with_heads(progress: float, old: float, new: float | None):
    decisions = VotingMesh().vote(quiet(progress, mtp_weight=old, qat_enabled=True))
    assert changes(decisions) == ({} if new is None else {"mtp_weight": new})


@pytest.mark.parametrize(
    ("grad_norm", "old", "new"),
    [
        (2.0, 0.3, None),
        (2.01, 0.3, 0.15),
        (math.inf, 0.3, 0.15),
        (math.nan, 0.3, None),
        (9, 0.15, None),
        (9, 0, None),
    ],
)
def test_clip_is_tightened_on_large_gradients_only(grad_norm: float, old: float, new: float | None):
    decisions = VotingMesh().vote(quiet(0.1, grad_norm=grad_norm, clip_norm=old))
    assert changes(decisions) == ({} if new is None else {"clip_norm": new})


@pytest.mark.parametrize("grad_norm", [2.01, math.inf, math.nan])
def test_gradient_health_vetoes_qat_before_its_deadline_only(grad_norm: float):
    tight = {"grad_norm": grad_norm, "current_lr_scale": 0.1, "clip_norm": 0.15}
    mesh = VotingMesh()
    assert mesh.vote(quiet(0.5, **tight)) == []
    log = "\n".join(mesh.log_lines())
    assert "qat_agent qat 0->1 rejected" in log
    assert "grad_health_agent veto (0.85): grad_norm=" in log
    assert changes(mesh.vote(quiet(0.66, **tight))) == {"qat": 1.0}
    assert changes(VotingMesh().vote(quiet(0.5, current_lr_scale=0.1, grad_norm=2.0))) == {"qat": 1.0}


def test_qat_timing_vetoes_a_tighter_clip_in_the_first_cycle_with_qat_only():
    mesh = VotingMesh()
    spike = {"grad_norm": 5.0, "clip_norm": 0.3}
    assert changes(mesh.vote(quiet(0.70))) == {"qat": 1.0}
    assert mesh.vote(quiet(0.75, qat_enabled=True, **spike)) == []
    assert "    qat_agent veto (0.80): QAT has just begun" in mesh.log_lines()
    assert changes(mesh.vote(quiet(0.80, qat_enabled=True, **spike))) == {"clip_norm": 0.15}


class Stub(swarm_agents.Agent):
    """Always proposes one value; answers others' proposals with a fixed vote, where one is given."""

    def __init__(self, parameter: str, wish: swarm_agents.Wish | None, vote: tuple[str, float] | None = None):
        self.name, self.parameter, self.wish, self.fixed = f"{parameter}_stub", parameter, wish, vote

    def propose(self, metrics: TrainingMetrics) -> swarm_agents.Wish | None:
        assert metrics is METRICS
        return self.wish

    def vote(self, motion: swarm_agents.Motion) -> swarm_agents.Vote:
        return (self.name, *self.fixed, "fixed") if self.fixed else super().vote(motion)


@pytest.mark.parametrize(
    ("confidence", "vote", "passes"),
    [
        (0.60, ("abstain", 0.9), True),
        (0.59, ("approve", 1.0), False),  # approval does not lift a proposal that is unsure of itself
        (0.90, ("veto", 0.59), True),
        (0.99, ("veto", 0.60), False),
    ],
)
def test_voting_rule(confidence: float, vote: tuple[str, float], passes: bool):
    mesh = VotingMesh(agents=(Stub("kg_weight", (0.7, confidence, "why")), Stub("qat", None, vote)))
    assert (
        mesh.vote(METRICS) == [Decision("kg_weight", 0.3, 0.7, "kg_weight_stub", confidence, "why")]
    ) == passes


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("learning_rate", 0.1, "'learning_rate' is unknown; known: qat, kg_weight, mtp_weight, clip_norm"),
        ("qat", 0.5, "qat=0.5; allowed: 0 or 1"),
        ("qat", 2.0, "qat=2.0"),
        ("kg_weight", -0.1, "kg_weight=-0.1; allowed: 0 to 1"),
        ("mtp_weight", 1.01, "mtp_weight=1.01"),
        ("clip_norm", 0.0, "clip_norm=0.0; allowed: 0.01 to 10"),
        ("clip_norm", math.nan, "clip_norm=nan"),
        ("clip_norm", math.inf, "clip_norm=inf"),
    ],
)
def test_unknown_and_out_of_range_raise(parameter: str, value: float, message: str):
    with pytest.raises(ValueError, match="swarm parameter") as caught:
        swarm_agents.check_value(parameter, value)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="swarm parameter"):
        VotingMesh(agents=(Stub(parameter, (value, 1.0, "")),)).vote(METRICS)


def test_what_the_agents_propose_is_within_bounds_and_a_proposal_of_the_current_value_is_none():
    for parameter, (low, high) in BOUNDS.items():
        swarm_agents.check_value(parameter, low)
        swarm_agents.check_value(parameter, high)
    mesh = VotingMesh(agents=(Stub("kg_weight", (0.3, 1.0, "")),))
    assert mesh.vote(METRICS) == []
    assert mesh.log_lines()[0].startswith("swarm cycle:1 step:800 proposals:0 ")


@pytest.mark.parametrize("every", [0, -800])
def test_period_must_be_positive(every: int):
    with pytest.raises(ValueError, match=f"period is {every}"):
        VotingMesh(every=every)


def test_log_and_summary_have_the_established_format():
    mesh = VotingMesh(every=800)
    mesh.vote(METRICS)
    mesh.vote(dataclasses.replace(METRICS, step=1600, kg_weight=0.5))
    (cycle,) = mesh.log_lines()
    assert re.fullmatch(r"swarm cycle:2 step:1600 proposals:0 time:\d+us", cycle)
    head, line = mesh.summary()
    assert head == "Swarm: 2 cycles, 1 decisions"
    expected = r"  cycle 1 step 800: kg_weight_agent kg_weight 0\.3->0\.5 \(conf=0\.75, \d+us\)"
    assert re.fullmatch(expected, line)


def test_log_states_every_vote_with_its_reason():
    mesh = VotingMesh()
    mesh.vote(METRICS)
    assert mesh.log_lines()[1:] == [
        "  kg_weight_agent kg_weight 0.3->0.5 passed: progress=0.04, adjusting KG schedule",
        "    qat_agent abstain (0.00): not my field",
        "    kg_weight_agent approve (0.75): own proposal",
        "    grad_health_agent abstain (0.00): not my field",
        "    mtp_agent abstain (0.00): not my field",
    ]


def test_state_survives_json_and_a_step_is_never_voted_on_twice():
    mesh = VotingMesh()
    mesh.vote(quiet(0.70, step=7200))
    mesh.vote(quiet(0.75, step=8000, qat_enabled=True))
    resumed = VotingMesh()
    resumed.load_state_dict(json.loads(json.dumps(mesh.state_dict())))
    assert resumed.summary() == mesh.summary()
    assert resumed.log_lines() == mesh.log_lines()
    assert resumed.rows() == mesh.rows()
    assert not resumed.due(8000)
    assert resumed.due(8800)
    spike = quiet(0.88, qat_enabled=True, grad_norm=5.0)  # QAT is not fresh for the resumed mesh either
    assert resumed.vote(spike) == mesh.vote(spike) != []


def test_deterministic_apart_from_time():
    def run() -> tuple[list[Decision], list[Any]]:
        mesh = VotingMesh()
        decisions = [d for p in (0.1, 0.3, 0.5, 0.7, 0.8) for d in mesh.vote(at(p, grad_norm=2.5 * p + 1))]
        return decisions, [(step, motions) for step, _, motions in mesh.state_dict()["cycles"]]

    assert run() == run()


def test_a_run_of_voting_is_cheap():
    """The goal is 300 µs for 8 cycles; the limit here is loose because test machines are busy."""
    totals = []
    for _ in range(20):
        mesh = VotingMesh()
        for progress in (0.11, 0.23, 0.34, 0.46, 0.57, 0.69, 0.80, 0.92):
            mesh.vote(at(progress, grad_norm=3.0))
        totals.append(sum(us for _, us, _ in mesh.state_dict()["cycles"]))
    assert 0 < min(totals) < 300
    assert sorted(totals)[10] < 3000


def test_imports_the_standard_library_alone():
    code = (
        "import sys; sys.path.insert(0, '.'); import swarm_agents, kg_data; "
        "print(*sorted(m.split('.')[0] for m in sys.modules if m.split('.')[0] in {'torch', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_no_qat_where_the_settings_rule_it_out():
    for progress, lr_scale in ((0.5, 0.1), (0.75, 1.0), (0.99, 0.0)):
        metrics = quiet(progress, current_lr_scale=lr_scale)
        assert changes(VotingMesh().vote(metrics)) == {"qat": 1.0}
        assert VotingMesh().vote(dataclasses.replace(metrics, qat_available=False)) == []
