// Searching by picture (choose, drop, paste) and by sketch (draw, choose), copying code, and "/" for the box.
// Everything else works without it.
"use strict";

const SIDE = 96;
// Larger pictures are sent smaller: encoders look at some hundred pixels.
const LARGEST = 1600;
const PEN = 6;
const box = document.querySelector("[data-box]");

if (box) {
  const status = box.querySelector("[data-status]");
  const list = box.querySelector("[data-pictures]");
  const choose = box.querySelector("[data-choose]");

  const say = (text, bad = false) => {
    status.textContent = text;
    status.classList.toggle("bad", bad);
  };

  const showKept = () => {
    for (const chip of list.querySelectorAll("[data-picture]")) {
      const kept = sessionStorage.getItem(chip.dataset.picture);
      if (kept && kept.startsWith("data:image/")) {
        const image = document.createElement("img");
        image.src = kept;
        image.alt = "";
        chip.prepend(image);
      }
    }
  };

  // A small copy of a picture for this tab alone: the server keeps none.
  const keepSmall = async (file, token) => {
    try {
      const bitmap = await createImageBitmap(file);
      const canvas = document.createElement("canvas");
      const side = Math.min(bitmap.width, bitmap.height);
      canvas.width = canvas.height = SIDE;
      canvas.getContext("2d").drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, SIDE, SIDE);
      sessionStorage.setItem(token, canvas.toDataURL("image/jpeg", 0.7));
    } catch {
      // Without it the picture is shown by its number.
    }
  };

  const smaller = async (file) => {
    try {
      const bitmap = await createImageBitmap(file);
      const scale = LARGEST / Math.max(bitmap.width, bitmap.height);
      if (scale >= 1) return file;
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(bitmap.width * scale));
      canvas.height = Math.max(1, Math.round(bitmap.height * scale));
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      return await new Promise((resolve) => canvas.toBlob((blob) => resolve(blob || file), "image/jpeg", 0.92));
    } catch {
      return file; // the server says what is wrong with it
    }
  };

  // Embeds pictures or sketches (`name` is "picture" or "sketch") and searches with them.
  const send = async (files, name = "picture") => {
    const pictures = [...files].filter((file) => file.type.startsWith("image/"));
    if (!pictures.length) {
      say("That is no picture.", true);
      return;
    }
    say(pictures.length === 1 ? `Looking at the ${name} …` : `Looking at ${pictures.length} pictures …`);
    for (const file of pictures) {
      let answer;
      try {
        const body = await smaller(file);
        answer = await fetch(name === "sketch" ? "/api/sketches" : "/api/pictures", { method: "POST", body, headers: { "Content-Type": body.type } });
      } catch {
        say("The server cannot be reached.", true);
        return;
      }
      const content = await answer.json().catch(() => ({}));
      if (!answer.ok) {
        say(content.detail || `The ${name} was refused.`, true);
        return;
      }
      await keepSmall(file, content[name]);
      const input = document.createElement("input");
      input.type = "hidden";
      input.name = name;
      input.value = content[name];
      list.append(input);
    }
    box.requestSubmit();
  };

  showKept();
  if (choose) {
    choose.hidden = false;
    for (const hint of box.querySelectorAll("[data-script]")) hint.hidden = false;
    choose.querySelector("input").addEventListener("change", (event) => send(event.target.files));
    document.addEventListener("paste", (event) => {
      if (event.clipboardData && event.clipboardData.files.length) {
        event.preventDefault();
        send(event.clipboardData.files);
      }
    });
    for (const kind of ["dragenter", "dragover"]) {
      document.addEventListener(kind, (event) => {
        if (event.dataTransfer && [...event.dataTransfer.types].includes("Files")) {
          event.preventDefault();
          box.classList.add("over");
        }
      });
    }
    for (const kind of ["dragleave", "drop"]) {
      document.addEventListener(kind, (event) => {
        if (kind === "drop" || !event.relatedTarget) box.classList.remove("over");
      });
    }
    document.addEventListener("drop", (event) => {
      if (event.dataTransfer && event.dataTransfer.files.length) {
        event.preventDefault();
        send(event.dataTransfer.files);
      }
    });
  }
  const draw = box.querySelector("[data-draw]");
  if (draw) startDrawing(draw, (file) => send([file], "sketch"));
  const kinds = box.querySelector("[data-kinds]");
  if (kinds) kinds.addEventListener("change", () => box.requestSubmit());
  // What was not filled in, or is as by default, is not part of the address.
  box.addEventListener("submit", () => {
    for (const input of box.querySelectorAll("input[name]")) {
      input.disabled = !input.value.trim() || (input.checked && "default" in input.dataset);
    }
  });
  window.addEventListener("pageshow", () => {
    for (const input of box.querySelectorAll("input[name]")) input.disabled = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !["INPUT", "TEXTAREA", "SELECT"].includes(document.activeElement.tagName)) {
      event.preventDefault();
      box.querySelector("#q").focus();
    }
  });
}

const copy = document.querySelector("[data-copy]");
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(copy.parentElement.querySelector("code").textContent);
    copy.textContent = "Copied";
  });
}

// A surface to draw dark lines on, with a mouse, a pen or a finger. A file may be chosen in its place.
function startDrawing(draw, send) {
  const canvas = draw.querySelector("[data-canvas]");
  const pen = canvas.getContext("2d");
  const buttons = draw.querySelectorAll("button");
  let strokes = [];
  let current = null;

  const show = () => {
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    Object.assign(pen, { lineWidth: PEN, lineCap: "round", lineJoin: "round", strokeStyle: "#000" });
    for (const stroke of strokes) {
      pen.beginPath();
      for (const [x, y] of stroke) pen.lineTo(x, y);
      if (stroke.length === 1) pen.lineTo(...stroke[0]);
      pen.stroke();
    }
    for (const button of buttons) button.disabled = !strokes.length;
  };
  const add = (event) => {
    const place = canvas.getBoundingClientRect();
    current.push([((event.clientX - place.left) / place.width) * canvas.width, ((event.clientY - place.top) / place.height) * canvas.height]);
    show();
  };

  draw.hidden = false;
  show();
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    strokes.push((current = []));
    add(event);
  });
  canvas.addEventListener("pointermove", (event) => current && add(event));
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (current = null));
  draw.querySelector("[data-undo]").addEventListener("click", () => (strokes.pop(), show()));
  draw.querySelector("[data-clear]").addEventListener("click", () => ((strokes = []), show()));
  draw.querySelector("[data-send]").addEventListener("click", () => canvas.toBlob(send, "image/png"));
  draw.querySelector("[data-sketch-file]").addEventListener("change", (event) => send(event.target.files[0]));
}
