"""gRPC's own client and server (grpcio) with the proxy between them: in plaintext, and over mTLS.

Cases after gRPC's interop suite (github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md), not all of it and with bytes instead
of protobuf messages, and some of what has gone wrong in other proxies. `cancel_after_begin` cancels behind the first answer: that is the
suite's cancel_after_first_response. The suite's own cancel_after_begin, before any message is sent, is not here.
"""

import asyncio
import collections
import itertools

import grpc
import grpc.aio

from harness import IP, PATIENCE, Lane, Ours, Report, bridge, main

MIB = 1 << 20
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]


class Server(grpc.GenericRpcHandler):
    def __init__(self):
        self.ended, self.remaining = asyncio.Event(), None
        # The same of calls that say who they are (`x-call`), for clients of another process.
        self.calls = collections.defaultdict(asyncio.Event)

    def service(self, details):
        kinds = {
            "Unary": (grpc.unary_unary_rpc_method_handler, self.unary),
            "Collect": (grpc.stream_unary_rpc_method_handler, self.collect),
            "Repeat": (grpc.unary_stream_rpc_method_handler, self.repeat),
            "Chat": (grpc.stream_stream_rpc_method_handler, self.chat),
            "Fail": (grpc.unary_unary_rpc_method_handler, self.fail),
            "FailLate": (grpc.unary_stream_rpc_method_handler, self.fail_late),
            "Sleep": (grpc.unary_unary_rpc_method_handler, self.sleep),
            "Ended": (grpc.unary_unary_rpc_method_handler, self.over),
        }
        service, _, name = details.method.rpartition("/")
        if service != "/test.Test" or name not in kinds:
            return None
        kind, handler = kinds[name]
        return kind(handler)

    async def unary(self, request, context):
        sent = dict(context.invocation_metadata())
        echoed = [(key, sent[key]) for key in ("x-text", "x-data-bin") if key in sent]
        await context.send_initial_metadata([*echoed, ("x-encoding", sent.get("grpc-encoding", ""))])
        context.set_trailing_metadata([(f"x-trailing-{key[2:]}", value) for key, value in echoed])
        return request

    async def collect(self, requests, _):
        return b",".join([request async for request in requests])

    async def repeat(self, request, context):
        count, size = map(int, request.split())
        try:
            for index in range(count):
                yield index.to_bytes(4, "big") + bytes(size)
        finally:
            self.end_by_name(context)

    async def chat(self, requests, context):
        try:
            async for request in requests:
                yield b"re: " + request
        finally:
            self.end(context)

    async def fail(self, request, context):
        code, _, message = request.partition(b" ")
        # Nothing was sent before: one header block with END_STREAM, "Trailers-Only".
        await context.abort(CODES[int(code)], message.decode(), (("x-detail-bin", b"\0\xff"),))

    async def fail_late(self, _, context):
        yield b"one"
        await context.abort(grpc.StatusCode.DATA_LOSS, "behind one")

    async def sleep(self, _, context):
        self.remaining = context.time_remaining()
        try:
            await asyncio.Event().wait()
        finally:
            self.end(context)

    def end(self, context):
        self.ended.set()
        self.end_by_name(context)

    def end_by_name(self, context):
        if call := dict(context.invocation_metadata()).get("x-call"):
            self.calls[call].set()

    async def over(self, call, _):
        """Answers when a call is over, with what the last that slept had of its time when it came."""
        await self.calls[call.decode()].wait()
        del self.calls[call.decode()]
        return str(self.remaining).encode()


CODES = {code.value[0]: code for code in grpc.StatusCode}


async def status(call):
    try:
        async with asyncio.timeout(PATIENCE):
            await call
        return grpc.StatusCode.OK, "", ()
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details(), error.trailing_metadata()


class Cases:
    """Each method is a case: it asserts."""

    def __init__(self, channel, dead, server):
        self.server, self.dead = server, dead.unary_unary("/test.Test/Unary")
        self.unary = channel.unary_unary("/test.Test/Unary")
        self.collect = channel.stream_unary("/test.Test/Collect")
        self.repeat = channel.unary_stream("/test.Test/Repeat")
        self.chat = channel.stream_stream("/test.Test/Chat")
        self.fail = channel.unary_unary("/test.Test/Fail")
        self.fail_late = channel.unary_stream("/test.Test/FailLate")
        self.sleep = channel.unary_unary("/test.Test/Sleep")
        self.unknown = channel.unary_unary("/test.Test/Unknown"), channel.unary_unary("/test.Unknown/Unary")

    async def empty_unary(self):
        assert await self.unary(b"") == b""

    async def large_unary(self):
        for size in (271_828, 314_159, 8 * MIB):
            data = bytes(size)
            assert await self.unary(data) == data

    async def client_streaming(self):
        async def requests():
            for word in (b"a", b"", bytes(100_000), b"d"):
                yield word

        assert await self.collect(requests()) == b"a,," + bytes(100_000) + b",d"

    async def server_streaming(self):
        got = [answer async for answer in self.repeat(b"50 60000")]
        assert [int.from_bytes(it[:4], "big") for it in got] == list(range(50)) and {len(it) for it in got} == {60004}

    async def ping_pong(self):
        call = self.chat()
        for word in (b"a", bytes(31_415), b""):
            await call.write(word)
            assert await call.read() == b"re: " + word
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF and await call.code() == grpc.StatusCode.OK

    async def empty_stream(self):
        call = self.chat()
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF and await call.code() == grpc.StatusCode.OK
        assert [answer async for answer in self.repeat(b"0 0")] == []

    async def status_codes_and_messages(self):
        for code, message in itertools.product(range(1, 17), ("", "plain", "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n", "100%")):
            got = await status(self.fail(f"{code} {message}".encode()))
            assert got[:2] == (CODES[code], message), got
            assert ("x-detail-bin", b"\0\xff") in tuple(got[2]), got

    async def status_behind_messages(self):
        call, got = self.fail_late(b""), []
        try:
            async for answer in call:
                got.append(answer)
        except grpc.aio.AioRpcError:
            pass
        assert got == [b"one"] and await call.code() == grpc.StatusCode.DATA_LOSS and await call.details() == "behind one"

    async def custom_metadata(self):
        sent = [("x-text", "a, b; c"), ("x-data-bin", bytes(range(256)))]
        call = self.unary(b"", metadata=sent)
        assert await call == b""
        initial, trailing = dict(await call.initial_metadata()), dict(await call.trailing_metadata())
        for key, value in sent:
            assert initial[key] == value and trailing[f"x-trailing-{key[2:]}"] == value, (initial, trailing)

    async def unimplemented(self):
        for call in self.unknown:
            assert (await status(call(b"")))[0] == grpc.StatusCode.UNIMPLEMENTED

    async def timeout_on_sleeping_server(self):
        self.server.ended.clear()
        assert (await status(self.sleep(b"", timeout=0.5)))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        # A timeout is rounded up to a unit of gRPC's, and the server counts from when it got it.
        assert 0 < self.server.remaining < 0.6, f"grpc-timeout did not arrive: {self.server.remaining}"
        await asyncio.wait_for(self.server.ended.wait(), PATIENCE)

    async def cancel_after_begin(self):
        call = self.chat()
        await call.write(b"a")
        self.server.ended.clear()
        assert await call.read() == b"re: a"
        call.cancel()
        await asyncio.wait_for(self.server.ended.wait(), PATIENCE)
        assert await self.unary(b"after") == b"after"

    async def compression(self):
        data = bytes(MIB)
        call = self.unary(data, compression=grpc.Compression.Gzip)
        assert await call == data

    async def many_at_once(self):
        # More than a connection may have open (256).
        answers = await asyncio.gather(*[self.unary(b"%d" % index) for index in range(600)])
        assert answers == [b"%d" % index for index in range(600)]

    async def one_that_is_not_read_holds_no_other_up(self):
        # hyper's windows were equal once: one stalled stream filled the connection (ztunnel, src/config.rs).
        stalled = self.repeat(b"200 100000")
        assert await stalled.read()
        for _ in range(7):
            assert len([answer async for answer in self.repeat(b"20 100000")]) == 20
        stalled.cancel()

    async def nobody_there(self):
        got = await status(self.dead(b""))
        assert got[0] == grpc.StatusCode.UNAVAILABLE and "upstream" in got[1] or "endpoint" in got[1], got


async def suite():
    plain, tls, dead = Lane((IP, 9001), (IP, 9003)), Lane((IP, 9002), (IP, 9003)), Lane((IP, 9005), (IP, 9006))
    handler = Server()
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([handler])
    server.add_insecure_port("{}:{}".format(*plain.upstream))
    await server.start()
    good = True
    async with Ours(plain=[plain, dead], tls=[tls]) as ours:
        await bridge(ours.client_tls("h2"), (IP, 9004), tls.listen)
        for kind, address in (("grpc", plain.listen), ("grpc over mTLS", (IP, 9004))):
            report = Report(kind)
            async with (
                grpc.aio.insecure_channel("{}:{}".format(*address), options=OPTIONS) as channel,
                grpc.aio.insecure_channel("{}:{}".format(*dead.listen), options=OPTIONS) as nobody,
            ):
                cases = Cases(channel, nobody, handler)
                for name in [name for name in vars(Cases) if not name.startswith("_")]:
                    try:
                        async with asyncio.timeout(PATIENCE * 2):
                            await getattr(cases, name)()
                        report.case(name, [])
                    except (AssertionError, grpc.aio.AioRpcError, TimeoutError) as error:
                        report.case(name, [f"{type(error).__name__}: {str(error)[:500]}"])
            good = report.end() and good
    await server.stop(None)
    return good


if __name__ == "__main__":
    main(suite)
