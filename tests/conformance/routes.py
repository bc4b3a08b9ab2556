"""What a route asks for, beside Envoy: the same resources, in Envoy's own messages, to both (corpus/routes.toml).

Each case has a listener and an upstream of its own (`$upstream`), which answers by a script, and another one (`$other`). What is looked at: the answer, how often the upstream was
asked and what it got, and why a proxy answered itself (response flags).
"""

import asyncio
import json
import os
import pathlib
import re
import sys
import tempfile
import tomllib

from google.protobuf import json_format
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.filters.http.cors.v3 import cors_pb2  # noqa: F401 known to the parser of JSON from here on
from envoy.extensions.filters.http.fault.v3 import fault_pb2  # noqa: F401
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2  # noqa: F401
from envoy.service.discovery.v3 import discovery_pb2

from harness import FLAG, HERE, PATIENCE, Envoy, Ours, Recorder, Report, envoy_resources, expanded, headers_beside, lanes, main

KEYS = {"name", "source", "route", "routes", "cluster", "send", "script", "status", "flags", "upstream", "with", "without", "answer_with", "answer_without", "envoy"}
KEYS |= {"answer_like", "answer_differs", "other", "other_script", "other_with"}


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
        assert not {"route", "routes"} <= one.keys(), one
        one["routes"] = [named(route) for route in json.loads(one.get("routes") or f"[{one.get('route', '{}')}]")]
        one["cluster"] = json.loads(one.get("cluster", "{}"))
    return found


def named(route):
    """A route that says its name, if it has one."""
    if "name" in route:
        header = {"header": {"key": "x-route", "value": route["name"]}}
        route["request_headers_to_add"] = [header, *route.get("request_headers_to_add", [])]
    return route


def ours_xds(folder, plain, routes, clusters):
    """Envoy's messages as our proxy takes them in."""
    listeners, clusters = envoy_resources(plain, routes, clusters)
    for index, listener in enumerate(listeners):
        # Nothing that our control plane never says.
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        for field in ("http_protocol_options", "http2_protocol_options", "use_remote_address"):
            del manager[field]
    for cluster in clusters:
        cluster["lb_policy"] = "LEAST_REQUEST"
    for kind, module, messages in (("Cluster", cluster_pb2, clusters), ("Listener", listener_pb2, listeners)):
        response = discovery_pb2.DeltaDiscoveryResponse()
        for message in messages:
            resource = response.resources.add(name=message["name"], version="1")
            resource.resource.Pack(json_format.ParseDict(message, getattr(module, kind)()))
        pathlib.Path(folder, kind).write_bytes(response.SerializeToString())


async def asked(lane, case):
    """The answer of the proxy, and what its upstreams have seen."""
    upstream, other = Scripted(case.get("script", [200])), Scripted(case.get("other_script", [200]))
    await upstream.start(lane.upstream)
    await other.start(lane.other)
    reader, writer = await asyncio.open_connection(*lane.listen)
    writer.write(expanded(case["send"]).encode("latin-1"))
    await writer.drain()
    async with asyncio.timeout(PATIENCE):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    writer.close()
    try:
        async with asyncio.timeout(PATIENCE):
            # A copy may come after the answer.
            while len(other.requests) < len(case.get("other", [])):
                await asyncio.sleep(0.01)
    except TimeoutError:
        pass
    upstream.over.set()
    other.over.set()
    first, *lines = head.strip().split("\r\n")
    fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return int(first.split(" ")[1]), fields, upstream, other


def problems(case, wants, status, fields, flags, upstream, other):
    found, fields = [], dict(fields)
    got = {"status": status, "upstream": [str(request) for request in upstream.requests], "flags": flags}
    got["other"] = [str(request) for request in other.requests]
    for key, default in (("status", 200), ("upstream", []), ("other", []), ("flags", "-")):
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
    for name, pattern in case.get("answer_like", {}).items():
        if not re.fullmatch(pattern, fields.get(name, "")):
            found.append(f"the answer has {name}: {fields.get(name)}, not like {pattern}")
    copied = dict(other.requests[-1].fields) if other.requests else {}
    for name, value in case.get("other_with", {}).items():
        if copied.get(name) != value:
            found.append(f"the other upstream got {name}: {copied.get(name)}, not {value}")
    for name in case.get("answer_without", []):
        if name in fields:
            found.append(f"the answer has {name}: {fields[name]}")
    found += [f"passed on: {fault}" for fault in upstream.faults + other.faults]
    return found


async def several(asking):
    """A few at a time: some cases are about time."""
    limit = asyncio.Semaphore(16)

    async def one(asked):
        async with limit:
            return await asked

    return await asyncio.gather(*map(one, asking))


async def suite():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [case for case in cases() if wanted in case["name"]]
    ours, theirs = lanes(len(chosen), 11000, 21000), lanes(len(chosen), 31000, 41000)
    routes, clusters = ([case[key] for case in chosen] for key in ("routes", "cluster"))
    report, beside = Report("routes"), Report("routes beside Envoy")
    with tempfile.TemporaryDirectory(prefix="sluice-conformance-") as folder:
        ours_xds(folder, ours, routes, clusters)
        async with Ours(arguments=["--xds", folder]):
            mine = await several(map(asked, ours, chosen))
            for case, (status, fields, *upstreams) in zip(chosen, mine):
                flags = dict(fields).get(FLAG, "-")
                report.case(f"{case['name']} ({case['source']})", problems(case, case, status, fields, flags, *upstreams))
    if not os.environ.get("ENVOY"):
        beside.skip("no stock Envoy could be installed")
        return report.end()
    async with Envoy(theirs, routes, clusters) as envoy:
        for index, (case, (status, fields, *upstreams)) in enumerate(zip(chosen, await several(map(asked, theirs, chosen)))):
            flags = await envoy.flags(index)
            found = problems(case, case | case.get("envoy", {}), status, fields, flags, *upstreams)
            if "envoy" in case and not problems(case, case, status, fields, flags, *upstreams):
                found.append("does not differ: take its `envoy` out")
            if status == mine[index][0]:
                found += headers_beside([(mine[index][1], fields)], case.get("answer_differs"))
            beside.case(case["name"], found)
    return all([report.end(), beside.end()])


if __name__ == "__main__":
    main(suite)
