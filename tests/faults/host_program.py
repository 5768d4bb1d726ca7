"""What torchrun starts on each of two hosts: serves with rebalances, and lives on when the link is cut.

Usage: host_program.py FOLDER PHASE MODE, with a folder that both hosts see.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from eplb_plugin.runtime.weights.transfer import Transfer
from tests.faults.cluster import Seat, hear_errors
from tests.faults.phases import at_phases, once
from tests.faults.serving import Service

LIMIT = 4.0
ENGINE_LIMIT = 15.0  # in the background mode, the serving thread is in the model's own messages meanwhile
MARGIN = ENGINE_LIMIT + 20.0
RANKS_PER_HOST = 2


def main(folder: Path, phase: str, mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=ENGINE_LIMIT))
    seat = Seat(dist.get_rank(), dist.get_world_size(), folder)
    hear_errors(seat)
    service = Service(seat, mode=mode, time_limit=LIMIT)
    service.serve(3)

    def wait_for_the_cut() -> None:
        seat.mark("ready")
        while seat.marked("fault") is None:
            time.sleep(0.01)

    start = Transfer.start

    def late(self: Transfer) -> None:
        """The other host's messages are under way when those of this one cannot leave any more."""
        for now in self._staged.rounds:
            peers.update(message.rank for message in (*(send for send, _ in now.sends), *now.receives))
        wait_for_the_cut()
        start(self)

    peers: set[int] = set()
    second = seat.rank >= RANKS_PER_HOST
    halfway = second and phase == "transfer"
    entering = second and phase != "transfer"
    with (
        mock.patch.object(Transfer, "start", late) if halfway else nullcontext(),
        at_phases(once(phase, wait_for_the_cut)) if entering else nullcontext(),
    ):
        # The client of a store that is cut off waits as long as TCP does, in a thread that is given up on.
        survivor = service.outlive(2 * LIMIT + MARGIN, left_over="eplb-decisions" if second else "")
    written = folder / f"new.{seat.rank}"
    more = {"wrong": service.model.wrong_slots(), "crossed": any(rank < RANKS_PER_HOST for rank in peers)}
    written.write_text(json.dumps(asdict(survivor) | more))
    written.rename(folder / f"survivor.{seat.rank}")
    # Nothing can be said to the other host any more, so there is nobody to say goodbye to.
    threading.Timer(1.0, os._exit, (0,)).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4])
