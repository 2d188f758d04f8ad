// Part 5: the run as a picture, a table or a trace; made in the browser from what it shows.

const WIDEST = 16000; // px that browsers' canvases can be relied on to have

function png() {
  const before = cell, height = TOP + rowHeight() * state.depth + 2;
  const columns = shownColumns();
  cell = [...WIDTHS].reverse().find((width) => width <= before && width * columns + AXIS <= WIDEST / 2) || 1;
  const wide = cell * columns, sheet = document.createElement('canvas'), colours = palette();
  const context = prepare(sheet, AXIS + wide, height, 2);
  context.fillStyle = colours.back(1);
  context.fillRect(0, 0, AXIS + wide, height);
  drawAxis(context, colours);
  context.translate(AXIS, 0);
  context.textBaseline = 'alphabetic';
  paint(context, colours, 0, wide, height);
  cell = before;
  sheet.toBlob((blob) => save('routing.png', 'image/png', blob));
}

function csv() {
  const field = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const head = ['token', 'id', 'text', 'kind', 'logprob', ...state.mod.flatMap((layer) => [`p L${layer}`, `score L${layer}`, `ran L${layer}`])];
  const rows = state.columns.map((one, at) => [at, one.id, field(one.text),
    { p: 'prompt', n: 'new', s: 'control' }[one.kind], one.logprob === undefined ? '' : one.logprob,
    ...state.mod.flatMap((_, place) => [threshold(one, place), one.values[place].toFixed(4), one.ran[place]])]);
  save('routing.csv', 'text/csv', [head, ...rows].map((row) => row.join(',')).join('\n') + '\n');
}

// The engine's own trace format (modification.RoutingTrace.from_json reads it).
function json() {
  let start = 0;
  const steps = state.steps.map((step, number) => {
    const part = state.columns.slice(start, step.columns);
    start = step.columns;
    const one = part[part.length - 1], layers = Array.isArray(one.p);
    return {
      tokens: part.map((cell) => cell.id), logprobs: part.map((cell) => (cell.logprob === undefined ? null : cell.logprob)),
      scores: state.mod.map((_, place) => part.map((cell) => +cell.values[place].toFixed(4))),
      routed: state.mod.map((_, place) => part.map((cell) => cell.ran[place])),
      p: layers ? one.p.reduce((sum, p) => sum + p, 0) / one.p.length : one.p, ...(layers ? { layer_p: one.p } : {}),
      kv: step.kv, seconds: step.seconds, prefill: number === 0,
      ...(one.likely.length ? { likely: one.likely.map(([, id, logprob]) => [id, logprob]) } : {}),
    };
  });
  const special = state.columns.flatMap((one, at) => (one.kind === 's' ? [at] : []));
  const likely = steps.map((_, number) => state.columns[state.steps[number].columns - 1].likely.map(([text]) => text));
  const info = { title: state.title, note: state.note, shape: state.shape, anchors: state.anchors, special, likely };
  save('routing.json', 'application/json', JSON.stringify({
    format: 1, depth: state.depth, mod_layers: state.mod, texts: state.columns.map((one) => one.text), info, steps,
  }));
}
