// The chat view: reads a conversation's tape (see app/talk.py) and shows both sides. Runs once per component with
// `element`, `props` and `watch` given, after app/prelude.js. All text goes in as textContent.

const list = find('.talk-turns'), voteRow = find('.talk-vote'), tallyLine = find('.talk-tally');
const STORE = 'modification-votes';

let talk = null;

// A blind conversation that was voted on stays open: its names are known now, so that no further vote would be blind.
let known = '';

function fresh(head) {
  if (!head) known = '';
  talk = { head, consumed: 0, names: ['', ''], blind: false, turns: [], revealed: false };
  list.replaceChildren();
}

function read() {
  const tape = props.value || '';
  find('.talk-empty').hidden = Boolean(tape);
  const head = tape.slice(0, 40);
  if (!talk || talk.head !== head || tape.length < talk.consumed) fresh(head);
  const end = tape.lastIndexOf('\n') + 1;
  const follow = list.scrollTop + list.clientHeight >= list.scrollHeight - 40;
  for (const line of tape.slice(talk.consumed, end).split('\n')) if (line) record(JSON.parse(line));
  talk.consumed = end;
  if (follow) list.scrollTop = list.scrollHeight;
  names();
  ballot();
}

function record([kind, ...rest]) {
  if (kind === 'h') {
    Object.assign(talk, { names: rest[0].names, blind: rest[0].blind, revealed: known === rest[0].names.join() });
  }
  else if (kind === 'u') ask(rest[0]);
  else if (kind === 't') say(rest[0], rest[1]);
  else if (kind === 'd') differ(rest[0]);
  else if (kind === 'f') figures(rest[0], rest[1]);
  else if (kind === 'e') ended(rest[0], rest[1]);
}

const make = (tag, name, parent, text = '') => {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  parent.append(made);
  return made;
};

function ask(message) {
  const turn = { text: ['', ''], same: [], rest: [], figures: [], ended: [false, false], offset: null, message };
  make('div', 'talk-user', list, message);
  const row = make('div', 'talk-row', list);
  for (const side of [0, 1]) {
    const box = make('div', 'talk-answer', row);
    box.dataset.side = side;
    const words = make('p', 'talk-text', box);
    turn.same[side] = make('span', '', words);
    turn.rest[side] = make('span', 'talk-rest', words);
    turn.figures[side] = make('p', 'talk-figures', box);
  }
  turn.note = make('p', 'talk-note', list);
  talk.turns.push(turn);
}

const last = () => talk.turns[talk.turns.length - 1];

function say(side, text) {
  const turn = last();
  turn.text[side] += text;
  show(turn, side);
}

function show(turn, side) {
  const cut = turn.offset === null ? turn.text[side].length : turn.offset;
  turn.same[side].textContent = turn.text[side].slice(0, cut);
  turn.rest[side].textContent = turn.text[side].slice(cut);
}

function differ(offset) {
  const turn = last();
  turn.offset = offset;
  for (const side of [0, 1]) show(turn, side);
  turn.note.textContent = offset ? `The answers part after ${offset} characters (marked).` : 'The answers differ from the first character.';
}

function figures(side, f) {
  const [stored, , dense] = f.kv;
  const less = dense > 1.005 * stored ? `, ${(dense / stored).toFixed(2)}× less than dense (estimated)` : '';
  const kv = stored ? `KV ${bytes(stored)} (measured)${less}` : '';
  const speed = f.speed === null ? '' : `${f.speed.toFixed(1)} tok/s`;
  const parts = [speed, `first token after ${f.first.toFixed(2)} s`, `${f.prefilled} prompt tokens run`,
    `load ${Math.round(100 * f.load)}%`];
  last().figures[side].textContent = `${parts.filter(Boolean).join(' · ')} (measured) · ${kv}`;
}

function ended(side, text) {
  const turn = last();
  turn.ended[side] = true;
  turn.figures[side].textContent += ` · ${text}`;
  if (turn.ended[0] && turn.ended[1] && turn.offset === null) {
    turn.note.textContent = turn.text[0] === turn.text[1] ? 'Both answers are the same, word for word.'
      : 'One answer goes on where the other ends; up to there they are the same.';
  }
}

// Names, and the vote that brings them out.

const hidden = () => talk && talk.blind && !talk.revealed;

function names() {
  find('.talk-names').hidden = !talk.turns.length;
  for (const side of [0, 1]) {
    const name = hidden() ? `Side ${'AB'[side]}` : talk.names[side];
    find(`[data-name="${side}"]`).textContent = name;
    for (const box of list.querySelectorAll(`[data-side="${side}"]`)) box.dataset.shown = name; // for narrow screens
  }
  // Figures would give the sides away.
  element.querySelector('.talk').classList.toggle('blind', Boolean(hidden()));
}

const votes = () => { try { return JSON.parse(localStorage.getItem(STORE)) || []; } catch { return []; } };

function ballot() {
  const turn = talk && last();
  voteRow.hidden = !(hidden() && turn && turn.ended[0] && turn.ended[1]);
  const cast = votes();
  tallyLine.hidden = find('.talk-export').hidden = !cast.length;
  const wins = {};
  for (const vote of cast) wins[vote.winner || 'no difference'] = (wins[vote.winner || 'no difference'] || 0) + 1;
  tallyLine.textContent = `${cast.length} blind ${cast.length === 1 ? 'vote' : 'votes'} in this browser: `
    + Object.entries(wins).map(([name, count]) => `“${name}” ${count}×`).join(', ');
}

function vote(choice) {
  const turn = last(), winner = choice === 'tie' ? null : talk.names[+choice];
  const cast = votes();
  cast.push({ time: new Date().toISOString(), message: turn.message, left: talk.names[0], right: talk.names[1],
    answers: turn.text, winner });
  talk.revealed = true;
  known = talk.names.join();
  names();
  try { localStorage.setItem(STORE, JSON.stringify(cast.slice(-1000))); } catch { /* a full or forbidden store */ }
  ballot();
  tallyLine.focus();
}

element.addEventListener('click', (event) => {
  const { vote: choice, export: what } = event.target.dataset || {};
  if (choice !== undefined) vote(choice);
  else if (what === 'votes') save('votes.json', 'application/json', JSON.stringify(votes(), null, 1));
  else if (what === 'clear') { localStorage.removeItem(STORE); ballot(); }
});

watch('value', read);
read();
