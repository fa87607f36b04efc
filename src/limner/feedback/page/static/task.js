// The page of a task: loads items, keeps drafts, hands answers in. State is plain data; every change makes a new one, so undo is a list.
import { Refused, backup, call, newId, saver } from './api.js';
import { buildChoice, buildSide, emptyChoice, emptySide } from './compare.js';
import { bind } from './keys.js';
import { build as buildRich, empty as emptyRich } from './rich.js';

const config = JSON.parse(document.getElementById('config').textContent);
const $ = (id) => document.getElementById(id);
const settings = { keys: {}, tour: false, ...config.settings };
const EVENTS = 400; // at most so many are kept of an item: what was done, and when

let task = null; let view = null; let past = []; let future = []; let now = null;
let events = []; let shownAt = 0; let seconds = 0; let version = 0; let busy = false;
let actions = []; let keys = null; let pending = null;
let moving = ''; // what is being moved, step by step: its steps are undone together

const tell = (text) => { $('problem').textContent = text; };
function saved(text, kind = '') { $('saved').textContent = text; $('saved').className = `saved ${kind}`; }
const spent = () => seconds + (document.hidden ? 0 : (performance.now() - shownAt) / 1000);
const payload = () => ({ ...now, events, seconds: Math.round(spent() * 10) / 10 });
const me = newId(); // this page: if a reply is lost, its next draft is not taken for another tab's
const place = (item) => ['limner', config.person, item.id, ...item.images.map((i) => i.token).sort()].join(':');

const draft = saver(async () => {
  const { item } = task;
  saved('Saving …');
  try {
    version = (await call('/api/draft', { item: item.id, version, payload: { ...payload(), page: me } })).version;
    backup.clear(place(item));
    saved('Saved', 'ok');
  } catch (error) {
    if (error instanceof Refused && error.status === 409) { saved('Changed in another tab', 'bad'); tell(error.message); } else if (error instanceof Refused && error.status === 401) signedOut();
    else if (error instanceof Refused) { saved('Not saved', 'bad'); tell(error.message); } else { saved('Not saved: no connection. Kept in this browser', 'bad'); setTimeout(() => draft.soon(), 3000); }
  }
});

const page = {
  config,
  state: () => now,
  /** step: the name of what is moved, if the change is a step of a movement: undone together with the steps before. */
  commit(next, what, step = '') {
    if (busy) return;
    if (!step || step !== moving) past.push(now);
    moving = step;
    future = [];
    now = next;
    log(what);
    changed();
  },
  /** The next step begins another movement. */
  rest() { moving = ''; },
};

function changed() {
  tell('');
  pending = null; // another answer: another submission
  view.draw();
  $('undo').disabled = !past.length;
  $('redo').disabled = !future.length;
  if (config.role === 'admin') return;
  saved('Not saved yet');
  backup.write(place(task.item), { state: now, events, seconds: spent(), base: task.revision, version, page: me });
  draft.soon();
}
function log(what) { if (events.length < EVENTS) events.push([Math.round(spent() * 1000), what]); }
function undo() { if (past.length && !busy) { future.push(now); now = past.pop(); page.rest(); log('undo'); changed(); } }
function redo() { if (future.length && !busy) { past.push(now); now = future.pop(); page.rest(); log('redo'); changed(); } }

function signedOut() {
  saved('Signed out', 'bad');
  const link = Object.assign(document.createElement('a'), { href: '/login', target: '_blank', rel: 'noopener', textContent: 'Sign in' });
  $('problem').replaceChildren('You are signed out. Nothing is lost: ', link, ' in another tab, then reload this one.');
}

function showProgress(p) {
  $('mine').textContent = config.role === 'admin' ? 'Settling' : `You: ${p.mine}`;
  $('global').max = p.total || 1;
  $('global').value = p.done;
  $('globaltext').textContent = `${p.done} of ${p.total}`;
}

function show(found) {
  showProgress(found.progress);
  $('task').setAttribute('aria-busy', 'false');
  $('bar').hidden = !found.item;
  tell('');
  if (!found.item) {
    const box = document.createElement('section');
    box.className = 'card done';
    box.innerHTML = '<h1></h1><p></p><p><a class="button" href="/mine">My answers</a> <a class="button" href="/">Look again</a></p>';
    box.querySelector('h1').textContent = found.finished ? 'Thank you, all done' : 'Nothing for you just now';
    box.querySelector('p').textContent = found.finished ? 'Every item has all its answers.' : 'You have seen all that there is for you. If somebody leaves an item, it will be here.';
    $('task').replaceChildren(box);
    task = null;
    saved('');
    return;
  }
  task = found;
  const fresh = { rich: emptyRich, choice: emptyChoice, side: emptySide }[config.task](task.item);
  const kept = backup.read(place(task.item));
  const ahead = kept && (kept.version >= task.version || kept.page === task.draft?.page); // the server has an older draft of that page
  const local = ahead && kept.base === task.revision ? kept : null;
  const { events: before = [], seconds: spentBefore = 0, page: _, ...from } = local ? { ...local.state, events: local.events, seconds: local.seconds } : (task.draft ?? task.answer ?? {});
  now = { ...fresh, ...from };
  past = []; future = []; moving = ''; pending = null; version = task.version;
  events = [...before]; seconds = spentBefore; shownAt = performance.now();
  view = { rich: buildRich, choice: buildChoice, side: buildSide }[config.task](task.item, page);
  $('task').replaceChildren(view.element);
  $('submit').firstChild.textContent = task.settles ? 'Settle ' : task.revision ? 'Submit the change ' : 'Submit ';
  $('undo').disabled = true; $('redo').disabled = true;
  view.fit();
  view.draw();
  rebind();
  if (local) draft.soon();
  saved(local ? 'Not saved yet' : task.draft ? 'Draft restored' : '', task.draft && !local ? 'ok' : '');
  if (!settings.tour && config.role !== 'admin') tour(view.tour);
}

async function load() {
  try {
    show(await call(`/api/task${config.item ? `?item=${config.item}` : ''}`));
  } catch (error) {
    $('bar').hidden = false;
    if (error.status === 401) signedOut(); else tell(`${error.message} Trying again …`);
    if (!(error instanceof Refused) || error.status === 429 || error.status >= 500) setTimeout(load, 3000);
  }
}

/** Hands in; tries again with the same id until the server says that it has it. */
async function send(skipped = '') {
  if (busy || !task) return;
  busy = true;
  $('submit').disabled = true;
  tell('');
  await draft.drop();
  pending ??= { id: newId(), item: task.item.id, base: task.revision, payload: payload(), seconds: spent(), skipped, take_next: !config.item };
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const found = await call('/api/submit', pending);
      backup.clear(place(task.item));
      pending = null;
      if (found.gold) await gold(found.gold);
      if (config.role === 'admin') location.assign(`/admin/items/${task.item.id}`);
      else if (config.item) location.assign('/mine');
      else { show(found.next); saved('Submitted', 'ok'); $('main').focus(); }
      break;
    } catch (error) {
      if (error instanceof Refused && ![429, 500, 502, 503, 504].includes(error.status)) {
        pending = null;
        if (error.status === 401) signedOut(); else tell(error.message);
        if (config.role !== 'admin') draft.soon();
        break;
      }
      if (!(error instanceof Refused || error instanceof TypeError)) { tell(String(error)); break; }
      saved('Not submitted yet: no connection. Trying again …', 'bad');
      await new Promise((done) => { setTimeout(done, wait * (0.5 + Math.random() / 2)); }); // not all at once
    }
  }
  busy = false;
  $('submit').disabled = false;
}

function gold(found) {
  $('goldtitle').textContent = found.correct >= 0.99 ? 'Right' : found.correct >= 0.5 ? 'Nearly right' : 'Look again at the guidelines';
  $('goldtext').textContent = `The answer to this item was known; you found ${Math.round(found.correct * 100)} % of it. ${found.message}`;
  $('gold').showModal();
  return new Promise((done) => { $('gold').addEventListener('close', done, { once: true }); });
}

function tour(steps) {
  const all = [...steps, ['#bar', 'Everything is saved as you work; you may close the page at any time. Submit when you are done; every key is listed under “Keys”.']];
  let at = 0;
  const from = document.activeElement;
  const clear = () => document.querySelectorAll('.spot').forEach((e) => e.classList.remove('spot'));
  const end = () => { clear(); $('tour').hidden = true; (from === document.body ? $('main') : from).focus({ preventScroll: true }); settings.tour = true; call('/api/settings', settings).catch(() => {}); };
  const step = () => {
    clear();
    if (at === all.length) { end(); return; }
    document.querySelector(all[at][0])?.classList.add('spot');
    $('tourtext').textContent = all[at][1];
    $('tournext').textContent = at === all.length - 1 ? 'Begin' : 'Next';
    $('tour').hidden = false;
    $('tournext').focus({ preventScroll: true });
    at += 1;
  };
  $('tournext').onclick = step;
  $('tourskip').onclick = end;
  step();
}
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !$('tour').hidden && !document.querySelector('dialog[open]')) $('tourskip').click();
});

function askSkip() { if (!task || config.role === 'admin') return; $('skipping').returnValue = ''; $('skipping').showModal(); }
$('noskip').addEventListener('click', () => $('skipping').close('back'));
$('skipping').addEventListener('close', () => {
  const form = new FormData($('skipform'));
  if ($('skipping').returnValue === 'skip') send(String(form.get('other')).trim() || form.get('reason'));
});

const common = [['undo', 'Undo', 'z', undo], ['redo', 'Redo', 'y', redo], ['skip', 'Skip', 's', askSkip], ['submit', 'Submit', 'Ctrl+Enter', () => send()],
  ['guide', 'Guidelines', 'g', () => $('guide').showModal()], ['keys', 'Keys', 'k', () => $('keys').showModal()], ['back', 'My answers', 'b', () => location.assign('/mine')]];

function rebind() {
  actions.splice(0, actions.length, ...view.actions, ...common);
  keys ??= bind(actions, settings.keys, () => call('/api/settings', settings).catch(() => tell('The keys could not be saved.')));
  keys.list();
}
for (const button of document.querySelectorAll('[data-action]')) {
  const [id, , , run] = common.find((a) => a[0] === button.dataset.action);
  button.addEventListener('click', run);
  if (button.closest('.bar')) button.append(' ', Object.assign(document.createElement('kbd'), { ariaHidden: 'true' }));
  const k = button.querySelector('kbd');
  if (k) k.dataset.for = id;
}
document.addEventListener('visibilitychange', () => {
  if (document.hidden) { seconds += (performance.now() - shownAt) / 1000; draft.flush(); } else shownAt = performance.now();
});
addEventListener('resize', () => view?.fit());
load();
