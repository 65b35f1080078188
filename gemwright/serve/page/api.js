// The server's API: models, and a chat's answer as a stream of server-sent events.

/** What the server refused, as it said it. */
export class ApiError extends Error {
  constructor(status, error = {}) {
    super(error.message ?? `status ${status}`);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
  }
}

async function call(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error);
}

/** The cards of the models that are served. ApiError 503 while the model is loading. */
export async function models(key) {
  const response = await call("v1/models", key);
  return (await response.json()).data;
}

/** The chunks of an answer. ApiError before the first one or among them; aborting `signal` ends it with AbortError. */
export async function* chat(body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", key, { method: "POST", body: JSON.stringify(asked), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error);
    yield chunk;
  }
  throw new TypeError("the stream ended before the answer did");
}

/** The data of each event. Comments keep a silent stream alive and are skipped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    await reader.cancel().catch(() => {}); // also when the reader of this generator leaves early
  }
}
