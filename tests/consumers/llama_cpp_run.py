"""Ask the real llama.cpp for next-token log-probabilities; run as a script.

A process of its own, since llama.cpp ends the process on some bad adapters. Reads a JSON object
from stdin: `base`, `adapters` (paths), `prompt` (token numbers), `vocabulary` (its size), `count`
(of the likeliest tokens wanted), and `scales` (a list of scales for the adapters, one list for each
request). Prints a JSON list with the log-probabilities by token number for each.
"""

import json
import sys
import urllib.request

import xllamacpp
from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

CONTEXT = 256


def parameters(base, adapters):
    found = CommonParams()
    found.model.path = base
    found.n_ctx = found.n_batch = found.n_ubatch = CONTEXT
    found.n_parallel = 1
    found.n_gpu_layers = 0
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = 1
    found.warmup = False
    found.fit_params = False
    found.cache_prompt = False
    found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    found.lora_adapters = [CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    return found


def log_probabilities(server, request, scales):
    body = {
        "prompt": request["prompt"],
        "n_predict": 1,
        "n_probs": request["count"],
        "post_sampling_probs": False,
        "temperature": 0,
        "cache_prompt": False,
        "ignore_eos": True,
        "lora": [{"id": i, "scale": scale} for i, scale in enumerate(scales)],
    }
    call = urllib.request.Request(
        f"{server.listening_address}/completion",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call) as response:
        found = json.load(response)["completion_probabilities"][0]["top_logprobs"]
    by_token = {entry["id"]: entry["logprob"] for entry in found}
    return [by_token.get(token) for token in range(request["vocabulary"])]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    server = Server(parameters(request["base"], request["adapters"]))
    print(json.dumps([log_probabilities(server, request, s) for s in request["scales"]]))
