// Part 6: what pointer, keys and buttons do.

const cellAt = (event) => {
  const box = canvas.getBoundingClientRect();
  return [Math.floor((event.clientX - box.left + scroll.scrollLeft) / cell), Math.floor((event.clientY - box.top - TOP) / rowHeight())];
};

let pointer = null, drag = null;
canvas.addEventListener('pointermove', (event) => {
  pointer = event;
  if (drag && event.pointerType === 'mouse') {
    scroll.scrollLeft = drag.from - (event.clientX - drag.x);
    drag.moved = drag.moved || Math.abs(event.clientX - drag.x) > 4;
  } else if (state) hover(...cellAt(event));
});
canvas.addEventListener('pointerdown', (event) => { drag = { x: event.clientX, from: scroll.scrollLeft, moved: false }; });
addEventListener('pointerup', () => { setTimeout(() => { drag = null; }); });
canvas.addEventListener('pointerleave', () => { pointer = null; leave(); });
canvas.addEventListener('click', (event) => {
  if (!state || (drag && drag.moved)) return;
  const [column, layer] = cellAt(event);
  select(column < state.columns.length && column >= 0 ? column : null, Math.max(0, Math.min(state.depth - 1, layer)));
});
canvas.addEventListener('wheel', (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1 : -1, event.clientX - canvas.getBoundingClientRect().left);
}, { passive: false });
story.addEventListener('click', (event) => {
  const at = event.target.dataset ? event.target.dataset.column : undefined;
  if (at !== undefined && state) { select(+at); bring(+at); }
});

// Arrow keys walk: over tokens everywhere, over layers in the heatmap. Home and End go to the ends, Escape lets go.
function walk(event, rows) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ...(rows ? { ArrowUp: [0, -1], ArrowDown: [0, 1] } : {}) };
  if (!state || !state.columns.length) return;
  if (event.key === 'Escape') return select(null);
  if (rows && (event.key === '+' || event.key === '-')) return zoom(event.key === '+' ? 1 : -1);
  const ends = { Home: 0, End: state.columns.length - 1 };
  const move = moves[event.key];
  if (!move && !(event.key in ends)) return;
  event.preventDefault();
  const from = chosen || { column: state.columns.length - (move ? move[0] : 0) - 1, layer: state.mod[0] || 0 };
  const column = event.key in ends ? ends[event.key] : Math.max(0, Math.min(state.columns.length - 1, from.column + move[0]));
  const layer = move ? Math.max(0, Math.min(state.depth - 1, from.layer + (chosen ? move[1] : 0))) : from.layer;
  select(column, layer);
  bring(column);
}

function bring(column) {
  if (column * cell < scroll.scrollLeft) scroll.scrollLeft = column * cell;
  if ((column + 1) * cell > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = (column + 1) * cell - scroll.clientWidth;
  const near = state.spans[column];
  if (near) {
    const top = near.offsetTop - story.offsetTop;
    if (top < story.scrollTop || top > story.scrollTop + story.clientHeight - 30) story.scrollTop = top - story.clientHeight / 2;
  }
}
canvas.addEventListener('keydown', (event) => walk(event, true));
story.addEventListener('keydown', (event) => walk(event, false));

const tools = { out: () => zoom(-1), in: () => zoom(1), fit, pin, png, csv, json, actual: () => previewAt(null) };
find('.mod-tools').addEventListener('click', (event) => {
  const use = tools[event.target.dataset.tool];
  if (use && state && state.columns.length) use();
});
find('[data-tool="mode"]').addEventListener('change', (event) => { mode = event.target.value; say(); schedule(); });
find('[data-tool="preview"]').addEventListener('input', (event) => { if (state) previewAt(+event.target.value); });

scroll.addEventListener('scroll', () => { if (pointer && state && !drag) hover(...cellAt(pointer)); schedule(); });
new ResizeObserver(schedule).observe(scroll);
new MutationObserver(schedule).observe(document.body, { attributes: true, attributeFilter: ['class'] });

watch('value', read);
read();
