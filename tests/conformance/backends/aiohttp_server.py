"""As main.go, with aiohttp, whose parser is llhttp, Node's."""

import asyncio
import logging
import sys

from aiohttp import web


async def answer(request):
    await request.read()
    print(request.transport.get_extra_info("sockname")[1], request.method, request.raw_path, flush=True)
    return web.Response(text=f"{request.method} {request.raw_path}")


async def main(ip, first, count):
    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    for port in range(first, first + count):
        await web.TCPSite(runner, ip, port).start()
    await asyncio.to_thread(sys.stdin.read)


logging.disable()
asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
