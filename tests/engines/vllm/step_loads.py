"""The load of every slot in single steps, as vLLM counted it, against the split that `balance_batch` says."""

import json

import torch

import eplb_plugin as eplb


def count_steps(folder):
    """Steps that all ranks have written down so far."""
    return min((path.read_text().count("\n") for path in folder.glob("steps-*.jsonl")), default=0)


def read_steps(folder, end=None, first=0):
    """Loads [steps, ranks, layers, slots] and maps [steps, layers, slots]: the same on all ranks."""
    paths = sorted(folder.glob("steps-*.jsonl"))
    end = count_steps(folder) if end is None else end
    ranks = [[json.loads(line) for line in path.read_text().splitlines()[first:end]] for path in paths]
    maps = torch.tensor([[step["map"] for step in steps] for steps in ranks])
    assert (maps == maps[0]).all(), "ranks had different maps in the same step"
    return torch.tensor([[step["load"] for step in steps] for steps in ranks]).transpose(0, 1), maps[0]


def wrong_steps(loads, maps, *, sharded, expert_cost=0):
    """Steps in which a slot did not get the tokens that the split of the whole batch gives it.

    Args:
        loads: integer [steps, ranks, layers, slots].
        maps: integer [steps, layers, slots].
        sharded: whether each rank has counted tokens of its own. Otherwise all have counted the same.
    """
    _, ranks, _, slots = loads.shape
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
    logical = int(maps.max()) + 1
    wrong = []
    for step, (load, ids) in enumerate(zip(loads.long(), maps.long(), strict=True)):
        total = load.sum(0) if sharded else load[0]
        counts = torch.zeros(len(ids), logical, dtype=torch.int64).scatter_add_(1, ids, total)
        wanted = eplb.balance_batch(counts, eplb.Placement(ids, logical), topology, expert_cost=expert_cost)
        same = sharded or bool((load == load[0]).all())
        if not (same and torch.equal(total, wanted)):
            wrong.append(step)
    return wrong
