"""Run llama.cpp's server, as a process of its own, until standard input ends; settings are one JSON argument."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Write {"address": ...} to standard output once the model is loaded; llama.cpp's own output goes to stderr."""
    settings = json.loads(sys.argv[1])
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _server(settings)
    told.write(json.dumps({"address": server.listening_address}) + "\n")
    told.flush()
    sys.stdin.read()  # ends when the parent closes it or dies
    os._exit(0)  # nothing here needs an orderly shutdown


def _server(settings: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in settings["loras"]]
    params.n_ctx = settings["context"]
    if settings["threads"]:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.warmup = params.fit_params = False
    params.n_parallel = 1
    params.port = 0
    params.ui = False
    params.verbosity = 1  # errors only
    # text as the model writes it
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    params.prefill_assistant = settings["continues_answers"]
    # the processor computes in float32 and keeps what it has seen in float32: differences are the file's own
    params.n_gpu_layers = 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
