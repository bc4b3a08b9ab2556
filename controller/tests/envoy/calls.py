"""gRPC's own xDS client, and two back ends of it: calls.py TARGET NAME=ADDRESS NAME=ADDRESS.

Calls TARGET without end, eight at a time. Each number that is read is answered by a line of JSON: who answered of so many calls that
began after it was read, and what has failed since the start.
"""

import asyncio
import collections
import json
import sys

import grpc
import grpc.aio


class Who(grpc.GenericRpcHandler):
    def __init__(self, name):
        self.name = name.encode()

    def service(self, _):
        return grpc.unary_unary_rpc_method_handler(self.answer)

    async def answer(self, *_):
        return self.name


class Window:
    def __init__(self, count):
        self.left, self.answers, self.full = count, collections.Counter(), asyncio.Event()


async def caller(who, windows, failed):
    while True:
        window = windows[-1]
        try:
            name = (await who(b"", timeout=20)).decode()
        except grpc.aio.AioRpcError as error:
            failed.append(f"{error.code()}: {error.details()}")
            window.full.set()
            return
        if window.left:
            window.left -= 1
            window.answers[name] += 1
            if not window.left:
                window.full.set()


async def main(target, *servers):
    running = []
    for name, address in (server.split("=") for server in servers):
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Who(name),))
        assert server.add_insecure_port(address), address
        await server.start()
        running.append(server)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", flush=True)
    async with grpc.aio.insecure_channel(target) as channel:
        windows, failed = [Window(0)], []
        callers = [asyncio.ensure_future(caller(channel.unary_unary("/test.Test/Who"), windows, failed)) for _ in range(8)]
        while line := await reader.readline():
            windows.append(Window(int(line)))
            await windows[-1].full.wait()
            print(json.dumps({"answers": windows[-1].answers, "failed": failed[:5]}), flush=True)
        for one in callers:
            one.cancel()
    for server in running:
        await server.stop(None)


asyncio.run(main(*sys.argv[1:]))
