"""An echo behind TLS on asyncio: `tls_echo.py PORT CERTIFICATE KEY`."""

import asyncio
import ssl
import sys


async def serve(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def main():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(sys.argv[2], sys.argv[3])
    server = await asyncio.start_server(serve, "0.0.0.0", int(sys.argv[1]), ssl=context)
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main())
