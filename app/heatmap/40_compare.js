// Part 4: a pinned run beside the one shown, and the picture at another p.

const banner = find('.mod-banner');
const DECISIONS = { run: 'processed', skip: 'skipped: score below p', dense: 'dense layer, always runs', mark: 'p changed here' };
const LEGENDS = {
  score: { ...DECISIONS, run: 'processed, stronger with the score' },
  decision: DECISIONS,
  depth: { ...DECISIONS, run: 'MoD layers that the token ran through', skip: 'skipped layers leave the bar short', dense: 'dense layers' },
  difference: { run: 'ran in this run alone', skip: 'ran in the pinned run alone', dense: 'ran in both', mark: 'first difference' },
};

function pin() {
  if (!state || !state.columns.length) return;
  if (pinned && pinned.id === state.id) return unpin();
  find('[data-tool="pin"]').textContent = 'Pin this run';
  pinned = { title: state.title, note: state.note, id: state.id, columns: state.columns.slice(), mod: state.mod.join() };
  find('option[value="difference"]').disabled = false;
  say();
  schedule();
}

function unpin() {
  pinned = null;
  mode = mode === 'difference' ? 'score' : mode;
  find('[data-tool="mode"]').value = mode;
  find('option[value="difference"]').disabled = true;
  find('[data-tool="pin"]').textContent = 'Pin run';
  say();
  schedule();
}

const comparable = () => pinned && state && pinned.mod === state.mod.join() && pinned.id !== state.id;

// The first column whose token is another one in the pinned run; null while there is none.
function parting() {
  if (!comparable()) return null;
  const end = Math.min(state.columns.length, pinned.columns.length);
  for (let at = 0; at < end; at += 1) if (state.columns[at].id !== pinned.columns[at].id) return at;
  return state.columns.length === pinned.columns.length ? null : end;
}

// Difference: faint where both ran, blue where this run alone did, amber where the pinned one alone did.
function drawDifference(context, colours, at, x) {
  const mine = state.columns[at], other = comparable() ? pinned.columns[at] : undefined, row = rowHeight();
  for (const [layer, place] of state.rows) {
    const here = mine ? mine.ran[place] : 0, there = other ? other.ran[place] : 0;
    if (!here && !there) continue;
    context.fillStyle = here && there ? colours.dense(0.3) : here ? colours.run(0.9) : colours.skip(0.9);
    const y = TOP + layer * row;
    if (there && !here) context.fillRect(x + gap(), y + row / 2 - 2, cell - 2 * gap(), 4);
    else context.fillRect(x, y, cell - gap(), row - 1);
  }
}

function comparison() {
  if (pinned && pinned.mod !== state.mod.join()) return 'The pinned run has other MoD layers: the two cannot be compared.';
  if (!comparable()) return pinned ? 'This run is pinned. Generate another: "difference to pinned run" then compares the two.' : '';
  const at = parting(), end = Math.min(state.columns.length, pinned.columns.length);
  let other = 0, cells = 0;
  for (let column = 0; column < (at === null ? end : at); column += 1) {
    for (let place = 0; place < state.mod.length; place += 1) {
      other += state.columns[column].ran[place] !== pinned.columns[column].ran[place];
      cells += 1;
    }
  }
  const share = cells ? `${Math.round(100 * other / cells)}% of the decisions up to there differ` : 'no decisions to compare';
  if (at === null) return `Compared with the pinned run: the same ${end} tokens; ${share}.`;
  const word = (columns) => (columns[at] ? quoted(columns[at]) : 'its end');
  return `Compared with the pinned run: first difference at token ${at}, ${word(state.columns)} here, `
    + `${word(pinned.columns)} there; ${share}.`;
}

function say() {
  const lines = [];
  if (preview !== null) {
    lines.push(`Preview at p = ${preview}: what this run's scores would decide. A real run at that p would have other `
      + 'scores, and another text.');
  }
  if (pinned) lines.push(comparison());
  banner.textContent = lines.filter(Boolean).join(' ');
  banner.hidden = !banner.textContent;
  if (pinned) find('[data-tool="pin"]').textContent = pinned.id === state.id ? 'Unpin' : 'Pin this run';
  for (const [name, text] of Object.entries(LEGENDS[mode])) find(`[data-legend="${name}"]`).textContent = text;
}

function previewAt(p) {
  preview = p;
  find('.mod-preview output').textContent = p === null ? '' : p.toFixed(2);
  find('[data-tool="actual"]').disabled = p === null;
  find('.mod-view').classList.toggle('previewing', p !== null);
  state.spans.forEach((one, at) => {
    if (one) one.style.setProperty('--depth', state.mod.length ? usedBy(state.columns[at], at) / state.mod.length : 1);
  });
  say();
  describe();
  if (chosen) select(chosen.column, chosen.layer);
  schedule();
}

// In words: how much ran, and which layers never or always do.
function describe() {
  const cells = state.columns.length * state.mod.length;
  canvas.setAttribute('aria-label', `Routing heatmap: ${state.columns.length} tokens, ${state.depth} layers; `
    + `${cells ? Math.round(100 * state.used / cells) : 100}% of the MoD layers' work was done. Arrow keys inspect tokens.`);
  const count = state.columns.length, free = count - Math.min(count, state.anchors);
  const never = state.mod.filter((_, place) => free > 20 && state.ran[place] <= count - free);
  const always = state.mod.filter((_, place) => free > 20 && state.ran[place] === count);
  const named = (layers, what) => (layers.length ? `Layer${layers.length > 1 ? 's' : ''} ${layers.join(', ')} ${what} in this run.` : '');
  find('.mod-layers').textContent = [named(never, 'never ran'), named(always, 'ran for every token')].filter(Boolean).join(' ');
  say();
}
