"""Methods that the tests add to vLLM's workers: they check weights against maps, and break the planner."""

import hashlib
import json
import os
import time
from pathlib import Path

import torch

from eplb_plugin import Placement


class WorkerChecks:
    """vLLM mixes this into its worker (`worker_extension_cls`); each method runs on every rank.

    Results go to one file per rank, since vLLM returns only the first engine's under data parallelism. With a
    pipeline, each stage has a folder.
    """

    def watch(self):
        """From now on, check all rows of this rank after each step that changed a map."""
        from vllm.distributed.parallel_state import get_ep_group, get_pp_group

        self.ep_rank = get_ep_group().rank_in_group
        self.folder = Path(os.environ["WORKER_CHECKS_FOLDER"])
        if get_pp_group().world_size > 1:
            # Each stage numbers its ranks and its layers anew.
            self.folder /= f"stage-{get_pp_group().rank_in_group}"
            self.folder.mkdir(exist_ok=True)
        state = self.model_runner.eplb_state
        (self.model_state,) = state.model_states.values()
        self.seen = {"changes": 0, "rows": 0, "wrong": [], "layers": 0, "calls": 0}
        first = {f"{layer} {expert}": row for layer, expert, row in self._rows()}
        self._write("start", first)
        self.map = self.model_state.physical_to_logical_map.clone()
        step, policy = state.step, state.policy

        def checked_step(*args, **kwargs):
            # Before: the step takes the load over and may change the map.
            if bool(state.should_record_tensor):
                self._count_step()
            step(*args, **kwargs)
            self._check()

        state.step = checked_step
        if not isinstance(policy, type):
            plan = policy.rebalance_experts

            def counted(*args, **kwargs):
                self.seen["calls"] += 1
                return plan(*args, **kwargs)

            policy.rebalance_experts = counted
        self._write("checks", self.seen)

    def rearrange_every(self, steps):
        """From now on, a rearrangement begins every so many steps."""
        state = self.model_runner.eplb_state
        state.expert_rearrangement_step_interval = steps
        state.expert_rearrangement_step = 0

    def go_on_in_sync_mode(self):
        """From now on, rearrange in vLLM's synchronous mode. No rearrangement may be under way."""
        state = self.model_runner.eplb_state
        assert state.is_async
        assert not self.model_state.rebalanced
        state.is_async = False

    def break_planner(self, how):
        """Replace the planner: one that raises, returns a wrong map, is slow, or differs between ranks."""
        policy = self.model_runner.eplb_state.policy
        for planner in policy.planners.values():
            original = type(planner).plan

            def broken(window, topology, current, planner=planner, original=original):
                if how == "raises":
                    raise RuntimeError("the planner broke")
                if how == "slow":
                    time.sleep(0.5)
                    return original(planner, window, topology, current)
                if how == "differs" and self.ep_rank == 0:
                    return current
                ids = current.physical_to_logical.roll(1, 1)
                placement = Placement(ids, current.num_logical)
                if how == "wrong":
                    # No expert but 0 is left, behind the back of the constructor's checks.
                    placement.physical_to_logical.zero_()
                return placement

            planner.plan = broken

    def mend_planner(self):
        """Undo `break_planner`."""
        for planner in self.model_runner.eplb_state.policy.planners.values():
            del planner.plan

    def split_by_cost(self, expert_cost):
        """The negative control: the first rank splits batches by another cost than the other ranks."""
        from vllm.model_executor.layers.fused_moe.router import base_router

        if self.ep_rank == 0:
            base_router.eplb_map_to_physical_and_record.split.expert_cost = expert_cost

    def commit_without_moving(self):
        """The negative control: a map that the weights do not follow."""
        from vllm.distributed.eplb.eplb_state import _commit_eplb_maps

        _commit_eplb_maps(self.model_state, self.model_state.physical_to_logical_map.cpu().roll(1, 1))
        self._check()

    def describe_policy(self):
        """What vLLM plans with, and what is bound to its state."""
        state = self.model_runner.eplb_state
        policy = state.policy if isinstance(state.policy, type) else type(state.policy)
        return {
            "policy": f"{policy.__module__}.{policy.__qualname__}",
            "bound": sorted({"add_model", "rearrange"} & set(vars(state))),
            "report": hasattr(self, "eplb_plugin_report"),
        }

    def show_metrics(self):
        """The series of this process, as its `/metrics` would show them."""
        from prometheus_client import generate_latest

        return generate_latest().decode()

    def _count_step(self):
        """Write what vLLM has counted in the step that ends, and the map that was in force."""
        load = self.model_state.expert_load_pass.tolist()
        line = json.dumps({"load": load, "map": self.model_state.physical_to_logical_map.tolist()})
        with (self.folder / f"steps-{self.ep_rank}.jsonl").open("a") as file:
            file.write(f"{line}\n")

    def _check(self):
        changed = (self.model_state.physical_to_logical_map != self.map).any(1)
        if bool(changed.any()):
            self.seen["changes"] += 1
            self.seen["layers"] += int(changed.sum())
            self.seen["rows"] += int((self.model_state.physical_to_logical_map != self.map).sum())
            self.map = self.model_state.physical_to_logical_map.clone()
            right = {}
            for path in self.folder.glob("start-*.json"):
                right.update(json.loads(path.read_text()))
            self.seen["wrong"] += [
                [layer, expert] for layer, expert, row in self._rows() if right[f"{layer} {expert}"] != row
            ]
        self._write("checks", self.seen)

    def _rows(self):
        """(layer, logical expert that the map names, checksum of its weights) of each slot of this rank."""
        for layer, weights in enumerate(self.model_state.model.expert_weights):
            slots = weights[0].shape[0]
            experts = self.model_state.physical_to_logical_map[layer, self.ep_rank * slots :][:slots]
            for slot, expert in enumerate(experts.tolist()):
                digest = hashlib.blake2b(digest_size=8)
                for weight in weights:
                    digest.update(weight[slot].contiguous().view(torch.uint8).numpy().tobytes())
                yield layer, expert, digest.hexdigest()

    def _write(self, name, content):
        path = self.folder / f"{name}-{self.ep_rank}.json"
        # Renamed into place, so that a reader never sees half of it.
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content))
        part.rename(path)
