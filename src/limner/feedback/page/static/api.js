// Talking to the server: every change carries the page's token; what cannot be sent is kept in this browser.

const token = document.querySelector('meta[name=csrf]').content;

export class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

/** JSON of an answer; throws Refused with the server's words, or TypeError where it cannot be reached. */
export async function call(path, body) {
  const options = body === undefined ? {} : {
    method: 'POST', headers: { 'content-type': 'application/json', 'x-csrf-token': token }, body: JSON.stringify(body),
  };
  const response = await fetch(path, { credentials: 'same-origin', ...options });
  let found = {};
  try { found = await response.json(); } catch { /* said below */ }
  if (!response.ok) throw new Refused(response.status, found.error || `The server answered ${response.status}.`);
  return found;
}

/** A submission's id. (crypto.randomUUID is missing where the page is not reached by https.) */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
}

/** What is not on the server yet, by `place`: rater, item and the pictures in it, whose names no other study has. Private windows may have no storage: then there is only the server. */
export const backup = {
  read(place) { try { return JSON.parse(localStorage.getItem(place)); } catch { return null; } },
  write(place, value) { try { localStorage.setItem(place, JSON.stringify(value)); } catch { /* see above */ } },
  clear(place) { try { localStorage.removeItem(place); } catch { /* see above */ } },
};

/** Calls `send` a while after the last `soon()`, one call at a time; `flush()` waits until nothing is left to send. */
export function saver(send, wait = 500) {
  let timer = 0; let running = Promise.resolve(); let due = false;
  const go = () => {
    clearTimeout(timer); timer = 0;
    if (!due) return running;
    due = false;
    running = running.then(send);
    return running;
  };
  return {
    soon() { due = true; clearTimeout(timer); timer = setTimeout(go, wait); },
    flush: go,
    drop() { due = false; clearTimeout(timer); return running; },
  };
}
