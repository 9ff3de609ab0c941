// The page: one view at a time, named in the address, around a desk with one picture on it.

import "./word_map.js";
import { announce, byId, make } from "./elements.js";
import { connection, getJson } from "./client.js";
import { desk } from "./desk.js";
import { latest, showGallery, startGallery } from "./gallery.js";
import { startChange } from "./change.js";
import { startCompare } from "./compare.js";
import { startHowItWorks } from "./how_it_works.js";
import { startPaint } from "./paint.js";
import { startPhoto } from "./photo.js";

const VIEWS = ["paint", "change", "look", "compare", "how", "gallery"];

function showView() {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : "paint";
  for (const name of VIEWS) byId(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = document.querySelector(`nav a[href="#${view}"]`).textContent;
  document.title = view === "paint" ? "Gobelin" : `${title} – Gobelin`;
  if (view === "gallery") showGallery();
}

function watchConnection() {
  const notice = byId("notice");
  connection.addEventListener("away", ({ detail: { seconds } }) => {
    if (notice.hidden) announce("The server does not answer.");
    notice.hidden = false;
    notice.className = "";
    notice.textContent = `The server does not answer. Trying again in ${seconds} s.`;
  });
  connection.addEventListener("back", () => {
    notice.className = "good";
    notice.textContent = "The server is back.";
    announce("The server is back.");
    setTimeout(() => {
      if (notice.className === "good") notice.hidden = true;
    }, 4000);
  });
}

// What the server says of itself; waits for a server that is away, and asks for the token where it wants one.
async function greet() {
  try {
    return await getJson("v1/info");
  } catch (error) {
    if (error.type === "token") {
      askToken(error.message);
      return new Promise(() => {}); // the page is loaded again with it
    }
    if (error.type !== "away") throw error;
    await new Promise((resolve) => connection.addEventListener("back", resolve, { once: true }));
    return greet();
  }
}

function askToken(message) {
  const input = make("input", { type: "password", id: "token", autocomplete: "current-password", required: true });
  const form = make(
    "form",
    {
      className: "token",
      onsubmit: (event) => {
        event.preventDefault();
        location.assign(`?token=${encodeURIComponent(input.value)}`);
      },
    },
    make("h1", { textContent: "This server asks for a token" }),
    make("p", { textContent: message }),
    make("label", { htmlFor: "token", textContent: "Token" }),
    input,
    make("button", { className: "primary", textContent: "Open" }),
  );
  document.querySelector("main").replaceChildren(form);
  input.focus();
}

async function start() {
  addEventListener("hashchange", showView);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address names the view
    byId("view").focus();
  });
  showView();
  watchConnection();
  try {
    desk.info = await greet();
  } catch (error) {
    byId("paint-form").querySelector(".line").textContent = error.message;
    return;
  }
  const { model, size } = desk.info;
  byId("model").textContent = `${model}, ${size[1]}×${size[0]} pixels`;
  startPaint();
  startChange();
  startPhoto();
  startCompare();
  startHowItWorks();
  startGallery();
  document.body.dataset.ready = "";
  const run = await latest();
  if (run && desk.run === null) desk.show(run);
}

start();
