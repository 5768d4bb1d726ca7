"""Rules of when not to balance, each with its source; and how to enable the best setting in an engine."""

from __future__ import annotations

import json

from ..config.options import PlannerOptions
from .advice import Advice
from .machine import Machine

__all__ = ["how_to_enable", "when_not"]

_FEW_TOKENS = 128
_FEW_EXPERTS = 8
_EVEN = 0.95
_SHORT_SECONDS = 600.0
_MOST_STEPS_OF_WINDOW = 1000  # vLLM keeps each of them: 58 layers of 288 slots take 67 MB

_ASCEND = "vLLM Ascend's user guide on EPLB"
_LPLB = "LMSYS and NVIDIA on LPLB in SGLang: 1 to 1.6 % less prefill throughput where nothing is uneven"
_KINDS = "loads of different kinds of traffic correlate at 0.1, docs/advise.md"
_METRO = "METRO, arXiv 2512.09277: replicas cost 11 to 22 % of decode latency on 8 A100"


def when_not(advice: Advice, machine: Machine, num_experts: int, seconds: float) -> list[str]:
    """Sentences for people: the rules against balancing that apply to a load.

    Args:
        advice: result of the sweep.
        machine: ranks and times.
        num_experts: logical experts per layer.
        seconds: duration of the load; 0: unknown.
    """
    said = []
    experts = -(-num_experts // machine.ranks)
    if advice.static >= _EVEN:
        said.append(
            f"Rule: even traffic. Balancedness is {advice.static:.3f} as it is: balancing can "
            f"only cost ({_LPLB})."
        )
    if advice.rank_load < _FEW_TOKENS:
        said.append(
            f"Rule: few tokens. A rank gets {advice.rank_load:.0f} tokens in a layer and step, below "
            f"{_FEW_TOKENS}: in decode, the gain may not cover the cost ({_ASCEND})."
        )
    if experts <= _FEW_EXPERTS:
        said.append(
            f"Rule: few experts. A rank has {experts} of {num_experts} experts, {_FEW_EXPERTS} or fewer: in "
            f"decode, the gain may not cover the cost ({_ASCEND})."
        )
    redundant = advice.best.setting.slots - num_experts
    per_slot = advice.rank_load * machine.ranks / advice.best.setting.slots
    if redundant and machine.expert_cost and per_slot < machine.expert_cost:
        said.append(
            f"Rule: replicas in small batches. A slot gets {per_slot:.1f} tokens a step; reading an "
            f"expert takes as long as {machine.expert_cost}. Each replica in use costs time ({_METRO})."
        )
    if 0 < seconds < _SHORT_SECONDS:
        said.append(
            f"Rule: short recordings. The load covers {seconds:.0f} s; traffic changes over hours. "
            f"Record {_SHORT_SECONDS / 60:.0f} minutes at least, at the hours that matter ({_KINDS})."
        )
    return said


def how_to_enable(advice: Advice, machine: Machine, engine: str, num_experts: int) -> str:
    """The best setting as the arguments of an engine, worth it or not.

    Args:
        advice: result of the sweep.
        machine: ranks, nodes and groups.
        engine: `vLLM`, `SGLang`, or anything else for the library.
        num_experts: logical experts per layer.
    """
    best = advice.best.setting
    redundant, interval = best.slots - num_experts, advice.engine_interval(best)
    default = best.move_price == PlannerOptions().move_price
    balanced = advice.dispatch is not None and advice.dispatch.is_worth_it is True and redundant > 0
    if engine == "SGLang":
        given = ([] if default else [f"move_price={best.move_price:g}"]) + (["dispatch=balanced"] * balanced)
        options = f":{','.join(given)}" if given else ""
        return (
            f"--enable-eplb --eplb-algorithm eplb_plugin{options} --ep-num-redundant-experts {redundant} "
            f"--eplb-rebalance-num-iterations {interval}"
        )
    if engine == "vLLM":
        window = min(interval, _MOST_STEPS_OF_WINDOW)
        eplb = {"num_redundant_experts": redundant, "step_interval": interval, "window_size": window}
        ours: dict[str, object] = {"enabled": True}
        if balanced:
            ours["dispatch"] = "balanced"
        if not default:
            ours["planner"] = {"move_price": best.move_price}
        return (
            f"--enable-expert-parallel --enable-eplb --eplb-config '{json.dumps(eplb)}' --additional-config "
            f"'{json.dumps({'eplb_plugin': ours})}'"
        )
    options = f"interval={interval}" + (', dispatch="balanced"' if balanced else "")
    price = "" if default else f", planner=PlannerOptions(move_price={best.move_price:g})"
    topology = f"num_ranks={machine.ranks}, num_slots={best.slots}"
    topology += f", num_nodes={machine.nodes}" if machine.nodes > 1 else ""
    topology += f", num_groups={machine.groups}" if machine.groups > 1 else ""
    return f"Rebalancer(Topology({topology}), ..., options=RebalancerOptions({options}){price})"
