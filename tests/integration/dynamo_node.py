"""A Dynamo frontend, a worker, or both in one process: ``dynamo_node.py DISCOVERY ROLES ENDPOINT MODEL PORT``.

The worker opens the items of a request and answers with JSON of what it found, or does what ``do:…`` in the prompt says.
"""

import asyncio
import hashlib
import itertools
import json
import re
import signal
import sys
from pathlib import Path

from dynamo.llm import (
    EngineType,
    EntrypointArgs,
    ModelInput,
    ModelType,
    WorkerType,
    make_engine,
    register_model,
    run_input,
)
from dynamo.llm.exceptions import HttpError
from dynamo.runtime import DistributedRuntime
from tokenizers import Tokenizer

from mmprep import AsyncBackend
from mmprep.bridges.dynamo import chat_engine_factory, open_items

DISCOVERY, ROLES, ENDPOINT, MODEL, PORT = sys.argv[1:]
NAMESPACE = "mmprep"


def is_shared(array):
    """Whether the array lies in a mapping of the service's segment that cannot be written to."""
    at = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= at < end:
            return "/dev/shm/mmprep-" in line and line.split()[1] == "r--s" and not array.flags.writeable
    return False


def described(arrays):
    fields = {
        name: [str(a.dtype), list(a.shape), hashlib.sha256(a.tobytes()).hexdigest()] for name, a in arrays.items()
    }
    return {"shared": all(map(is_shared, arrays.values())), "fields": fields}


class Worker:
    def __init__(self, backend):
        self.backend = backend
        self.tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")

    def said(self, words):
        return self.tokenizer.encode(words, add_special_tokens=False).ids

    def handle(self, request, context):
        """Return the outputs; Dynamo calls this in a thread, and tells its frontend then that a worker has the request."""
        prompt = self.tokenizer.decode(request["token_ids"], skip_special_tokens=False)
        wanted = re.search(r"do:(\w+)", prompt)
        wanted = wanted and wanted[1]
        if wanted == "late":
            Path.home().joinpath("gate").read_bytes()  # a pipe: until the test has opened and closed it
        return self.outputs(request, context, wanted)

    async def outputs(self, request, context, wanted):
        if wanted == "fail":
            raise RuntimeError("the engine broke")
        if wanted == "refuse":
            raise HttpError(400, "the prompt is not for this engine")
        if wanted == "end":
            yield {"token_ids": [], "finish_reason": "error: the engine broke"}
            return
        if wanted == "stale":
            for address in request["extra_args"]["mm_addresses"]["image"]:
                address["generation"] -= 1
        async with open_items(request, self.backend) as items:
            found = {modality: [described(arrays) for arrays in ones] for modality, ones in items.items()}
            if wanted in {"hang", "late", "stop"}:  # its lease shows that it goes on until it is told
                async for output in self.going_on(context, "alpha STOP omega " if wanted == "stop" else ""):
                    yield output
                sys.stderr.write(f"{wanted} was told\n")
                return
        if wanted == "drip":
            yield {"token_ids": self.said("drip")}
            await context.async_killed_or_stopped()
            return
        routing = request.get("mm_routing_info") or {}
        told = {
            "items": found,
            "routed": routing.get("routing_token_ids"),
            "token_ids": request["token_ids"],
            "extra": {
                name: value for name, value in (request.get("extra_args") or {}).items() if name != "kwargs_data"
            },
            "sampling": request["sampling_options"],
            "stops": request["stop_conditions"],
            "eos": request["eos_token_ids"],
            "routing": request.get("routing"),
        }
        ids = self.said(json.dumps(told))
        yield {"token_ids": ids[:7]}
        yield {"token_ids": ids[7:], "finish_reason": "stop"}

    async def going_on(self, context, words):
        for token in itertools.cycle(self.said(words)):
            yield {"token_ids": [token]}
            # Dynamo asks for one output more when nobody wants any, and then drops all this where it stands.
            if context.is_stopped():
                return
        await context.async_killed_or_stopped()


async def main():
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, DISCOVERY, "tcp", event_plane="zmq")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.shutdown)
    work = []
    async with AsyncBackend(ENDPOINT) as backend, chat_engine_factory(ENDPOINT) as factory:
        if "worker" in ROLES:
            endpoint = runtime.endpoint(f"{NAMESPACE}.worker.generate")
            work.append(asyncio.ensure_future(endpoint.serve_endpoint(Worker(backend).handle)))
            kind = {"worker_type": WorkerType.Aggregated, "ignore_weights": True, "kv_cache_block_size": 16}
            await register_model(ModelInput.Tokens, ModelType.Chat, endpoint, MODEL, "served", **kind)
        if "frontend" in ROLES:
            arguments = EntrypointArgs(
                EngineType.Dynamic,
                http_host="127.0.0.1",
                http_port=int(PORT),
                namespace=NAMESPACE,
                chat_engine_factory=factory,
            )
            work.append(asyncio.ensure_future(run_input(runtime, "http", await make_engine(runtime, arguments))))
        await asyncio.gather(*work)


asyncio.run(main())
