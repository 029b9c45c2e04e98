"use strict";

const INTERVAL_MS = 2000;
const REMEMBERED = 90;
const fillings = new Map(); // by tier: used ratios of late
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

function line(ratios) {
  const picture = drawn("svg", {
    class: "line", role: "img", viewBox: `0 0 ${REMEMBERED - 1} 1`, preserveAspectRatio: "none",
    "aria-label": `from ${percent(ratios[0])} to ${percent(ratios[ratios.length - 1])} filled`,
  });
  const start = REMEMBERED - ratios.length;
  const points = ratios.map((ratio, index) => `${start + index},${(1 - 0.94 * ratio - 0.03).toFixed(4)}`);
  picture.append(drawn("path", { d: `M${points.join("L")}` }));
  return picture;
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
  at("overview").replaceChildren(...facts.map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", name), make("dd", value));
    return pair;
  }));
  if (service) showService(service, elapsed);
  const largest = Math.max(1, ...told.namespaces.map((each) => each.nbytes));
  rows("namespaces", told.namespaces, [
    (each) => each.namespace || "(without a name)",
    (each) => bar(each.nbytes / largest, ""),
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

function showService(service, elapsed) {
  for (const tier of service.tiers) {
    const ratio = tier.capacity_bytes ? tier.used_bytes / tier.capacity_bytes : 0;
    const known = fillings.get(tier.name) ?? [];
    fillings.set(tier.name, [...known, ratio].slice(-REMEMBERED));
  }
  rows("tiers", service.tiers, [
    (tier) => tier.name,
    (tier) => make("span", tier.is_healthy ? "answers" : "failing", { class: `health ${tier.is_healthy ? "ok" : "failing"}` }),
    (tier) => {
      const ratio = tier.capacity_bytes ? tier.used_bytes / tier.capacity_bytes : 0;
      return bar(ratio, tier.capacity_bytes ? percent(ratio) : size(tier.used_bytes));
    },
    (tier) => line(fillings.get(tier.name)),
    number((tier) => count(tier.chunks)),
    number((tier) => rate(tier.name, tier, "hits", elapsed)),
    number((tier) => rate(tier.name, tier, "evictions", elapsed)),
    number((tier) => rate(tier.name, tier, "demotions", elapsed)),
  ], "");
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
  fillings.clear();
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
