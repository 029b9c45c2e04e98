"use strict";

const INTERVAL_MS = 2000;
const REMEMBERED = 90;
let before = null; // the last answer, for rates
let timer = 0;

const at = (id) => document.getElementById(id);
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const drawn = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const count = (number) => new Intl.NumberFormat("en").format(number);
const percent = (ratio) => `${(100 * ratio).toFixed(ratio > 0 && ratio < 0.1 ? 1 : 0)} %`;
const seconds = (s) => (s < 1 ? `${(1000 * s).toFixed(1)} ms` : `${s.toFixed(2)} s`);
const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes.toFixed(bytes < 10 && unit ? 1 : 0)} ${units[unit]}`;
};

function bar(ratio, text, isBad = false) {
  const box = make("div", undefined, { class: isBad ? "bar bad" : "bar" });
  const picture = drawn("svg", { "aria-hidden": "true", preserveAspectRatio: "none", viewBox: "0 0 100 1" });
  picture.append(drawn("rect", { width: String(Math.min(100, 100 * ratio)), height: "1" }));
  box.append(picture, make("span", text));
  return box;
}

// A line over the last minutes. `values` are between 0 and `top`; the newest is at the right.
function line(values, top, label) {
  const picture = drawn("svg", {
    class: "line", role: "img", viewBox: `0 0 ${REMEMBERED - 1} 1`, preserveAspectRatio: "none", "aria-label": label,
  });
  const start = REMEMBERED - values.length;
  const points = values.map((value, index) => `${start + index},${(0.97 - 0.94 * (top ? value / top : 0)).toFixed(4)}`);
  if (values.length > 1) {
    picture.append(drawn("path", { class: "area", d: `M${start},1L${points.join("L")}L${REMEMBERED - 1},1Z` }));
    picture.append(drawn("path", { d: `M${points.join("L")}` }));
  }
  return picture;
}

function fact(name, value) {
  const pair = make("div");
  pair.append(make("dt", name), make("dd", value));
  return pair;
}

// What a count grew by a second, from each moment to the next.
function growth(moments, value) {
  return moments.slice(1).map((each, index) => {
    const elapsed = each.at_s - moments[index].at_s;
    return elapsed > 0 ? Math.max(0, value(each) - value(moments[index])) / elapsed : 0;
  });
}

function chart(title, values, top, text) {
  const box = make("figure");
  const words = make("figcaption");
  words.append(make("span", title), make("strong", text));
  box.append(words, line(values, top, `${title}: ${text}`));
  return box;
}

function rows(id, found, columns, empty) {
  const body = at(id);
  body.replaceChildren();
  if (!found.length) {
    const row = make("tr");
    row.append(make("td", empty, { class: "empty", colspan: String(columns.length) }));
    body.append(row);
  }
  for (const each of found) {
    const row = make("tr");
    columns.forEach((column, index) => {
      const cell = index === 0 ? make("th", undefined, { scope: "row" }) : make("td");
      const content = column(each);
      if (content instanceof Node) cell.append(content); else cell.textContent = content;
      if (column.isNumber) cell.className = "number";
      row.append(cell);
    });
    body.append(row);
  }
}

const number = (column) => Object.assign(column, { isNumber: true });

function rate(name, tier, key, elapsed) {
  const old = before?.service?.tiers.find((each) => each.name === name);
  const grown = old && elapsed > 0 ? (tier.counts[key] - old.counts[key]) / elapsed : 0;
  return grown > 0 ? `${count(tier.counts[key])} (${grown.toFixed(1)}/s)` : count(tier.counts[key]);
}

function show(told) {
  const elapsed = before ? told.at_s - before.at_s : 0;
  const service = told.service;
  for (const section of document.querySelectorAll(".operator")) section.hidden = !service;
  const facts = [["Chunks", count(told.chunks)], ["Bytes", size(told.namespaces.reduce((sum, each) => sum + each.nbytes, 0))]];
  if (service) {
    facts.push(["Hit ratio", service.lookups ? percent(service.hits / service.lookups) : "none yet"]);
    facts.push(["Look-ups", count(service.lookups)]);
    facts.push(["Open requests", count(service.open_requests)]);
    facts.push(["Pinned chunks", count(service.pinned)]);
    facts.push(["Shared-memory clients", count(service.shared_memory_clients)]);
  }
  at("overview").replaceChildren(...facts.map(([name, value]) => fact(name, value)));
  if (service) showService(service, elapsed);
  const mostRead = Math.max(1, ...told.namespaces.map((each) => each.reads));
  rows("namespaces", told.namespaces, [
    (each) => each.namespace || "(without a name)",
    (each) => bar(each.reads / mostRead, ""),
    number((each) => count(each.reads)),
    number((each) => size(each.nbytes)),
  ], "Nothing is stored.");
  const hottest = Math.max(1, ...told.documents.map((each) => each.uses));
  rows("documents", told.documents, [
    (each) => each.id,
    (each) => bar(each.uses / hottest, ""),
    number((each) => count(each.uses)),
    (each) => each.state,
  ], "No documents are registered.");
  before = told;
  at("updated").textContent = new Date(1000 * told.at_s).toLocaleTimeString();
}

function showTier(tier, service, elapsed) {
  const box = make("li");
  const title = make("h3", tier.name);
  title.append(" ", make("span", tier.is_healthy ? "answers" : "failing", { class: `health ${tier.is_healthy ? "ok" : "failing"}` }));
  const ratio = tier.capacity_bytes ? tier.used_bytes / tier.capacity_bytes : 0;
  const filled = bar(ratio, tier.capacity_bytes ? percent(ratio) : "no limit");
  const room = make("p", tier.capacity_bytes ? `${size(tier.used_bytes)} of ${size(tier.capacity_bytes)}` : size(tier.used_bytes), { class: "note" });
  const past = service.recent.map((each) => each.filled[tier.name] ?? 0);
  const trend = past.length ? `from ${percent(past[0])} to ${percent(past[past.length - 1])} filled` : "not yet known how it filled";
  const facts = make("dl", undefined, { class: "small" });
  facts.append(fact("Chunks", count(tier.chunks)));
  for (const [name, key] of [["Hits", "hits"], ["Evictions", "evictions"], ["Demotions", "demotions"], ["Errors", "errors"]]) {
    facts.append(fact(name, rate(tier.name, tier, key, elapsed)));
  }
  box.append(title, filled, room, line(past, 1, trend), facts);
  return box;
}

function showRecent(moments) {
  const looked = growth(moments, (each) => each.lookups);
  const hit = growth(moments, (each) => each.hits);
  const ratios = looked.map((each, index) => (each ? hit[index] / each : 0));
  const evicted = growth(moments, (each) => each.evictions);
  const demoted = growth(moments, (each) => each.demotions);
  const sum = (values) => values.reduce((total, each) => total + each, 0);
  const last = (values) => `${(values[values.length - 1] ?? 0).toFixed(1)} / s`;
  at("recent").replaceChildren(
    chart("Look-ups", looked, Math.max(1, ...looked), last(looked)),
    chart("Hit ratio", ratios, 1, sum(looked) ? percent(sum(hit) / sum(looked)) : "no look-ups"),
    chart("Evictions", evicted, Math.max(1, ...evicted), last(evicted)),
    chart("Demotions", demoted, Math.max(1, ...demoted), last(demoted)),
  );
}

function showService(service, elapsed) {
  at("tiers").replaceChildren(...service.tiers.map((tier) => showTier(tier, service, elapsed)));
  showRecent(service.recent);
  const total = Math.max(1, service.lookups);
  const outcomes = service.tiers.map((tier) => ({ name: `hit in ${tier.name}`, count: tier.counts.hits, isBad: false }));
  for (const [reason, missed] of Object.entries(service.misses)) outcomes.push({ name: `miss: ${reason}`, count: missed, isBad: true });
  rows("outcomes", outcomes, [
    (each) => each.name,
    (each) => bar(each.count / total, percent(each.count / total), each.isBad),
    number((each) => count(each.count)),
  ], "No look-ups yet.");
  const routes = Object.entries(service.latencies).filter(([route]) => route.includes("/v1/")).sort();
  rows("latencies", routes, [
    ([route]) => route,
    number(([, times]) => seconds(times.p50_s)),
    number(([, times]) => seconds(times.p99_s)),
  ], "No requests yet.");
}

function say(text, isBad = false) {
  const status = at("status");
  if (status.textContent !== text) status.textContent = text;
  status.className = isBad ? "bad" : "";
}

async function refresh() {
  const token = sessionStorage.getItem("token");
  if (!token) return;
  try {
    const answer = await fetch("v1/dashboard", { headers: { Authorization: `Bearer ${token}` } });
    const told = await answer.json();
    if (answer.status === 401 || answer.status === 403) { signOut(told.detail); return; }
    if (!answer.ok) throw new Error(told.detail);
    at("sign-in").hidden = true;
    at("figures").hidden = false;
    at("sign-out").hidden = false;
    show(told);
    say(told.is_draining ? "Draining" : "Live");
  } catch (error) {
    say(`No answer: ${error.message}`, true);
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, INTERVAL_MS);
}

function signOut(reason = "") {
  sessionStorage.removeItem("token");
  clearTimeout(timer);
  before = null;
  at("figures").hidden = true;
  at("sign-out").hidden = true;
  at("sign-in").hidden = false;
  at("problem").textContent = reason;
  say("Not connected");
  at("token").focus();
}

at("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  at("token").value = "";
  at("problem").textContent = "";
  refresh().then(() => { if (!at("figures").hidden) at("main").focus(); });
});
at("sign-out").addEventListener("click", () => signOut());
if (location.hash.startsWith("#token=")) {
  sessionStorage.setItem("token", decodeURIComponent(location.hash.slice(7)));
  window.history.replaceState(null, "", location.pathname);
}
refresh();
