"""What the suites share: proxies to talk to, an upstream that records every byte, and how a result is told."""

import asyncio
import collections
import json
import os
import pathlib
import re
import ssl
import sys
import tempfile
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).parent
# Longer than anything takes here; whoever waits for it has failed.
PATIENCE = float(os.environ.get("PATIENCE", "15"))
# Names in routes.
FAULT, OTHER = "envoy.filters.http.fault", "$other"
# An address of this process's own, so that fixed ports meet nobody's.
IP = f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250 + 1}.1"


class Report:
    """Counts, and says what is wrong with each case that is not right."""

    def __init__(self, suite):
        self.suite, self.passed, self.failed, self.known = suite, 0, [], 0

    def case(self, name, problems, known=None):
        """`known` is the reason why a case may fail; it must fail then, or the reason goes."""
        if known and problems:
            self.known += 1
            print(f"known   {self.suite} {name}: {known}")
        elif known:
            self._fail(name, [f"passes now: take its `fails` out ({known})"])
        elif problems:
            self._fail(name, problems)
        else:
            self.passed += 1

    def _fail(self, name, problems):
        self.failed.append(name)
        print(f"FAILED  {self.suite} {name}")
        for problem in problems:
            print(f"        {problem}")

    def skip(self, reason):
        print(f"SKIPPED {self.suite}: {reason}")

    def end(self):
        """Whether all is well."""
        print(f"==> {self.suite}: {self.passed} passed, {self.known} known, {len(self.failed)} failed", flush=True)
        return not self.failed


@dataclass
class Lane:
    """One listener of a proxy and what is behind it."""

    listen: tuple
    upstream: tuple

    @property
    def other(self):
        """A second upstream, for routes that name `$other`."""
        return self.upstream[0], self.upstream[1] + 5000

    def __str__(self):
        return "{}:{}={}:{}".format(*self.listen, *self.upstream)


def lanes(count, listen_from, upstream_from):
    return [Lane((IP, listen_from + n), (IP, upstream_from + n)) for n in range(count)]


class Ours:
    """Our data path with a static snapshot (src/main.rs)."""

    def __init__(self, plain=(), tls=(), arguments=()):
        self.plain, self.tls, self.arguments = plain, tls, arguments
        self.folder = tempfile.TemporaryDirectory(prefix="sluice-conformance-")

    async def __aenter__(self):
        command = [os.environ["SLUICE_CONFORMANCE"], "--certificates", self.folder.name, *self.arguments]
        for option, some in (("--plain", self.plain), ("--tls", self.tls)):
            for lane in some:
                command += [option, str(lane)]
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)
        assert line == b"ready\n", line
        return self

    def client_tls(self, alpn):
        """mTLS as a proxy of ours in front would have it. The server's name is a SPIFFE id, which this end ignores."""
        context = ssl.create_default_context(cafile=f"{self.folder.name}/ca.crt")
        context.check_hostname = False
        context.load_cert_chain(f"{self.folder.name}/client.crt", f"{self.folder.name}/client.key")
        context.set_alpn_protocols([alpn])
        return context

    async def __aexit__(self, *_):
        alive = self.process.returncode is None
        self.process.stdin.close()
        await asyncio.wait_for(self.process.wait(), PATIENCE)
        self.folder.cleanup()
        assert alive, "our proxy died"


class Envoy:
    """Stock Envoy with the same listeners. Its binary is `ENVOY`. `routes`: a list for each, in place of that to its upstream;
    `clusters`: what is said of each beside where its upstream is."""

    def __init__(self, plain, routes=None, clusters=None):
        self.plain, self.routes, self.clusters = plain, routes, clusters
        self.folder = tempfile.TemporaryDirectory(prefix="sluice-conformance-")

    async def __aenter__(self):
        file = pathlib.Path(self.folder.name, "envoy.json")
        listeners, clusters = envoy_resources(self.plain, self.routes, self.clusters, self.folder.name)
        file.write_text(json.dumps({"static_resources": {"listeners": listeners, "clusters": clusters}}))
        arguments = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "off", "-c", str(file)]
        arguments += ["--file-flush-interval-msec", "20"]
        self.process = await asyncio.create_subprocess_exec(os.environ["ENVOY"], *arguments)
        async with asyncio.timeout(PATIENCE * 2):
            await connected(self.plain[-1].listen)
        return self

    async def flags(self, index):
        """The response flags of the first request of a listener, as Envoy's access log has them."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    if line := pathlib.Path(self.folder.name, f"access{index}").read_text():
                        return line.splitlines()[0]
                except FileNotFoundError:
                    pass
                await asyncio.sleep(0.02)

    async def __aexit__(self, *_):
        alive = self.process.returncode is None
        if alive:
            self.process.kill()
        await self.process.wait()
        self.folder.cleanup()
        assert alive, "Envoy died"


async def bridge(context, address, upstream):
    """mTLS for a client that has no certificate: passes bytes and closes as they come."""

    async def copy(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass

    async def serve(reader, writer):
        try:
            there_reader, there_writer = await asyncio.open_connection(*upstream, ssl=context)
        except OSError:
            writer.close()
            return
        both = [asyncio.ensure_future(copy(reader, there_writer)), asyncio.ensure_future(copy(there_reader, writer))]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        for end in (writer, there_writer):
            end.close()

    return await asyncio.start_server(serve, *address)


async def connected(address):
    """Waits until somebody listens there."""
    while True:
        try:
            _, writer = await asyncio.open_connection(*address)
            writer.close()
            return
        except OSError:
            await asyncio.sleep(0.05)


def envoy_resources(plain, routes=None, clusters=None, logs=None):
    """Listeners and clusters as our fleet has them: HTTP/1.0 is served, WebSocket passes, HTTP/2 stays HTTP/2. In the form of JSON.
    `logs`: folder for access logs."""
    kind = "type.googleapis.com/envoy.extensions."
    routes = routes or [[{}]] * len(plain)

    def address(of):
        return {"socket_address": {"address": of[0], "port_value": of[1]}}

    def route(index, own):
        own = named(own, index)
        if "direct_response" in own:
            return {"match": {"prefix": "/"}, **own}
        action = {"timeout": "0s", **own.get("route", {})}
        if "weighted_clusters" not in action:
            action["cluster"] = f"c{index}"
        return {"match": {"prefix": "/"}, **own, "route": action}

    def http_filters(index):
        router = {"@type": f"{kind}filters.http.router.v3.Router", "suppress_envoy_headers": True}
        filters = [
            {"name": "envoy.filters.http.cors", "typed_config": {"@type": f"{kind}filters.http.cors.v3.Cors"}},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ]
        if any(FAULT in own.get("typed_per_filter_config", {}) for own in routes[index]):
            filters.insert(1, {"name": FAULT, "typed_config": {"@type": f"{kind}filters.http.fault.v3.HTTPFault"}})
        return filters

    def listener(index, lane):
        manager = {
            "@type": f"{kind}filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "conformance",
            "codec_type": "AUTO",
            "generate_request_id": False,
            "use_remote_address": True,
            "server_header_transformation": "PASS_THROUGH",
            "http_protocol_options": {"accept_http_10": True, "default_host_for_http_10": "default"},
            "http2_protocol_options": {"override_stream_error_on_invalid_http_message": True},
            "upgrade_configs": [{"upgrade_type": "websocket"}],
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route(index, own) for own in routes[index]]}]},
            "http_filters": http_filters(index),
        }
        if logs:
            log = {"@type": f"{kind}access_loggers.file.v3.FileAccessLog", "path": f"{logs}/access{index}"}
            log["log_format"] = {"text_format_source": {"inline_string": "%RESPONSE_FLAGS%\n"}}
            manager["access_log"] = [{"name": "envoy.access_loggers.file", "typed_config": log}]
        filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
        return {"name": f"l{index}", "address": address(lane.listen), "filter_chains": [{"filters": filters}]}

    def cluster(name, upstream, index):
        options = f"{kind}upstreams.http.v3.HttpProtocolOptions"
        same = {"http_protocol_options": {}, "http2_protocol_options": {}}
        endpoint = {"endpoint": {"address": address(upstream)}}
        # Envoy gives a user a cookie only where an endpoint is chosen by it.
        hashed = any("hash_policy" in own.get("route", {}) for own in routes[index])
        return {
            "name": name,
            "lb_policy": "RING_HASH" if hashed else "LEAST_REQUEST",
            "type": "STATIC",
            "connect_timeout": "1s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": options,
                    "use_downstream_protocol_config": same,
                }
            },
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
            **(clusters[index] if clusters else {}),
        }

    found = [cluster(f"c{index}", lane.upstream, index) for index, lane in enumerate(plain)]
    found += [cluster(f"d{index}", lane.other, index) for index, lane in enumerate(plain) if OTHER in json.dumps(routes[index])]
    return [listener(*one) for one in enumerate(plain)], found


def named(route, index):
    """A route with its clusters by name, for `$upstream` and `$other`."""
    return json.loads(json.dumps(route).replace("$upstream", f"c{index}").replace(OTHER, f"d{index}"))


FLAG = "x-sluice-response-flag"
# Fields of answers that are not held against Envoy's: the clock, and why an answer is our own.
NOT_COMPARED = {"date", FLAG}
# An answer of a proxy's own has a text of its own.
OWN_TEXT = {"content-length", "content-type", "grpc-message"}
# A new user's cookie is drawn.
DRAWN = re.compile(r'(?<=")[0-9a-f]{16}(?=")')


def headers_beside(pairs, reviewed=None):
    """What is wrong with the heads of answers beside Envoy's: (ours, Envoy's), each as (name, value). `reviewed` is `answer_differs`
    of a case: the lines that ours or `envoy` alone has, and why."""
    found = {"ours": [], "envoy": []}
    for ours, envoy in pairs:
        own = any(name.lower() == FLAG for name, _ in ours)
        without = NOT_COMPARED | (OWN_TEXT if own else set())
        lines = lambda of: collections.Counter(f"{name.lower()}: {DRAWN.sub('...', value)}" for name, value in of if name.lower() not in without)
        ours, envoy = lines(ours), lines(envoy)
        found["ours"] += sorted((ours - envoy).elements())
        found["envoy"] += sorted((envoy - ours).elements())
    assert reviewed is None or reviewed["why"], reviewed
    wanted = {key: (reviewed or {}).get(key, []) for key in found}
    return [] if found == wanted else [f"the answers' heads differ by {found}, not {wanted}: is that intended?"]


def expanded(text):
    """In a text of the corpus, `{{x*3}}` is xxx."""
    return re.sub(r"\{\{(.+?)\*(\d+)\}\}", lambda match: match[1] * int(match[2]), text, flags=re.S)


TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.1")
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*((?:[\x21-\x7e\x80-\xff][\t\x20-\x7e\x80-\xff]*)?)")
FRAMING = {"content-length", "transfer-encoding", "host"}


def parse_fields(lines, faults):
    """Field lines, and what of them another implementation may read differently."""
    fields = []
    for line in lines:
        match = FIELD.fullmatch(line)
        if not match:
            faults.append(f"not a field line: {line!r}")
            continue
        fields.append((match[1].decode().lower(), match[2].rstrip(b" \t").decode("latin-1")))
    return fields


def parse_head(head):
    """The head of a request in its narrowest reading, with everything in it that is not in that."""
    faults = []
    for name, bad in (("bare CR", rb"\r(?!\n)"), ("bare LF", rb"(?<!\r)\n"), ("NUL", rb"\0")):
        if re.search(bad, head):
            faults.append(f"{name} in a head")
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if not line:
        faults.append(f"not a request line: {first!r}")
        return "?", "?", [], faults
    fields = parse_fields(lines, faults)
    of = lambda wanted: [value for name, value in fields if name == wanted]
    target = line[2].decode("latin-1")
    if not target.startswith("/") and target != "*":
        faults.append(f"not a target in origin-form: {target}")
    if len(of("host")) != 1:
        faults.append(f"Host: {of('host')}")
    lengths, codings = of("content-length"), of("transfer-encoding")
    if lengths and codings:
        faults.append("Content-Length and Transfer-Encoding")
    if len(lengths) > 1 or any(not re.fullmatch(r"[0-9]+", it) for it in lengths):
        faults.append(f"Content-Length: {lengths}")
    if codings and codings != ["chunked"]:
        faults.append(f"Transfer-Encoding: {codings}")
    return line[1].decode(), target, fields, faults


@dataclass
class Received:
    """A request that came whole."""

    method: str
    target: str
    fields: list
    body: bytes
    trailers: list = field(default_factory=list)

    def __str__(self):
        text = self.body.decode("latin-1")
        return f"{self.method} {self.target} {text}".rstrip()


class Recorder:
    """An upstream that takes requests in the narrowest reading of RFC 9112 only, and writes down what else it gets."""

    def __init__(self, answer=None):
        # Bytes to answer with, and whether the connection is closed behind them.
        self.answer = answer
        # Those that came whole, and "METHOD target" of all that began.
        self.requests, self.begun, self.faults = [], [], []

    async def start(self, address):
        self.server = await asyncio.start_server(self._serve, *address, backlog=16)

    async def _serve(self, reader, writer):
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        except (ValueError, asyncio.LimitOverrunError) as error:
            self.faults.append(str(error))
        finally:
            writer.close()

    async def _request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, fields, faults = parse_head(head)
        self.faults += faults
        if faults:
            return False
        self.begun.append(f"{method} {target}")
        values = dict(fields)
        trailers = []
        if "transfer-encoding" in values:
            body, trailers = await self._chunks(reader)
        else:
            body = await reader.readexactly(int(values.get("content-length", 0)))
        received = Received(method, target, fields, body, trailers)
        if target == "/probe":
            writer.write(answer("probe"))
            await writer.drain()
            return True
        self.requests.append(received)
        return await self._answer(received, writer)

    async def _answer(self, received, writer):
        """Returns whether the connection goes on."""
        if self.answer:
            data, close = self.answer
            writer.write(data)
            await writer.drain()
            return not close
        writer.write(answer("" if received.method == "HEAD" else str(received)))
        await writer.drain()
        return True

    async def _chunks(self, reader):
        body = b""
        while True:
            line = await reader.readuntil(b"\r\n")
            if not re.fullmatch(rb"[0-9a-fA-F]{1,16}\r\n", line):
                raise ValueError(f"a chunk's size line: {line!r}")
            size = int(line, 16)
            if not size:
                break
            body += await reader.readexactly(size)
            if await reader.readexactly(2) != b"\r\n":
                raise ValueError("a chunk's end")
        trailers, faults = [], []
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            trailers += parse_fields([line.removesuffix(b"\r\n")], faults)
        framing = FRAMING.intersection(name for name, _ in trailers)
        if faults or framing:
            raise ValueError(f"trailers: {faults} {framing}")
        return body, trailers


def answer(text):
    body = text.encode("latin-1")
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def main(*suites):
    """Runs suites, each an async function that returns whether all was well."""
    sys.exit(0 if all([asyncio.run(suite()) for suite in suites]) else 1)
