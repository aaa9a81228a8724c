"""Four rule-based agents that vote on training controls, after contest pull request 1081; imports no torch.

Agents, thresholds and confidences are that pull request's. Progress also counts the wallclock budget, a
proposal equal to the current value is none, and votes are cast: each agent answers each proposal.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

APPROVE, ABSTAIN, VETO = "approve", "abstain", "veto"
MIN_CONFIDENCE = 0.6  # what a proposal needs to pass, and a veto to stand
QAT_DEADLINE = 0.65  # progress past which QAT starts whatever the gradients do
LARGE_GRAD_NORM = 2.0

# What the swarm may touch, and how far; the names are the fields of `Controls` in train_gpt.py.
BOUNDS = {"qat": (0.0, 1.0), "kg_weight": (0.0, 1.0), "mtp_weight": (0.0, 1.0), "clip_norm": (0.01, 10.0)}


def check_value(parameter: str, value: float) -> None:
    """Raise ValueError for an unknown parameter, a value out of its bounds, or NaN."""
    if parameter not in BOUNDS:
        raise ValueError(f"swarm parameter {parameter!r} is unknown; known: {', '.join(BOUNDS)}")
    low, high = BOUNDS[parameter]
    if not low <= value <= high or (parameter == "qat" and value not in (0, 1)):
        link = "or" if parameter == "qat" else "to"
        raise ValueError(f"swarm parameter {parameter}={value}; allowed: {low:g} {link} {high:g}")


@dataclass(frozen=True)
class TrainingMetrics:
    """What the agents see at one step, the same on every rank. Losses in nats, times in milliseconds."""

    step: int
    total_steps: int
    train_loss: float
    grad_norm: float  # global, before clipping
    elapsed_ms: float
    max_wallclock_ms: float  # 0: no budget
    current_lr_scale: float
    qat_enabled: bool
    kg_weight: float  # 0: no knowledge graph
    mtp_weight: float  # 0: no MTP heads
    clip_norm: float  # 0: no clipping
    loss_history: tuple[float, ...] = ()
    qat_available: bool = True  # false: the run's settings rule QAT out

    @property
    def progress(self) -> float:
        """Fraction of the run done, by steps or by wallclock budget, whichever is further."""
        by_clock = self.elapsed_ms / self.max_wallclock_ms if self.max_wallclock_ms > 0 else 0.0
        return max(self.step / self.total_steps, by_clock)


class Decision(NamedTuple):
    """A change of one parameter: a proposal while it is voted on, a decision once it passed."""

    parameter: str
    old: float
    new: float
    agent: str
    confidence: float
    reason: str


Wish = tuple[float, float, str]  # new value of the agent's parameter, confidence, reason
Motion = tuple[Decision, TrainingMetrics, bool]  # true: first voting cycle after QAT began
Vote = tuple[str, str, float, str]  # agent; approve, abstain or veto; confidence; reason


class Agent(ABC):
    """Owner of one parameter, who approves the change it proposed and abstains from what others propose."""

    name: str
    parameter: str

    @abstractmethod
    def propose(self, metrics: TrainingMetrics) -> Wish | None:
        """Return the change wanted now, or None."""

    def vote(self, motion: Motion) -> Vote:
        """Answer a proposal; agents that judge other parameters as well extend this."""
        if motion[0].agent == self.name:
            return self.name, APPROVE, motion[0].confidence, "own proposal"
        return self.name, ABSTAIN, 0.0, "not my field"


class QATTimingAgent(Agent):
    """Starts QAT late in warm-down or at the deadline; vetoes a tighter clip while its own jump settles."""

    name, parameter = "qat_agent", "qat"

    def propose(self, metrics: TrainingMetrics) -> Wish | None:
        progress, lr_scale, allowed = metrics.progress, metrics.current_lr_scale, metrics.qat_available
        if allowed and progress > 0.40 and lr_scale < 0.15:
            return 1.0, 0.90, f"progress={progress:.2f}, lr_scale={lr_scale:.4f}, warmdown region"
        return (1.0, 0.95, f"progress={progress:.2f}, QAT deadline") if allowed and progress > QAT_DEADLINE else None

    def vote(self, motion: Motion) -> Vote:
        proposal, _, qat_is_fresh = motion
        if qat_is_fresh and proposal.parameter == "clip_norm" and proposal.new < proposal.old:
            return self.name, VETO, 0.80, "QAT has just begun"
        return super().vote(motion)


class KGWeightAgent(Agent):
    """Moves a positive KG loss weight to its stage, 0.5, 0.4, 0.3, 0.1, when off by more than 0.05."""

    name, parameter = "kg_weight_agent", "kg_weight"

    def propose(self, metrics: TrainingMetrics) -> Wish | None:
        progress = metrics.progress
        target = 0.5 if progress < 0.15 else 0.4 if progress < 0.40 else 0.3 if progress < 0.70 else 0.1
        off = metrics.kg_weight > 0.0 and abs(target - metrics.kg_weight) > 0.05
        return (target, 0.75, f"progress={progress:.2f}, adjusting KG schedule") if off else None


class GradientHealthAgent(Agent):
    """Tightens a looser clip to 0.15 when grad_norm > 2.0; vetoes QAT meanwhile, up to the deadline."""

    name, parameter = "grad_health_agent", "clip_norm"

    def propose(self, metrics: TrainingMetrics) -> Wish | None:
        loose = metrics.grad_norm > LARGE_GRAD_NORM and metrics.clip_norm > 0.15
        return (0.15, 0.85, f"grad_norm={metrics.grad_norm:.3f}, tighten clipping") if loose else None

    def vote(self, motion: Motion) -> Vote:
        proposal, metrics, _ = motion
        if proposal.parameter != "qat":
            return super().vote(motion)
        if metrics.progress > QAT_DEADLINE or metrics.grad_norm <= LARGE_GRAD_NORM:  # a NaN norm is not calm
            return self.name, APPROVE, 0.70, "gradients are calm or the QAT deadline is past"
        return self.name, VETO, 0.85, f"grad_norm={metrics.grad_norm:.3f}, too large for QAT"


class MTPWeightAgent(Agent):
    """Lowers a larger MTP weight to 0.05 when progress > 0.75."""

    name, parameter = "mtp_agent", "mtp_weight"

    def propose(self, metrics: TrainingMetrics) -> Wish | None:
        late = metrics.progress > 0.75 and metrics.mtp_weight > 0.05
        return (0.05, 0.65, "late training, shift focus to primary loss") if late else None


class VotingMesh:
    """Holds a vote every `every` steps and logs it. Deterministic but for the logged microseconds.

    A proposal passes when its confidence is at least 0.6 and no veto of 0.6 or more stands against it.
    Raises ValueError when `every` is not positive.
    """

    def __init__(self, every: int = 800, agents: tuple[Agent, ...] | None = None):
        if every <= 0:
            raise ValueError(f"swarm voting period is {every}; allowed: a positive number of steps")
        self.every = every
        self.agents = agents or (QATTimingAgent(), KGWeightAgent(), GradientHealthAgent(), MTPWeightAgent())
        self._qat_was_on = False
        self._cycles: list[tuple[int, float, list[Any]]] = []  # step, µs, (proposal, votes, passed) each

    def due(self, step: int) -> bool:
        """Tell whether to vote at `step`: never at 0, nor at a step voted on already (as after a resume)."""
        return step % self.every == 0 and step > (self._cycles[-1][0] if self._cycles else 0)

    def vote(self, metrics: TrainingMetrics) -> list[Decision]:
        """Hold one cycle and return what passed, for the caller to apply; ValueError as in `check_value`."""
        start_ns = time.perf_counter_ns()
        qat_is_fresh, self._qat_was_on = metrics.qat_enabled and not self._qat_was_on, metrics.qat_enabled
        motions: list[tuple[Decision, list[Vote], bool]] = []
        for agent in self.agents:
            wish, parameter = agent.propose(metrics), agent.parameter
            if wish is None:
                continue
            new, confidence, reason = wish
            check_value(parameter, new)
            old = float(metrics.qat_enabled if parameter == "qat" else getattr(metrics, parameter))
            if new == old:
                continue
            motion = (Decision(parameter, old, new, agent.name, confidence, reason), metrics, qat_is_fresh)
            votes = [voter.vote(motion) for voter in self.agents]
            vetoed = any(choice == VETO and conf >= MIN_CONFIDENCE for _, choice, conf, _ in votes)
            motions.append((motion[0], votes, confidence >= MIN_CONFIDENCE and not vetoed))
        self._cycles.append((metrics.step, (time.perf_counter_ns() - start_ns) / 1000, motions))
        return [proposal for proposal, _, passed in motions if passed]

    def log_lines(self) -> list[str]:
        """Return the log of the cycle just held: a head, then each proposal's outcome and the votes on it."""
        step, us, motions = self._cycles[-1]
        lines = [f"swarm cycle:{len(self._cycles)} step:{step} proposals:{len(motions)} time:{us:.0f}us"]
        for (name, old, new, agent, _, reason), votes, passed in motions:
            lines.append(f"  {agent} {name} {old:g}->{new:g} {'passed' if passed else 'rejected'}: {reason}")
            lines += [f"    {voter} {choice} ({conf:.2f}): {why}" for voter, choice, conf, why in votes]
        return lines

    def rows(self) -> list[dict[str, Any]]:
        """Return the proposals of the cycle just held, each with the votes on it, for a log that machines read."""
        (*_, motions), keys = self._cycles[-1], ("vote", "confidence", "reason")
        return [
            {**Decision(*made)._asdict(), "passed": passed, "votes": {by: dict(zip(keys, vote)) for by, *vote in votes}}
            for made, votes, passed in motions
        ]

    def summary(self) -> list[str]:
        """Return the run's decisions in the established format: a head line, then one line a decision."""
        lines = [
            f"  cycle {n} step {step}: {agent} {parameter} {old:g}->{new:g} (conf={conf:.2f}, {us:.0f}us)"
            for n, (step, us, motions) in enumerate(self._cycles, 1)
            for (parameter, old, new, agent, conf, _), _, passed in motions
            if passed
        ]
        return [f"Swarm: {len(self._cycles)} cycles, {len(lines)} decisions", *lines]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, the log included, as values that JSON can hold."""
        return {"qat_was_on": self._qat_was_on, "cycles": list(self._cycles)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, straight or through JSON."""
        self._qat_was_on, self._cycles = state["qat_was_on"], list(state["cycles"])
