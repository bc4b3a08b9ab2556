"""h2spec (github.com/summerwind/h2spec), all of it, against a listener of the fleet: in plaintext with prior knowledge,
and over mTLS. What may fail is in h2spec-failures.txt, with the reason.
"""

import asyncio
import os
import tempfile
import xml.etree.ElementTree as ElementTree

from harness import HERE, IP, PATIENCE, Lane, Ours, Report, bridge, main
from http2 import Http2Recorder


def reviewed():
    """Test -> why it may fail."""
    found = {}
    for line in (HERE / "h2spec-failures.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, reason = line.partition(" | ")
            assert reason, line
            found[name] = reason
    return found


async def h2spec(address):
    """Test -> what was wrong with it, or None."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = [os.environ["H2SPEC"], "-h", address[0], "-p", str(address[1]), "-o", "4", "-j", file.name]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        # Each of its 146 tests may wait for its own 4 s.
        await asyncio.wait_for(process.wait(), PATIENCE * 40)
        results = {}
        for suite in ElementTree.parse(file.name).getroot():
            for test in suite.iter("testcase"):
                name = f"{test.get('package')} {test.get('classname')}"
                failure = test.find("failure")
                results[name] = None if failure is None else " ".join("".join(failure.itertext()).split())
                skipped = test.find("skipped")
                if skipped is not None:
                    results[name] = "skipped"
        return results


async def suite():
    plain, tls = Lane((IP, 9001), (IP, 9003)), Lane((IP, 9002), (IP, 9003))
    await Http2Recorder().start(plain.upstream)
    async with Ours(plain=[plain], tls=[tls]) as ours:
        await bridge(ours.client_tls("h2"), (IP, 9004), tls.listen)
        results = await asyncio.gather(h2spec(plain.listen), h2spec((IP, 9004)))
    reasons, good = reviewed(), True
    for kind, found in zip(("h2spec", "h2spec over mTLS"), results):
        report = Report(kind)
        for name, failure in found.items():
            report.case(name, [failure] if failure else [], reasons.get(name))
        if len(found) < 140:
            report.case("all of h2spec", [f"only {len(found)} tests ran"])
        good = report.end() and good
    return good


if __name__ == "__main__":
    main(suite)
