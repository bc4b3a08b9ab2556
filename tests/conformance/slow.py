"""slowhttptest against the proxy, in plaintext and over mTLS: heads that never end (-H), bodies that come by a few bytes (-B) and
answers that are read so (-X). On demand.

One attack has fewer connections than its listener takes: clients of the same listener are served all the time. Another has more: no more
than the listener's number are held, and another Service is served all the time. Heads have their time (docs/limits.md); of bodies
and answers only the number is bounded within the time of a test. Afterwards all is as before.
"""

import asyncio
import contextlib
import csv
import pathlib
import tempfile

from harness import IP, PATIENCE, Lane, Ours, Recorder, Report, answer, bridge, main

# What each listener takes at once, and two attacks on it: with slowhttptest's probe, the first one leaves some.
LIMIT, FEW, MANY = 32, 20, 50
# A head ends its connection after 10 to 20 s.
HEAD_FROM, HEAD_TO = 10, 20
SECONDS = {"H": HEAD_TO + 20, "B": 10, "X": 10}
ANSWER = 8 << 20
# Resident memory may grow by so much; the answers of one listener's connections are 8 times that.
GROWTH = 64 << 20


class Held(Recorder):
    """An upstream that counts its connections, and has a long answer to GET, or a short one."""

    def __init__(self, long):
        super().__init__()
        self.long = long
        self.open = self.most = 0

    async def start(self, address):
        # All of an attack may come at once.
        self.server = await asyncio.start_server(self._serve, *address, backlog=MANY * 2)

    async def _serve(self, reader, writer):
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await super()._serve(reader, writer)
        finally:
            self.open -= 1

    async def _answer(self, received, writer):
        if received.method != "GET" or not self.long:
            return await super()._answer(received, writer)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % ANSWER)
        for _ in range(ANSWER >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
        return True


class Client:
    """Asks again and again until it is told to stop, on a new connection each time."""

    def __init__(self, address):
        self.address, self.answers, self.problem = address, 0, None
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        try:
            while True:
                async with asyncio.timeout(PATIENCE):
                    await probe(self.address)
                self.answers += 1
                await asyncio.sleep(0.1)
        except (AssertionError, OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            self.problem = f"{type(error).__name__} after {self.answers} answers: {error}"

    async def stop(self):
        """What was wrong, in words."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        if self.problem:
            return [self.problem]
        return [] if self.answers else ["no answer"]


async def probe(address):
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"GET /probe HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n")
        got = await reader.read()
        assert got.startswith(b"HTTP/1.1 200"), got
    finally:
        writer.close()


async def attack(mode, connections, address):
    """Each second's (closed, pending, connected, available) as slowhttptest has counted, and what it says of its end."""
    with tempfile.TemporaryDirectory(prefix="sluice-conformance-") as folder:
        command = ["slowhttptest", f"-{mode}", "-g", "-o", f"{folder}/seconds", "-c", connections, "-r", 50, "-l", SECONDS[mode]]
        # Bytes of a head or a body every 2 s; 32 bytes of an answer a second, with a window of as few.
        command += {"H": ["-i", 2, "-t", "GET"], "B": ["-i", 2, "-s", 8192, "-t", "POST"], "X": ["-n", 1, "-z", 32, "-w", 16, "-y", 32]}[mode]
        command += ["-p", int(PATIENCE), "-u", "http://{}:{}/".format(*address)]
        process = await asyncio.create_subprocess_exec(*map(str, command), stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), SECONDS[mode] + PATIENCE * 4)
        rows = list(csv.reader(pathlib.Path(folder, "seconds.csv").read_text().splitlines()))[1:]
        return [tuple(map(int, row[1:])) for row in rows], "No open connections left" in output.decode()


async def until(is_so):
    async with asyncio.timeout(PATIENCE):
        while not is_so():
            await asyncio.sleep(0.05)


def resident(process):
    """Bytes of memory of a process."""
    pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096


async def attacked(kind, mode, ours, few, many, other):
    """`few`, `many` and `other` are (where clients connect, what is behind)."""
    report = Report(f"slow -{mode} {kind}")
    before = resident(ours.process)
    clients = {"a client of the same listener": Client(few[0]), "a client of another Service": Client(other[0])}
    (mild, mild_ended), (rude, rude_ended) = await asyncio.gather(attack(mode, FEW, few[0]), attack(mode, MANY, many[0]))
    grown = resident(ours.process) - before
    for name, client in clients.items():
        report.case(name, await client.stop())
    # slowhttptest asks on the same listener, too. Its last column is 0 where it got no answer.
    report.case("slowhttptest's own client", [f"{mild}"] if any(not row[3] for row in mild) else [])
    most = max(row[2] for row in mild)
    report.case("the attack was one", [f"at most {most} were connected"] if most < FEW else [])
    # Of its last whole second: those that are reset count as connected for a moment.
    held = rude[-2][2]
    least = 0 if mode == "H" else LIMIT / 2
    report.case("the number is bounded", [] if least <= held <= LIMIT else [f"{held} held, of {MANY}"])
    upstream = many[1].most
    report.case("so is what the upstream sees", [f"{upstream} connections"] if upstream > LIMIT else [])
    report.case("memory", [f"{grown >> 20} MiB more"] if grown > GROWTH else [])
    if mode == "H":
        early = [row for row in mild[: HEAD_FROM - 2] if row[0]]
        report.case("a head has its time", [f"ended before: {early}"] if early else [])
        for name, ended in (("few", mild_ended), ("many", rude_ended)):
            report.case(f"{name} end in {HEAD_TO} s", [] if ended else ["some are still open"])
    # What the attack held is free again.
    problems = []
    try:
        await until(lambda: not few[1].open and not many[1].open)
        async with asyncio.timeout(PATIENCE):
            await probe(many[0])
    except (AssertionError, OSError, TimeoutError) as error:
        problems = [f"{type(error).__name__}: {error}; {many[1].open} connections to the upstream"]
    report.case("afterwards", problems)
    return report.end()


async def suite():
    good = True
    for mode in SECONDS:
        plain, tls = ([Lane((IP, first + n), (IP, first + 100 + n)) for n in range(3)] for first in (9000, 9200))
        upstreams = {lane: Held(mode == "X") for lane in map(str, plain + tls)}
        for lane in plain + tls:
            await upstreams[str(lane)].start(lane.upstream)
        async with Ours(plain=plain, tls=tls, arguments=["--max-connections", str(LIMIT)]) as ours:
            bridged = [(IP, 9400 + n) for n in range(3)]
            bridges = [await bridge(ours.client_tls("http/1.1"), *both) for both in zip(bridged, [lane.listen for lane in tls])]
            behind = lambda some: [upstreams[str(lane)] for lane in some]
            runs = [("plaintext", zip([lane.listen for lane in plain], behind(plain))), ("mTLS", zip(bridged, behind(tls)))]
            results = [await attacked(kind, mode, ours, *some) for kind, some in runs]
        for server in bridges + [upstream.server for upstream in upstreams.values()]:
            server.close()
        good = good and all(results)
    return good


if __name__ == "__main__":
    main(suite)
