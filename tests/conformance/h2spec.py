"""h2spec (github.com/summerwind/h2spec), all of it with its strict cases, against a listener of the fleet: in plaintext with
prior knowledge, and over mTLS. What may fail is in h2spec-failures.txt, with the reason.

Before that, h2spec has to find fault with a server that breaks a rule, or its silence would mean nothing.
"""

import asyncio
import collections
import html
import os
import pathlib
import re
import tempfile

from harness import HERE, IP, PATIENCE, Lane, Ours, Report, bridge, main
from http2 import ACK, PREFACE, SETTINGS, Http2Recorder, frame

# All that version 2.2.1 has.
CASES = 146


def reviewed():
    """Listener and test -> why it may fail."""
    found = {}
    for line in (HERE / "h2spec-failures.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, reason = line.partition(" | ")
            assert reason and name not in found, line
            found[name] = reason
    return found


TEST = re.compile(r'<testcase package="(.*?)" classname="(.*?)" time=".*?">\s*(.*?)\s*</testcase>', re.S)
WRONG = re.compile(r"<(failure|error|skipped)>(.*)</\1>", re.S)


def read(report):
    """Test -> what was wrong with it, or None. A test's name begins as h2spec's arguments have it: `http2/5.1/7`.

    What h2spec calls JUnit is no XML: it writes what a frame was like with a `<` as it is. And it means to write <failure>,
    but writes <error> (reporter/junit_report.go asks for a type that it never has).
    """
    results, places = {}, collections.Counter()
    for package, title, content in TEST.findall(report):
        places[package] += 1
        wrong = WRONG.fullmatch(content)
        assert wrong or not content, content
        told = wrong and f"{wrong[1]}: {' '.join(wrong[2].split())}"
        results[f"{package}/{places[package]} {html.unescape(title)}"] = told
    assert len(results) == report.count("<testcase "), report
    return results


async def h2spec(address, *only, seconds=4):
    """What `read` has of a run of all tests, or of some."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = [os.environ["H2SPEC"], "-S", "-h", address[0], "-p", str(address[1]), "-o", str(seconds), "-j", file.name, *only]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        # Each test may wait for its seconds.
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE * 40)
        results = read(pathlib.Path(file.name).read_text())
        assert results, f"no report: {output.decode()[-500:]}"
        failed = any(told and not told.startswith("skipped") for told in results.values())
        assert process.returncode == int(failed), f"h2spec ended with {process.returncode}, and its report says {results}"
        return results


async def silent(reader, writer):
    """A server that breaks a rule: it acknowledges SETTINGS, but no PING (RFC 9113, 6.7)."""
    try:
        await reader.readexactly(len(PREFACE))
        writer.write(frame(SETTINGS, 0, 0, b""))
        while head := await reader.readexactly(9):
            await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == SETTINGS and not head[4] & ACK:
                writer.write(frame(SETTINGS, ACK, 0, b""))
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def finds_fault():
    """Whether a rule that is broken is told, and one that is kept is not."""
    report = Report("h2spec finds fault")
    address = IP, 9005
    preface, ping = "http2/3.5/1", "http2/6.7/1"
    async with await asyncio.start_server(silent, *address):
        # One at a time, so each is the first of its package.
        results = {only: list((await h2spec(address, only, seconds=1)).values()) for only in (preface, ping)}
    report.case("a rule that is kept", [] if results[preface] == [None] else [f"{results[preface]}"])
    told = len(results[ping]) == 1 and results[ping][0] and results[ping][0].startswith(("error", "failure"))
    report.case("a rule that is broken", [] if told else [f"{results[ping]}"])
    return report.end()


async def suite():
    if not await finds_fault():
        return False
    plain, tls = Lane((IP, 9001), (IP, 9003)), Lane((IP, 9002), (IP, 9003))
    await Http2Recorder().start(plain.upstream)
    async with Ours(plain=[plain], tls=[tls]) as ours:
        await bridge(ours.client_tls("h2"), (IP, 9004), tls.listen)
        results = await asyncio.gather(h2spec(plain.listen), h2spec((IP, 9004)))
    reasons, good = reviewed(), True
    for kind, found in zip(("plaintext", "mTLS"), results):
        report = Report(f"h2spec {kind}")
        for name, failure in found.items():
            report.case(name, [failure] if failure else [], reasons.pop(f"{kind} {name}", None))
        report.case("all of h2spec", [] if len(found) == CASES else [f"{len(found)} tests ran, not {CASES}"])
        good = report.end() and good
    if reasons:
        print(f"FAILED  h2spec-failures.txt: h2spec has no such tests: {sorted(reasons)}")
        good = False
    return good


if __name__ == "__main__":
    main(suite)
