"""The disk cache does without a single system call for files on the event loop: proved by taking them away from its thread."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.integration.service import ROOT, environment
from tests.syscalls import known_machine

pytestmark = pytest.mark.skipif(
    not known_machine(), reason="the system calls of this machine are not known to the test"
)

CODE = """
import asyncio, errno, sys, threading
from pathlib import Path
import uvloop
from mmprep.digest import Hasher
from mmprep.metrics import Metrics
from mmprep_frontend.media.cache import MediaCache
from mmprep_frontend.media.cache_disk import CacheDisk
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.policy import UrlPolicy
from tests.syscalls import deny_files

directory, url = Path(sys.argv[1]), sys.argv[2]
limits = {"max_bytes": 1 << 20, "memory": MediaMemory(64 << 20)}

async def main():
    metrics, policy = Metrics(), UrlPolicy(allow_private=True)
    async with Fetcher(policy, **limits, metrics=metrics) as fetcher:
        disk = CacheDisk(directory, max_bytes=64 << 20, ttl=1000.0)
        cache = MediaCache(disk, fetcher, policy, **limits, metrics=metrics)

        async def get(path):
            fetched = await cache.fetch(url + path, scope=bytes(32), param="p", timeout=60.0)
            if fetched.keepable is not None:
                cache.keep(fetched.keepable, fetched.data, Hasher("blake3").content_digest(fetched.data), "blake3")
            cache._uses.write_down()
            while cache._keeping or cache._uses._writing:
                await asyncio.sleep(0.001)
            return fetched

        await asyncio.gather(*(get(f"/warm/{number}") for number in range(8)))
        assert not (await get("/warm/0")).asked
        threads = threading.active_count()
        deny_files()
        try:
            open("/dev/null")
        except PermissionError:
            print("files are taken away", flush=True)
        fetched = [await get(path) for path in ["/a", "/a", "/b"] + ["/b"] * 50]
        assert [f.asked for f in fetched[:4]] == [True, False, True, False]
        assert not any(f.asked for f in fetched[4:])
        assert {len(f.data) for f in fetched} == {500_000}
        assert threading.active_count() == threads, "a new thread would have no files either"
        counted = {name: value for name, _, value in metrics.snapshot().counters}
        assert counted.get("mmprep_media_cache_errors_total", 0) == 0, counted
        print("and nobody misses them", flush=True)
        import os
        os._exit(0)

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


class Host(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "500000")
        self.end_headers()
        self.wfile.write(bytes(500_000))

    def log_message(self, *_):
        """Say nothing."""


def test_lookups_hits_fetches_and_writes_need_no_file_on_the_loops_thread(tmp_path):
    packages = environment()["PYTHONPATH"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path), f"http://127.0.0.1:{server.server_port}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment({"PYTHONPATH": f"{ROOT}:{packages}"}),
            check=False,
        )
        server.shutdown()
        thread.join()
    assert done.stdout == "files are taken away\nand nobody misses them\n", done.stderr
    assert done.returncode == 0
