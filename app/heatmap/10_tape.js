// The live view, part 1: reads the tape (see app/tape.py) into columns.
// The parts are joined in the order of their names after app/prelude.js, and run once per component, as one function
// body, with `element`, `props` and `watch` given. All text goes in as textContent.

const story = find('.mod-story'), scroll = find('.mod-scroll'), spacer = find('.mod-spacer');
const canvas = find('.mod-canvas'), axis = find('.mod-axis'), tip = find('.mod-tip'), title = find('.mod-title');

let state = null; // the run shown
let pinned = null; // the run to compare it with

function reset(id) {
  state = {
    lines: 0, id, title: '', depth: 0, mod: [], rows: new Map(), anchors: 0, columns: [], spans: [],
    steps: [], now: null, used: 0, ran: [], answering: false, note: '',
  };
  story.replaceChildren();
  select(null);
  tip.hidden = true;
  cell = 10;
  preview = null;
  find('[data-tool="actual"]').disabled = true;
  find('.mod-view').classList.remove('previewing');
}

// The value is a window on the tape: {id, at, d}, the lines from number `at` on.
function read() {
  const { id, at, d } = props.value || { id: '', at: 0, d: '' };
  if (!state || state.id !== id) reset(id);
  if (at > state.lines) return; // lines between were missed: the last window is whole
  const lines = d.split('\n');
  if (at + lines.length - 1 <= state.lines) return;
  const followText = story.scrollTop + story.clientHeight >= story.scrollHeight - 30;
  const followMap = chosen === null && atEnd();
  const fresh = document.createDocumentFragment();
  for (let next = state.lines - at; next < lines.length - 1; next += 1) record(JSON.parse(lines[next]), fresh);
  state.lines = at + lines.length - 1;
  story.append(fresh);
  if (state.now) showFigures(state.now);
  widen();
  if (followText && !state.note) story.scrollTop = story.scrollHeight; // a finished run opens at its start
  if (followMap) scroll.scrollLeft = scroll.scrollWidth;
  describe();
  schedule();
}

function record(entry, fresh) {
  if (entry[0] === 'h') header(entry[1]);
  else if (entry[0] === 'c') column(entry, fresh);
  else if (entry[0] === 'f') figures(entry);
  else if (entry[0] === 'e') state.note = entry[1];
}

function header(info) {
  Object.assign(state, { title: info.title, depth: info.depth, mod: info.mod, anchors: info.anchors, shape: info.shape });
  state.rows = new Map(info.mod.map((layer, at) => [layer, at]));
  state.ran = info.mod.map(() => 0);
  title.textContent = info.title;
  canvas.dataset.run = info.id;
}

function column([, text, p, scores, bits, kind, id, logprob, likely], fresh) {
  const routed = BigInt('0x' + (bits || '0'));
  const values = state.mod.map((_, at) => parseInt(scores.slice(3 * at, 3 * at + 3), 16) / 4095);
  const ran = state.mod.map((_, at) => ((routed >> BigInt(at)) & 1n ? 1 : 0));
  let used = 0;
  for (let at = 0; at < ran.length; at += 1) { used += ran[at]; state.ran[at] += ran[at]; }
  state.used += used;
  const at = state.columns.length, last = state.columns[at - 1];
  const changed = last !== undefined && String(last.p) !== String(p);
  state.columns.push({ text, p, values, ran, used, kind, id, logprob, likely: likely || [], changed });
  state.spans.push(kind === 's' || !text ? null : span(text, kind, used, at, fresh));
}

function span(text, kind, used, at, fresh) {
  if (kind === 'n' && !state.answering) {
    state.answering = true;
    fresh.append(document.createElement('hr'));
  }
  const made = document.createElement('span');
  made.textContent = text;
  made.dataset.column = at;
  made.style.setProperty('--depth', state.mod.length ? used / state.mod.length : 1);
  if (kind === 'p') made.className = 'prompt';
  fresh.append(made);
  return made;
}

function figures([, load, total, speed, stored, allocated, dense, saved, tokens, seconds]) {
  state.steps.push({ columns: state.columns.length, kv: [stored, allocated, dense], seconds });
  state.now = { load, total, speed, stored, dense, saved, tokens };
}

function showFigures({ load, total, speed, stored, dense, saved, tokens }) {
  const ratio = stored ? dense / stored : 1;
  put('load', Math.round(100 * load) + '%', `last tokens · ${Math.round(100 * total)}% over all ${tokens} · measured`);
  put('speed', speed === null ? '–' : speed.toFixed(1) + ' tok/s', 'last tokens · measured');
  put('kv', bytes(stored), `measured · dense parent ${bytes(dense)}, estimated · ${ratio.toFixed(2)}× less`);
  put('saved', Math.round(100 * saved) + '%', 'FLOPs of the run against dense · counted');
}

function put(name, value, note) {
  find(`[data-figure="${name}"]`).textContent = value;
  find(`[data-note="${name}"]`).textContent = note;
}

// The threshold of a MoD layer (by its place) at a column.
const threshold = (cell, place) => (Array.isArray(cell.p) ? cell.p[place] : cell.p);
const shownP = (cell) => (Array.isArray(cell.p) ? 'per layer' : cell.p);

// What the picture shows: the run's own decisions, or those that its scores would give at another p.
let preview = null;
const runs = (cell, place, at) => (preview === null ? cell.ran[place]
  : cell.values[place] >= preview || at < state.anchors ? 1 : 0);
const usedBy = (cell, at) => (preview === null ? cell.used
  : cell.values.reduce((sum, _, place) => sum + runs(cell, place, at), 0));
