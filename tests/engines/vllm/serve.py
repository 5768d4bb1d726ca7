"""vLLM's server, with engines that are forked from a process that has imported vLLM."""

import multiprocessing
import runpy

import vllm.utils.system_utils

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engines.vllm.drive"])
    # The server has threads and does not fork. Engines find what `drive.py` sets.
    vllm.utils.system_utils.get_mp_context = lambda: context
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
