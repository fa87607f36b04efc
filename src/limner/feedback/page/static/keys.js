// Hot keys: a list of actions with keys that raters can change; shown on screen; kept with the rater's account.

const NAMES = { ' ': 'Space', ArrowLeft: '←', ArrowRight: '→', ArrowUp: '↑', ArrowDown: '↓', Escape: 'Esc', Delete: 'Del', Control: 'Ctrl' };

/** A key press as text: "a", "Ctrl+Enter", "Shift+ArrowUp" (of characters the case is left out, of punctuation Shift). */
export function pressed(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const shift = event.shiftKey && event.key.length > 1 ? 'Shift+' : '';
  return `${event.ctrlKey || event.metaKey ? 'Ctrl+' : ''}${event.altKey ? 'Alt+' : ''}${shift}${key}`;
}

export const shown = (key) => key.split(/\+(?=.)/).map((k) => NAMES[k] || (k.length === 1 ? k.toUpperCase() : k)).join('+');

/**
 * Actions [id, what it does, key, run] to key presses.
 * mine: {id: key} that the rater chose; save: keeps them.
 */
export function bind(actions, mine, save) {
  const keyOf = (id) => mine[id] ?? actions.find((a) => a[0] === id)?.[2];
  let waiting = null;

  function onKey(event) {
    if (waiting) { choose(event); return; }
    const at = event.target;
    const dialog = document.querySelector('dialog[open]');
    if (dialog || event.isComposing || at.matches('input:not([type=radio]):not([type=checkbox]), select, textarea')) return;
    const key = pressed(event);
    if ((key === 'Enter' || key === ' ') && at.closest('button, a, label, summary, input')) return;
    const plain = key.replace('Shift+Arrow', 'Arrow');
    if (at.matches('input[type=radio]') && plain.startsWith('Arrow')) return;
    const action = actions.find((a) => keyOf(a[0]) === key) ?? actions.find((a) => keyOf(a[0]) === plain && plain !== key);
    const fixed = { 'Ctrl+z': 'undo', 'Ctrl+y': 'redo', '?': 'keys', Backspace: 'delete' }[key];
    const run = (action ?? actions.find((a) => a[0] === fixed))?.[3];
    if (!run) return;
    event.preventDefault();
    run(event);
  }

  function choose(event) {
    event.preventDefault();
    event.stopPropagation();
    if (['Shift', 'Control', 'Alt', 'Meta'].includes(event.key)) return;
    const key = pressed(event);
    if (key !== 'Escape' || keyOf(waiting) === 'Escape') {
      const other = actions.find((a) => a[0] !== waiting && keyOf(a[0]) === key);
      if (other) mine[other[0]] = keyOf(waiting); // two actions trade keys: none is without one
      mine[waiting] = key;
      save(mine);
    }
    waiting = null;
    list();
  }

  function list() {
    const box = document.getElementById('keylist');
    const at = box.contains(document.activeElement) && document.activeElement.dataset.key;
    box.replaceChildren(...actions.map(([id, text]) => {
      const row = document.createElement('div');
      const name = document.createElement('span');
      const button = document.createElement('button');
      name.textContent = text;
      button.type = 'button';
      button.textContent = id === waiting ? 'press a key' : shown(keyOf(id));
      button.classList.toggle('waiting', id === waiting);
      button.setAttribute('aria-label', `Key for: ${text}, now ${shown(keyOf(id))}`);
      button.dataset.key = id;
      button.addEventListener('click', () => { waiting = id; button.focus(); list(); });
      row.append(name, button);
      return row;
    }));
    if (at) box.querySelector(`[data-key="${at}"]`)?.focus();
    document.querySelectorAll('kbd[data-for]').forEach((k) => { k.textContent = shown(keyOf(k.dataset.for) ?? ''); });
  }

  document.addEventListener('keydown', onKey, true);
  document.getElementById('keys').addEventListener('close', () => { waiting = null; list(); });
  document.getElementById('resetkeys').addEventListener('click', () => { Object.keys(mine).forEach((k) => delete mine[k]); save(mine); list(); });
  list();
  return { list };
}

/** A <kbd> that shows the key of an action, whatever it is now. */
export function key(id) {
  const k = document.createElement('kbd');
  k.dataset.for = id;
  k.setAttribute('aria-hidden', 'true');
  return k;
}
