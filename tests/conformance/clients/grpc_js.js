// grpc-js through the proxy: the cases of grpc_interop.py, against its server. Says of each what is wrong with it, a line of JSON.
// node grpc_js.js HOST:PORT [FOLDER with ca.crt, client.crt and client.key: mTLS]
"use strict";
const assert = require("node:assert/strict");
const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");

const MIB = 1 << 20;
const PATIENCE_MS = 30_000;
const raw = (message) => message;

function method(path, requestStream, responseStream) {
  return { path, requestStream, responseStream, requestSerialize: raw, requestDeserialize: raw, responseSerialize: raw, responseDeserialize: raw };
}

const Client = grpc.makeGenericClientConstructor({
  Unary: method("/test.Test/Unary", false, false),
  Collect: method("/test.Test/Collect", true, false),
  Repeat: method("/test.Test/Repeat", false, true),
  Chat: method("/test.Test/Chat", true, true),
  Fail: method("/test.Test/Fail", false, false),
  FailLate: method("/test.Test/FailLate", false, true),
  Sleep: method("/test.Test/Sleep", false, false),
  Ended: method("/test.Test/Ended", false, false),
  Unknown: method("/test.Test/Unknown", false, false),
  Elsewhere: method("/test.Unknown/Unary", false, false),
});

function credentials(folder) {
  if (!folder) return grpc.credentials.createInsecure();
  const read = (name) => fs.readFileSync(`${folder}/${name}`);
  // The server's name is a SPIFFE id, which this end ignores.
  const options = { checkServerIdentity: () => undefined };
  return grpc.credentials.createSsl(read("ca.crt"), read("client.key"), read("client.crt"), options);
}

const [address, folder] = process.argv.slice(2);
const client = new Client(address, credentials(folder), {
  "grpc.max_receive_message_length": -1,
  "grpc.max_send_message_length": -1,
  "grpc.enable_retries": 0,
  "grpc.enable_http_proxy": 0,
  "grpc.ssl_target_name_override": "conformance",
});

function metadata(entries) {
  const found = new grpc.Metadata();
  for (const [key, value] of entries) found.add(key, value);
  return found;
}

function call(name, message, entries = [], options = {}) {
  return new Promise((resolve, reject) => {
    client[name](Buffer.from(message), metadata(entries), options, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error("it did not fail");
}

async function all(stream) {
  const found = [];
  for await (const message of stream) found.push(message);
  return found;
}

function chat(id) {
  const stream = client.Chat(metadata([["x-call", id]]));
  const answers = stream[Symbol.asyncIterator]();
  return { stream, next: async () => (await answers.next()).value };
}

const cases = {
  async empty_unary() {
    assert.equal((await call("Unary", "")).length, 0);
  },

  async large_unary() {
    for (const size of [271_828, 314_159, 8 * MIB]) assert.ok((await call("Unary", Buffer.alloc(size))).equals(Buffer.alloc(size)), `${size} bytes`);
  },

  async client_streaming() {
    const large = Buffer.alloc(100_000);
    const answer = await new Promise((resolve, reject) => {
      const stream = client.Collect((error, got) => (error ? reject(error) : resolve(got)));
      for (const message of [Buffer.from("a"), Buffer.alloc(0), large, Buffer.from("d")]) stream.write(message);
      stream.end();
    });
    assert.ok(answer.equals(Buffer.concat([Buffer.from("a,,"), large, Buffer.from(",d")])));
  },

  async server_streaming() {
    const answers = await all(client.Repeat(Buffer.from("50 60000")));
    assert.deepEqual(answers.map((it) => it.readUInt32BE()), Array.from({ length: 50 }, (_, index) => index));
    assert.ok(answers.every((it) => it.length === 60_004));
  },

  async ping_pong() {
    const { stream, next } = chat("js-ping-pong");
    for (const word of [Buffer.from("a"), Buffer.alloc(31_415), Buffer.alloc(0)]) {
      stream.write(word);
      assert.ok((await next()).equals(Buffer.concat([Buffer.from("re: "), word])));
    }
    stream.end();
    assert.equal(await next(), undefined);
  },

  async empty_stream() {
    const { stream, next } = chat("js-empty");
    stream.end();
    assert.equal(await next(), undefined);
    assert.deepEqual(await all(client.Repeat(Buffer.from("0 0"))), []);
  },

  async status_codes_and_messages() {
    const odd = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n";
    for (let code = 1; code <= 16; code += 1) {
      for (const message of ["", "plain", odd, "100%"]) {
        const error = await failure(call("Fail", `${code} ${message}`));
        assert.equal(error.code, code);
        assert.equal(error.details, message);
        assert.deepEqual(error.metadata.get("x-detail-bin"), [Buffer.from([0, 0xff])]);
      }
    }
  },

  async status_behind_messages() {
    const got = [];
    const error = await failure((async () => {
      for await (const message of client.FailLate(Buffer.alloc(0))) got.push(message.toString());
    })());
    assert.deepEqual(got, ["one"]);
    assert.equal(error.code, grpc.status.DATA_LOSS);
    assert.equal(error.details, "behind one");
  },

  async custom_metadata() {
    const data = Buffer.from(Array.from({ length: 256 }, (_, index) => index));
    const sent = [["x-text", "a, b; c"], ["x-data-bin", data]];
    const [initial, trailing] = await new Promise((resolve, reject) => {
      const seen = [];
      const end = () => seen[0] && seen[1] && seen[2] && resolve(seen);
      const running = client.Unary(Buffer.alloc(0), metadata(sent), (error) => (error ? reject(error) : ((seen[2] = true), end())));
      running.on("metadata", (it) => ((seen[0] = it), end()));
      running.on("status", (it) => ((seen[1] = it.metadata), end()));
    });
    for (const [key, value] of sent) {
      assert.deepEqual(initial.get(key), [value]);
      assert.deepEqual(trailing.get(`x-trailing-${key.slice(2)}`), [value]);
    }
  },

  async unimplemented() {
    for (const name of ["Unknown", "Elsewhere"]) assert.equal((await failure(call(name, ""))).code, grpc.status.UNIMPLEMENTED);
  },

  async timeout_on_sleeping_server() {
    const error = await failure(call("Sleep", "", [["x-call", "js-sleep"]], { deadline: Date.now() + 500 }));
    assert.equal(error.code, grpc.status.DEADLINE_EXCEEDED);
    const remaining = Number((await call("Ended", "js-sleep")).toString());
    assert.ok(remaining > 0 && remaining < 0.6, `grpc-timeout did not arrive: ${remaining}`);
  },

  async cancel_after_begin() {
    const { stream, next } = chat("js-cancel");
    stream.write(Buffer.from("a"));
    assert.equal((await next()).toString(), "re: a");
    const over = failure(next());
    stream.cancel();
    assert.equal((await over).code, grpc.status.CANCELLED);
    await call("Ended", "js-cancel");
    assert.equal((await call("Unary", "after")).toString(), "after");
  },

  async many_at_once() {
    // More than a connection may have open (256).
    const answers = await Promise.all(Array.from({ length: 600 }, (_, index) => call("Unary", `${index}`)));
    answers.forEach((answer, index) => assert.equal(answer.toString(), `${index}`));
  },
};

function within(promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("it hangs")), PATIENCE_MS);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

(async () => {
  for (const [name, run] of Object.entries(cases)) {
    let problem = null;
    try {
      await within(run());
    } catch (error) {
      problem = String(error.stack).slice(0, 500);
    }
    console.log(JSON.stringify({ name, problem }));
  }
  client.close();
})();
