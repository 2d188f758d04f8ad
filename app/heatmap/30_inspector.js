// Part 3: one token looked at closely: its scores against p, its probability, what else might have come.

let chosen = null; // { column, layer } of the token that the inspector shows
const inspector = find('.mod-inspector'), hint = find('.mod-hint');
const SVG = 'http://www.w3.org/2000/svg';

function part(tag, name, text, parent) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

const quoted = (one) => (one.text ? JSON.stringify(one.text) : '(part of a character)');

function select(column, layer) {
  for (const near of story.querySelectorAll('.near')) near.classList.remove('near');
  const at = column === null || !state ? undefined : state.columns[column];
  chosen = at ? { column, layer: layer === undefined ? (state.mod[0] || 0) : layer } : null;
  inspector.replaceChildren(...(chosen ? close(column, at) : [hint]));
  if (chosen && state.spans[column]) state.spans[column].classList.add('near');
  if (state) schedule();
}

function close(column, one) {
  const kind = { p: 'prompt', s: 'control token', n: 'new' }[one.kind];
  const head = part('h3', '', `Token ${column}: ${quoted(one)} · ${kind}`);
  const body = part('div', 'mod-close');
  body.append(chart(one), beside(one, column));
  return [head, body];
}

function beside(one, column) {
  const box = part('div', 'mod-facts');
  const dense = state.depth - state.mod.length;
  part('p', '', `Ran through ${dense + one.used} of ${state.depth} layers at p = ${shownP(one)} (measured).`, box);
  if (preview !== null) {
    part('p', '', `At p = ${preview}: ${dense + usedBy(one, column)} of ${state.depth} by these scores (a preview).`, box);
  }
  const layer = chosen.layer, place = state.rows.get(layer);
  part('p', '', place === undefined ? `Layer ${layer}: dense, always runs.`
    : `Layer ${layer}: score ${one.values[place].toFixed(3)}, p ${threshold(one, place)} → `
      + `${one.ran[place] ? 'processed' : 'skipped'}${column < state.anchors ? ' (an anchor, always runs)' : ''}.`, box);
  if (one.logprob === undefined || one.logprob === null) {
    part('p', '', 'Given, not chosen: no probability.', box);
    return box;
  }
  part('p', '', `Probability ${percent(one.logprob)} (measured). Likeliest here:`, box);
  const list = part('ol', 'mod-likely', undefined, box);
  for (const [text, id, logprob] of one.likely) {
    const row = part('li', id === one.id ? 'taken' : '', undefined, list);
    part('span', 'mod-bar', '', row).style.setProperty('--share', Math.exp(logprob));
    part('span', 'mod-word', JSON.stringify(text), row);
    part('span', '', percent(logprob), row);
  }
  return box;
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? share.toFixed(1) + '%' : '< 0.1%';
};

// Scores over layers, with p as a line; filled where the token ran.
function chart(one) {
  const width = Math.max(200, Math.min(460, 26 * state.depth + 40)), height = 130, left = 26, bottom = 18;
  const x = (layer) => left + (layer + 0.5) * (width - left - 6) / state.depth;
  const y = (value) => 6 + (1 - value) * (height - bottom - 10);
  const svg = shape('svg', { viewBox: `0 0 ${width} ${height}`, width, height, role: 'img', class: 'mod-chart' });
  const summary = state.mod.map((layer, place) => `layer ${layer} ${one.values[place].toFixed(2)} ${one.ran[place] ? 'ran' : 'skipped'}`);
  svg.append(shape('title', {}, `Scores of the MoD layers against p: ${summary.join(', ')}`));
  for (const mark of [0, 0.5, 1]) {
    svg.append(shape('line', { x1: left, x2: width, y1: y(mark), y2: y(mark), class: 'grid' }));
    svg.append(shape('text', { x: 2, y: y(mark) + 4 }, mark));
  }
  const every = Math.ceil(state.depth / 16);
  for (let layer = 0; layer < state.depth; layer += every) svg.append(shape('text', { x: x(layer) - 6, y: height - 4 }, 'L' + layer));
  const step = (width - left - 6) / state.depth / 2;
  state.mod.forEach((layer, place) => {
    const at = y(threshold(one, place));
    svg.append(shape('line', { x1: x(layer) - step, x2: x(layer) + step, y1: at, y2: at, class: 'bound' }));
    svg.append(shape('line', { x1: x(layer), x2: x(layer), y1: y(0), y2: y(one.values[place]), class: 'stem' }));
    svg.append(shape('circle', { cx: x(layer), cy: y(one.values[place]), r: 4, class: one.ran[place] ? 'ran' : 'skipped' }));
  });
  if (preview !== null) svg.append(shape('line', { x1: left, x2: width, y1: y(preview), y2: y(preview), class: 'preview' }));
  return svg;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function hover(column, layer) {
  if (!state || column < 0 || layer < 0 || column >= state.columns.length || layer >= state.depth) return leave();
  const one = state.columns[column], place = state.rows.get(layer);
  const decision = place === undefined ? 'dense, always runs'
    : `score ${one.values[place].toFixed(3)}, p ${threshold(one, place)} → ${one.ran[place] ? 'processed' : 'skipped'}`
      + (column < state.anchors ? ' (an anchor, always runs)' : '');
  const used = state.depth - state.mod.length + one.used;
  const would = preview === null || place === undefined ? '' : `\nat p ${preview}: ${runs(one, place, column) ? 'processed' : 'skipped'} (a preview)`;
  tip.textContent = `token ${column}: ${quoted(one)}${one.kind === 'n' ? '' : ' (prompt)'}\nlayer ${layer}: ${decision}\n`
    + `runs through ${used} of ${state.depth} layers${would}`;
  tip.hidden = false;
  const box = find('.mod-view').getBoundingClientRect(), map = canvas.getBoundingClientRect();
  const x = map.left - box.left + column * cell - scroll.scrollLeft, y = map.top - box.top + TOP + layer * rowHeight();
  tip.style.left = Math.max(0, Math.min(x + 16, box.width - tip.offsetWidth - 4)) + 'px';
  tip.style.top = Math.max(0, y - tip.offsetHeight - 8) + 'px';
}

function leave() { tip.hidden = true; }
