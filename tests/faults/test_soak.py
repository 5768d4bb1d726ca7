"""Hundreds of rebalances in a row: right to the last, and without more memory, threads or files."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.faults.cluster import Seat, StoreKind, run_cluster
from tests.faults.serving import SMALL, Service
from tests.faults.table import SOAK, Soak, Use

SIZE = 4
LIMIT = 540.0  # seconds; a thousand take two minutes on two idle cores, and five beside other tests
REBALANCES = int(os.environ.get("EPLB_SOAK", "300"))  # `make soak` has a thousand
WARMUP = 100  # rebalances; allocators and caches have seen every size by then
BYTES_EVERY = 50
GROWTH = 1.01
STORED = 1024  # bytes that a rebalance may leave in a store that is a file, since those are only appended to


def use(seat: Seat) -> Use:
    """Between two rebalances, with no thread of the balancer's under way but the one that asks the store."""
    while any(t.name.startswith("eplb-") and t.name != "eplb-decisions" for t in threading.enumerate()):
        time.sleep(0.001)
    gc.collect()
    rollup = Path("/proc/self/smaps_rollup").read_text().split()
    path = seat.folder / "store"
    return Use(
        rss=int(rollup[rollup.index("Rss:") + 1]),
        threads=len(os.listdir("/proc/self/task")),
        files=len(os.listdir("/proc/self/fd")),
        keys=dist.distributed_c10d._get_default_store().num_keys(),
        stored=path.stat().st_size if path.exists() else 0,
    )


def rebalance_on_and_on(seat: Seat, mode: str, rebalances: int, name: str) -> Soak:
    service = Service(seat, slots_per_rank=5, mode=mode, interval=3, commit_layers=2)
    balancer, config = service.balancer, service.config
    shares = [
        torch.empty(SMALL.num_layers, SMALL.num_logical).log_normal_(
            4, 1.2, generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(7)
    ]
    done, moving, first, last = 0, 0, None, None
    start = time.monotonic()
    while last is None:
        for layer in range(config.num_layers):
            balancer.record_counts(layer, shares[done % 7][layer].long())
        report = balancer.step()
        service.steps += 1
        if mode == "async":
            # An engine computes meanwhile; a loop that does nothing keeps the background from its core.
            time.sleep(0.002)
        if report is None:
            continue
        assert not report.failed, report.reason
        done += 1
        moving += report.moves > 0
        # The report comes in the same step on all ranks, so all of them get here.
        service.check_tables()
        service.check_outputs()
        if done % BYTES_EVERY == 0:
            service.check_weights()
        if mode == "async" and service.steps % balancer.options.interval == 0:
            continue  # the next one is under way already
        if done >= WARMUP and first is None:
            first = use(seat)
        if done >= rebalances:
            last = use(seat)
    seconds = time.monotonic() - start
    balancer.close()
    closed = use(seat)
    assert closed.threads < last.threads
    assert closed.files < last.files
    assert first is not None
    return Soak(name, seat.rank, done, moving, seconds, first, last)


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize(
    ("mode", "store", "rebalances"),
    [("async", "file", REBALANCES), ("sync", "tcp", max(2 * WARMUP, REBALANCES // 4))],
    ids=["async", "sync"],
)
def test_nothing_grows(mode: str, store: StoreKind, rebalances: int, record_property) -> None:
    ranks = run_cluster(
        rebalance_on_and_on, SIZE, mode, rebalances, f"{mode}, {store} store", store=store, limit=LIMIT
    )
    for soak in ranks:
        record_property(SOAK, asdict(soak))
        assert soak.rebalances >= rebalances
        assert soak.moving > 0.95 * soak.rebalances
        assert soak.last.rss <= GROWTH * soak.first.rss, soak
        assert soak.last.threads <= soak.first.threads, soak
        assert soak.last.files <= soak.first.files, soak
        assert soak.last.keys <= soak.first.keys + 2, soak
        assert soak.last.stored - soak.first.stored <= STORED * (soak.rebalances - WARMUP), soak
