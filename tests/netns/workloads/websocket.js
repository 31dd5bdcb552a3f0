// A WebSocket echo (RFC 6455), whole frames only: `websocket.js PORT`.
"use strict";
const { createHash } = require("crypto");
const http = require("http");

const server = http.createServer();
server.on("upgrade", (request, socket) => {
  const accept = createHash("sha1")
    .update(request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")
    .digest("base64");
  socket.write(
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
      `Sec-WebSocket-Accept: ${accept}\r\n\r\n`
  );
  socket.setNoDelay(true);
  let kept = Buffer.alloc(0);
  socket.on("data", (data) => {
    kept = Buffer.concat([kept, data]);
    for (;;) {
      if (kept.length < 2) return;
      let length = kept[1] & 127;
      let at = 2;
      if (length === 126) {
        if (kept.length < 4) return;
        length = kept.readUInt16BE(2);
        at = 4;
      } else if (length === 127) {
        if (kept.length < 10) return;
        length = Number(kept.readBigUInt64BE(2));
        at = 10;
      }
      if (kept.length < at + 4 + length) return;
      const head = Buffer.from(kept.subarray(0, at));
      head[1] &= 127;
      const mask = kept.subarray(at, at + 4);
      const payload = Buffer.from(kept.subarray(at + 4, at + 4 + length));
      for (let i = 0; i < payload.length; i++) payload[i] ^= mask[i & 3];
      kept = kept.subarray(at + 4 + length);
      socket.write(Buffer.concat([head, payload]));
    }
  });
  socket.on("error", () => socket.destroy());
});
server.listen(Number(process.argv[2]), "0.0.0.0", () => console.log("ready"));
