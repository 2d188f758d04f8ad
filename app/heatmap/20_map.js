// Part 2: the heatmap. Only the columns in sight are drawn, so that thousands cost no more than hundreds.

const TOP = 18, AXIS = 34, WIDTHS = [1, 2, 3, 5, 7, 10, 14, 20];
let cell = 10; // width of a column in px
let mode = 'score';

const atEnd = () => scroll.scrollLeft + scroll.clientWidth >= scroll.scrollWidth - 4 * cell;
const rowHeight = () => Math.max(5, Math.min(20, Math.floor(230 / Math.max(1, state.depth))));

function widen() { spacer.style.width = state.columns.length * cell + 24 + 'px'; }

function zoom(step, around) {
  const index = Math.max(0, Math.min(WIDTHS.length - 1, WIDTHS.indexOf(cell) + step));
  const place = around === undefined ? scroll.clientWidth / 2 : around;
  const column = (scroll.scrollLeft + place) / cell;
  cell = WIDTHS[index];
  widen();
  scroll.scrollLeft = column * cell - place;
  schedule();
}

function fit() {
  const wanted = scroll.clientWidth / Math.max(1, state.columns.length);
  cell = [...WIDTHS].reverse().find((width) => width <= wanted) || WIDTHS[0];
  widen();
  schedule();
}

let scheduled = false;
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; draw(); });
}

function prepare(target, width, height, ratio = window.devicePixelRatio || 1) {
  const wide = Math.max(1, Math.round(width * ratio)), high = Math.max(1, Math.round(height * ratio));
  if (target.width !== wide || target.height !== high) {
    target.width = wide;
    target.height = high;
    target.style.width = width + 'px';
    target.style.height = height + 'px';
  }
  const context = target.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function palette() {
  const style = getComputedStyle(find('.mod-view'));
  const colour = (name) => {
    const value = style.getPropertyValue('--map-' + name);
    return (alpha) => `rgba(${value}, ${alpha})`;
  };
  return { run: colour('run'), skip: colour('skip'), dense: colour('dense'), ink: colour('ink'), back: colour('back') };
}

function draw() {
  if (!state || !state.depth) return;
  const colours = palette(), height = TOP + rowHeight() * state.depth + 2;
  drawAxis(prepare(axis, AXIS, height), colours);
  const width = scroll.clientWidth, offset = scroll.scrollLeft;
  paint(prepare(canvas, width, height), colours, offset, width, height);
  if (chosen !== null) drawCursor(canvas.getContext('2d'), colours, chosen.column * cell - offset);
  canvas.dataset.columns = state.columns.length;
}

function paint(context, colours, offset, width, height) {
  const first = Math.max(0, Math.floor(offset / cell)), end = Math.min(shownColumns(), Math.ceil((offset + width) / cell));
  const drawOne = { depth: drawDepth, difference: drawDifference }[mode] || drawColumn;
  for (let at = first; at < end; at += 1) drawOne(context, colours, at, at * cell - offset);
  const parted = mode === 'difference' ? parting() : null;
  for (let at = first; at < end; at += 1) {
    if (mode === 'difference' ? at === parted : state.columns[at] && state.columns[at].changed) {
      drawMark(context, colours, height, at, at * cell - offset);
    }
  }
}

const shownColumns = () => (mode === 'difference' && pinned ? Math.max(state.columns.length, pinned.columns.length)
  : state.columns.length);
const gap = () => (cell > 3 ? 1 : 0);

function drawColumn(context, colours, at, x) {
  const one = state.columns[at], row = rowHeight();
  const faint = one.kind === 'n' ? 1 : 0.6; // the prompt is paler than what was written
  for (let layer = 0; layer < state.depth; layer += 1) {
    const y = TOP + layer * row, place = state.rows.get(layer);
    if (place === undefined) {
      context.fillStyle = colours.dense(0.45 * faint);
      context.fillRect(x, y, cell - gap(), row - 1);
    } else if (runs(one, place, at)) {
      context.fillStyle = colours.run((mode === 'decision' ? 0.9 : 0.35 + 0.65 * one.values[place]) * faint);
      context.fillRect(x, y, cell - gap(), row - 1);
    } else {
      context.fillStyle = colours.skip((mode === 'decision' ? 0.7 : 0.25 + 0.6 * one.values[place]) * faint);
      context.fillRect(x + gap(), y + row / 2 - 1.5, cell - 3 * gap(), 2);
    }
  }
}

// Depth: a bar a token, as high as the layers it ran through.
function drawDepth(context, colours, at, x) {
  const one = state.columns[at], row = rowHeight(), bottom = TOP + row * state.depth;
  const dense = state.depth - state.mod.length, used = usedBy(one, at);
  const faint = one.kind === 'n' ? 1 : 0.6;
  context.fillStyle = colours.dense(0.45 * faint);
  context.fillRect(x, bottom - dense * row, cell - gap(), dense * row);
  context.fillStyle = colours.run(0.8 * faint);
  context.fillRect(x, bottom - (dense + used) * row, cell - gap(), used * row);
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
  const label = mode === 'difference' ? 'first difference' : `p ${shownP(state.columns[at])}`;
  if (mode === 'difference' || !next || !next.changed) context.fillText(label, Math.max(0, x + 2), 11);
}

function drawCursor(context, colours, x) {
  context.strokeStyle = colours.ink(1);
  context.lineWidth = 1.5;
  const row = rowHeight(), wide = Math.max(3, cell - 1);
  context.strokeRect(x, TOP - 1, wide, row * state.depth);
  if (mode !== 'depth') context.strokeRect(x, TOP + chosen.layer * row, wide, row - 1);
}

function drawAxis(context, colours) {
  const row = rowHeight(), every = row >= 11 ? 1 : Math.ceil(11 / row);
  context.fillStyle = colours.ink(0.9);
  context.font = '10.5px system-ui, sans-serif';
  context.textBaseline = 'middle';
  for (let layer = 0; layer < state.depth; layer += every) {
    const label = mode === 'depth' ? state.depth - layer : 'L' + layer;
    context.fillText(label, 2, TOP + (layer + 0.5) * row);
  }
}
