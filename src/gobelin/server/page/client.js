// The server's HTTP interface: requests, jobs and their events, errors as sentences, patience where it is busy or away.

const LONGEST_PAUSE = 10; // seconds between two questions whether the server is back

export class ServerError extends Error {
  constructor(message, type = "failed", field = null) {
    super(message);
    this.type = type;
    this.field = field;
  }
}

// Tells of "away" and "back".
export const connection = new EventTarget();
let away = false;

const address = (path) => new URL(path, document.baseURI).href;

export async function request(path, { method = "GET", body, signal } = {}) {
  const options = { method, signal };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    watch();
    throw new ServerError("The server does not answer.", "away");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const getJson = async (path, options) => (await request(path, options)).json();
export const post = (path, body, signal) => getJson(path, { method: "POST", body, signal });

async function refusal(response) {
  let said;
  try {
    ({ error: said } = await response.json());
  } catch {
    said = undefined; // a proxy's page, or nothing
  }
  const message = said?.message ?? `The server answers ${response.status} ${response.statusText}`.trim();
  const kind = response.status === 401 ? "token" : (said?.type ?? "failed");
  const error = new ServerError(message, kind, said?.field ?? null);
  const wait = Number(response.headers.get("Retry-After"));
  if (response.status === 429) error.wait = Math.max(1, Number.isFinite(wait) ? Math.ceil(wait) : 5);
  return error;
}

// Ask again and again until the server answers, and tell whoever listens.
async function watch() {
  if (away) return;
  away = true;
  for (let pause = 1; away; pause = Math.min(LONGEST_PAUSE, 2 * pause)) {
    for (let left = pause; left > 0; left -= 1) {
      connection.dispatchEvent(new CustomEvent("away", { detail: { seconds: left } }));
      await sleep(1000);
    }
    try {
      const { status } = await fetch(address("v1/samplers"));
      away = status >= 500; // what a proxy answers for a server that is away
    } catch {
      away = true;
    }
  }
  connection.dispatchEvent(new CustomEvent("back"));
}

export const sleep = (milliseconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(cancelled());
    });
  });

const cancelled = () => new ServerError("Cancelled.", "cancelled");

// Run a job to its end and return it. `heard` may have functions `waiting(seconds)`, for a server whose queue is full,
// `queued`, `started` and `step`, for what the server tells; `signal` cancels it.
export async function runJob(body, heard = {}, signal = undefined) {
  const { id, position } = await submit(body, heard, signal);
  heard.queued?.({ position });
  return follow(id, heard, signal);
}

async function submit(body, heard, signal) {
  for (;;) {
    if (signal?.aborted) throw cancelled();
    try {
      return await post("v1/jobs", body);
    } catch (error) {
      if (error.wait === undefined) throw error;
      for (let left = error.wait; left > 0; left -= 1) {
        heard.waiting?.(left);
        await sleep(1000, signal);
      }
    }
  }
}

function follow(id, heard, signal) {
  return new Promise((resolve, reject) => {
    const source = new EventSource(address(`v1/jobs/${id}/events`));
    const end = (settle, value) => {
      source.close();
      signal?.removeEventListener("abort", cancel);
      settle(value);
    };
    const cancel = () => {
      // What the server cannot be told it will notice by itself, or it is gone.
      request(`v1/jobs/${id}`, { method: "DELETE" }).catch(() => {});
      end(reject, cancelled());
    };
    signal?.addEventListener("abort", cancel);
    if (signal?.aborted) cancel();
    const on = (name, act) => source.addEventListener(name, ({ data }) => act(JSON.parse(data || "{}")));
    for (const name of ["queued", "started", "step"]) on(name, (detail) => heard[name]?.(detail));
    on("done", (detail) => end(resolve, detail.job ?? detail));
    on("cancelled", () => end(reject, cancelled()));
    on("failed", ({ error }) => end(reject, new ServerError(error.message, error.type, error.field)));
    source.addEventListener("error", async () => {
      if (source.readyState !== EventSource.CLOSED) {
        watch(); // the browser itself tries again
        return;
      }
      try {
        const job = await getJson(`v1/jobs/${id}`);
        if (job.state === "done") end(resolve, job);
        else end(reject, new ServerError(job.error?.message ?? "The server stopped telling of this picture."));
      } catch (error) {
        if (error.type === "away") {
          connection.addEventListener("back", () => follow(id, heard, signal).then(resolve, reject), { once: true });
        } else if (error.type === "not_found") {
          end(
            reject,
            new ServerError("The server was started again and has forgotten this picture: ask for it again."),
          );
        } else {
          end(reject, error);
        }
      }
    });
  });
}
