"""Clients that people use, through the proxy: curl, the WebSockets of websockets and of aiohttp, nghttp and h2load of nghttp2."""

import asyncio
import contextlib
import pathlib
import tempfile

import aiohttp
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.frames import Close

from harness import IP, PATIENCE, Lane, Ours, Recorder, Report, main
from http2 import Http2Recorder

MIB = 1 << 20


async def output(*command):
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*map(str, command), stdout=pipe, stderr=pipe)
    try:
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE * 2)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, f"{command}: {process.returncode}: {err.decode()[-500:]}"
    return out.decode("latin-1")


class Curl:
    """What curl's own transfer says of itself is the oracle."""

    WRITE = "%{stderr}%{http_version} %{http_code} %{num_connects} %{size_download}\\n"

    def __init__(self, http1, http2, folder):
        self.http1, self.http2 = (f"http://{host}:{port}" for host, port in (http1, http2))
        self.file = pathlib.Path(folder, "8MiB")
        self.file.write_bytes(b"0123456789abcdef" * (8 * MIB // 16))

    async def curl(self, *arguments):
        """A line of version, status, connects and bytes for each transfer."""
        pipe = asyncio.subprocess.PIPE
        command = ["curl", "--no-progress-meter", "--max-time", str(PATIENCE), "--noproxy", "*", "-w", self.WRITE, *map(str, arguments)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=pipe)
        _, err = await process.communicate()
        assert process.returncode == 0, f"{arguments}: {process.returncode} {err.decode()}"
        return [line.split() for line in err.decode().splitlines()]

    async def versions(self):
        # curl tells the version of the answer, and a server answers with its own (RFC 9110, 6.2).
        for option, base, size in (("--http1.0", self.http1, "6"), ("--http1.1", self.http1, "6"), ("--http2-prior-knowledge", self.http2, "5")):
            [[version, status, connects, got]] = await self.curl(option, f"{base}/a")
            assert (status, connects, got) == ("200", "1", size), (option, version, status, connects, got)
            assert option == "--http1.0" or version == {"--http1.1": "1.1"}.get(option, "2"), (option, version)

    async def one_connection_for_three(self):
        got = await self.curl("--http1.1", "-o", "/dev/null", f"{self.http1}/a", f"{self.http1}/b", f"{self.http1}/c")
        assert [line[2] for line in got] == ["1", "0", "0"], got

    async def head(self):
        assert (await self.curl("--http1.1", "-I", f"{self.http1}/a"))[0][:2] == ["1.1", "200"]

    async def expect_100_continue_with_8_mib(self):
        # Without the 100, curl would wait longer than it may take.
        expect = ("-H", "Expect: 100-continue", "--expect100-timeout", PATIENCE * 2, "--data-binary", f"@{self.file}")
        [[_, status, _, got]] = await self.curl("--http1.1", *expect, f"{self.http1}/a")
        assert (status, got) == ("200", str(8 * MIB + 8)), (status, got)

    async def chunked_upload(self):
        got = await self.curl("--http1.1", "-H", "Transfer-Encoding: chunked", "-H", "Expect:", "-T", self.file, f"{self.http1}/a")
        assert got == [["1.1", "200", "1", str(8 * MIB + 7)]], got

    async def http2_upload(self):
        got = await self.curl("--http2-prior-knowledge", "-T", self.file, f"{self.http2}/a")
        assert got == [["2", "200", "1", "5"]], got

    async def http2_upgrade_is_not_taken(self):
        # RFC 9113, 3.1: h2c by upgrade is obsolete. curl goes on with HTTP/1.1.
        assert (await self.curl("--http2", f"{self.http1}/a"))[0][:2] == ["1.1", "200"]


class WebSocket:
    def __init__(self, address):
        self.uri = "ws://{}:{}/chat".format(*address)

    @staticmethod
    async def start(address):
        async def echo(socket):
            with contextlib.suppress(websockets.ConnectionClosedError):
                async for message in socket:
                    if message == "bye":
                        await socket.close(4001, "as you wish")
                        return
                    await socket.send(message)

        def gate(socket, request):
            return socket.respond(403, "not you\n") if request.path == "/forbidden" else None

        await serve(echo, *address, subprotocols=["chat"], max_size=None, process_request=gate)

    def connect(self, **more):
        return connect(self.uri, max_size=None, open_timeout=PATIENCE, proxy=None, subprotocols=["chat"], **more)

    async def text_binary_large_and_compressed(self):
        for compression in ("deflate", None):
            async with self.connect(compression=compression) as socket:
                assert socket.subprotocol == "chat"
                for message in ("", "text ☺", b"", bytes(range(256)), bytes(4 * MIB), "x" * MIB):
                    await socket.send(message)
                    assert await asyncio.wait_for(socket.recv(), PATIENCE) == message

    async def fragments(self):
        async with self.connect() as socket:
            await socket.send(["a", "b" * 70_000, "c"])
            assert await asyncio.wait_for(socket.recv(), PATIENCE) == "a" + "b" * 70_000 + "c"

    async def ping(self):
        async with self.connect() as socket:
            await asyncio.wait_for(await socket.ping(b"12345"), PATIENCE)

    async def close_by_the_server(self):
        async with self.connect() as socket:
            await socket.send("bye")
            try:
                await asyncio.wait_for(socket.recv(), PATIENCE)
                raise AssertionError("a message")
            except websockets.ConnectionClosed as closed:
                assert closed.rcvd == Close(4001, "as you wish"), closed.rcvd

    async def close_by_the_client(self):
        async with self.connect() as socket:
            await socket.close(4002, "enough")
            assert socket.close_code == 4002, socket.close_code

    async def refused_by_the_server(self):
        try:
            async with connect(self.uri.replace("/chat", "/forbidden"), proxy=None):
                raise AssertionError("accepted")
        except websockets.InvalidStatus as refused:
            assert refused.response.status_code == 403 and refused.response.body == b"not you\n"

    async def many(self):
        async def one(index):
            async with self.connect() as socket:
                await socket.send(str(index))
                assert await asyncio.wait_for(socket.recv(), PATIENCE) == str(index)

        await asyncio.gather(*[one(index) for index in range(50)])


class AiohttpWebSocket:
    """Another implementation of RFC 6455, which says its pings and its compression otherwise."""

    def __init__(self, address):
        self.uri = "ws://{}:{}/chat".format(*address)

    @contextlib.asynccontextmanager
    async def connect(self, **more):
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(self.uri, max_msg_size=0, protocols=["chat"], **more) as socket:
                assert socket.protocol == "chat"
                yield socket

    async def text_binary_large_and_compressed(self):
        for compress in (15, 0):
            async with self.connect(compress=compress) as socket:
                # The server may say a smaller window.
                assert bool(socket.compress) == bool(compress), socket.compress
                for text in ("", "text ☺", "x" * MIB):
                    await socket.send_str(text)
                    assert await socket.receive_str(timeout=PATIENCE) == text
                for binary in (b"", bytes(range(256)), bytes(4 * MIB)):
                    await socket.send_bytes(binary)
                    assert await socket.receive_bytes(timeout=PATIENCE) == binary

    async def ping(self):
        async with self.connect(autoping=False) as socket:
            await socket.ping(b"12345")
            pong = await socket.receive(timeout=PATIENCE)
            assert (pong.type, bytes(pong.data)) == (aiohttp.WSMsgType.PONG, b"12345"), pong

    async def close_by_the_server(self):
        async with self.connect() as socket:
            await socket.send_str("bye")
            end = await socket.receive(timeout=PATIENCE)
            assert (end.type, end.data, end.extra) == (aiohttp.WSMsgType.CLOSE, 4001, "as you wish"), end

    async def close_by_the_client(self):
        async with self.connect() as socket:
            await socket.close(code=4002, message=b"enough")
            assert socket.close_code == 4002, socket.close_code

    async def refused_by_the_server(self):
        async with aiohttp.ClientSession() as session:
            try:
                await session.ws_connect(self.uri.replace("/chat", "/forbidden"))
                raise AssertionError("accepted")
            except aiohttp.WSServerHandshakeError as refused:
                assert refused.status == 403, refused


class Nghttp2:
    def __init__(self, http1, http2):
        self.http1, self.http2 = (f"http://{host}:{port}/a" for host, port in (http1, http2))

    async def nghttp(self):
        out = await output("nghttp", "-v", "-n", self.http2)
        assert ":status: 200" in out and "error_code=NO_ERROR" in out, out

    async def h2load(self):
        out = await output("h2load", "-n", 1000, "-c", 4, "-m", 32, self.http2)
        assert "1000 succeeded, 0 failed, 0 errored, 0 timeout" in out, out

    async def h2load_http1(self):
        out = await output("h2load", "--h1", "-n", 1000, "-c", 4, self.http1)
        assert "1000 succeeded, 0 failed, 0 errored, 0 timeout" in out, out


async def suite():
    http1, http2, websocket = (Lane((IP, 9000 + n), (IP, 9100 + n)) for n in range(3))
    await Recorder().start(http1.upstream)
    await Http2Recorder().start(http2.upstream)
    await WebSocket.start(websocket.upstream)
    report = Report("clients")
    with tempfile.TemporaryDirectory(prefix="sluice-conformance-") as folder:
        async with Ours(plain=[http1, http2, websocket]):
            curl = Curl(http1.listen, http2.listen, folder)
            for cases in (curl, WebSocket(websocket.listen), AiohttpWebSocket(websocket.listen), Nghttp2(http1.listen, http2.listen)):
                for name in [name for name in vars(type(cases)) if name[0].islower() and name not in ("curl", "start", "connect")]:
                    try:
                        async with asyncio.timeout(PATIENCE * 3):
                            await getattr(cases, name)()
                        report.case(f"{type(cases).__name__} {name}", [])
                    except (AssertionError, OSError, TimeoutError, TypeError, websockets.WebSocketException, aiohttp.ClientError) as error:
                        report.case(f"{type(cases).__name__} {name}", [f"{type(error).__name__}: {str(error)[:800]}"])
    return report.end()


if __name__ == "__main__":
    main(suite)
