"""Requests that two implementations may read differently, byte for byte as they are written in corpus/http1/*.toml.

Each is sent to our proxy and to Envoy, each time with a listener and a recording upstream of its own. What is looked at: the answers,
whether the connection is closed, and what the upstream got. An upstream must never get anything but whole requests in
the narrowest reading of RFC 9112; whatever a case expects, that is checked (harness.Recorder).
"""

import asyncio
import os
import re
import sys
import tomllib
from dataclasses import dataclass

from harness import HERE, PATIENCE, Envoy, Ours, Recorder, Report, expanded, headers_beside, lanes, main

PROBE = b"GET /probe HTTP/1.1\r\nHost: probe\r\n\r\n"
# How long an answer more than expected is waited for.
GRACE = 0.2
KEYS = {"name", "source", "send", "status", "closed", "upstream", "body", "without", "with", "answer", "answer_closes", "why", "envoy", "fails", "answer_differs"}


def raw(text):
    """The bytes of a case."""
    return expanded(text).encode("latin-1")


@dataclass
class Case:
    name: str
    source: str
    send: list
    want: dict
    envoy: dict | None
    answer_differs: dict | None
    answer: tuple | None
    fails: str | None


def cases():
    found = []
    for file in sorted((HERE / "corpus/http1").glob("*.toml")):
        shared = tomllib.loads(file.read_text())
        for one in shared["case"]:
            assert not one.keys() - KEYS, one
            name = f"{file.stem}/{one['name']}"
            assert one["source"] and name not in [it.name for it in found], name
            send = one["send"] if isinstance(one["send"], list) else [one["send"]]
            want = {
                "status": one["status"] if isinstance(one["status"], list) else [one["status"]],
                "closed": one["closed"],
                "upstream": [expanded(it) for it in one.get("upstream", [])],
                "body": one.get("body"),
                "without": one.get("without", []),
                "with": one.get("with", {}),
            }
            envoy = None
            if "envoy" in one:
                assert one["envoy"].get("why"), f"{name}: why does Envoy differ?"
                envoy = want | {"body": None, "without": [], "with": {}} | one["envoy"]
                envoy["status"] = envoy["status"] if isinstance(envoy["status"], list) else [envoy["status"]]
            answer = (raw(one["answer"]), one.get("answer_closes", False)) if "answer" in one else None
            found.append(Case(name, one["source"], [raw(it) for it in send], want, envoy, one.get("answer_differs"), answer, one.get("fails")))
    return found


class Client:
    """Sends the bytes of a case, and reads what comes."""

    def __init__(self):
        self.statuses, self.closed, self.probed, self.buffer, self.body = [], False, False, b"", b""
        # The fields of each answer.
        self.fields = []

    async def run(self, address, case, want, patience):
        self.heads = [b"HEAD " in case.send[0][:5]]
        reader, writer = await asyncio.open_connection(*address)
        pump = asyncio.create_task(self._pump(reader))
        try:
            for index, piece in enumerate(case.send):
                if index:
                    await asyncio.sleep(0.03)
                writer.write(piece)
                await writer.drain()
            expected = len(want["status"])
            enough = lambda: self.closed or (not want["closed"] and len(self.statuses) >= expected)
            await self._until(enough, patience)
            if not self.closed:
                await self._until(lambda: self.closed or len(self.statuses) > expected, GRACE)
            if not self.closed:
                before = len(self.statuses)
                writer.write(PROBE)
                await writer.drain()
                await self._until(lambda: self.closed or len(self.statuses) > before, patience)
                if len(self.statuses) > before and self.body.endswith(b"probe"):
                    self.statuses.pop()
                    self.fields.pop()
                    self.body = self.body.removesuffix(b"probe")
                    self.probed = True
        except OSError:
            pass
        finally:
            # What is there already is read before.
            await self._until(lambda: self.closed, 0.05)
            pump.cancel()
            writer.close()

    async def _until(self, is_so, seconds):
        deadline = asyncio.get_running_loop().time() + seconds
        while not is_so() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)

    async def _pump(self, reader):
        try:
            while data := await reader.read(65536):
                self.buffer += data
                while self._response():
                    pass
        except OSError:
            pass
        # What was cut short is no answer.
        if self.buffer:
            self._response(ended=True)
        self.closed = True

    def _response(self, ended=False):
        """Takes one answer from the buffer, if it is whole."""
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        status = int(head.split(b" ", 2)[1])
        fields = head.lower() + b"\r\n"
        if status == 204 or status == 304 or status // 100 == 1 or (self.heads[0] and not self.statuses):
            body = b""
        elif b"\r\ntransfer-encoding: chunked\r\n" in fields:
            body = b""
            while True:
                line, end, rest = rest.partition(b"\r\n")
                if not end:
                    return False
                size = int(line, 16)
                if len(rest) < size + 2:
                    return False
                if not size:
                    while True:
                        trailer, end, rest = rest.partition(b"\r\n")
                        if not end:
                            return False
                        if not trailer:
                            break
                    break
                body += rest[:size]
                rest = rest[size + 2 :]
        elif match := re.search(rb"\r\ncontent-length: (\d+)\r\n", fields):
            if len(rest) < int(match[1]):
                return False
            body, rest = rest[: int(match[1])], rest[int(match[1]) :]
        elif ended:
            body, rest = rest, b""
        else:
            return False
        self.buffer = rest
        self.body += body
        if status // 100 != 1 or status == 101:
            self.statuses.append(status)
            lines = head.decode("latin-1").split("\r\n")[1:]
            self.fields.append([(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)])
        return True


async def tried(lane, case, want, patience, slots):
    recorder = Recorder(case.answer)
    await recorder.start(lane.upstream)
    client = Client()
    async with slots:
        await client.run(lane.listen, case, want, patience)
    return client, recorder


def outcome(client, recorder):
    return {
        "status": client.statuses,
        "closed": client.closed,
        "upstream": [str(request) for request in recorder.requests],
    }


def problems(want, client, recorder):
    found = []
    got = outcome(client, recorder)
    for key, value in got.items():
        if value != want[key]:
            found.append(f"{key} is {value}, not {want[key]}")
    if not client.closed and not client.probed:
        found.append("the connection was left open, and does not answer")
    if want["body"] is not None and client.body.decode("latin-1") != want["body"]:
        found.append(f"the client got {client.body!r}, not {want['body']!r}")
    for request in recorder.requests:
        for name in want["without"]:
            if name in dict(request.fields):
                found.append(f"the upstream got {name}: {dict(request.fields)[name]}")
        for name, value in want["with"].items():
            if (name, value) not in request.fields:
                found.append(f"the upstream did not get {name}: {value}, but {request.fields}")
    for fault in recorder.faults:
        found.append(f"passed on: {fault}")
    return found


async def suite():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    all_cases = [case for case in cases() if wanted in case.name]
    count = len(all_cases)
    ours, theirs = lanes(count, 10000, 20000), lanes(count, 30000, 40000)
    slots = asyncio.Semaphore(24)
    report, beside = Report("http1"), Report("http1 beside Envoy")
    async with Ours(plain=ours):
        runs = [tried(lane, case, case.want, 2 if case.fails else PATIENCE, slots) for lane, case in zip(ours, all_cases)]
        mine = await asyncio.gather(*runs)
        for case, (client, recorder) in zip(all_cases, mine):
            report.case(f"{case.name} ({case.source})", problems(case.want, client, recorder), case.fails)
    if not os.environ.get("ENVOY"):
        beside.skip("no stock Envoy could be installed")
        return report.end()
    async with Envoy(theirs):
        runs = [tried(lane, case, case.envoy or case.want, 2, slots) for lane, case in zip(theirs, all_cases)]
        for case, (client, recorder), (my_client, my_recorder) in zip(all_cases, await asyncio.gather(*runs), mine):
            got, wants, found = outcome(client, recorder), case.envoy or case.want, []
            differing = {key: got[key] for key in got if got[key] != wants[key]}
            if differing:
                found.append(f"Envoy: {differing}, ours: {outcome(my_client, my_recorder)}: is that intended?")
            elif case.envoy and all(got[key] == case.want[key] for key in got):
                found.append("does not differ: take its `envoy` out")
            if client.statuses == my_client.statuses:
                found += headers_beside(zip(my_client.fields, client.fields), case.answer_differs)
            beside.case(case.name, found)
    return all([report.end(), beside.end()])


if __name__ == "__main__":
    main(suite)
