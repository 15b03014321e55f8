"""The part of a report that answers: slices of three planes, which the browser compares as it is told.

Every image is embedded once, a strip of slices a plane. Flicker, checkerboard, overlay, difference and the edges on top
are put together in the browser, on a canvas; the script depends on nothing.
"""

import io
import json
from html import escape

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.reporting.html import data_url
from dilformer_jax.reporting.pair_figures import EDGE, ENDS, PLANES, colours, place
from dilformer_jax.reporting.shown import IMAGES, LABELS, Shown, edges, pixels, slices, upright

SLICES = 9  # of each plane
THUMBNAIL = 96
# key, name, what it does
VIEWS = (
    ("e", "edges", "edges of the fixed image on it"),
    ("f", "flicker", "in turn with the fixed image"),
    ("c", "checkerboard", "squares of it and of the fixed image"),
    ("o", "overlay", "it in magenta, the fixed image in green: grey where they agree"),
    ("d", "difference", "its distance from the fixed image, black where they agree"),
    ("a", "alone", "nothing beside it"),
)

STYLE = """
.viewer .controls { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin: .8rem 0; }
.viewer .group { display: flex; flex-wrap: wrap; gap: 1px; border-radius: 6px; overflow: hidden; }
.viewer button { font: inherit; font-size: .88rem; border: 0; padding: .4rem .7rem; background: var(--line);
                 color: var(--ink); cursor: pointer; }
.viewer button[aria-pressed=true] { background: var(--accent); color: #ffffff; }
.viewer kbd { font: inherit; font-size: .75rem; opacity: .6; margin-left: .35rem; }
.planes { display: flex; flex-wrap: wrap; gap: 4px; align-items: flex-end; background: #000000; border-radius: 6px;
          padding: 4px; }
.planes figure { margin: 0; min-width: min(15rem, 100%); }
.planes canvas { display: block; width: 100%; height: auto; cursor: pointer; }
.planes input { width: 100%; margin: 0; accent-color: var(--accent); }
.planes figcaption { color: #9aa4ad; font-size: .78rem; padding: 0 .2rem .2rem; display: flex; gap: .6rem;
                     justify-content: space-between; }
.planes img { display: none; }
@media print { .viewer .controls, .planes input { display: none; } }
"""

SCRIPT = """
(async () => {
  const viewer = document.querySelector(".viewer");
  const planes = [...viewer.querySelectorAll("figure")].map(figure => ({
    canvas: figure.querySelector("canvas"),
    slider: figure.querySelector("input"),
    caption: figure.querySelector("output"),
    places: JSON.parse(figure.dataset.places),
    ends: figure.dataset.ends,
    layers: Object.fromEntries([...figure.querySelectorAll("img")].map(image => [image.dataset.layer, image])),
  }));
  const state = {image: "moved", view: "edges", outlines: false, turn: false, held: false};

  function paint(context, plane, layer) {  // the slice of a layer, where the pair has that layer
    const strip = plane.layers[layer], width = strip ? strip.naturalWidth / plane.places.length : 0;
    if (strip) context.drawImage(strip, plane.slider.value * width, 0, width, strip.naturalHeight,
                                 0, 0, plane.canvas.width, plane.canvas.height);
  }
  function picture(context, plane, name) {  // an image, with its structures where these are asked for
    paint(context, plane, name);
    if (state.outlines) paint(context, plane, name + "_labels");
  }
  function tinted(plane, name, colour) {
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    [canvas.width, canvas.height] = [plane.canvas.width, plane.canvas.height];
    picture(context, plane, name);
    context.globalCompositeOperation = "multiply";
    context.fillStyle = colour;
    context.fillRect(0, 0, canvas.width, canvas.height);
    return canvas;
  }
  function squares(context, width, height) {
    const side = Math.max(width, height) / 7;
    context.beginPath();
    for (let i = 0; i * side < width; i++)
      for (let j = i % 2; j * side < height; j += 2) context.rect(i * side, height - (j + 1) * side, side, side);
  }
  function draw(plane) {
    const context = plane.canvas.getContext("2d"), {width, height} = plane.canvas;
    const fixed = state.held || (state.view == "flicker" && state.turn);
    context.save();
    picture(context, plane, fixed ? "fixed" : state.image);
    if (!state.held && state.view == "edges") paint(context, plane, "edges");
    if (!state.held && state.view == "checkerboard") {
      squares(context, width, height);
      context.clip();
      picture(context, plane, "fixed");
    }
    if (!state.held && state.view == "difference") {
      context.globalCompositeOperation = "difference";
      picture(context, plane, "fixed");
    }
    if (!state.held && state.view == "overlay") {
      context.drawImage(tinted(plane, state.image, "#ff00ff"), 0, 0);
      context.globalCompositeOperation = "lighter";
      context.drawImage(tinted(plane, "fixed", "#00ff00"), 0, 0);
    }
    context.restore();
    context.font = "20px system-ui, sans-serif";
    context.fillStyle = "#ffffff";
    context.textAlign = "center";
    context.textBaseline = "middle";
    [[14, height / 2], [width - 14, height / 2], [width / 2, height - 14], [width / 2, 16]].forEach(
      ([x, y], k) => context.fillText(plane.ends[k], x, y));
    plane.caption.textContent = plane.places[plane.slider.value];
    return fixed;
  }
  function update() {
    const fixed = planes.map(draw)[0];
    const words = {edges: "edges of fixed on ", flicker: "flicker: ", checkerboard: "checkerboard of fixed and ",
                   overlay: "fixed in green, in magenta ", difference: "distance from fixed of ", alone: ""};
    const image = fixed ? "fixed" : state.image;
    viewer.querySelector(".state").textContent = state.held ? "fixed" : words[state.view] + image;
    for (const button of viewer.querySelectorAll("button")) {
      const chosen = button.dataset.outlines ? state.outlines : [state.image, state.view].includes(button.value);
      button.setAttribute("aria-pressed", chosen);
    }
  }
  function choose(button) {
    if (button.dataset.outlines) state.outlines = !state.outlines;
    else state[button.name] = button.value;
    if (button.value == "fixed") state.view = "alone";  // beside itself there is nothing to see
    else if (button.name == "view" && state.image == "fixed") state.image = "moved";
    update();
  }
  function follow() {  // report.html#aligned-checkerboard
    for (const word of location.hash.slice(1).split("-")) {
      const button = viewer.querySelector(`button[value="${CSS.escape(word)}"]`);
      if (button) choose(button);
    }
  }
  viewer.hidden = false;
  await Promise.all([...viewer.querySelectorAll("img")].map(image => image.decode()));
  viewer.querySelectorAll("button").forEach(button => button.addEventListener("click", () => choose(button)));
  for (const plane of planes) {
    plane.slider.addEventListener("input", () => draw(plane));
    plane.canvas.addEventListener("pointerdown", () => { state.held = true; update(); });
  }
  for (const end of ["pointerup", "pointercancel"])
    addEventListener(end, () => { if (state.held) { state.held = false; update(); } });
  addEventListener("keydown", event => {
    const button = viewer.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
    if (button && !event.ctrlKey && !event.metaKey && !event.altKey) choose(button);
  });
  addEventListener("hashchange", follow);
  setInterval(() => { if (state.view == "flicker") { state.turn = !state.turn; update(); } }, 700);
  update();
  follow();
})();
"""


def viewer(shown: Shown) -> str:
    """The viewer of an upright pair as HTML, hidden until its script runs; `STYLE` and `SCRIPT` belong to it."""
    outlined = any(getattr(shown, name) is not None for name in LABELS)
    images = [_button("image", name, str(k), "") for k, name in enumerate(IMAGES, 1)]
    views = [_button("view", name, key, title) for key, name, title in VIEWS]
    outlines = '<button data-outlines="1" data-key="s" value="structures">structures<kbd>s</kbd></button>'
    groups = [images, views, [outlines] * outlined]
    controls = "".join(f'<div class="group" role="group">{"".join(group)}</div>' for group in groups if group)
    figures = "\n".join(_plane(shown, axis) for axis in range(3))
    return (
        '<div class="viewer" hidden>\n'
        f'<div class="controls">{controls}</div>\n<div class="planes">\n{figures}\n</div>\n'
        '<p><output class="state"></output></p>\n</div>'
    )


def thumbnail(shown: Shown) -> bytes:
    """A small JPEG: the fixed image's three middle slices, side by side, and on them the edges of the moved image."""
    shown = upright(shown)
    parts = []
    for axis in range(3):
        middle = slices(shown.scaled("fixed"), axis, 3)
        index = middle[len(middle) // 2]
        fixed = pixels(shown, shown.scaled("fixed").take(index, axis), axis, THUMBNAIL)
        moved = pixels(shown, shown.scaled("moved").take(index, axis), axis, THUMBNAIL)
        tile = np.repeat((255 * fixed).astype(np.uint8)[..., None], 3, -1)
        tile[edges(moved, 1.0)] = EDGE[:3]
        margin = [*((n // 2, n - n // 2) for n in np.subtract(THUMBNAIL, tile.shape[:2])), (0, 0)]
        parts.append(np.pad(tile, margin))
    return _jpeg(np.concatenate(parts).swapaxes(0, 1)[::-1], 80)


def _button(group: str, name: str, key: str, title: str) -> str:
    attributes = f'name="{group}" value="{name}" data-key="{key}" title="{escape(title)}"'
    return f"<button {attributes}>{name}<kbd>{key}</kbd></button>"


def _plane(shown: Shown, axis: int) -> str:
    """A plane: its canvas, its slider and, hidden, the strips of its slices."""
    indices = slices(shown.scaled("fixed"), axis, SLICES)
    layers: dict[str, bytes] = {}
    for name in IMAGES:
        image = shown.scaled(name)
        strip = [pixels(shown, image.take(k, axis), axis) for k in indices]
        layers[name] = _jpeg(_strip(strip), 82)
        if name == "fixed":
            width, height = strip[0].shape
            drawn = [edges(ndimage.zoom(tile, 2, order=1, grid_mode=True, mode="nearest"), 2.5) for tile in strip]
            layers["edges"] = _png(
                _strip([np.where(mask[..., None], np.array(EDGE, np.uint8), np.uint8(0)) for mask in drawn])
            )
    for name in LABELS:
        labels = getattr(shown, name)
        if labels is not None:
            tiles = [pixels(shown, labels.take(k, axis), axis) for k in indices]
            layers[name] = _png(_strip([colours(tile) for tile in tiles]))
    strips = "".join(f'<img alt="" data-layer="{name}" src="{data_url(layer)}">' for name, layer in layers.items())
    right, up = (ENDS[a] for a in range(3) if a != axis)
    places = [f"{PLANES[axis]}, {place(shown, axis, k)}" for k in indices]
    last, middle = len(indices) - 1, len(indices) // 2
    return (
        f'<figure style="flex: {width} 1 0" data-ends="{right}{up}" data-places="{escape(json.dumps(places))}">'
        f'<canvas width="{2 * width}" height="{2 * height}"></canvas>'
        f'<input type="range" min="0" max="{last}" value="{middle}" aria-label="{PLANES[axis]} slice">'
        f"<figcaption><output></output></figcaption>{strips}</figure>"
    )


def _strip(tiles: list[np.ndarray]) -> np.ndarray:
    """Slices (width, height) side by side as rows of pixels, the uppermost first."""
    return np.concatenate([tile.swapaxes(0, 1)[::-1] for tile in tiles], axis=1)


def _jpeg(picture: Float[np.ndarray, "rows columns"] | UInt8[np.ndarray, "rows columns 3"], quality: int) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, picture, format="jpeg", cmap="gray", vmin=0, vmax=1, pil_kwargs={"quality": quality})
    return buffer.getvalue()


def _png(picture: UInt8[np.ndarray, "rows columns 4"]) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, picture, format="png", pil_kwargs={"optimize": True})
    return buffer.getvalue()
