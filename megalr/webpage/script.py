"""The page's script: values under the pointer, and zooming. Without it, the page shows the same charts.

It writes text only as text, never as markup.
"""

JAVASCRIPT = r"""
"use strict";
(() => {
  const SIZE = 1000, X_TICKS = 8, Y_TICKS = 5, charts = [];
  document.documentElement.classList.add("scripted");

  const element = (parent, tag, name, text) => {
    const made = document.createElement(tag);
    made.className = name;
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const percent = share => 100 * share + "%";

  // Numbers, as axes.py writes them.
  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));
  const short = (value, digits = 6) => {
    for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= unit * 0.9995 && Math.abs(value) < 1e15) return trimmed(value / unit, digits) + name;
    return Math.abs(value) < 1e-300 ? "0" : trimmed(value, digits);
  };
  const bytes = value => {
    let unit = -1;
    while (Math.abs(value) >= 999.5 && unit < 5) { value /= 1000; unit += 1; }
    return trimmed(value, 3) + " " + (unit < 0 ? "B" : ["kB", "MB", "GB", "TB", "PB", "EB"][unit]);
  };
  const perplexity = value => {
    if (value >= 1e7) return trimmed(value, 4);
    const digits = value < 999.995 ? 2 : 0;
    return value.toLocaleString("en-US", {minimumFractionDigits: digits, maximumFractionDigits: digits});
  };
  const seconds = value => {
    if (value === 0) return "0";
    if (Math.abs(value) < 1e-3) return trimmed(value * 1e6, 3) + " µs";
    return Math.abs(value) < 1 ? trimmed(value * 1e3, 3) + " ms" : trimmed(value, 4) + " s";
  };
  const whole = value => value.toLocaleString("en-US");
  const FORMS = {short, whole, bytes, perplexity, seconds, percent: value => trimmed(100 * value, 3) + " %"};
  const besideTick = (form, value) => {
    const isPlain = form === "perplexity" && value < 1e7;
    return isPlain ? value.toLocaleString("en-US", {maximumSignificantDigits: 6}) : FORMS[form](value);
  };

  // Ticks, as axes.py chooses them.
  const even = (low, high, about) => {
    const rough = (high - low) / about;
    if (!(rough > 0) || !isFinite(rough)) return [];
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(each => each * power).find(each => each >= rough * 0.999);
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9), found = [];
    for (let i = first; i <= last && found.length < 50; i++) found.push(i * step);
    return found;
  };
  const logarithmic = (low, high, about) => {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const stride = Math.max(1, Math.ceil((last - first + 1) / (about + 2)));
    for (const digits of [[1], [1, 3], [1, 2, 5]]) {
      const found = [];
      for (let decade = first; decade <= last; decade += stride)
        for (const digit of digits) {
          const tick = Number(`${digit}e${decade}`);
          if (tick >= low && tick <= high) found.push(tick);
        }
      if (found.length >= Math.min(about, 3)) return found;
    }
    return even(low, high, about).filter(tick => tick > 0);
  };

  // A value on the scale of its axis, and back.
  const inner = (axis, value) => (axis.log ? (value > 0 ? Math.log(value) : NaN) : value);
  const outer = (axis, value) => (axis.log ? Math.exp(value) : value);

  class Chart {
    constructor(plot) {
      const figure = plot.closest("figure");
      this.plot = plot;
      this.group = plot.dataset.group;
      this.data = JSON.parse(figure.querySelector("script").textContent);
      this.view = plot.querySelector("svg .view");
      this.gridLines = plot.querySelector("svg .gridline");
      this.labels = plot.querySelector(".labels");
      this.lanes = [...figure.querySelectorAll(".lane .view")];
      const {x, y} = this.data;
      this.full = {x: [inner(x, x.low), inner(x, x.high)], y: [inner(y, y.low), inner(y, y.high)]};
      this.now = {x: [...this.full.x], y: [...this.full.y]};
      this.hair = element(plot, "div", "hair");
      this.tip = element(plot, "div", "tip");
      this.box = element(plot, "div", "drag");
      this.box.hidden = true;
      this.hideValues();
      this.listen();
    }
    place(axis, value) {
      const [low, high] = this.now[axis];
      return (inner(this.data[axis], value) - low) / (high - low);
    }
    isInside(x) {
      const share = this.place("x", x);
      return share >= 0 && share <= 1;
    }
    valueAt(share) {
      const [low, high] = this.now.x;
      return outer(this.data.x, low + share * (high - low));
    }
    share(event) {
      const box = this.plot.getBoundingClientRect();
      return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    }

    listen() {
      let start = null;
      const on = (name, action) => this.plot.addEventListener(name, action);
      on("pointermove", event => {
        const here = this.share(event);
        if (start !== null) {
          this.box.hidden = false;
          this.box.style.left = percent(Math.min(start, here));
          this.box.style.width = percent(Math.abs(here - start));
        }
        this.showAll(this.valueAt(here));
      });
      on("pointerdown", event => {
        if (event.button !== 0 || event.pointerType !== "mouse") return;
        start = this.share(event);
        this.plot.setPointerCapture(event.pointerId);
      });
      on("pointerup", event => {
        const from = start, to = this.share(event);
        start = null;
        this.box.hidden = true;
        if (from === null || Math.abs(to - from) < 0.02) return;
        zoomGroup(this.group, [this.valueAt(Math.min(from, to)), this.valueAt(Math.max(from, to))]);
      });
      on("pointercancel", () => { start = null; this.box.hidden = true; });
      on("pointerleave", hideAll);
      on("blur", hideAll);
      on("dblclick", () => zoomGroup(this.group, null));
      on("keydown", event => {
        if (event.key === "Escape") zoomGroup(this.group, null);
        const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (step === undefined) return;
        event.preventDefault();
        const points = this.longest().filter(x => this.isInside(x));
        const last = this.at === undefined ? -1 : points.findIndex(x => x >= this.at);
        const next = points[Math.min(points.length - 1, Math.max(0, last + step))];
        if (next !== undefined) this.showAll(next);
      });
    }
    longest() {
      return this.data.curves.reduce((best, curve) => (curve.x.length > best.length ? curve.x : best), []);
    }

    showAll(x) {
      for (const chart of charts)
        if (chart.group === this.group) chart.showValues(x, chart === this);
        else chart.hideValues();
    }
    hideValues() {
      this.hair.hidden = this.tip.hidden = true;
      this.at = undefined;
    }
    showValues(x, withTip) {
      const nearest = this.data.curves.map(curve => [curve, nearestPoint(curve, x)]).filter(([, i]) => i >= 0);
      const places = nearest.map(([curve, i]) => curve.x[i]);
      const at = places.reduce((best, each) => (Math.abs(each - x) < Math.abs(best - x) ? each : best), Infinity);
      if (!this.isInside(at)) return this.hideValues();
      this.at = at;
      this.hair.hidden = false;
      this.hair.style.left = percent(this.place("x", at));
      this.tip.hidden = !withTip;
      if (withTip) this.fillTip(nearest, at);
    }
    fillTip(nearest, at) {
      const {y, xLabel, losses, curves, marks} = this.data;
      const width = this.now.x[1] - this.now.x[0], share = this.place("x", at);
      this.tip.replaceChildren();
      element(this.tip, "div", "", at.toLocaleString("en-US") + " " + xLabel);
      for (const [curve, i] of nearest) {
        if (curve.x.length > 60 && Math.abs(curve.x[i] - at) > 0.012 * width) continue;
        const value = curve.y[i], line = element(this.tip, "div", "");
        element(line, "i", "c" + curve.color);
        let text = FORMS[y.form](value);
        if (losses && value < 700) text += ", perplexity " + perplexity(Math.exp(value));
        if (curve.x[i] !== at) text += " at " + short(curve.x[i]);
        line.append(curves.length > 1 ? curve.name + ": " + text : text);
      }
      for (const mark of marks)
        if (mark.x.some(value => Math.abs(value - at) <= 0.004 * width)) element(this.tip, "div", "", mark.name);
      this.tip.style.left = share > 0.5 ? "auto" : percent(share);
      this.tip.style.right = share > 0.5 ? percent(1 - share) : "auto";
    }

    zoom(range) {
      this.now.x = range === null ? [...this.full.x] : range.map(value => inner(this.data.x, value));
      this.now.y = range === null ? [...this.full.y] : this.heights();
      const scale = axis => (this.full[axis][1] - this.full[axis][0]) / (this.now[axis][1] - this.now[axis][0]);
      const sx = scale("x"), sy = scale("y");
      const left = (this.now.x[0] - this.full.x[0]) / (this.full.x[1] - this.full.x[0]) * SIZE;
      const top = (this.full.y[1] - this.now.y[1]) / (this.full.y[1] - this.full.y[0]) * SIZE;
      this.view.setAttribute("transform", `matrix(${sx} 0 0 ${sy} ${-left * sx} ${-top * sy})`);
      for (const lane of this.lanes) lane.setAttribute("transform", `matrix(${sx} 0 0 1 ${-left * sx} 0)`);
      this.relabel(range === null);
    }
    heights() {
      const {y, curves} = this.data, [bottom, ceiling] = this.full.y;
      let low = Infinity, high = -Infinity;
      const see = value => {
        if (!isFinite(value)) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      };
      for (const curve of curves) {
        const heights = curve.y.map(value => (value === null ? NaN : inner(y, value)));
        const shares = curve.x.map(x => this.place("x", x));
        shares.forEach((share, i) => {
          if (share >= 0 && share <= 1) see(heights[i]);
          for (const edge of [0, 1])  // where a line crosses the edge
            if (i > 0 && (shares[i - 1] - edge) * (share - edge) < 0)
              see(heights[i - 1] + (heights[i] - heights[i - 1]) * (edge - shares[i - 1]) / (share - shares[i - 1]));
        });
      }
      if (!(high >= low) || low > ceiling || high < bottom) return [bottom, ceiling];
      low = Math.max(low, bottom);
      high = Math.min(high, ceiling);
      const room = 0.06 * (high - low) || 0.02 * (ceiling - bottom);
      return [low - room, high + room];
    }
    relabel(isFull) {
      const {x, y, losses} = this.data;
      for (const old of this.labels.querySelectorAll(".x, .y, .r")) old.remove();
      const label = (name, text, side, share) => {
        element(this.labels, "span", name, text).style[side] = percent(share);
      };
      const ticks = (name, about) => {
        const axis = this.data[name], [low, high] = this.now[name].map(value => outer(axis, value));
        const found = (axis.log ? logarithmic : even)(low, high, about);
        return axis.form === "whole" ? found.filter(Number.isInteger) : found;
      };
      for (const tick of ticks("x", X_TICKS)) label("x", besideTick(x.form, tick), "left", this.place("x", tick));
      let lines = "";
      for (const tick of ticks("y", Y_TICKS)) {
        const share = 1 - this.place("y", tick);
        label("y", besideTick(y.form, tick), "top", share);
        lines += `M0,${SIZE * share}H${SIZE}`;
      }
      this.gridLines.setAttribute("d", lines);
      if (losses && this.now.y[1] < 700)
        for (const tick of logarithmic(Math.exp(this.now.y[0]), Math.exp(this.now.y[1]), 6))
          label("r", besideTick("perplexity", tick), "top", 1 - this.place("y", Math.log(tick)));
      for (const level of this.labels.querySelectorAll(".at")) level.hidden = !isFull;
    }
  }

  const nearestPoint = (curve, x) => {
    let best = -1, distance = Infinity;
    for (let i = 0; i < curve.x.length; i++) {
      const away = Math.abs(curve.x[i] - x);
      if (curve.y[i] !== null && away < distance) { best = i; distance = away; }
    }
    return best;
  };
  const hideAll = () => charts.forEach(chart => chart.hideValues());
  const zoomGroup = (group, range) => {
    hideAll();
    charts.filter(chart => chart.group === group).forEach(chart => chart.zoom(range));
  };
  for (const plot of document.querySelectorAll(".plot")) charts.push(new Chart(plot));
})();
"""
