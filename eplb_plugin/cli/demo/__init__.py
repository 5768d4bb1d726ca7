"""`eplb-plugin demo`: the online loop on real processes, checked against the same model without it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from ...config.options import DemoOptions
from ...config.sources import Settings
from ...core.errors import TopologyError, TraceError
from ...core.topology import Topology
from ...dispatch.registry import find_dispatch
from ...formats.loads import read_trace
from ...offline.synthetic_traffic import topic_mix
from ...offline.token_replay import category_mix, decode_schedule
from ...offline.traces import LoadTrace
from ...planning.planner import warmup
from ..arguments import AsJson, Config, option, settings_for
from ..console import compiling, counted, progress_bar
from .outcome import DemoOutcome, DemoTally, IntervalOutcome
from .ranks import RankError, run_ranks
from .serving import IntervalRecord, MetricsReady, StepDone, model_config, serve

__all__ = ["demo", "run_demo"]


def demo(
    context: typer.Context,
    ranks: Annotated[int | None, option("demo.ranks")] = None,
    layers: Annotated[int | None, option("demo.layers")] = None,
    experts: Annotated[int | None, option("demo.experts")] = None,
    slots: Annotated[int | None, option("demo.slots")] = None,
    steps: Annotated[int | None, option("demo.steps")] = None,
    tokens: Annotated[int | None, option("demo.tokens")] = None,
    interval: Annotated[int | None, option("demo.interval")] = None,
    dispatch: Annotated[str | None, option("demo.dispatch")] = None,
    drift: Annotated[float | None, option("demo.drift")] = None,
    trace: Annotated[str | None, option("demo.trace")] = None,
    mode: Annotated[str | None, option("demo.mode")] = None,
    seed: Annotated[int | None, option("demo.seed")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of Prometheus metrics; by default there are none.")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Serve a small MoE model on several processes, rebalance under drifting traffic, check its outputs."""
    settings = settings_for(context, "demo")
    if metrics_port is not None:
        settings = settings.replaced("metrics.enabled", True)
    outcome = run_demo(settings, Console(stderr=True))
    console = Console()
    console.print(_table(settings.demo, outcome.intervals))
    console.print(outcome.summary(), highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(outcome.as_dict()))
    if not outcome.outputs_equal:
        raise typer.Exit(1)


def run_demo(settings: Settings, console: Console) -> DemoOutcome:
    """Run the demo with progress on `console`. If a rank fails, `console` gets the table so far.

    Raises:
        TraceError, TopologyError, ConfigError: the options contradict each other.
        RankError: a rank raised or died, or no rank made progress within the time limit.
    """
    options = settings.demo
    Topology(num_ranks=options.ranks, num_slots=options.slots).check_experts(options.experts)
    if options.top_k > options.experts:
        raise TopologyError(f"top_k={options.top_k} is above experts={options.experts}")
    mix = _mix(options)
    model_config(options, mix.shape[1])
    # Steps of this model take milliseconds: throttled background work would outlast the intervals.
    settings = settings.replaced("rebalancer.background_share", 1.0)
    settings = settings.replaced("rebalancer.interval", options.interval)
    settings = settings.replaced("rebalancer.dispatch", options.dispatch)
    find_dispatch(options.dispatch)
    with compiling(console, "loading the planner"):
        warmup(dispatch=settings.planner.for_dispatch(settings.rebalancer.splits).dispatch)
    bar = progress_bar(console)
    task = bar.add_task("steps served", total=options.steps)
    tally = DemoTally(options.ranks)
    messages = run_ranks(serve, options.ranks, (settings, mix), time_limit=options.time_limit)
    try:
        with Live(bar, console=console, transient=True) as live:
            for rank, message in messages:
                if isinstance(message, StepDone) and rank == 0:
                    bar.update(task, completed=message.steps)
                if isinstance(message, MetricsReady):
                    console.print(f"metrics at {message.url} while this runs", highlight=False)
                if isinstance(message, IntervalRecord):
                    tally.add(message)
                    live.update(Group(_table(options, tally.intervals), bar))
    except RankError:
        if tally.intervals:
            console.print(_table(options, tally.intervals))
        raise
    return tally.outcome()


def _mix(options: DemoOptions) -> npt.NDArray[np.float64]:
    """float64 [steps, topics]: share of each topic at each step."""
    if options.trace is None:
        rng = np.random.default_rng(options.seed)
        return topic_mix(options.steps, options.topics, drift=options.drift, period=options.period, rng=rng)
    trace = read_trace(options.trace)
    if isinstance(trace, LoadTrace):
        raise TraceError(
            f"{trace.name} holds loads only; the demo needs a token trace, whose requests have categories"
        )
    if options.mode == "prefill":
        return category_mix(trace, steps=options.steps)
    order: Any = {"drift": options.drift, "period": options.period, "seed": options.seed}
    return category_mix(trace, decode_schedule(trace, options.ranks * options.tokens, options.steps, **order))


def _table(options: DemoOptions, intervals: tuple[IntervalOutcome, ...]) -> Table:
    table = Table(
        title=f"{counted(options.ranks, 'rank')}, {counted(options.layers, 'layer')}, "
        f"{counted(options.experts, 'expert')} in {counted(options.slots, 'slot')}, "
        f"{counted(options.ranks * options.tokens, 'token')} per step",
        caption="static: balancedness (mean / max rank load) without rebalancing;\n"
        "plan: with rebalancing, tokens spread evenly over replicas;\n"
        f"dispatch: as measured, with dispatch {options.dispatch}.\n"
        "before, after: balancedness of the steps' sums under the placement\n"
        "in force and under the new one. moved: transfers of one expert.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in (
        "steps",
        "static",
        "plan",
        "dispatch",
        "before",
        "after",
        "moved",
        "MB",
        "plan ms",
        "move ms",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for item in intervals:
        steps = f"{item.first_step}-{item.first_step + item.steps - 1}"
        scores = (item.balancedness_static, item.balancedness_even, item.balancedness)
        cells = [steps, *(f"{score:.3f}" for score in scores)]
        if (report := item.report) is not None:
            cells += [
                f"{report.balancedness_before:.3f}",
                f"{report.balancedness_after:.3f}",
                str(report.moves),
                f"{(report.bytes_moved or 0) / 1e6:.1f}",
                f"{1000 * report.plan_seconds:.1f}",
                f"{1000 * (report.transfer_seconds + report.commit_seconds):.1f}",
            ]
        table.add_row(*cells)
    return table
