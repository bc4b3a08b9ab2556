"""The corpus of http1 again, with servers behind the proxy that people use: none may see a request that the recorder, with
its narrowest reading, did not see.
"""

import asyncio
import os
import shutil
import sys
import tempfile

from harness import HERE, IP, PATIENCE, Ours, Recorder, Report, connected, lanes, main
from http1 import Client, cases

FIRST = 20000


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
    """Sends each case; what comes back is another suite's matter."""
    slots = asyncio.Semaphore(48)

    async def one(lane, case):
        async with slots:
            await Client().run(lane.listen, case, case.want, 1)

    async with Ours(plain=upstreams):
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
    all_cases = [case for case in cases() if not case.answer]
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
            total = 0
            for case, recorder, seen in zip(all_cases, recorders, await served(command, all_cases, upstreams)):
                total += len(seen)
                # It may refuse some, and nginx answers before the end of a body.
                rest = iter(recorder.begun)
                subset = all(any(one == it for it in rest) for one in seen)
                report.case(case.name, [] if subset else [f"it saw {seen}, the recorder {recorder.begun}"])
            if total < len([case for case in all_cases if case.want["upstream"]]) / 2:
                report.case("serves", [f"only {total} requests of all cases"])
            good = report.end() and good
    return good


if __name__ == "__main__":
    main(suite)
