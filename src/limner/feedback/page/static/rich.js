// Task rich: points on the image, words of the prompt, ratings, and an explicit "nothing wrong".
import { key } from './keys.js';
import { MARKS, makeStage } from './stage.js';

const WORST = 'very poor'; const BEST = 'very good';
const make = (tag, properties = {}, ...children) => {
  const e = Object.assign(document.createElement(tag), properties);
  e.append(...children);
  return e;
};

export const empty = () => ({
  points: { artifact: [], misalignment: [] }, words: { misaligned: [] }, ratings: {}, nothing: { image: false, prompt: false },
});

/** Builds the view of an item; `page` has state(), commit(next, what, step), rest() and config. Returns {element, draw, actions}. */
export function build(item, page) {
  const { questions } = page.config;
  let left = 'artifact';
  let active = 0;
  const change = (edit, what, step) => {
    const next = structuredClone(page.state());
    edit(next);
    page.commit(next, what, step);
  };
  const stage = makeStage(item.images[0], {
    points: () => page.state().points,
    left: () => left,
    rest: page.rest,
    change: (points, what, step) => change((s) => {
      s.points = points;
      if (points.artifact.length) s.nothing.image = false;
      if (points.misalignment.length) s.nothing.prompt = false;
    }, what, step),
  });

  const sides = MARKS.map((mark) => {
    const b = make('button', { type: 'button', className: `ink-${mark}` }, make('span', { className: 'dot' }), ` ${mark}`, key(mark));
    b.addEventListener('click', () => { left = mark; draw(); });
    return b;
  });
  const zoom = [['zoomOut', '−', 'Zoom out'], ['zoomFit', 'Fit', 'Fit the image'], ['zoomIn', '+', 'Zoom in']].map(([id, text, label]) => {
    const b = make('button', { type: 'button', ariaLabel: label }, text);
    b.addEventListener('click', stage[id]);
    return b;
  });
  const remove = make('button', { type: 'button', id: 'delete' }, 'Delete', key('delete'));
  remove.addEventListener('click', stage.remove);
  const segmented = make('div', { className: 'segmented', role: 'group', ariaLabel: 'What a left click or tap marks' }, ...sides);
  const tools = make('div', { className: 'tools' }, segmented, make('span', { className: 'quiet hint' }, 'right click: the other'),
    make('span', { className: 'spring' }), remove, make('div', { className: 'segmented', role: 'group', ariaLabel: 'Zoom' }, ...zoom));

  const words = item.pieces.filter((p) => p.word !== null).map((p) => {
    const b = make('button', { type: 'button', textContent: p.text });
    b.dataset.word = p.word;
    b.addEventListener('click', () => change((s) => {
      const had = s.words.misaligned.includes(p.word);
      s.words.misaligned = had ? s.words.misaligned.filter((w) => w !== p.word) : [...s.words.misaligned, p.word].sort((x, y) => x - y);
      if (!had) s.nothing.prompt = false;
    }, `word ${p.word}`));
    return b;
  });
  const prompt = make('p', { className: 'prompt', dir: 'auto', id: 'prompt' }, ...item.pieces.map((p) => (p.word === null ? p.text : words[p.word])));
  if (!item.text.trim()) prompt.append(make('span', { className: 'quiet' }, '(no prompt)'));
  prompt.addEventListener('keydown', (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = words.indexOf(document.activeElement);
    if (!by || at < 0) return;
    event.preventDefault();
    event.stopPropagation();
    words[(at + (getComputedStyle(prompt).direction === 'rtl' ? -by : by) + words.length) % words.length].focus();
  });

  const check = (part, text) => {
    const box = make('input', { type: 'checkbox', id: `nothing-${part}` });
    box.addEventListener('change', () => toggleNothing(part));
    return make('label', { className: 'check' }, box, text, key(`nothing-${part}`));
  };
  function toggleNothing(part) {
    change((s) => {
      s.nothing[part] = !s.nothing[part];
      if (s.nothing[part] && part === 'image') s.points.artifact = [];
      if (s.nothing[part] && part === 'prompt') { s.points.misalignment = []; s.words.misaligned = []; }
    }, `nothing ${part}`);
  }
  const rate = (n, value) => {
    change((s) => { s.ratings[questions[n]] = value; }, `rate ${questions[n]} ${value}`);
    const open = questions.findIndex((q) => !page.state().ratings[q]);
    active = open < 0 ? Math.min(n + 1, questions.length - 1) : open;
    draw();
  };
  const rows = questions.map((q, n) => {
    const scale = make('div', { className: 'scale', role: 'radiogroup', ariaLabel: q }, ...[1, 2, 3, 4, 5].map((v) => {
      const input = make('input', { type: 'radio', name: q, value: v, ariaLabel: `${q} ${v}${v === 1 ? `, ${WORST}` : v === 5 ? `, ${BEST}` : ''}` });
      input.addEventListener('change', () => rate(n, v));
      input.addEventListener('focus', () => { active = n; draw(); });
      return make('label', {}, input, String(v));
    }));
    return make('div', { className: 'question' }, make('span', {}, q[0].toUpperCase() + q.slice(1)), scale);
  });
  const counts = make('p', { className: 'counts', ariaLive: 'polite' });
  const hint = (...parts) => make('span', {}, ...parts);
  const say = make('div', { className: 'say' },
    make('section', { id: 'words' }, make('h2', {}, 'Prompt: mark words that the image does not show'), prompt, check('prompt', 'Nothing contradicts the prompt')),
    make('section', { id: 'points' }, make('h2', {}, 'Image: mark what is wrong in it'), counts, check('image', 'Nothing looks wrong')),
    make('section', { id: 'ratings' }, make('h2', {}, 'Ratings'), ...rows, make('p', { className: 'ends quiet' }, make('span', {}, WORST), make('span', {}, BEST))),
    make('p', { className: 'hints' }, hint(key('up'), key('down'), key('left'), key('right'), ' cursor'), hint(key('next'), ' next point'), hint(key('words'), ' words'),
      hint(key('rate1'), '–', key('rate5'), ' rate'), hint(key('question'), ' next question'), hint(key('submit'), ' submit'), hint(key('keys'), ' all keys')));
  const element = make('div', { className: 'rich' }, make('div', { className: 'look' }, tools, stage.element), say);

  function draw() {
    const s = page.state();
    stage.draw();
    sides.forEach((b, i) => b.setAttribute('aria-pressed', MARKS[i] === left));
    words.forEach((b, i) => b.setAttribute('aria-pressed', s.words.misaligned.includes(i)));
    element.querySelector('#nothing-image').checked = s.nothing.image;
    element.querySelector('#nothing-prompt').checked = s.nothing.prompt;
    rows.forEach((row, n) => {
      row.classList.toggle('active', n === active);
      row.querySelectorAll('input').forEach((i) => { i.checked = Number(i.value) === s.ratings[questions[n]]; });
    });
    remove.disabled = !s.points.artifact.length && !s.points.misalignment.length;
    counts.replaceChildren(...MARKS.map((m) => make('span', { className: `ink-${m}` }, `${s.points[m].length} ${m}`)));
  }

  const arrow = (dx, dy) => (e) => stage.move(dx, dy, e.shiftKey);
  const actions = [
    ['artifact', 'Artifact point at the cursor', 'a', () => stage.put('artifact')],
    ['misalignment', 'Misalignment point at the cursor', 'm', () => stage.put('misalignment')],
    ['left', 'Cursor (or point) left; Shift: farther', 'ArrowLeft', arrow(-1, 0)], ['right', 'Right', 'ArrowRight', arrow(1, 0)],
    ['up', 'Up', 'ArrowUp', arrow(0, -1)], ['down', 'Down', 'ArrowDown', arrow(0, 1)],
    ['next', 'Select the next point', 'n', () => stage.choose(1)], ['previous', 'Select the point before', 'p', () => stage.choose(-1)],
    ['deselect', 'Select no point', 'Escape', stage.deselect], ['delete', 'Delete the selected point, or the last', 'Delete', stage.remove],
    ['words', 'To the words (then ← → and Space)', 'w', () => words[0]?.focus()],
    ['nothing-image', 'Nothing looks wrong', 'x', () => toggleNothing('image')], ['nothing-prompt', 'Nothing contradicts the prompt', 'c', () => toggleNothing('prompt')],
    ['question', 'Next question', 'q', () => { active = (active + 1) % questions.length; draw(); }],
    ...[1, 2, 3, 4, 5].map((v) => [`rate${v}`, `Rate ${v}`, String(v), () => rate(active, v)]),
    ['zoom-in', 'Zoom in', '+', stage.zoomIn], ['zoom-out', 'Zoom out', '-', stage.zoomOut], ['zoom-fit', 'Fit the image', '0', stage.zoomFit],
  ];
  const tour = [['#stage', 'Look at the image. A click or tap marks what is chosen above it, a right click the other: an artifact, or what contradicts the prompt. Drag a point to move it.'],
    ['#words', 'Read the prompt and click the words that the image does not show.'], ['#points', 'If nothing is wrong, say so: that differs from not having looked.'],
    ['#ratings', 'Then rate, from 1 to 5.']];
  return { element, draw, actions, tour, fit: stage.fit };
}
