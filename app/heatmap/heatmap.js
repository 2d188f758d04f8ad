// The live view: reads the tape (see app/present.py), appends text, draws the visible part of the heatmap.
// Runs once per component with `element`, `props` and `watch` given. All text goes in as textContent.

const find = (selector) => element.querySelector(selector);
const story = find('.mod-story'), scroll = find('.mod-scroll'), spacer = find('.mod-spacer');
const canvas = find('.mod-canvas'), axis = find('.mod-axis'), tip = find('.mod-tip'), title = find('.mod-title');
const CELL = 10, TOP = 18, AXIS = 34;

let state = null;

function reset(head) {
  state = {
    head, consumed: 0, depth: 0, mod: [], rows: new Map(), anchors: 0, columns: [], spans: [], used: 0, cursor: null,
    answering: false,
  };
  story.replaceChildren();
  tip.hidden = true;
}

function read() {
  const tape = props.value || '';
  const head = tape.slice(0, 48);
  if (!state || state.head !== head || tape.length < state.consumed) reset(head);
  const end = tape.lastIndexOf('\n') + 1;
  if (end <= state.consumed) return;
  const followText = story.scrollTop + story.clientHeight >= story.scrollHeight - 30;
  const followMap = !state.cursor && scroll.scrollLeft + scroll.clientWidth >= scroll.scrollWidth - 4 * CELL;
  const fresh = document.createDocumentFragment();
  for (const line of tape.slice(state.consumed, end).split('\n')) if (line) record(JSON.parse(line), fresh);
  state.consumed = end;
  story.append(fresh);
  spacer.style.width = state.columns.length * CELL + 24 + 'px';
  if (followText) story.scrollTop = story.scrollHeight;
  if (followMap) scroll.scrollLeft = scroll.scrollWidth;
  describe();
  schedule();
}

function record(entry, fresh) {
  if (entry[0] === 'h') header(entry[1]);
  else if (entry[0] === 'c') column(entry, fresh);
  else if (entry[0] === 'f') figures(entry[1]);
}

function header(info) {
  state.depth = info.depth;
  state.mod = info.mod;
  state.anchors = info.anchors;
  state.rows = new Map(info.mod.map((layer, at) => [layer, at]));
  title.textContent = info.title;
  canvas.dataset.run = info.id;
}

function column([, text, p, scores, bits, kind], fresh) {
  const routed = bigBits(bits);
  const values = state.mod.map((_, at) => parseInt(scores.slice(3 * at, 3 * at + 3), 16) / 4095);
  const ran = state.mod.map((_, at) => (routed >> BigInt(at)) & 1n ? 1 : 0);
  const used = ran.reduce((sum, one) => sum + one, 0);
  state.used += used;
  const at = state.columns.length, last = state.columns[at - 1];
  state.columns.push({ text, p, values, ran, used, kind, changed: last !== undefined && last.p !== p });
  let span = null;
  if (kind !== 's' && text) {
    if (kind === 'n' && !state.answering) {
      state.answering = true;
      fresh.append(document.createElement('hr'));
    }
    span = document.createElement('span');
    span.textContent = text;
    span.dataset.column = at;
    span.style.setProperty('--depth', state.mod.length ? used / state.mod.length : 1);
    if (kind === 'p') span.className = 'prompt';
    fresh.append(span);
  }
  state.spans.push(span);
}

const bigBits = (hex) => BigInt('0x' + (hex || '0'));

function figures(f) {
  const [stored, allocated, dense] = f.kv;
  const ratio = stored ? dense / stored : 1;
  put('load', Math.round(100 * f.load) + '%', `last tokens · ${Math.round(100 * f.total)}% over all ${f.tokens} · measured`);
  put('speed', f.speed === null ? '–' : f.speed.toFixed(1) + ' tok/s', 'last tokens · measured');
  put('kv', size(stored), `measured · dense parent ${size(dense)}, estimated · ${ratio.toFixed(2)}× less`);
  put('saved', Math.round(100 * f.saved) + '%', 'FLOPs of the run against dense · estimated');
}

function put(name, value, note) {
  find(`[data-figure="${name}"]`).textContent = value;
  find(`[data-note="${name}"]`).textContent = note;
}

function size(bytes) {
  const units = ['B', 'KB', 'MB', 'GB'];
  let at = 0;
  while (bytes >= 1000 && at < 3) { bytes /= 1000; at += 1; }
  return (at ? bytes.toFixed(1) : bytes) + ' ' + units[at];
}

let scheduled = false;
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; draw(); });
}

const rowHeight = () => Math.max(5, Math.min(20, Math.floor(230 / Math.max(1, state.depth))));

function prepare(target, width, height) {
  const ratio = window.devicePixelRatio || 1;
  target.width = Math.max(1, Math.round(width * ratio));
  target.height = Math.max(1, Math.round(height * ratio));
  target.style.width = width + 'px';
  target.style.height = height + 'px';
  const context = target.getContext('2d');
  context.scale(ratio, ratio);
  context.clearRect(0, 0, width, height);
  return context;
}

function palette() {
  const style = getComputedStyle(find('.mod-view'));
  const colour = (name) => (alpha) => `rgba(${style.getPropertyValue('--map-' + name)}, ${alpha})`;
  return { run: colour('run'), skip: colour('skip'), dense: colour('dense'), ink: colour('ink') };
}

function draw() {
  if (!state || !state.depth) return;
  const colours = palette(), row = rowHeight(), height = TOP + row * state.depth + 2;
  drawAxis(colours, row, height);
  const width = scroll.clientWidth, offset = scroll.scrollLeft;
  const context = prepare(canvas, width, height);
  const first = Math.max(0, Math.floor(offset / CELL)), last = Math.min(state.columns.length, Math.ceil((offset + width) / CELL));
  for (let at = first; at < last; at += 1) drawColumn(context, colours, row, at, at * CELL - offset);
  for (let at = first; at < last; at += 1) if (state.columns[at].changed) drawMark(context, colours, height, at, at * CELL - offset);
  if (state.cursor) {
    context.strokeStyle = colours.ink(1);
    context.lineWidth = 1.5;
    context.strokeRect(state.cursor.column * CELL - offset, TOP + state.cursor.layer * row, CELL - 1, row - 1);
  }
  canvas.dataset.columns = state.columns.length;
}

function drawColumn(context, colours, row, at, x) {
  const column = state.columns[at];
  const faint = column.kind === 'n' ? 1 : 0.6; // the prompt is paler than what was written
  for (let layer = 0; layer < state.depth; layer += 1) {
    const y = TOP + layer * row, place = state.rows.get(layer);
    if (place === undefined) {
      context.fillStyle = colours.dense(0.45 * faint);
      context.fillRect(x, y, CELL - 1, row - 1);
    } else if (column.ran[place]) {
      context.fillStyle = colours.run((0.35 + 0.65 * column.values[place]) * faint);
      context.fillRect(x, y, CELL - 1, row - 1);
    } else {
      context.fillStyle = colours.skip((0.25 + 0.6 * column.values[place]) * faint);
      context.fillRect(x + 1, y + row / 2 - 1.5, CELL - 3, 2);
    }
  }
}

function drawMark(context, colours, height, at, x) {
  context.strokeStyle = colours.ink(0.9);
  context.lineWidth = 1.5;
  context.setLineDash([4, 3]);
  context.beginPath();
  context.moveTo(x - 0.5, 12);
  context.lineTo(x - 0.5, height);
  context.stroke();
  context.setLineDash([]);
  context.fillStyle = colours.ink(1);
  context.font = '11px system-ui, sans-serif';
  const next = state.columns[at + 1];
  if (!next || !next.changed) context.fillText(`p ${state.columns[at].p}`, Math.max(0, x + 2), 11);
}

function drawAxis(colours, row, height) {
  const context = prepare(axis, AXIS, height);
  context.fillStyle = colours.ink(0.9);
  context.font = '10.5px system-ui, sans-serif';
  context.textBaseline = 'middle';
  const every = row >= 11 ? 1 : Math.ceil(11 / row);
  for (let layer = 0; layer < state.depth; layer += every) context.fillText('L' + layer, 2, TOP + (layer + 0.5) * row);
}

function inspect(column, layer) {
  if (!state || column < 0 || layer < 0 || column >= state.columns.length || layer >= state.depth) return leave();
  mark(null);
  state.cursor = { column, layer };
  const cell = state.columns[column], place = state.rows.get(layer);
  const name = cell.text ? JSON.stringify(cell.text) : '(part of a character)';
  const head = `token ${column}: ${name}${cell.kind === 'n' ? '' : ' (prompt)'}\nlayer ${layer}: `;
  const used = state.depth - state.mod.length + cell.used;
  const anchor = column < state.anchors ? ' (an anchor, always runs)' : '';
  const decision = place === undefined ? 'dense, always runs'
    : `score ${cell.values[place].toFixed(3)}, p ${cell.p} → ${cell.ran[place] ? 'processed' : 'skipped'}${anchor}`;
  tip.textContent = `${head}${decision}\nruns through ${used} of ${state.depth} layers`;
  tip.hidden = false;
  const box = find('.mod-view').getBoundingClientRect(), map = canvas.getBoundingClientRect();
  const x = map.left - box.left + column * CELL - scroll.scrollLeft, y = map.top - box.top + TOP + layer * rowHeight();
  tip.style.left = Math.max(0, Math.min(x + 16, box.width - tip.offsetWidth - 4)) + 'px';
  tip.style.top = Math.max(0, y - tip.offsetHeight - 8) + 'px';
  mark(column);
  schedule();
}

function mark(column) {
  for (const span of story.querySelectorAll('.near')) span.classList.remove('near');
  if (column !== null && state.spans[column]) state.spans[column].classList.add('near');
}

function leave() {
  tip.hidden = true;
  if (!state) return;
  state.cursor = null;
  mark(null);
  schedule();
}

function describe() {
  const cells = state.columns.length * state.mod.length;
  canvas.setAttribute('aria-label', `Routing heatmap: ${state.columns.length} tokens, ${state.depth} layers; `
    + `${cells ? Math.round(100 * state.used / cells) : 100}% of the MoD layers' work was done. Arrow keys inspect cells.`);
}

let pointer = null;
function point() {
  if (!state || !pointer) return;
  const box = canvas.getBoundingClientRect();
  const column = Math.floor((pointer.x - box.left + scroll.scrollLeft) / CELL);
  inspect(column, Math.floor((pointer.y - box.top - TOP) / rowHeight()));
}
canvas.addEventListener('pointermove', (event) => { pointer = { x: event.clientX, y: event.clientY }; point(); });
canvas.addEventListener('pointerleave', () => { pointer = null; leave(); });
canvas.addEventListener('blur', leave);
canvas.addEventListener('keydown', (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!move || !state || !state.columns.length) return;
  event.preventDefault();
  const from = state.cursor || { column: state.columns.length - 1 - move[0], layer: -move[1] };
  const column = Math.max(0, Math.min(state.columns.length - 1, from.column + move[0]));
  const layer = Math.max(0, Math.min(state.depth - 1, from.layer + move[1]));
  if (column * CELL < scroll.scrollLeft) scroll.scrollLeft = column * CELL;
  if ((column + 1) * CELL > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = (column + 1) * CELL - scroll.clientWidth;
  inspect(column, layer);
});
story.addEventListener('pointerover', (event) => {
  const at = event.target.dataset ? event.target.dataset.column : undefined;
  if (at === undefined || !state) return;
  inspect(+at, state.mod.length ? state.mod[0] : 0);
});
story.addEventListener('pointerleave', leave);
scroll.addEventListener('scroll', () => { point(); schedule(); });
new ResizeObserver(schedule).observe(scroll);
new MutationObserver(schedule).observe(document.body, { attributes: true, attributeFilter: ['class'] });

watch('value', read);
read();
