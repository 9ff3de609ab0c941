// The runner of a form: its button asks the server for a job, and cancels it while it goes on; a line says how it went.

import { announce } from "./elements.js";
import { runJob } from "./client.js";
import { gather } from "./desk.js";

export class Runner {
  #button;
  #verb;
  #line;
  #going = null;

  constructor(form) {
    this.#button = form.querySelector("button[type=submit]");
    this.#verb = this.#button.textContent;
    this.#line = form.querySelector(".line");
    this.#button.addEventListener("click", (event) => {
      if (!this.#going) return;
      event.preventDefault();
      this.#going.abort();
    });
  }

  get busy() {
    return this.#going !== null;
  }

  say(text, isProblem = false) {
    this.#line.textContent = text;
    this.#line.classList.toggle("problem", isProblem);
  }

  // Do what is asked, a function of a signal, and return what it returns; null where it failed or was cancelled, which
  // the line then says. `blame(field, message)` may show an error at its field, and says whether it did.
  async attempt(act, blame = () => false) {
    if (this.#going) return null;
    this.#going = new AbortController();
    this.#button.textContent = "Cancel";
    this.#button.classList.add("going");
    this.say("");
    try {
      return await act(this.#going.signal);
    } catch (error) {
      if (error.type === "cancelled" || error.name === "AbortError") {
        this.say("Cancelled.");
      } else {
        const blamed = error.field !== undefined && error.field !== null && blame(error.field, error.message);
        this.say(blamed ? "One of the settings does not fit." : sentence(error.message), true);
      }
      announce(this.#line.textContent);
      return null;
    } finally {
      this.#going = null;
      this.#button.textContent = this.#verb;
      this.#button.classList.remove("going");
    }
  }

  // Run a job on a stage; returns the run, or null.
  async paint(body, stage, blame) {
    const heard = stage.begin(body.prompt ?? body.caption, body.kind === "look" ? body.image : null);
    const run = await this.attempt(async (signal) => {
      const job = await runJob(body, heard, signal);
      await heard.settled();
      return gather(job, body, heard.previews);
    }, blame);
    if (run === null) stage.back();
    return run;
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
