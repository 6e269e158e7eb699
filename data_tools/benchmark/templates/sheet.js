// A page of an annotation sheet: keeps the answers in this browser, and saves them as a CSV.
"use strict";
(() => {
  const page = document.querySelector("main");
  const pairs = [...document.querySelectorAll(".pair")];
  const annotator = document.getElementById("annotator");
  const message = document.getElementById("message");
  const kept = `tandem answers ${page.dataset.sheet}`;
  const keptName = "tandem annotator";
  const columns = ["id", "split", "key", "text", "label", "verdict", "corrected_text", "annotator", "note"];
  const risky = /^'*[=+\-@\t\r\n＝＋－＠]/; // as data_tools/annotation_csv.py

  const say = (text, warns = false) => {
    message.textContent = text;
    message.classList.toggle("warns", warns);
  };
  const field = (pair, name) => pair.querySelector(`[data-field=${name}]`);
  const shown = (pair) => pair.querySelector(".text").textContent;
  const verdict = (pair) => pair.querySelector("input[type=radio]:checked")?.value ?? "";
  const corrected = (pair) => {
    const text = field(pair, "corrected_text").value.trim();
    return verdict(pair) === "match" && text !== shown(pair).trim() ? text : "";
  };

  function store() {
    const answers = {};
    for (const pair of pairs) {
      // a list, as all pages share what the browser keeps, some 5 MB
      const answer = [verdict(pair), field(pair, "corrected_text").value, field(pair, "note").value];
      if (answer.some((value) => value !== "")) answers[pair.dataset.id] = answer;
    }
    try {
      localStorage.setItem(kept, JSON.stringify(answers));
      localStorage.setItem(keptName, annotator.value);
    } catch {
      say("This browser keeps no more answers: save the CSV before you close the page.", true);
    }
    show();
  }

  function restore() {
    let answers = {};
    try {
      answers = JSON.parse(localStorage.getItem(kept)) ?? {};
      annotator.value = localStorage.getItem(keptName) ?? "";
    } catch {
      say("The answers that this browser kept cannot be read.", true);
    }
    for (const pair of pairs) {
      const answer = answers[pair.dataset.id];
      if (!answer) continue;
      for (const choice of pair.querySelectorAll("input[type=radio]")) {
        choice.checked = choice.value === answer[0];
      }
      field(pair, "corrected_text").value = answer[1];
      field(pair, "note").value = answer[2];
    }
    show();
  }

  function show() {
    let judged = 0;
    for (const pair of pairs) {
      const said = verdict(pair);
      judged += said !== "";
      pair.dataset.verdict = said;
      field(pair, "corrected_text").disabled = said !== "match";
    }
    document.getElementById("count").textContent = `${judged} of ${pairs.length} judged`;
    document.getElementById("bar").value = judged;
  }

  const cell = (text) => `"${(risky.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

  function csv() {
    const lines = [columns];
    for (const pair of pairs) {
      if (verdict(pair) === "") continue;
      const { id, split, key, label } = pair.dataset;
      const note = field(pair, "note").value.trim();
      lines.push([id, split, key, shown(pair), label, verdict(pair), corrected(pair), annotator.value.trim(), note]);
    }
    return "\ufeff" + lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
  }

  function save() {
    const name = annotator.value.trim();
    if (name === "") {
      say("Write your name first: answers are counted by annotator.", true);
      annotator.focus();
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = `${page.dataset.name}-${name.replace(/[^\p{L}\p{N}_-]+/gu, "_")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say(`Saved as ${link.download}`);
  }

  const here = () => pairs.indexOf(document.activeElement?.closest(".pair"));
  function go(place) {
    const pair = pairs[Math.max(0, Math.min(pairs.length - 1, place))];
    pair.focus({ preventScroll: true });
    pair.scrollIntoView({ block: "center" });
  }
  function judge(pair, value) {
    for (const choice of pair.querySelectorAll("input[type=radio]")) choice.checked = choice.value === value;
    store();
  }

  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "s") {
      event.preventDefault();
      save();
      return;
    }
    const typing = event.target.matches("textarea, input:not([type=radio])");
    if (typing && event.key === "Escape") event.target.closest(".pair")?.focus();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = here();
    const choice = { 1: "match", 2: "no match", 3: "drop", 0: "" }[event.key];
    if (event.key === "j" || event.key === "ArrowDown") go(place + 1);
    else if (event.key === "k" || event.key === "ArrowUp") go(place - 1);
    else if (choice !== undefined && place >= 0) {
      judge(pairs[place], choice);
      if (choice !== "") go(place + 1);
    } else if (event.key === "e" && place >= 0) {
      judge(pairs[place], "match");
      const text = field(pairs[place], "corrected_text");
      if (text.value === "") text.value = shown(pairs[place]);
      text.focus();
    } else return;
    event.preventDefault();
  });
  page.addEventListener("input", store);
  page.addEventListener("change", store);
  annotator.addEventListener("input", store);
  document.getElementById("save").addEventListener("click", save);
  restore();
})();
