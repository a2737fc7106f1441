// A view as a PNG file: its canvases, sliders and bars, and its words where the browser laid them.

import { color } from "./dom.js";

const HIDDEN = "button, .button, select, input, textarea, details:not([open]), .sr";
const MARGIN = 16;

export function save(root, name) {
  const scale = 2;
  const frame = root.getBoundingClientRect();
  const sheet = document.createElement("canvas");
  sheet.width = Math.ceil((frame.width + 2 * MARGIN) * scale);
  sheet.height = Math.ceil((frame.height + 2 * MARGIN) * scale);
  const context = sheet.getContext("2d");
  context.scale(scale, scale);
  context.fillStyle = color("paper");
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.translate(MARGIN - frame.left, MARGIN - frame.top);
  for (const bar of root.querySelectorAll(".bar i")) {
    const box = bar.getBoundingClientRect();
    context.fillStyle = getComputedStyle(bar).backgroundColor;
    context.fillRect(box.left, box.top, box.width, box.height);
  }
  for (const canvas of root.querySelectorAll("canvas")) {
    const box = canvas.getBoundingClientRect();
    context.imageSmoothingEnabled = !canvas.classList.contains("pixels");
    if (canvas.width && box.width) context.drawImage(canvas, box.left, box.top, box.width, box.height);
  }
  for (const input of root.querySelectorAll("input[type=range]")) {
    const box = input.getBoundingClientRect();
    const share = (input.value - input.min) / (input.max - input.min);
    context.fillStyle = color("line");
    context.fillRect(box.left, box.top + box.height / 2 - 1, box.width, 2);
    context.fillStyle = color("accent");
    context.beginPath();
    context.arc(box.left + 8 + share * (box.width - 16), box.top + box.height / 2, 5, 0, 7);
    context.fill();
  }
  words(root, context);
  sheet.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${name}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

/** Draw every word of the text in `root`, or part of one before a hyphen, at its own place. */
function words(root, context) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  context.textBaseline = "middle";
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest(HIDDEN)) continue;
    const style = getComputedStyle(node.parentElement);
    context.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    context.fillStyle = style.color;
    for (const match of node.data.matchAll(/[^\s-]+-?|-/g)) {
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      const box = range.getBoundingClientRect();
      if (box.width) context.fillText(match[0], box.left, box.top + box.height / 2);
    }
  }
}
