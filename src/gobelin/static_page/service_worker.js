// The service worker: the page works without a network once it was loaded, and may use threads on any host.
//
// Threads need memory that workers share, which browsers give to pages that are isolated from other origins; most hosts
// of static files cannot send the two headers that say so, and this file adds them.

const CACHE = `gobelin ${self.registration.scope}`;
const ISOLATED = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};
const MARK = '<meta name="generator" content="gobelin page">';

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || !request.url.startsWith(self.registration.scope)) return;
  event.respondWith(answer(request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request);
  // What has its version in its address never changes; all else is asked for again while there is a network.
  const isVersion = new URL(request.url).searchParams.has("v");
  if (kept && isVersion) return isolated(kept);
  let response;
  try {
    response = await fetch(request, isVersion ? {} : { cache: "no-cache" });
  } catch (error) {
    if (kept) return isolated(kept);
    throw error;
  }
  if (response.type === "opaqueredirect") return response; // which the browser follows
  if (request.mode === "navigate" && response.ok && !(await isOurs(response.clone()))) return leave(response);
  if (response.ok && response.status !== 206) await keep(cache, request, response.clone());
  return isolated(response);
}

async function keep(cache, request, response) {
  const { pathname } = new URL(request.url);
  for (const other of await cache.keys()) {
    if (new URL(other.url).pathname === pathname && other.url !== request.url) await cache.delete(other);
  }
  await cache.put(request, response).catch(() => {}); // no room: the page works all the same
}

function isolated(response) {
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

async function isOurs(response) {
  return (await response.text()).includes(MARK);
}

// Another page has taken this one's place, as on a port of one's own machine: it is left alone from now on.
async function leave(response) {
  await caches.delete(CACHE);
  await self.registration.unregister();
  return response;
}
