"""Requests over HTTP/2 that would be two, or another one, after a downgrade, as they are written in corpus/http2.toml.

Our proxy speaks HTTP/2 onwards, but an application may translate, so it is held to what a translator must refuse (RFC
9113, 8.2 and 10.3). The client writes frames itself, as no library would write these; the upstream takes anything. Then it
translates itself (`explicit_http_config`), to an upstream that takes HTTP/1.1 in its narrowest reading only.
"""

import asyncio
import os
import sys
import tomllib

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import hpack

from harness import HERE, PATIENCE, Envoy, Ours, Recorder, Report, expanded, headers_beside, lanes, main

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 3, 4, 7, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PLAIN = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/probe")]


class Http2Recorder:
    """An upstream that answers each whole request, and checks nothing of it."""

    def __init__(self):
        self.requests, self.faults = [], []

    async def start(self, address):
        self.server = await asyncio.start_server(self._serve, *address)

    async def _serve(self, reader, writer):
        config = h2.config.H2Configuration(
            client_side=False, validate_inbound_headers=False, normalize_inbound_headers=False, header_encoding="latin-1"
        )
        connection = h2.connection.H2Connection(config)
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        open_requests = {}
        try:
            while data := await reader.read(65536):
                for event in connection.receive_data(data):
                    self._event(connection, event, open_requests)
                writer.write(connection.data_to_send())
                await writer.drain()
        except OSError:
            pass
        except h2.exceptions.ProtocolError as error:
            self.faults.append(f"{type(error).__name__}: {error}")
        finally:
            writer.close()

    def _event(self, connection, event, open_requests):
        if isinstance(event, h2.events.RequestReceived):
            open_requests[event.stream_id] = [event.headers, b"", []]
        elif isinstance(event, h2.events.DataReceived):
            open_requests[event.stream_id][1] += event.data
            connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            open_requests[event.stream_id][2] += event.headers
        elif isinstance(event, h2.events.StreamEnded):
            headers, body, trailers = open_requests.pop(event.stream_id)
            if dict(headers).get(":path") != "/probe":
                self.requests.append((headers, body, trailers))
            # The answer to HEAD has no content, and one that has is malformed (RFC 9113, 8.1.1).
            head = dict(headers).get(":method") == "HEAD"
            connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "text/plain")], end_stream=head)
            if not head:
                connection.send_data(event.stream_id, b"hello", end_stream=True)
        elif isinstance(event, h2.events.StreamReset):
            open_requests.pop(event.stream_id, None)


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(text):
    """A string of HPACK without Huffman (RFC 7541, 5.1 and 5.2)."""
    data, length = text.encode("latin-1"), len(text)
    if length < 127:
        return bytes([length]) + data
    prefix, length = bytes([127]), length - 127
    while length >= 128:
        prefix, length = prefix + bytes([length % 128 + 128]), length // 128
    return prefix + bytes([length]) + data


def block(fields):
    return b"".join(b"\x10" + literal(name) + literal(value) for name, value in fields)


def message(stream, case):
    """The frames of a request."""
    data, trailers = case.get("data"), case.get("trailers")
    end = END_STREAM if data is None and trailers is None else 0
    fields = block((name, expanded(value)) for name, value in case["fields"])
    first, rest = fields[:16000], fields[16000:]
    frames = frame(HEADERS, end | (0 if rest else END_HEADERS), stream, first)
    if rest:
        frames += frame(CONTINUATION, END_HEADERS, stream, rest)
    if data is not None:
        frames += frame(DATA, END_STREAM if trailers is None else 0, stream, data.encode("latin-1"))
    if trailers is not None:
        frames += frame(HEADERS, END_HEADERS | END_STREAM, stream, block(trailers))
    return frames


async def exchange(address, case):
    """How each of the streams 1 and 3 ended: a status, `reset`, or `goaway` if the connection did. And the answer's fields on stream 1."""
    reader, writer = await asyncio.open_connection(*address)
    decoder, ends, statuses, answers = hpack.Decoder(), {}, {}, {}
    writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + message(1, case))
    probed = False
    try:
        async with asyncio.timeout(PATIENCE):
            while 3 not in ends:
                head = await reader.readexactly(9)
                length, kind, flags, stream = int.from_bytes(head[:3], "big"), head[3], head[4], int.from_bytes(head[5:], "big")
                payload = await reader.readexactly(length)
                if kind == SETTINGS and not flags & ACK:
                    writer.write(frame(SETTINGS, ACK, 0, b""))
                elif kind == HEADERS:
                    fields = decoder.decode(payload)
                    if stream not in statuses:
                        statuses[stream], answers[stream] = int(dict(fields)[":status"]), fields
                elif kind == RST_STREAM:
                    # After a whole answer it only says that the rest of the request is not wanted.
                    ends.setdefault(stream, "reset")
                elif kind == GOAWAY:
                    ends.setdefault(1, "goaway")
                    break
                if kind in (HEADERS, DATA) and flags & END_STREAM:
                    ends.setdefault(stream, statuses[stream])
                if 1 in ends and not probed:
                    probed = True
                    writer.write(message(3, {"fields": PLAIN}))
    except (OSError, asyncio.IncompleteReadError):
        ends.setdefault(1, "goaway")
    except TimeoutError:
        ends.setdefault(1, "hangs")
    writer.close()
    return ends.get(1), ends.get(3), answers.get(1, [])


async def tried(lane, case, recorder=Http2Recorder):
    recorder = recorder()
    await recorder.start(lane.upstream)
    end, probe, fields = await exchange(lane.listen, case)
    if isinstance(recorder, Recorder):
        requests = [([(":method", one.method), (":path", one.target), *one.fields], one.body, one.trailers) for one in recorder.requests]
    else:
        requests = recorder.requests
    bodies = [f"{dict(headers)[':method']} {dict(headers)[':path']} {body.decode('latin-1')}".rstrip() for headers, body, _ in requests]
    found = [f"passed on: {fault}" for fault in recorder.faults]
    if end not in ("goaway", "hangs") and probe != 200:
        found.append(f"another stream of the connection got {probe}")
    for headers, _, trailers in requests:
        for name, value in headers + trailers:
            hop = name in ("connection", "transfer-encoding", "upgrade", "keep-alive", "proxy-connection")
            # What HTTP/1.1 says of this hop is the proxy's own.
            own = isinstance(recorder, Recorder) and (name, value) in (("transfer-encoding", "chunked"), ("connection", "te"))
            if any(char in value + name for char in "\r\n\0") or name != name.lower() or (hop and not own):
                found.append(f"passed on: {name}: {value!r}")
    got = {"end": end, "upstream": bodies}
    if isinstance(recorder, Recorder) and "fields" in case.get("http1", {}):
        got["fields"] = [sorted([name, value] for name, value in headers if name[0] != ":" and not name.startswith("x-")) for headers, _, _ in requests]
    return got, found, fields


async def suite(name="http2", recorder=Http2Recorder, first=10000, clusters=None, arguments=()):
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    cases = tomllib.loads((HERE / "corpus/http2.toml").read_text())["case"]
    cases = [case for case in cases if wanted in case["name"]]
    ours, theirs = lanes(len(cases), first, first + 10000), lanes(len(cases), first + 20000, first + 30000)
    report, beside = Report(name), Report(f"{name} beside Envoy")
    wants = [{"end": case["end"], "upstream": case.get("upstream", [])} for case in cases]
    if recorder is Recorder:
        # What is otherwise where HTTP/1.1 is spoken onwards.
        wants = [want | {key: value for key, value in case.get("http1", {}).items() if key != "envoy"} for want, case in zip(wants, cases)]
        cases = [case | {"envoy": case.get("http1", {}).get("envoy", case.get("envoy", {}))} for case in cases]
    async with Ours(plain=ours, arguments=arguments):
        mine = await asyncio.gather(*[tried(*one, recorder) for one in zip(ours, cases)])
        for case, want, (got, found, _) in zip(cases, wants, mine):
            differs = [f"got {got}, not {want}"] if got != want else []
            report.case(f"{case['name']} ({case['source']})", differs + found, case.get("fails"))
    if not os.environ.get("ENVOY"):
        beside.skip("no stock Envoy could be installed")
        return report.end()
    async with Envoy(theirs, clusters=clusters and [clusters] * len(cases)):
        results = await asyncio.gather(*[tried(*one, recorder) for one in zip(theirs, cases)])
        for case, want, (got, _, fields), (_, _, ours) in zip(cases, wants, results, mine):
            # Of a stream or of the connection: refused is refused.
            for one in (got, want):
                one["end"] = "reset" if one["end"] == "goaway" else one["end"]
            envoy = case.get("envoy", {})
            assert not envoy or envoy["why"], case
            wanted = want | {key: value for key, value in envoy.items() if key != "why"}
            found = [f"Envoy: {got}: is that intended?"] if got != wanted else []
            if envoy and got == want:
                found = ["does not differ: take its `envoy` out"]
            if fields[:1] == ours[:1]:
                found += headers_beside([(ours, fields)], case.get("answer_differs"))
            beside.case(case["name"], found)
    return all([report.end(), beside.end()])


async def to_http1():
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    explicit = {"@type": f"type.googleapis.com/{options}", "explicit_http_config": {"http_protocol_options": {"enable_trailers": True}}}
    return await suite("http2 to HTTP/1.1", Recorder, 13000, {"typed_extension_protocol_options": {options: explicit}}, ["--to-http1"])


if __name__ == "__main__":
    main(suite, to_http1)
