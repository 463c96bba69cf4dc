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

  // What is chosen stands in the address, so that it can be sent: #ID?filter=3,7&sort=2.

  const address = () => {
    const [id, query = ""] = location.hash.slice(1).split("?");
    return [decodeURIComponent(id), new URLSearchParams(query)];
  };
  const choose = (id, chosen) => {
    const query = new URLSearchParams(Object.entries(chosen).filter(([, value]) => value !== ""));
    history.replaceState(null, "", `#${encodeURIComponent(id)}${query.size ? `?${query}` : ""}`);
  };
  // The documents of the benchmark that an element belongs to, or of each benchmark of its model.
  const documentsBeside = (element) => all("details.documents", element.closest("article")
    ?? element.closest("section[data-model]")
    ?? document.getElementById(element.closest("[data-model]")?.dataset.model)?.closest("section")
    ?? make("div"));
  const addressOf = (section, run) => `#${section.id}?${new URLSearchParams({ run })}`;
  // A mean is of several benchmarks: the reader chooses one of them.
  const openDocuments = (box, run) => {
    const sections = documentsBeside(box);
    if (sections.length === 1) location.hash = addressOf(sections[0], run);
    if (sections.length < 2) return;
    const links = sections.flatMap((section, place) => [place ? " · " : " ", make("a", {
      href: addressOf(section, run),
      textContent: section.closest("article").querySelector("h3").textContent,
    })]);
    const before = box.previousElementSibling;
    const line = before?.matches(".choices") ? before : make("p", { className: "meta choices", role: "status" });
    line.replaceChildren(`Documents lost and won without ${run}, on:`, ...links);
    box.before(line);
  };

  // Charts

  let template, figures = {};
  const draw = (box) => {
    const figure = figures[box.id];
    if (!figure) return;
    delete figures[box.id];
    const [data, layout] = figure;
    // On a phone each entry of a legend has a row of its own, above the axes.
    const rows = data.filter(({ type, showlegend }) => showlegend ?? type === "scatter").length;
    if (box.clientWidth < 500 && rows > 2) {
      layout.height += 19 * (rows - 2);
      box.style.height = `${layout.height}px`;
    }
    // Without a drag mode, a finger on a chart scrolls the page.
    Plotly.newPlot(box, data, { ...layout, template, dragmode: false }, {
      responsive: true,
      displaylogo: false,
      // Only buttons that work without a network.
      modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
      toImageButtonOptions: { format: "svg", filename: box.id },
    });
    // A bar or a mark of a layer leads to its documents.
    box.on("plotly_click", ({ points: [{ x, text, data }] }) => {
      const layer = Math.round(data.mode === "markers+text" ? text : x);
      const kinds = ["attention", "mlp", "shared_expert", "mean", "scale", "linear", "int8", "int4"];
      const word = [...kinds, "repeat"].find((kind) => kind === data.name) ?? "layer";
      if (!Number.isNaN(layer)) openDocuments(box, `${word} ${layer}`);
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
      if (/[^\d\s,;–-]/.test(typed)) return null;
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
    for (const row of rows) row.hidden = keep !== null && !keep(row);
    if (keep === null) status.textContent = "type layers by number, for example 3, 7–12";
    else status.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };

  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  // A spreadsheet computes a text that begins like a formula.
  const plain = (text) => (/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);
  const csv = (table) => {
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
    const columns = [...table.tHead.rows[0].cells].flatMap((head, place) => {
      const cells = rows.map((row) => row.cells[place]);
      const some = (name) => cells.some((cell) => exact(cell)[name] !== undefined);
      const label = plain(head.textContent.trim());
      const ends = ["low", "high"].map((name) => [`${label}: ${name}`, (cell) => exact(cell)[name] ?? ""]);
      const value = [label, (cell) => (undefinedAt(cell) ? "" : exact(cell).value ?? plain(cell.textContent.trim()))];
      return (some("low") ? [...(some("value") ? [value] : []), ...ends] : [value])
        .map(([name, read]) => [name, ...cells.map(read)]);
    });
    return columns[0].map((_, line) => columns.map((column) => quoted(column[line])).join(",")).join("\r\n") + "\r\n";
  };

  // Buttons appear where a script is there to serve them.
  const equip = (box) => {
    const table = box.querySelector("table");
    const heads = table.tHead.rows[0].cells;
    const chosen = { filter: "", sort: "", down: "" };
    [...heads].forEach((head, column) => {
      const onclick = () => {
        sort(table, column);
        chosen.sort = String(column);
        chosen.down = head.getAttribute("aria-sort") === "descending" ? "1" : "";
        choose(table.id, chosen);
      };
      head.append(make("button", { type: "button", onclick }, ...head.childNodes));
    });
    const tools = make("div", { className: "tools" });
    const kind = box.dataset.filter;
    const [id, asked] = address();
    if (kind) {
      const status = make("span", { role: "status" });
      const input = make("input", {
        type: "search",
        placeholder: kind === "layers" ? "for example 3, 7–12" : "part of a name",
        oninput: () => {
          filter(table, wanted[kind](input.value.trim()), status);
          chosen.filter = input.value.trim();
          choose(table.id, chosen);
        },
      });
      tools.append(make("label", {}, kind === "layers" ? "Layers " : "Rows with ", input), status);
      if (id === table.id && asked.has("filter")) {
        chosen.filter = input.value = asked.get("filter");
        filter(table, wanted[kind](chosen.filter), status);
      }
    }
    if (id === table.id && heads[asked.get("sort")]) {
      chosen.sort = asked.get("sort");
      chosen.down = asked.get("down") ?? "";
      for (let turn = 0; turn < (chosen.down ? 2 : 1); turn += 1) {
        heads[chosen.sort].removeAttribute("aria-sort");
        if (turn) heads[chosen.sort].setAttribute("aria-sort", "ascending");
        sort(table, Number(chosen.sort));
      }
    }
    const sections = documentsBeside(box);
    if (kind === "layers" && sections.length) {
      for (const row of table.tBodies[0].rows) {
        const layer = row.querySelector("th");
        const run = `layer ${layer.textContent.trim()}`;
        layer.replaceChildren(make("a", {
          href: addressOf(sections[0], run),
          title: "the documents that it loses and wins",
          onclick: (event) => {
            if (sections.length === 1) return;
            event.preventDefault();
            openDocuments(table.parentElement, run);
          },
        }, ...layer.childNodes));
      }
    }
    tools.append(make("button", {
      type: "button", onclick: () => save(`${table.id}.csv`, "text/csv", csv(table)),
    }, "Download this table as CSV"));
    box.prepend(tools);
  };

  // Documents that runs lose and win: unpacked when their section is opened.

  const letter = (option) => (option < 26 ? String.fromCharCode(65 + option) : String(option + 1));
  const signed = (value) => (value === null ? "–" : value.toFixed(Math.abs(value) < 0.1 ? 4 : 2).replace("-", "−"));
  const decision = (choice, margin, said) => {
    const parts = choice === null ? [] : [make("strong", {}, letter(choice))];
    if (said !== null) parts.push(make("q", {}, said));
    return make("td", { className: "text" }, ...parts, make("small", {}, signed(margin)));
  };
  const asked = ([task, doc, question, choices, answer, gold], why) => {
    const cell = make("td", { className: "text asks" });
    if (question === null) cell.append(make("abbr", { title: why }, `document ${doc} of ${task}`));
    else cell.append(make("div", {}, question));
    if (choices.length) {
      cell.append(make("ol", {}, ...choices.map((choice, place) => (
        make("li", place === gold ? { className: "gold", title: "the right one" } : {}, choice)))));
    } else if (answer !== null) cell.append(make("div", { className: "gold" }, answer));
    if (question === null && gold !== null) cell.append(make("div", { className: "gold" }, letter(gold)));
    return cell;
  };
  const browse = async (section) => {
    const { runs, documents, margin, why } = JSON.parse(await unpack(section.dataset.documents));
    const option = (words) => (value, place) => make("option", { value: place }, words(value));
    const layers = make("select", {}, ...runs.map(option(([label, lost, won]) => `${label}: ${lost} lost, ${won} won`)));
    const kinds = make("select", {}, ...["lost", "won"].map(option((word) => word)));
    const others = make("select", {}, make("option", { value: "" }, "any"), ...runs.map(option(([label]) => label)));
    const names = [...new Set(documents.map(([task]) => task))].sort();
    const tasks = make("select", {}, ...["all", ...names].map(option((name) => name)));
    const words = make("input", { type: "search", placeholder: "words" });
    const status = make("span", { role: "status" });
    const body = make("tbody", {});
    const show = () => {
      const [label, lost, won, named] = runs[layers.value];
      const kind = Number(kinds.value);
      not.textContent = `and not ${kind ? "won" : "lost"} without `;
      const other = others.value === "" ? [] : runs[others.value][3];
      const shared = new Set(other.filter(([, side]) => side === kind).map(([place]) => place));
      const sided = named.filter(([, side]) => side === kind);
      const mine = sided.filter(([place]) => !shared.has(place));
      choose(section.id, { run: label, kind: kind ? "won" : "", beside: others.value === "" ? "" : runs[others.value][0] });
      const typed = words.value.trim().toLowerCase().split(/\s+/);
      const rows = mine.map(([place, , choice, after, said]) => {
        const entry = documents[place];
        const [task, doc, , , , , before, was, wrote] = entry;
        return [task, make("tr", {}, make("th", { scope: "row" }, names.length > 1 ? `${task} ${doc}` : doc),
          asked(entry, why), decision(before, was, wrote), decision(choice, after, said))];
      }).filter(([task, row]) => (tasks.value === "0" || task === names[tasks.value - 1])
        && typed.every((word) => row.textContent.toLowerCase().includes(word)));
      body.replaceChildren(...rows.map(([, row]) => row));
      const total = kind ? won : lost;
      status.textContent = `${rows.length} of ${total} documents that ${label} ${kind ? "wins" : "loses"}`
        + (others.value === "" ? "" : `, without those that are named of ${runs[others.value][0]}`)
        + (sided.length < total ? `; named are the ${sided.length} whose margin changes most` : "");
    };
    const take = () => {
      const [id, asked] = address();
      if (id !== section.id) return;
      const place = (name) => runs.findIndex(([label]) => label === asked.get(name));
      if (place("run") >= 0) layers.value = place("run");
      kinds.value = asked.get("kind") === "won" ? 1 : 0;
      others.value = place("beside") >= 0 ? place("beside") : "";
      show();
    };
    for (const control of [layers, kinds, tasks, words, others]) control.oninput = show;
    addEventListener("hashchange", take);
    const not = make("span", {});
    const tools = make("div", { className: "tools" }, make("label", {}, "Documents ", kinds),
      make("label", {}, "without ", layers), ...(names.length > 1 ? [make("label", {}, "of ", tasks)] : []),
      make("label", {}, "containing ", words), make("label", {}, not, others), status);
    const heads = ["document", "question, options, the right one marked", "intact model", "without it"];
    const table = make("table", {}, make("thead", {}, make("tr", {},
      ...heads.map((head, place) => make("th", { scope: "col", className: place ? "text" : "" }, head)))), body);
    const scroll = make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "documents" }, table);
    const below = `Below each choice: the ${margin}.${why ? ` Texts are missing: ${why}.` : ""}`;
    section.append(tools, make("p", { className: "meta" }, below), scroll);
    if (address()[0] === section.id) take();
    else show();
  };
  all("[data-documents]").forEach((section) => {
    section.addEventListener("toggle", () => browse(section), { once: true });
  });

  // Whatever is far away, or in a closed section, waits until it comes near.

  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      (target.matches(".chart") ? draw : equip)(target);
    }
  }, { rootMargin: "800px" });
  all(".table").forEach((box) => near.observe(box));
  // Whoever prints or captures a page waits until it is loaded, and it loads as long as a frame of its does.
  const loading = document.body.appendChild(make("iframe", { hidden: true }));
  loading.contentDocument.open();
  const drawSoon = async () => {
    const open = all(".chart").filter((box) => !box.closest("details:not([open])"));
    if (open.length > 40) return;
    for (const box of open) {
      await new Promise((done) => { setTimeout(done); });
      draw(box);
    }
  };
  Promise.all([unpack("plotly"), unpack("charts")]).then(([plotly, packed]) => {
    document.head.append(make("script", { textContent: plotly }));
    ({ template, figures } = JSON.parse(packed));
    all(".chart").forEach((box) => near.observe(box));
    document.documentElement.dataset.charts = "ready";
    return drawSoon();
  }).finally(() => {
    loading.contentDocument.close();
    loading.remove();
  });

  // Links lead into closed sections too.
  const reveal = () => {
    const target = document.getElementById(address()[0]);
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
