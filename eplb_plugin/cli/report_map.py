"""`eplb-plugin report --map`: a placement alone, or with a load, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..config.sources import COMMAND_LINE, Settings
from ..core.balancedness import balancedness
from ..core.errors import ConfigError, TopologyError
from ..core.placement import Placement
from ..core.topology import Topology
from ..formats.placements import PlacementFile, read_placement_file
from ..offline.traces import LoadTrace
from ..report.replica_spread import ReplicaSpread, replica_spread
from .console import counted, size_of, tell_left_out
from .loading import load_for, recording_for

__all__ = ["report_map"]

_HEADINGS = {
    "spare_slots": "spare\nslots",
    "repeats_on_rank": "repeats\non their\nrank",
    "experts_on_one_rank": "experts\non one\nrank",
    "experts_on_one_node": "experts\non one\nnode",
    "replicated_experts": "several\nreplicas",
    "empty_slots": "empty\nslots",
}
# With these breaks, the table fits into 80 columns.

# Parameters of `report` for a map alone, and for the load beside it.
_OF_MAPS = frozenset({"traces", "map_file", "ranks", "slots", "nodes", "config", "as_json"})
_OF_LOADS = frozenset({"mode", "batch", "max_tokens", "steps"})


def report_map(
    context: typer.Context, path: Path, traces: list[str], settings: Settings, as_json: bool
) -> None:
    """Print the table of the placement `path`, with its balancedness if `traces` names a load.

    Raises:
        ConfigError: an option without use here, several loads, or no number of ranks.
        TraceError, PlacementError, TopologyError: the file, the load or their numbers are wrong.
    """
    for parameter in context.command.params:
        given = context.params.get(parameter.name or "")
        if parameter.name in _OF_MAPS or given in (None, False, [], ()):
            continue
        if parameter.name not in _OF_LOADS:
            raise ConfigError(f"{parameter.opts[0]} is of no use with --map, which prints a table")
        if not traces:
            raise ConfigError(f"{parameter.opts[0]} is for a load, and none is given beside --map")
    if len(traces) > 1:
        raise ConfigError(f"--map takes one load, not {len(traces)}")
    load = recording = None
    if traces:
        errors = Console(stderr=True)
        with errors.status("reading the load"):
            recording, _ = recording_for(traces[0], settings)
            load = load_for(traces[0], settings, recording=recording)
        tell_left_out(errors, traces[0], recording)
    expected = (None, None) if load is None else (load.num_experts, load.layer_ids)
    content = read_placement_file(path, *expected)
    topology = _topology(path, content, settings, None if recording is None else recording.newest.topology)
    spread = replica_spread(content.placement, topology)
    balance = None if load is None else _balance(load.load, content.placement, topology)
    Console().print(_table(path, content, topology, spread, load, balance))
    if as_json:
        print(json.dumps(_plain(path, content, topology, spread, balance)))


def _topology(path: Path, content: PlacementFile, settings: Settings, recorded: Topology | None) -> Topology:
    """The topology of the file. The command line wins over it, and it over other settings and a recording."""
    given, origins = settings.simulate, settings.origins
    slots = content.placement.num_slots
    if origins.get("simulate.slots") == COMMAND_LINE and given.slots != slots:
        raise ConfigError(f"{path}: has {slots} slots, not --slots {given.slots}")
    asked = origins.get("simulate.ranks") == COMMAND_LINE
    ranks, rank_slots = content.num_ranks, content.rank_slots
    if asked or (ranks is None and rank_slots is None and "simulate.ranks" in origins):
        ranks, rank_slots = given.ranks, None
    nodes = content.num_nodes
    if ranks is None and rank_slots is None and recorded is not None:
        ranks, nodes = recorded.num_ranks, recorded.num_nodes if nodes is None else nodes
        rank_slots = recorded.rank_slots if recorded.num_slots == slots else None
    if rank_slots is not None:
        ranks = len(rank_slots)
    if ranks is None:
        raise ConfigError(f"{path}: does not say over how many ranks its {slots} slots spread; add --ranks")
    if nodes is None or origins.get("simulate.nodes") == COMMAND_LINE:
        nodes = given.nodes
    try:
        return Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, rank_slots=rank_slots)
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from None


class _Balance(NamedTuple):
    """Balancedness of a load with the even split: of each layer, of all, and with the default placement."""

    layers: list[float]
    whole: float
    default: float


def _balance(load: torch.Tensor, placement: Placement, topology: Topology) -> _Balance:
    """Of `load` [steps, layers, logical], step by step: ranks wait for peaks that a sum over steps hides."""
    layers = [
        balancedness(load[:, layer : layer + 1], Placement(row[None], placement.num_logical), topology)
        for layer, row in enumerate(placement.physical_to_logical)
    ]
    default = Placement.default(placement.num_layers, placement.num_logical, placement.num_slots)
    whole, before = (balancedness(load, item, topology) for item in (placement, default))
    return _Balance(layers, whole, before)


def _columns(spread: ReplicaSpread, topology: Topology) -> dict[str, torch.Tensor]:
    """Counts by layer, int64 [layers], under their names in JSON."""
    columns = {
        "spare_slots": spread.spare,
        "repeats_on_rank": spread.repeats,
        "experts_on_one_rank": spread.on_one_rank,
        "experts_on_one_node": spread.on_one_node,
        "replicated_experts": spread.replicated,
        "empty_slots": spread.empty,
    }
    if topology.num_nodes == 1:
        del columns["experts_on_one_node"]
    if not bool(spread.empty.any()):
        del columns["empty_slots"]
    return columns


def _table(
    path: Path,
    content: PlacementFile,
    topology: Topology,
    spread: ReplicaSpread,
    load: LoadTrace | None,
    balance: _Balance | None,
) -> Table:
    placement = content.placement
    size = [
        counted(placement.num_layers, "layer"),
        f"{placement.num_logical} experts in {topology.num_slots} slots",
        f"{counted(topology.num_ranks, 'rank')} on {counted(topology.num_nodes, 'node')}",
    ]
    columns = _columns(spread, topology)
    table = Table(
        title=f"{path}: {', '.join(size)}",
        caption=_caption(columns, spread, load, balance),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_footer=True,
    )
    most = spread.replica_count.amax(1)
    table.add_column("layer", "sum", justify="right")
    for name, values in columns.items():
        table.add_column(_HEADINGS[name], str(int(values.sum())), justify="right")
    table.add_column("most\nreplicas", str(int(most.max())), justify="right")
    if balance is not None:
        table.add_column("balanced-\nness", f"{balance.whole:.4f}", justify="right")
    for index, layer in enumerate(content.layer_ids):
        counts = [str(int(values[index])) for values in columns.values()]
        scores = [] if balance is None else [f"{balance.layers[index]:.4f}"]
        table.add_row(str(layer), *counts, str(int(most[index])), *scores)
    return table


def _caption(
    columns: dict[str, torch.Tensor],
    spread: ReplicaSpread,
    load: LoadTrace | None,
    balance: _Balance | None,
) -> str:
    replicas, experts = torch.unique(spread.replica_count, return_counts=True)
    by_replicas = ", ".join(
        f"{count} with {number}" for number, count in zip(replicas.tolist(), experts.tolist(), strict=True)
    )
    told = [f"Replicas of an expert, over all layers: {by_replicas}."]
    repeats, spare = int(columns["repeats_on_rank"].sum()), int(columns["spare_slots"].sum())
    if repeats:
        told.append(
            f"{repeats} of {spare} spare slots repeat an expert of their rank, which relieves no rank."
        )
    if load is not None and balance is not None:
        told.append(
            f"Balancedness of {load.name} ({size_of(load)}) with the even split; "
            f"the engine's default placement has {balance.default:.4f}."
        )
    return " ".join(told)


def _plain(
    path: Path, content: PlacementFile, topology: Topology, spread: ReplicaSpread, balance: _Balance | None
) -> dict[str, object]:
    columns = _columns(spread, topology)
    layers: list[dict[str, object]] = []
    for index, layer in enumerate(content.layer_ids):
        row: dict[str, object] = {"layer": layer}
        row |= {name: int(values[index]) for name, values in columns.items()}
        row["replica_count"] = spread.replica_count[index].tolist()
        if balance is not None:
            row["balancedness"] = balance.layers[index]
        layers.append(row)
    whole: dict[str, object] = {
        "map": str(path),
        "experts": content.placement.num_logical,
        "slots": topology.num_slots,
        "ranks": topology.num_ranks,
        "nodes": topology.num_nodes,
    }
    whole |= {name: int(values.sum()) for name, values in columns.items()}
    if balance is not None:
        whole |= {"balancedness": balance.whole, "default_balancedness": balance.default}
    return whole | {"layers": layers}
