"use strict";
// The listening list: search, filter, sort. Without it the list is whole, in the order of the test split.
(() => {
  const list = document.getElementById("clips"), form = document.getElementById("controls");
  if (!list) return;
  const clips = Array.from(list.children), count = document.getElementById("count");
  const texts = new Map(clips.map((clip) => [clip, clip.textContent.toLowerCase()]));
  const fields = form.elements;

  const shown = (clip) => Array.from(clip.querySelectorAll(".line")).filter((line) => !line.hidden);
  const mean = (numbers) => (numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : NaN);
  const score = (clip, key) => mean(shown(clip).map((line) => parseFloat(line.dataset[key])).filter((n) => !isNaN(n)));
  const orders = {
    order: (clip) => Number(clip.dataset.order),
    worst: (clip) => score(clip, "score"),
    best: (clip) => -score(clip, "score"),
    lost: (clip) => score(clip, "score") - score(clip, "first"),
    won: (clip) => score(clip, "first") - score(clip, "score"),
    longest: (clip) => -parseFloat(clip.dataset.seconds),
    shortest: (clip) => parseFloat(clip.dataset.seconds),
  };

  function update() {
    const words = fields.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const code = fields.language ? fields.language.value : "", filter = fields.filter.value;
    let visible = 0;
    for (const clip of clips) {
      for (const line of clip.querySelectorAll(".line")) line.hidden = Boolean(code) && line.dataset.language !== code;
      const passes = !filter || shown(clip).some((line) => line.dataset[filter] === "yes");
      clip.hidden = !passes || !words.every((word) => texts.get(clip).includes(word));
      visible += clip.hidden ? 0 : 1;
    }
    const key = new Map(clips.map((clip) => [clip, orders[fields.sort.value](clip)]));
    const place = (clip) => (isNaN(key.get(clip)) ? Infinity : key.get(clip)); // what was not measured comes last
    const sorted = clips.slice().sort((a, b) => (place(a) === place(b) ? a.dataset.order - b.dataset.order : place(a) - place(b)));
    list.append(...sorted);
    count.textContent = `${visible} of ${clips.length} clips`;
  }

  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("play", (event) => {
    for (const player of document.querySelectorAll("audio")) if (player !== event.target) player.pause();
  }, true);
  update();
})();
