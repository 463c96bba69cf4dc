"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const text = (id) => document.getElementById(id).textContent;
  const bytes = (id) => Uint8Array.from(atob(text(id)), (character) => character.charCodeAt(0));
  const unpack = (id) => new Response(
    new Blob([bytes(id)]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const save = (name, type, content) => {
    const link = make("a", { download: name, href: URL.createObjectURL(new Blob([content], { type })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };

  // Charts

  let template, figures = {};
  const draw = (box) => {
    const figure = figures[box.id];
    if (!figure) return;
    delete figures[box.id];
    const [data, layout] = figure;
    // Without a drag mode, a finger on a chart scrolls the page.
    Plotly.newPlot(box, data, { ...layout, template, dragmode: false }, {
      responsive: true,
      displaylogo: false,
      // Only buttons that work without a network.
      modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
      toImageButtonOptions: { format: "svg", filename: box.id },
    });
  };

  // Tables

  const PLAIN = /^[−-]?[\d,]*\.?\d+$/;
  // `data-v` holds what the text rounds: a figure, both ends of an interval, or all three.
  const exact = (cell) => {
    const found = cell.dataset.v?.split(" ") ?? [];
    const [low, high] = found.slice(-2);
    return { value: found.length % 2 ? found[0] : undefined, ...(found.length > 1 ? { low, high } : {}) };
  };
  const figure = (cell) => {
    const { value, low } = exact(cell);
    if (value ?? low) return Number(value ?? low);
    const shown = cell.textContent.trim();
    return PLAIN.test(shown) ? Number(shown.replace("−", "-").replaceAll(",", "")) : NaN;
  };
  const undefinedAt = (cell) => cell.querySelector("abbr") !== null;
  const sort = (table, column) => {
    const heads = table.tHead.rows[0].cells;
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => {
      const cell = row.cells[column];
      return { row, gap: undefinedAt(cell), value: figure(cell), words: cell.textContent };
    });
    const order = (one, other) => (isNaN(one.value) || isNaN(other.value)
      ? one.words.localeCompare(other.words, "en", { numeric: true }) : one.value - other.value);
    // What is undefined comes last in either direction.
    rows.sort((one, other) => one.gap - other.gap || (one.gap ? 0 : (down ? -1 : 1) * order(one, other)));
    body.append(...rows.map((entry) => entry.row));
  };

  const wanted = {
    // Layers and ranges of layers, such as `3, 7-12`.
    layers: (typed) => {
      const ranges = [...typed.matchAll(/(\d+)(?:\s*[-–]\s*(\d+))?/g)]
        .map(([, first, last]) => [Number(first), Number(last ?? first)]);
      return (row) => {
        const layer = figure(row.querySelector("th"));
        return !ranges.length || ranges.some(([first, last]) => first <= layer && layer <= last);
      };
    },
    text: (typed) => {
      const words = typed.toLowerCase().split(/\s+/);
      return (row) => words.every((word) => row.textContent.toLowerCase().includes(word));
    },
  };
  const filter = (table, keep, status) => {
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) row.hidden = !keep(row);
    status.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };

  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const csv = (table) => {
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
    const columns = [...table.tHead.rows[0].cells].flatMap((head, place) => {
      const cells = rows.map((row) => row.cells[place]);
      const some = (name) => cells.some((cell) => exact(cell)[name] !== undefined);
      const label = head.textContent.trim();
      const ends = ["low", "high"].map((name) => [`${label}: ${name}`, (cell) => exact(cell)[name] ?? ""]);
      const value = [label, (cell) => (undefinedAt(cell) ? "" : exact(cell).value ?? cell.textContent.trim())];
      return (some("low") ? [...(some("value") ? [value] : []), ...ends] : [value])
        .map(([name, read]) => [name, ...cells.map(read)]);
    });
    return columns[0].map((_, line) => columns.map((column) => quoted(column[line])).join(",")).join("\r\n") + "\r\n";
  };

  // Buttons appear where a script is there to serve them.
  const equip = (box) => {
    const table = box.querySelector("table");
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = make("button", { type: "button", onclick: () => sort(table, column) }, ...head.childNodes);
      head.append(button);
    });
    const tools = make("div", { className: "tools" });
    const kind = box.dataset.filter;
    if (kind) {
      const status = make("span", { role: "status" });
      const input = make("input", {
        type: "search",
        placeholder: kind === "layers" ? "for example 3, 7–12" : "part of a name",
        oninput: () => filter(table, wanted[kind](input.value.trim()), status),
      });
      tools.append(make("label", {}, kind === "layers" ? "Layers " : "Rows with ", input), status);
    }
    tools.append(make("button", {
      type: "button", onclick: () => save(`${table.id}.csv`, "text/csv", csv(table)),
    }, "Download this table as CSV"));
    box.prepend(tools);
  };

  // Whatever is far away, or in a closed section, waits until it comes near.

  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      (target.matches(".chart") ? draw : equip)(target);
    }
  }, { rootMargin: "800px" });
  all(".table").forEach((box) => near.observe(box));
  unpack("charts").then((packed) => {
    ({ template, figures } = JSON.parse(packed));
    all(".chart").forEach((box) => near.observe(box));
    document.documentElement.dataset.charts = "ready";
  });

  // Links lead into closed sections too.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const heads = target.closest("summary")?.parentElement;
    for (let node = heads ?? target.closest("details"); node; node = node.parentElement.closest("details")) node.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();

  all("[data-file]").forEach((button) => {
    const id = button.dataset.file;
    button.onclick = async () => (id.endsWith(".csv")
      ? save(id, "text/csv", await unpack(id))
      : save(id, "application/vnd.apache.parquet", bytes(id)));
    button.parentElement.hidden = false;
  });

  // Paper has its own width, and shows no closed sections but the cells that the reader left closed.
  addEventListener("beforeprint", () => {
    all("details:not(.cell)").forEach((section) => { section.open = true; });
    all(".chart").filter((box) => !box.closest("details:not([open])")).forEach(draw);
    all(".js-plotly-plot").forEach((chart) => Plotly.relayout(chart, { width: 680 }));
  });
  addEventListener("afterprint", () => {
    all(".js-plotly-plot").forEach((chart) => Plotly.relayout(chart, { width: null, autosize: true }));
  });
})();
