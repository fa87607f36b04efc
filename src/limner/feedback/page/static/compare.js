// Tasks choice (best of several, or a ranking) and side (two images).
import { key } from './keys.js';

const make = (tag, properties = {}, ...children) => {
  const e = Object.assign(document.createElement(tag), properties);
  e.append(...children);
  return e;
};
const LEVELS = [[-2, 'A is much better'], [-1, 'A is better'], [0, 'The same'], [1, 'B is better'], [2, 'B is much better']];

export const emptyChoice = (item) => ({ images: item.images.map((i) => i.token), ranks: item.images.map(() => null) });
export const emptySide = (item) => ({ left: item.images[0].token, right: item.images[1].token, value: null });

function frame(item, tokens, columns, below) {
  let tile = 1;
  const size = Object.fromEntries(item.images.map((i) => [i.token, i]));
  const options = tokens.map((token, n) => {
    const picture = make('img', { src: `/images/${token}`, alt: `Image ${n + 1}`, width: size[token].width, height: size[token].height, draggable: false });
    if (size[token].height < 200) picture.className = 'crisp';
    return picture;
  });
  const tiles = make('div', { className: 'tiles', id: 'tiles' });
  const prompt = make('p', { className: 'prompt', dir: 'auto', id: 'prompt' }, item.text.trim() ? item.text : '(no prompt)');
  const sizes = make('div', { className: 'segmented', role: 'group', ariaLabel: 'Zoom' });
  const element = make('div', { className: 'compare' }, make('div', { className: 'head' }, prompt, sizes), tiles, below);
  const fit = () => {
    const aspect = Math.max(...item.images.map((i) => i.width / i.height));
    const rows = Math.ceil(tokens.length / columns);
    tiles.style.setProperty('--columns', columns);
    tiles.style.setProperty('--tile', `${((matchMedia('(max-width: 820px)').matches ? 40 : 62) / rows) * aspect * tile}vh`);
    tiles.style.setProperty('--phone-columns', tile > 1 ? 1 : 2);
  };
  fit();
  const zoom = (by) => () => { tile = Math.min(Math.max(tile * by, 1), 5); fit(); };
  const actions = [['zoom-in', 'Zoom in', '+', zoom(1.4)], ['zoom-out', 'Zoom out', '-', zoom(1 / 1.4)], ['zoom-fit', 'Fit the images', '0', zoom(0)]];
  sizes.append(...[[1, '−'], [2, 'Fit'], [0, '+']].map(([n, text]) => {
    const b = make('button', { type: 'button', ariaLabel: actions[n][1] }, text);
    b.addEventListener('click', actions[n][3]);
    return b;
  }));
  return { element, tiles, options, actions, fit };
}

export function buildChoice(item, page) {
  const { images } = page.state();
  const ranking = page.config.answer === 'ranking';
  let tied = false;
  const below = make('div', { className: 'group', id: 'below' });
  const view = frame(item, images, images.length <= 3 ? images.length : Math.ceil(images.length / 2), below);
  const buttons = images.map((token, n) => {
    const b = make('button', { type: 'button', className: 'option' }, view.options[n], make('span', { className: 'tag' }, String(n + 1)), make('span', { className: 'rank', hidden: true }));
    b.addEventListener('click', () => pick(n));
    return b;
  });
  view.tiles.append(...buttons);
  const tie = make('button', { type: 'button', id: 'tie' }, ranking ? 'The next shares the last rank' : 'All are equally good', key('tie'));
  tie.addEventListener('click', equal);
  below.append(tie, make('span', { className: 'quiet' }, ranking ? 'Choose the best first, then the next; again takes its rank away.' : 'Choose the best.'));

  function set(ranks, what) { page.commit({ ...structuredClone(page.state()), ranks }, what); }
  function pick(n) {
    const ranks = [...page.state().ranks];
    if (!ranking) { set(ranks.map((_, i) => (i === n ? 1 : 2)), `best ${n}`); return; }
    if (ranks[n] !== null) {
      const gone = ranks[n];
      ranks[n] = null;
      set(ranks.includes(gone) ? ranks : ranks.map((r) => (r !== null && r > gone ? r - 1 : r)), `unrank ${n}`);
    } else {
      const last = Math.max(0, ...ranks.filter((r) => r !== null));
      ranks[n] = tied && last ? last : last + 1;
      tied = false;
      set(ranks, `rank ${n}`);
    }
  }
  function equal() {
    if (ranking) { tied = !tied; draw(); } else set(images.map(() => 1), 'all equal');
  }
  function draw() {
    const { ranks } = page.state();
    buttons.forEach((b, n) => {
      const first = ranks[n] === 1;
      b.setAttribute('aria-pressed', ranking ? ranks[n] !== null : first);
      b.setAttribute('aria-label', `Image ${n + 1}${ranks[n] !== null && (ranking || first) ? `, rank ${ranks[n]}` : ''}`);
      const badge = b.querySelector('.rank');
      badge.hidden = ranking ? ranks[n] === null : !first;
      badge.textContent = ranking ? ranks[n] : '✓';
    });
    tie.setAttribute('aria-pressed', ranking ? tied : ranks.every((r) => r === 1));
    tie.classList.toggle('primary', ranking ? tied : ranks.every((r) => r === 1));
  }
  const actions = [...images.map((_, n) => [`pick${n + 1}`, `Image ${n + 1}`, String(n + 1), () => pick(n)]),
    ['tie', ranking ? 'The next shares the last rank' : 'All equally good', 't', equal], ...view.actions];
  return { element: view.element, draw, actions, fit: view.fit, tour: [['#tiles', ranking ? 'Choose the best image, then the next best, and so on.' : 'Choose the image that you would keep.']] };
}

export function buildSide(item, page) {
  const forced = page.config.levels === 'forced';
  const levels = LEVELS.filter(([v]) => !forced || Math.abs(v) === 2);
  const below = make('div', { className: forced ? 'levels forced' : 'levels', role: 'group', ariaLabel: 'Which is better?' });
  const view = frame(item, [page.state().left, page.state().right], 2, below);
  view.tiles.append(...view.options.map((picture, n) => make('div', { className: 'option' }, picture, make('span', { className: 'tag' }, 'AB'[n]))));
  const say = (value) => page.commit({ ...structuredClone(page.state()), value }, `side ${value}`);
  const buttons = levels.map(([value, text], n) => {
    const b = make('button', { type: 'button' }, forced ? text.replace('much ', '') : text, key(`level${n + 1}`));
    b.dataset.value = value;
    b.addEventListener('click', () => say(value));
    return b;
  });
  below.append(...buttons);
  function draw() {
    const { value } = page.state();
    buttons.forEach((b) => b.setAttribute('aria-pressed', Number(b.dataset.value) === value));
    [...view.tiles.children].forEach((t, n) => t.classList.toggle('chosen', value !== null && (n ? value > 0 : value < 0)));
  }
  const actions = [...levels.map(([value, text], n) => [`level${n + 1}`, forced ? text.replace('much ', '') : text, String(n + 1), () => say(value)]), ...view.actions];
  return { element: view.element, draw, actions, fit: view.fit, tour: [['#tiles', 'Two images for one prompt; which stands where is drawn by lot.'], ['.levels', 'Say how they compare.']] };
}
