// What every view begins with. Runs once per component with `element` given; all text goes in as textContent.

const find = (selector) => element.querySelector(selector);

function bytes(count) {
  const units = ['B', 'KB', 'MB', 'GB'];
  let at = 0;
  while (count >= 1000 && at < 3) { count /= 1000; at += 1; }
  return (at ? count.toFixed(1) : count) + ' ' + units[at];
}

function save(name, type, content) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
