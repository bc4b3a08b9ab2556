"""What TLS scanners (sslscan, nmap) find of a listener with mTLS, and of one in plaintext. On demand."""

import asyncio
import contextlib
import ssl
import tempfile
import xml.etree.ElementTree as ElementTree

from harness import IP, PATIENCE, Lane, Ours, Recorder, Report, answer, main

# RFC 8446, B.4; rustls has no other of TLS 1.3, and we take none out.
SUITES = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
# X25519MLKEM768 is served too, but sslscan 2.0 does not know it.
GROUPS = {"x25519", "secp256r1", "secp384r1"}


async def scan(address, folder):
    """What sslscan says, with a client certificate that the listener takes."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = ["sslscan", f"--xml={file.name}", f"--certs={folder}/client.crt", f"--pk={folder}/client.key", "{}:{}".format(*address)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        await asyncio.wait_for(process.wait(), PATIENCE * 8)
        return ElementTree.parse(file.name).getroot().find("ssltest")


async def enumerated(address):
    """Suites by version, such as `TLSv1.3`, that nmap's script finds. It shows no certificate, and looks only at what a server answers a hello with."""
    host, port = address
    command = ["nmap", "-n", "-Pn", "-p", str(port), "--script", "+ssl-enum-ciphers", "-oX", "-", host]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE * 8)
    script = ElementTree.fromstring(out).find(".//script[@id='ssl-enum-ciphers']")
    tables = [] if script is None else script.findall("table")
    return {table.get("key"): {name.text for name in table.findall(".//elem[@key='name']")} for table in tables}


def versions(found):
    """Protocols that it could speak, such as `tls 1.3`."""
    all_of_them = found.findall("protocol")
    assert len(all_of_them) == 6, "sslscan did not try all versions"
    return {f"{one.get('type')} {one.get('version')}" for one in all_of_them if one.get("enabled") == "1"}


def offers_what_is_meant(found):
    yield "versions", versions(found), {"tls 1.3"}
    yield "suites", {one.get("cipher") for one in found.findall("cipher")}, SUITES
    yield "groups", {one.get("name").split(" ")[0] for one in found.findall("group")}, GROUPS
    yield "renegotiation", {one.get("supported") for one in found.findall("renegotiation")}, {"0"}
    yield "heartbleed", {one.get("vulnerable") for one in found.findall("heartbleed")}, {"0"}
    # Debian's sslscan cannot ask for compression; TLS 1.3 has none, and no other version is spoken.
    yield "compression", {one.get("supported") for one in found.findall("compression")} - {"0"}, set()
    yield "expired", {one.text for one in found.findall("certificates/certificate/expired")}, {"false"}
    yield "signature", {one.text for one in found.findall("certificates/certificate/signature-algorithm")}, {"ecdsa-with-SHA256"}
    yield "name", {one.text for one in found.findall("certificates/certificate/altnames")}, {"URI:spiffe://conformance/ns/test/sa/server"}


async def has_ticket(address, context):
    """Whether the server gave a ticket to resume the session with."""
    reader, writer = await asyncio.open_connection(*address, ssl=context)
    writer.write(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
    # Tickets come before the answer.
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
    assert head.startswith(b"HTTP/1.1 200"), head
    found = writer.get_extra_info("ssl_object").session.has_ticket
    writer.close()
    return found


async def finds_fault(report, ours):
    """TLS 1.2 and tickets are seen where they are served, or they could not be missed here."""
    folder, address = ours.folder.name, (IP, 9005)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/server.crt", f"{folder}/server.key")
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    async def serve(reader, writer):
        with contextlib.suppress(OSError):
            if await reader.read(65536):
                writer.write(answer("hello"))
        writer.close()

    async with await asyncio.start_server(serve, *address, ssl=context):
        found = versions(await scan(address, folder))
        report.case("finds fault with TLS 1.2", [] if found == {"tls 1.2", "tls 1.3"} else [f"{found}"])
        found = set(await enumerated(address))
        report.case("nmap finds fault with TLS 1.2", [] if found == {"TLSv1.2", "TLSv1.3"} else [f"{found}"])
        ticket = await has_ticket(address, ours.client_tls("http/1.1"))
        report.case("finds fault with a ticket", [] if ticket else ["it is not seen"])


async def suite():
    plain, tls = Lane((IP, 9001), (IP, 9003)), Lane((IP, 9002), (IP, 9003))
    await Recorder((answer("hello"), False)).start(plain.upstream)
    report = Report("tls_scan")
    async with Ours(plain=[plain], tls=[tls]) as ours:
        await finds_fault(report, ours)
        for name, got, want in offers_what_is_meant(await scan(tls.listen, ours.folder.name)):
            report.case(f"mTLS {name}", [] if got == want else [f"{got}, not {want}"])
        found = await enumerated(tls.listen)
        report.case("mTLS nmap", [] if set(found) == {"TLSv1.3"} and len(found["TLSv1.3"]) == len(SUITES) else [f"{found}"])
        found = versions(await scan(plain.listen, ours.folder.name))
        report.case("plaintext speaks no TLS", [f"{found}"] if found else [])
        # A resumed session would skip the check against the trust bundle of today.
        ticket = await has_ticket(tls.listen, ours.client_tls("http/1.1"))
        report.case("no ticket to resume a session with", ["there is one"] if ticket else [])
    return report.end()


if __name__ == "__main__":
    main(suite)
