"""Other gRPC clients than grpcio's with the proxy between them and the server of grpc_interop.py: grpc-js (clients/grpc_js.js)
and tonic (examples/grpc_tonic.rs), in plaintext and over mTLS. On demand.
"""

import asyncio
import json
import os

import grpc.aio

from grpc_interop import OPTIONS, Server
from harness import HERE, IP, PATIENCE, Lane, Ours, Report, bridge, main

CASES = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "status_codes_and_messages",
    "status_behind_messages",
    "custom_metadata",
    "unimplemented",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "many_at_once",
]


async def run(server, kind, *command):
    """Whether all cases of a client passed."""
    report = Report(kind)
    # Those of another client are not this one's.
    server.calls.clear()
    process = await asyncio.create_subprocess_exec(*map(str, command), stdout=asyncio.subprocess.PIPE)
    # Each case has its own patience.
    output, _ = await asyncio.wait_for(process.communicate(), PATIENCE * 2 * len(CASES))
    told = [json.loads(line) for line in output.splitlines()]
    for one in told:
        report.case(one["name"], [one["problem"]] if one["problem"] else [])
    names = [one["name"] for one in told]
    report.case("all cases", [] if names == CASES and not process.returncode else [f"ended with {process.returncode} after {names}"])
    return report.end()


async def suite():
    plain, tls, bridged = Lane((IP, 9001), (IP, 9003)), Lane((IP, 9002), (IP, 9003)), (IP, 9004)
    server = grpc.aio.server(options=OPTIONS)
    handler = Server()
    server.add_generic_rpc_handlers([handler])
    server.add_insecure_port("{}:{}".format(*plain.upstream))
    await server.start()
    good = True
    async with Ours(plain=[plain], tls=[tls]) as ours:
        await bridge(ours.client_tls("h2"), bridged, tls.listen)
        if "NODE_PATH" in os.environ:
            # It speaks TLS itself.
            for kind, lane, more in (("grpc-js", plain, []), ("grpc-js over mTLS", tls, [ours.folder.name])):
                good = await run(handler, kind, "node", HERE / "clients/grpc_js.js", "{}:{}".format(*lane.listen), *more) and good
        else:
            Report("grpc-js").skip("there is no Node.js, or npm cannot install it")
        for kind, address in (("tonic", plain.listen), ("tonic over mTLS", bridged)):
            good = await run(handler, kind, os.environ["GRPC_TONIC"], "{}:{}".format(*address)) and good
    await server.stop(None)
    return good


if __name__ == "__main__":
    main(suite)
