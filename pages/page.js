// Show the questions of a page that page.py wrote: filter and search them, and build elements only
// when they are looked at. The address holds the view: #q=words&show=wrong&order=file&page=2&open=17
"use strict";

const PER_PAGE = 50;    // questions that are listed at once
const FIRST = 10;       // passages of a question that are shown without a click on "all"
const PATIENCE = 200;   // milliseconds after the last key until a search begins

const about = JSON.parse(takeText("about"));
const texts = takeText("texts").split("\n");      // one line per question, as in the numbers
const numbers = takeText("numbers").split("\n");
let lowered = null;     // the texts in lower case, made by the first search
let matching = [];      // the indices of the questions that fit the view, in order
let state = {};

function takeText(id) {
  const element = document.getElementById(id);
  const text = element.textContent;
  element.remove();     // so that memory holds a large page once
  return text;
}

// ---------------------------------------------------------------- questions

function readQuestion(index) {
  const [id, question, prediction, answers, ...rest] =
    texts[index].replaceAll(about.less_than, "<").split("\t");
  const passages = JSON.parse(numbers[index]).map((values, i) => {
    const [rank, score, reader, holds, label, gold, predicted] = values;
    const [key, title, text] = rest.slice(3 * i, 3 * i + 3);
    return {rank, score, reader, holds, label, gold, predicted, key, title, text};
  });
  const golds = answers ? answers.split(about.between_answers) : [];
  return {id, question, prediction, answers: golds, passages};
}

function readRow(index) {
  const [em, f1, answerRank, relevantRank, count, holding] = about.rows[index];
  return {em, f1, answerRank, relevantRank, count, holding};
}

// ---------------------------------------------------------------- filters and search

// Return [name in the address, label, test of a row] of each filter.
function listFilters() {
  const filters = [["all", "all questions", () => true]];
  if (about.has_predictions) {
    filters.push(
      ["wrong", "wrong", row => row.em === 0],
      ["lost", "wrong, though a passage holds an answer", row => row.em === 0 && row.answerRank],
      ["absent", "wrong, and no passage holds an answer", row => row.em === 0 && !row.answerRank],
      ["right", "right", row => row.em === 1],
      ["lucky", "right, though no passage holds an answer", row => row.em === 1 && !row.answerRank],
      ["unscored", "without gold answers", row => row.em === null]);
    return filters;
  }
  for (const [name, field, what] of [["relevant", "relevantRank", "relevant passage"],
                                     ["answer", "answerRank", "passage with an answer"]])
    filters.push(
      [`${name}-none`, `no ${what}`, row => row[field] === 0],
      [`${name}-below`, `first ${what} below rank 1`, row => row[field] > 1],
      [`${name}-first`, `${what} at rank 1`, row => row[field] === 1]);
  return filters;
}

// Return a number for sorting: worse questions have smaller ones, unjudged questions the largest.
function goodness(row) {
  if (about.has_predictions) return row.em === null ? 3 : row.em + row.f1;
  const rank = row.relevantRank ?? row.answerRank;
  if (rank === null) return 2;
  return rank ? 1 / rank : 0;
}

function findMatching() {
  const filter = filters.find(([name]) => name === state.show) ?? filters[0];
  matching = [];
  for (let i = 0; i < about.rows.length; i++)
    if (filter[2](rows[i])) matching.push(i);
  if (sought()) {
    lowered ??= texts.map(text => text.toLowerCase());
    const words = sought().replaceAll("<", about.less_than);
    matching = matching.filter(i => lowered[i].includes(words));
  }
  if (state.order !== "file") matching.sort((a, b) => goodness(rows[a]) - goodness(rows[b]));
}

// Return the search words in the form of page.py's texts: single blanks, NFC.
function sought() {
  return state.q.trim().replace(/\s+/g, " ").normalize("NFC").toLowerCase();
}

// ---------------------------------------------------------------- elements of the page

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeQuestion(index) {
  const row = rows[index];
  const question = readQuestion(index);
  const summary = make("summary", {}, makeMark(row),
                       make("h2", {dir: "auto"}, question.question));
  if (about.has_predictions)
    summary.append(make("p", {}, make("span", {class: "quiet"}, "predicted: "),
                        make("bdi", {class: row.em === 0 ? "wrong" : ""},
                             question.prediction || "(an empty answer)")));
  if (question.answers.length) summary.append(makeAnswers(question.answers));
  summary.append(make("p", {class: "quiet"}, describeRow(row, question)));
  const details = make("details", {"data-index": index}, summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1)
      details.append(makePassages(question, row));
    if (details.open) setState({open: String(index)});
    else if (state.open === String(index)) setState({open: ""});
  });
  return details;
}

function makeMark(row) {
  let [sign, name, label] = ["·", "", "not judged"];
  if (about.has_predictions && row.em !== null)
    [sign, name, label] = row.em ? ["✓", "right", "right"] : ["✗", "wrong", "wrong"];
  const rank = row.relevantRank ?? row.answerRank;
  if (!about.has_predictions && rank !== null)
    [sign, name, label] = rank ? ["✓", "right", "found"] : ["✗", "wrong", "not found"];
  return make("span", {class: `mark ${name}`, role: "img", "aria-label": label}, sign);
}

function makeAnswers(answers) {
  const line = make("p", {}, make("span", {class: "quiet"}, "gold: "));
  answers.forEach((answer, i) => line.append(i ? "; " : "", make("bdi", {}, answer)));
  return line;
}

function describeRow(row, question) {
  const parts = [`question ${question.id}`];
  if (row.em !== null) parts.push(`EM ${row.em}`, `F1 ${row.f1.toFixed(2)}`);
  if (row.relevantRank) parts.push(`first relevant passage at rank ${row.relevantRank}`);
  if (row.relevantRank === 0) parts.push("no relevant passage");
  if (row.answerRank)
    parts.push(`first answer at rank ${row.answerRank}, one in ${row.holding} of ${row.count} ` +
               "passages");
  if (row.answerRank === 0) parts.push(`an answer in none of ${row.count} passages`);
  return parts.join(" · ");
}

function makePassages(question, row) {
  const box = make("div", {});
  const list = make("ol", {class: "passages"});
  const best = Math.max(...question.passages.map(passage => passage.reader ?? -Infinity));
  const isShown = passage => passage.rank <= FIRST || passage.rank === row.answerRank ||
    passage.rank === row.relevantRank || passage.reader === best || holdsSought(passage);
  const fill = passages => list.replaceChildren(
    ...passages.map(passage => makePassage(passage, question.passages)));
  const shown = question.passages.filter(isShown);
  fill(shown);
  box.append(list);
  if (!row.count) box.append(make("p", {class: "quiet"}, "no passage"));
  const left = row.count - question.passages.length;
  if (left) box.append(make("p", {class: "quiet"}, `${left} more are left out to keep the page small`));
  if (shown.length < question.passages.length) {
    const button = make("button", {type: "button"}, `all ${question.passages.length} passages`);
    button.addEventListener("click", () => {
      fill(question.passages);
      button.remove();
    });
    box.append(button);
  }
  return box;
}

function holdsSought(passage) {
  const words = sought();
  return words !== "" && `${passage.title}\n${passage.text}`.toLowerCase().includes(words);
}

function makePassage(passage, passages) {
  const title = make("h3", {}, `${passage.rank}. `, make("bdi", {}, passage.title || passage.key));
  if (passage.label >= 1)
    title.append(" ", make("span", {class: "badge"},
                           passage.label === 1 ? "relevant" : `relevant: ${passage.label}`));
  if (passage.holds) title.append(" ", make("span", {class: "badge"}, "holds an answer"));
  const item = make("li", {}, title);
  const parts = [];
  if (passage.reader !== null) {
    const bar = make("span", {});
    bar.style.width = `${barWidth(passage, passages)}%`;
    item.append(make("div", {class: "bar", "aria-hidden": "true"}, bar));
    parts.push(about.reader_is_share ? `the reader's share ${(100 * passage.reader).toFixed(1)} %`
                                     : `the reader's score ${passage.reader.toFixed(3)}`);
  }
  if (passage.score !== null) parts.push(`the retriever's score ${passage.score.toFixed(3)}`);
  if (passage.title) parts.push(`document ${passage.key}`);
  item.append(make("div", {class: "quiet"}, parts.join(" · ")),
              make("p", {dir: "auto"}, ...markText(passage)));
  return item;
}

// Return a bar's width in per cent: the share, or the score between the lowest and the highest.
function barWidth(passage, passages) {
  if (about.reader_is_share) return 100 * passage.reader;
  const values = passages.map(other => other.reader).filter(value => value !== null);
  const lowest = Math.min(...values);
  return 100 * (passage.reader - lowest) / (Math.max(...values) - lowest || 1);
}

// Return the pieces of a text, with marks on gold answers, predictions and search words.
function markText(passage) {
  const characters = [...passage.text];  // Python counts whole characters
  const kinds = new Array(characters.length).fill("");
  const paint = (spans, kind) => {
    for (let i = 0; i < spans.length; i += 2) kinds.fill(kind, spans[i], spans[i + 1]);
  };
  paint(findSought(characters), "sought");
  paint(passage.predicted, "found");
  paint(passage.gold, "gold");
  const pieces = [];
  for (let start = 0, end = 0; start < characters.length; start = end) {
    while (end < characters.length && kinds[end] === kinds[start]) end++;
    const piece = characters.slice(start, end).join("");
    pieces.push(kinds[start] ? make("mark", {class: kinds[start]}, piece) : piece);
  }
  return pieces;
}

function findSought(characters) {
  const words = [...sought()];
  const lower = characters.map(character => character.toLowerCase());
  const spans = [];
  for (let i = 0; words.length && i + words.length <= lower.length; i++)
    if (words.every((character, j) => lower[i + j] === character))
      spans.push(i, i + words.length);
  return spans;
}

// ---------------------------------------------------------------- the view and its address

function show() {
  findMatching();
  const numPages = Math.max(1, Math.ceil(matching.length / PER_PAGE));
  const page = Math.min(Math.max(1, Number(state.page) || 1), numPages);
  const listed = matching.slice((page - 1) * PER_PAGE, page * PER_PAGE).map(makeQuestion);
  list.replaceChildren(...listed);
  const opened = listed.find(details => details.dataset.index === state.open);
  if (opened) opened.open = true;
  status.textContent = `${matching.length.toLocaleString("en")} of ` +
    `${rows.length.toLocaleString("en")} questions`;
  place.textContent = `page ${page} of ${numPages}`;
  previous.disabled = page === 1;
  next.disabled = page === numPages;
  previous.onclick = () => turn(page - 1);
  next.onclick = () => turn(page + 1);
}

function turn(page) {
  setState({page: String(page), open: ""});
  show();
  window.scrollTo(0, 0);
}

function setState(changes) {
  Object.assign(state, changes);
  const address = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
  history.replaceState(null, "", `#${address}`);
}

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  state = {};
  for (const name of ["q", "show", "order", "page", "open"]) state[name] = address.get(name) ?? "";
  search.value = state.q;
  choice.value = filters.some(([name]) => name === state.show) ? state.show : "all";
  order.value = state.order === "file" ? "file" : "worst";
  show();
}

const [search, choice, order, status, list, previous, next, place] =
  ["q", "show", "order", "status", "questions", "previous", "next", "place"].map(
    id => document.getElementById(id));
const rows = about.rows.map((_, index) => readRow(index));
const filters = listFilters().map(filter => [...filter, rows.filter(filter[2]).length])
  .filter(([name, , , count]) => count || name === "all");
for (const [name, label, , count] of filters)
  choice.append(make("option", {value: name}, `${label} (${count.toLocaleString("en")})`));

let waiting = 0;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    setState({q: search.value, page: "", open: ""});
    show();
  }, PATIENCE);
});
choice.addEventListener("change", () => {
  setState({show: choice.value, page: "", open: ""});
  show();
});
order.addEventListener("change", () => {
  setState({order: order.value, page: "", open: ""});
  show();
});
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
window.addEventListener("hashchange", readAddress);
readAddress();
