// The image with its points. Points are fractions of width and height; their disks have a twentieth of the height as radius.

const SVG = 'http://www.w3.org/2000/svg';
const svg = (name, attributes = {}) => {
  const e = document.createElementNS(SVG, name);
  Object.entries(attributes).forEach(([k, v]) => e.setAttribute(k, v));
  return e;
};
export const MARKS = ['artifact', 'misalignment'];
const clamp = (v) => Math.min(Math.max(v, 0), 1);
const round = (v) => Math.round(v * 1e4) / 1e4;

/**
 * hooks: points() -> {artifact, misalignment}; change(points, what, step) makes a new state, rest() ends a movement; left() -> which mark the left button makes.
 */
export function makeStage(image, hooks) {
  const { width, height } = image;
  const stage = document.createElement('div');
  const canvas = document.createElement('div');
  const picture = document.createElement('img');
  const layer = svg('svg', { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' });
  const marks = svg('g');
  const cross = svg('g', { class: 'cursor' });
  let cursor = [0.5, 0.5];
  let chosen = null; // [mark, number]
  let drag = null;
  let zoom = 1;

  stage.className = 'stage';
  stage.id = 'stage';
  stage.tabIndex = 0;
  stage.setAttribute('role', 'application');
  stage.setAttribute('aria-label', 'Image. Arrow keys move the cursor; the keys for artifact and misalignment put a point there.');
  canvas.className = 'canvas';
  picture.src = `/images/${image.token}`;
  picture.alt = 'The image to judge';
  picture.draggable = false;
  if (height < 200) picture.className = 'crisp';
  layer.append(marks, cross);
  canvas.append(picture, layer);
  stage.append(canvas);

  const place = (event) => {
    const box = layer.getBoundingClientRect();
    return [round(clamp((event.clientX - box.left) / box.width)), round(clamp((event.clientY - box.top) / box.height))];
  };
  const copy = () => structuredClone(hooks.points());

  function add(mark, at) {
    const points = copy();
    points[mark].push(at);
    chosen = null;
    cursor = at;
    hooks.change(points, `${mark} ${at}`);
  }
  function remove() {
    const points = copy();
    const last = chosen ?? [...MARKS].reverse().map((m) => [m, points[m].length - 1]).find(([, i]) => i >= 0);
    if (!last) return;
    points[last[0]].splice(last[1], 1);
    chosen = null;
    hooks.change(points, `delete ${last[0]}`);
  }
  function move(dx, dy, far) {
    const step = far ? 0.05 : 0.01;
    const [x, y] = chosen ? hooks.points()[chosen[0]][chosen[1]] : cursor;
    const to = [round(clamp(x + dx * step * (height / width))), round(clamp(y + dy * step))];
    cursor = to;
    stage.classList.add('keyed');
    if (!chosen) { draw(); return; }
    const points = copy();
    points[chosen[0]][chosen[1]] = to;
    hooks.change(points, `move ${chosen[0]}`, chosen.join(' '));
  }
  function choose(by) {
    const all = MARKS.flatMap((m) => hooks.points()[m].map((_, i) => [m, i]));
    if (!all.length) return;
    const now = chosen ? all.findIndex(([m, i]) => m === chosen[0] && i === chosen[1]) : (by > 0 ? -1 : 0);
    chosen = all[(now + by + all.length) % all.length];
    cursor = hooks.points()[chosen[0]][chosen[1]];
    hooks.rest();
    stage.classList.add('keyed');
    draw();
  }
  function setZoom(to) {
    zoom = Math.min(Math.max(to, 1), 8);
    fit();
    const [x, y] = cursor;
    stage.scrollLeft = x * canvas.clientWidth - stage.clientWidth / 2;
    stage.scrollTop = y * canvas.clientHeight - stage.clientHeight / 2;
  }
  function fit() {
    if (!stage.clientWidth) return;
    const phone = matchMedia('(max-width: 820px)').matches;
    const room = [stage.clientWidth - 2, phone ? innerHeight * 0.62 : stage.clientHeight - 2];
    const scale = Math.min(room[0] / width, room[1] / height) * zoom;
    canvas.style.width = `${Math.max(width * scale, 8)}px`;
    canvas.style.height = `${Math.max(height * scale, 8)}px`;
  }
  function draw() {
    const points = hooks.points();
    if (chosen && !points[chosen[0]][chosen[1]]) chosen = null;
    marks.replaceChildren(...MARKS.flatMap((mark) => points[mark].map(([x, y], i) => {
      const c = svg('circle', { cx: x * width, cy: y * height, r: height / 20, class: mark });
      if (chosen && chosen[0] === mark && chosen[1] === i) c.classList.add('chosen');
      c.dataset.mark = mark;
      c.dataset.number = i;
      return c;
    })));
    const [x, y, arm] = [cursor[0] * width, cursor[1] * height, height / 14];
    cross.replaceChildren(...['out', 'in'].flatMap((part) => [
      svg('line', { x1: x - arm, x2: x + arm, y1: y, y2: y, class: part }), svg('line', { x1: x, x2: x, y1: y - arm, y2: y + arm, class: part }),
    ]));
  }

  layer.addEventListener('contextmenu', (e) => e.preventDefault());
  layer.addEventListener('pointerdown', (event) => {
    stage.classList.remove('keyed');
    const on = event.target.dataset?.mark;
    const at = place(event);
    if (on) {
      if (event.button === 0) {
        chosen = [on, Number(event.target.dataset.number)];
        hooks.rest();
        drag = { from: at, moved: false, points: copy() };
        layer.setPointerCapture(event.pointerId);
        for (const c of marks.children) c.classList.toggle('chosen', c === event.target); // a touch is lost with the circle that it began on
      }
      return;
    }
    if (event.pointerType === 'touch') { drag = { tap: at, x: event.clientX, y: event.clientY }; return; } // it may become a scroll
    if (event.button === 0) add(hooks.left(), at);
    if (event.button === 2) add(MARKS.find((m) => m !== hooks.left()), at);
  });
  // A finger on a point moves the point, not the page. (Chromium leaves touch-action on a circle unheeded.)
  layer.addEventListener('touchstart', (event) => { if (event.target.dataset?.mark) event.preventDefault(); }, { passive: false });
  layer.addEventListener('pointermove', (event) => {
    if (!drag || drag.tap) return;
    const at = place(event);
    if (!drag.moved && Math.hypot(at[0] - drag.from[0], at[1] - drag.from[1]) < 0.006) return;
    drag.moved = true;
    marks.querySelector('.chosen')?.setAttribute('cx', at[0] * width);
    marks.querySelector('.chosen')?.setAttribute('cy', at[1] * height);
    drag.points[chosen[0]][chosen[1]] = at;
  });
  layer.addEventListener('pointerup', (event) => {
    if (drag?.tap && Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < 10) add(hooks.left(), drag.tap);
    else if (drag?.moved) { cursor = drag.points[chosen[0]][chosen[1]]; hooks.change(drag.points, `move ${chosen[0]}`); }
    drag = null;
  });
  layer.addEventListener('pointercancel', () => { drag = null; });
  new ResizeObserver(fit).observe(stage);
  draw();

  return {
    element: stage, draw, fit, remove, move, choose,
    put: (mark) => { stage.classList.add('keyed'); add(mark, [...cursor]); },
    deselect: () => { chosen = null; hooks.rest(); draw(); },
    zoomIn: () => setZoom(zoom * 1.5), zoomOut: () => setZoom(zoom / 1.5), zoomFit: () => setZoom(1),
    hasChosen: () => chosen !== null,
  };
}
