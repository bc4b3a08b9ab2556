"""What a route asks for, beside Envoy: the same resources, in Envoy's own messages, to both (corpus/routes.toml).

Each case has a listener and an upstream of its own, which answers by a script. What is looked at: the answer, how often the upstream was
asked and what it got, and why a proxy answered itself (response flags).
"""

import asyncio
import json
import os
import pathlib
import sys
import tempfile
import tomllib

from google.protobuf import json_format
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401 known to the parser of JSON from here on
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2  # noqa: F401
from envoy.service.discovery.v3 import discovery_pb2

from harness import HERE, PATIENCE, Envoy, Ours, Recorder, Report, envoy_resources, expanded, lanes, main

KEYS = {"name", "source", "route", "cluster", "send", "script", "status", "flags", "upstream", "with", "without", "answer_with", "answer_without", "envoy"}
FLAG = "x-sluice-response-flag"


class Scripted(Recorder):
    """Answers request after request as it is told: a status, "reset" (no answer) or "hang". The last holds for all that follow."""

    def __init__(self, script):
        super().__init__()
        self.script = list(script)
        # The client has its answer.
        self.over = asyncio.Event()

    async def _answer(self, received, writer):
        what = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if what == "reset":
            return False
        if what == "hang":
            await asyncio.wait_for(self.over.wait(), PATIENCE)
            return False
        fields = {"content-length": "2", "server": "app", **what} if isinstance(what, dict) else {"content-length": "2", "server": "app"}
        status = fields.pop("status", what)
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {status} Said\r\n{lines}\r\nok".encode())
        await writer.drain()
        return True


def cases():
    found = tomllib.loads((HERE / "corpus/routes.toml").read_text())["case"]
    for one in found:
        assert not one.keys() - KEYS and one["source"], one
        assert "envoy" not in one or one["envoy"].get("why"), f"{one['name']}: why does Envoy differ?"
        one["route"], one["cluster"] = (json.loads(one.get(key, "{}")) for key in ("route", "cluster"))
    return found


def ours_xds(folder, plain, routes, clusters):
    """Envoy's messages as our proxy takes them in."""
    listeners, clusters = envoy_resources(plain, routes, clusters)
    for index, listener in enumerate(listeners):
        # Nothing that our control plane never says.
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        for field in ("http_protocol_options", "http2_protocol_options", "use_remote_address"):
            del manager[field]
    for kind, module, messages in (("Cluster", cluster_pb2, clusters), ("Listener", listener_pb2, listeners)):
        response = discovery_pb2.DeltaDiscoveryResponse()
        for message in messages:
            resource = response.resources.add(name=message["name"], version="1")
            resource.resource.Pack(json_format.ParseDict(message, getattr(module, kind)()))
        pathlib.Path(folder, kind).write_bytes(response.SerializeToString())


async def asked(lane, case):
    """The answer of the proxy, and what its upstream has seen."""
    upstream = Scripted(case.get("script", [200]))
    await upstream.start(lane.upstream)
    reader, writer = await asyncio.open_connection(*lane.listen)
    writer.write(expanded(case["send"]).encode("latin-1"))
    await writer.drain()
    async with asyncio.timeout(PATIENCE):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    writer.close()
    upstream.over.set()
    first, *lines = head.strip().split("\r\n")
    fields = dict((name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
    return int(first.split(" ")[1]), fields, upstream


def problems(case, wants, status, fields, flags, upstream):
    found = []
    got = {"status": status, "upstream": [str(request) for request in upstream.requests], "flags": flags}
    for key, default in (("status", 200), ("upstream", []), ("flags", "-")):
        if got[key] != wants.get(key, default):
            found.append(f"{key} is {got[key]}, not {wants.get(key, default)}")
    seen = upstream.requests[-1].fields if upstream.requests else []
    for name, value in case.get("with", {}).items():
        if [it for field, it in seen if field == name] != (value if isinstance(value, list) else [value]):
            found.append(f"the upstream did not get {name}: {value}, but {seen}")
    for name in case.get("without", []):
        if name in dict(seen):
            found.append(f"the upstream got {name}")
    for name, value in case.get("answer_with", {}).items():
        if fields.get(name) != value:
            found.append(f"the answer has {name}: {fields.get(name)}, not {value}")
    for name in case.get("answer_without", []):
        if name in fields:
            found.append(f"the answer has {name}: {fields[name]}")
    found += [f"passed on: {fault}" for fault in upstream.faults]
    return found


async def suite():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [case for case in cases() if wanted in case["name"]]
    ours, theirs = lanes(len(chosen), 11000, 21000), lanes(len(chosen), 31000, 41000)
    routes, clusters = ([case[key] for case in chosen] for key in ("route", "cluster"))
    report, beside = Report("routes"), Report("routes beside Envoy")
    with tempfile.TemporaryDirectory(prefix="sluice-conformance-") as folder:
        ours_xds(folder, ours, routes, clusters)
        async with Ours(arguments=["--xds", folder]):
            for case, (status, fields, upstream) in zip(chosen, await asyncio.gather(*map(asked, ours, chosen))):
                flags = fields.get(FLAG, "-")
                report.case(f"{case['name']} ({case['source']})", problems(case, case, status, fields, flags, upstream))
    if not os.environ.get("ENVOY"):
        beside.skip("no stock Envoy could be installed")
        return report.end()
    async with Envoy(theirs, routes, clusters) as envoy:
        for index, (case, (status, fields, upstream)) in enumerate(zip(chosen, await asyncio.gather(*map(asked, theirs, chosen)))):
            flags = await envoy.flags(index)
            found = problems(case, case | case.get("envoy", {}), status, fields, flags, upstream)
            if "envoy" in case and not problems(case, case, status, fields, flags, upstream):
                found.append("does not differ: take its `envoy` out")
            beside.case(case["name"], found)
    return all([report.end(), beside.end()])


if __name__ == "__main__":
    main(suite)
