// Interaction: light and dark theme, chart values on hover, table sorting, and the dialog of the 3D view.

const byId = (identity) => document.getElementById(identity);

function startTheme() {
  const [button, root] = [byId('theme'), document.documentElement];
  const isDark = () => (root.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  const name = () => { button.textContent = isDark() ? 'Light mode' : 'Dark mode'; };
  button.hidden = false;
  button.addEventListener('click', () => { root.dataset.theme = isDark() ? 'light' : 'dark'; name(); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', name);
  name();
}

/** Shows the values of a chart on hover, or with the arrow keys. */
function startReader(plot) {
  const stops = JSON.parse(plot.dataset.stops);
  if (!stops.length) return;
  const [top, bottom, width] = plot.dataset.area.split(',').map(Number);
  const height = plot.querySelector('svg').viewBox.baseVal.height;
  const part = (className) => plot.appendChild(Object.assign(document.createElement('div'), { className }));
  const [cursor, tip, reader] = ['cursor', 'tip', 'reader'].map(part);
  Object.assign(cursor.style, { top: `${100 * top / height}%`, height: `${100 * (bottom - top) / height}%` });
  const attributes = { role: 'slider', tabindex: 0, 'aria-label': `Values of ${plot.dataset.title}`, 'aria-valuemin': 0,
    'aria-valuemax': stops.length - 1 };
  Object.entries(attributes).forEach(([name, value]) => reader.setAttribute(name, value));
  let at = 0;

  function update(number) {
    at = Math.min(Math.max(number, 0), stops.length - 1);
    const [x, text] = stops[at];
    const left = x < width / 2;
    tip.textContent = text;
    cursor.style.left = `${100 * x / width}%`;
    Object.assign(tip.style, { left: left ? `calc(${100 * x / width}% + 8px)` : 'auto',
      right: left ? 'auto' : `calc(${100 - 100 * x / width}% + 8px)` });
    reader.setAttribute('aria-valuenow', at);
    reader.setAttribute('aria-valuetext', text.replaceAll('\n', ', '));
    show(true);
  }
  const show = (shown) => { cursor.hidden = tip.hidden = !shown; };
  const pointed = (event) => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    update(stops.reduce((best, stop, i) => (Math.abs(stop[0] - x) < Math.abs(stops[best][0] - x) ? i : best), 0));
  };
  reader.addEventListener('pointermove', pointed);
  reader.addEventListener('pointerdown', pointed);
  reader.addEventListener('pointerleave', () => show(reader.matches(':focus-visible')));
  reader.addEventListener('focus', () => { if (reader.matches(':focus-visible')) update(at); });
  reader.addEventListener('blur', () => show(false));
  reader.addEventListener('keydown', (event) => {
    const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: stops.length - 1 };
    if (event.key === 'Escape') show(false);
    if (!(event.key in to)) return;
    update(to[event.key]);
    event.preventDefault();
  });
  reader.setAttribute('aria-valuenow', 0);
  reader.setAttribute('aria-valuetext', stops[0][1].replaceAll('\n', ', '));
  show(false);
}

/** Turns headers into sort buttons. Numbers start in descending order; missing values come last. */
function startSorting(table) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].textContent;
  const figure = (text) => Number.parseFloat(text.replaceAll(',', ''));
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.every((row) => /^-?[\d,.]+$|^–$/.test(value(row, column)));
      const now = head.getAttribute('aria-sort');
      const order = now ? { ascending: 'descending', descending: 'ascending' }[now] : numeric ? 'descending' : 'ascending';
      const sign = order === 'ascending' ? 1 : -1;
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (!numeric) return sign * x.localeCompare(y, 'en', { numeric: true });
        return (x === '–') - (y === '–') || sign * (figure(x) - figure(y)) || 0;
      });
      heads.forEach((other) => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', order);
      table.tBodies[0].append(...rows);
    });
  });
  heads[1].setAttribute('aria-sort', 'descending');
}

/** Connects the buttons of all sample cards to one viewer. */
function startViewer() {
  const { runs, colours } = JSON.parse(byId('meshes').textContent);
  const [dialog, canvas, buttons] = [byId('viewer'), byId('canvas'), [...document.querySelectorAll('.open-viewer')]];
  const viewer = createViewer(canvas, colours);
  if (!viewer) return;
  byId('no-viewer').hidden = true;
  let shown = 0;

  function open(button) {
    shown = buttons.indexOf(button);
    const sample = runs[button.dataset.run].samples[button.dataset.sample];
    byId('viewer-title').textContent = button.dataset.title;
    byId('viewer-figures').textContent = button.dataset.figures;
    const pictures = button.closest('.card').querySelector('.pictures').cloneNode(true);
    byId('viewer-pictures').replaceChildren(...pictures.children);
    if (!dialog.open) {
      viewer.view.stage = sample.stages.length - 1;
      viewer.reset();
      dialog.showModal();
      canvas.focus();
    }
    viewer.show(sample, runs[button.dataset.run].faces);
    offerStages(sample.stages.length);
    update();
  }

  function offerStages(count) {
    const set = byId('choice-stage');
    set.querySelectorAll('label').forEach((label) => label.remove());
    for (let stage = 0; stage < count; stage += 1) {
      const input = Object.assign(document.createElement('input'), { type: 'radio', name: 'stage', value: stage });
      input.checked = stage === viewer.view.stage;
      const label = document.createElement('label');
      label.append(input, stage);
      set.append(label);
    }
  }

  function update() {
    const { stage, truth, place } = viewer.view;
    byId('viewer-state').textContent = `Stage ${stage}, ground truth ${truth}, ${place === 'own' ? 'each hand at its own root'
      : 'right hand at the predicted offset'}.`;
  }

  function choose(name, value) {
    const input = dialog.querySelector(`input[name="${name}"][value="${value}"]`);
    if (!input) return;
    input.checked = true;
    viewer.choose(name, name === 'stage' ? Number(value) : value);
    update();
  }

  const step = (by) => open(buttons[(shown + by + buttons.length) % buttons.length]);
  const actions = { 'zoom-in': () => viewer.zoom(1.2), 'zoom-out': () => viewer.zoom(1 / 1.2), reset: () => viewer.reset(),
    previous: () => step(-1), next: () => step(1), close: () => dialog.close() };
  Object.entries(actions).forEach(([identity, act]) => byId(identity).addEventListener('click', act));
  dialog.addEventListener('change', (event) => choose(event.target.name, event.target.value));
  buttons.forEach((button) => {
    button.hidden = false;
    button.addEventListener('click', () => open(button));
  });
  const keys = { ArrowLeft: () => viewer.turn(0, -0.12), ArrowRight: () => viewer.turn(0, 0.12),
    ArrowUp: () => viewer.turn(-0.12, 0), ArrowDown: () => viewer.turn(0.12, 0), '+': actions['zoom-in'],
    '=': actions['zoom-in'], '-': actions['zoom-out'] };
  canvas.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = keys[event.key] || (/^\d$/.test(event.key) && (() => choose('stage', event.key)));
    if (!act) return;
    act();
    event.preventDefault();
  });
  followPointers(canvas, viewer);
}

/** One pointer rotates, two zoom. */
function followPointers(canvas, viewer) {
  const pointers = new Map();
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return Math.hypot(a.x - b.x, a.y - b.y) || 1;
  };
  canvas.addEventListener('pointerdown', (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener('pointermove', (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const apart = pointers.size === 2 && spread();
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (apart) viewer.zoom(spread() / apart);
    else if (pointers.size === 1) viewer.turn((event.clientY - before.y) / 150, (event.clientX - before.x) / 150);
  });
  ['pointerup', 'pointercancel'].forEach((name) => canvas.addEventListener(name, (event) => pointers.delete(event.pointerId)));
  canvas.addEventListener('wheel', (event) => {
    viewer.zoom(Math.exp(-event.deltaY / 600));
    event.preventDefault();
  }, { passive: false });
}

startTheme();
document.querySelectorAll('.plot').forEach(startReader);
document.querySelectorAll('.sortable').forEach(startSorting);
if (byId('meshes')) startViewer();
