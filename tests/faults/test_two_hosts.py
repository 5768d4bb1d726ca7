"""Two hosts under torchrun, and the cable between them is cut in the middle of a rebalance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.host_program import LIMIT, MARGIN, RANKS_PER_HOST
from tests.faults.network import Hosts, missing, two_hosts
from tests.faults.table import Record

ROOT = Path(__file__).resolve().parents[2]
PORT = 29_477
START = 90.0  # seconds until they serve and rebalance


def start(hosts: Hosts, host: int, folder: Path, phase: str, mode: str) -> subprocess.Popen[bytes]:
    torchrun = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            str(RANKS_PER_HOST),
        ),
        *("--rdzv-backend", "c10d", "--rdzv-id", "faults", "--rdzv-endpoint", f"{hosts.address(0)}:{PORT}"),
        *("--rdzv-conf", f"is_host={1 - host}", "--local-addr", hosts.address(host)),
        *("-m", "tests.faults.host_program", str(folder), phase, mode),
    ]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": hosts.devices[host], "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with (folder / f"host.{host}").open("wb") as output:
        return subprocess.Popen(
            hosts.command(host, torchrun),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(paths: list[Path], seconds: float, folder: Path) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            said = "\n".join((folder / f"host.{host}").read_text()[-6000:] for host in (0, 1))
            names = [path.name for path in paths if not path.exists()]
            raise AssertionError(f"no {names} after {seconds:g} s\n{said}")
        time.sleep(0.02)


def cut_while_serving(phase: str, mode: str) -> list[dict[str, Any]]:
    """What each rank was left with."""
    with tempfile.TemporaryDirectory() as name, two_hosts() as hosts:
        folder = Path(name)
        launchers = [start(hosts, host, folder, phase, mode) for host in (0, 1)]
        try:
            wait_for([folder / "ready"], START, folder)
            hosts.cut()
            (folder / "fault.new").write_text(repr(time.monotonic()))
            (folder / "fault.new").rename(folder / "fault")
            ended = [folder / f"survivor.{rank}" for rank in range(2 * RANKS_PER_HOST)]
            wait_for(ended, 2 * LIMIT + MARGIN + 20, folder)
            return [json.loads(path.read_text()) for path in ended]
        finally:
            hosts.kill()
            for launcher in launchers:
                launcher.wait()


WHY_NOT = missing()


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("phase", ["transfer", "commit"])
def test_the_link_between_two_hosts_is_cut(phase: str, mode: str, record: Record) -> None:
    ranks = cut_while_serving(phase, mode)
    decided = [rank for rank in ranks if not rank["undecided"]]
    assert all(rank["wrong"] == 0 for rank in decided)
    assert all(rank["rows"] == decided[0]["rows"] for rank in decided)
    # The store is on the first host, which therefore always knows.
    assert all(rank in decided for rank in ranks[:RANKS_PER_HOST])
    if phase == "transfer":
        # No vote was under way, so it is certain that nothing was switched over. A rank that has nothing to
        # exchange with the other host votes all the same.
        assert any(rank["crossed"] for rank in ranks)
        assert all(rank in decided for rank in ranks if rank["crossed"])
    assert all(rank["seconds"] < 2 * LIMIT + MARGIN for rank in ranks)
    record(
        "link between two hosts cut",
        mode,
        f"during {phase}",
        placement=True,
        outputs=None,
        seconds=max(rank["seconds"] for rank in ranks),
        after="off" if decided == ranks else "off; UndecidedError on the side without the store",
    )
