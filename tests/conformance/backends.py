"""The corpora of http1 and http2 (translated to HTTP/1.1) again, with servers behind the proxy that people use: none may see a
request that the recorder, with its narrowest reading, did not see.
"""

import asyncio
import os
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from typing import Callable

from harness import HERE, IP, PATIENCE, Ours, Recorder, Report, connected, lanes, main
from http1 import Client, cases
from http2 import exchange

FIRST = 20000


@dataclass
class Sent:
    corpus: str
    name: str
    # Sends it, from the address of the proxy on; what comes back is another suite's matter.
    send: Callable
    # Whether anything of it should arrive.
    arrives: bool


def sent_http1():
    def send(case):
        return lambda address: Client().run(address, case, case.want, 1)

    return [Sent("http1", case.name, send(case), bool(case.want["upstream"])) for case in cases() if not case.answer]


def sent_http2():
    def send(case):
        return lambda address: exchange(address, case)

    found = tomllib.loads((HERE / "corpus/http2.toml").read_text())["case"]
    arrives = lambda case: bool(case.get("http1", {}).get("upstream", case.get("upstream")))
    return [Sent("http2", f"http2/{case['name']}", send(case), arrives(case)) for case in found]


def nginx_config(folder, count):
    listens = "".join(f"listen {IP}:{port};" for port in range(FIRST, FIRST + count))
    return (
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr crit; events {{ worker_connections 8192; }}"
        "http { log_format port '$server_port $request_method $request_uri $status'; access_log /dev/stdout port;"
        f"client_body_temp_path {folder}/body; large_client_header_buffers 4 128k; lingering_close off;"
        f"server {{ {listens} location / {{ return 200 '$request_method $request_uri'; }} }} }}"
    )


def servers(folder, count):
    """Name -> command, or None where there is no such server on this machine."""
    config = f"{folder}/nginx.conf"
    with open(config, "w") as file:
        file.write(nginx_config(folder, count))
    ports = [IP, str(FIRST), str(count)]
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    return {
        "Go net/http": [os.environ["BACKENDS"], *ports] if "BACKENDS" in os.environ else None,
        "aiohttp": [sys.executable, "-B", str(HERE / "backends/aiohttp_server.py"), *ports],
        "nginx": [nginx, "-e", "stderr", "-p", folder, "-c", config] if nginx else None,
    }


async def run(all_cases, upstreams):
    """Sends each case."""
    slots = asyncio.Semaphore(48)

    async def one(lane, case):
        async with slots:
            await case.send(lane.listen)

    # HTTP/1.1 stays what it is, whether or not HTTP/2 is translated.
    async with Ours(plain=upstreams, arguments=["--to-http1"]):
        await asyncio.gather(*[one(lane, case) for lane, case in zip(upstreams, all_cases)])


async def served(command, all_cases, upstreams):
    """For each case what the server says that it served."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    # Read while it writes, or it would stop.
    reading = asyncio.create_task(process.stdout.read())
    async with asyncio.timeout(PATIENCE):
        await connected(upstreams[-1].upstream)
    await run(all_cases, upstreams)
    process.terminate()
    output = await asyncio.wait_for(reading, PATIENCE)
    await process.wait()
    seen = [[] for _ in all_cases]
    for line in output.decode("latin-1").splitlines():
        port, method, target, *status = line.split(" ")
        # nginx logs what it refused, too.
        if target != "/probe" and status in ([], ["200"]):
            seen[int(port) - FIRST].append(f"{method} {target}")
    return seen


async def suite():
    all_cases = sent_http1() + sent_http2()
    upstreams = lanes(len(all_cases), 10000, FIRST)
    recorders = [Recorder() for _ in all_cases]
    for recorder, lane in zip(recorders, upstreams):
        await recorder.start(lane.upstream)
    await run(all_cases, upstreams)
    for recorder in recorders:
        recorder.server.close()
    good = True
    with tempfile.TemporaryDirectory(prefix="sluice-conformance-") as folder:
        for name, command in servers(folder, len(all_cases)).items():
            report = Report(f"backends {name}")
            if not command:
                report.skip("it is not installed")
                continue
            results = list(zip(all_cases, recorders, await served(command, all_cases, upstreams)))
            for case, recorder, seen in results:
                # It may refuse some, and nginx answers before the end of a body.
                rest = iter(recorder.begun)
                subset = all(any(one == it for it in rest) for one in seen)
                report.case(case.name, [] if subset else [f"it saw {seen}, the recorder {recorder.begun}"])
            for corpus in ("http1", "http2"):
                some = [(case, seen) for case, _, seen in results if case.corpus == corpus]
                total, enough = sum(len(seen) for _, seen in some), sum(case.arrives for case, _ in some) / 2
                report.case(f"serves {corpus}", [] if total >= enough > 0 else [f"only {total} requests of all cases"])
            good = report.end() and good
    return good


if __name__ == "__main__":
    main(suite)
