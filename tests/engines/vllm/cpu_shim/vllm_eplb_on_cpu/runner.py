"""The CPU model runner makes an EPLB state and steps it, as the model runners for accelerators do."""

import functools


def with_eplb():
    """(7, 8, 9) A device index for vLLM's thread, the state around the loading of the model, pipelines."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    make = EplbState.__init__
    load = CPUModelRunner.load_model
    sample = CPUModelRunner.sample_tokens

    @functools.wraps(make)
    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.device_index = 0

    @functools.wraps(load)
    def load_model(self, *args, **kwargs):
        enabled = self.parallel_config.enable_eplb
        if enabled:
            self.eplb_state = EplbState(self.parallel_config, self.device)
        load(self, *args, **kwargs)
        if not get_pp_group().is_first_rank:
            # Made in the profiling run, which this runner leaves out where nothing is compiled.
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        if enabled:
            self._moe_model = get_mixture_of_experts_model(self.model)
            if self._moe_model is not None:
                self.eplb_state.add_model(self._moe_model, self.model_config)
                self.eplb_state.start_async_loop()

    @functools.wraps(sample)
    def sample_tokens(self, *args, **kwargs):
        result = sample(self, *args, **kwargs)
        # This runner (V1) steps on the last stage alone; V2 does on every stage, after this method.
        if not get_pp_group().is_last_rank:
            self.eplb_step()
        return result

    EplbState.__init__ = init
    CPUModelRunner.sample_tokens = sample_tokens
    CPUModelRunner.load_model = load_model
