// Images by the values of up to three columns, as sweeps are read: X across, Y down, Z one grid below the other.
const MOST_ACROSS = 60;
const MOST_DOWN = 300;
const MOST_GRIDS = 24;
const MOST_CELLS = 6000;
const grid = {cell: 128, cells: [], active: [0, 0]};
const SWEPT = ['sampler', 'num_inference_steps', 'guidance_scale', 'true_cfg_scale', 'strength', 'blend', 'adapters'];
// What follows from something else, or is another one for each image
const DERIVED = new Set([...TECHNICAL, 'row', 'bytes', 'prompt_tokens', 'prompt_truncated', 'file_height', 'file_width', 'original_bytes']);

function buildGrid() {
  const axes = COLUMNS.filter((column) => {
    const distinct = column.countedWithGaps().length;
    return distinct > 1 && distinct <= MOST_DOWN;
  });
  for (const axis of ['x', 'y', 'z']) {
    const select = byId(`axis-${axis}`);
    select.append(element('option', {value: ''}, 'nothing'), ...axes.map((column) => element('option', {value: column.name}, `${column.name} (${column.countedWithGaps().length})`)));
    select.addEventListener('change', drawGrid);
  }
  for (const [axis, name] of Object.entries(likelyAxes(axes))) byId(`axis-${axis}`).value = name;
  byId('swap').addEventListener('click', () => {
    [byId('axis-x').value, byId('axis-y').value] = [byId('axis-y').value, byId('axis-x').value];
    drawGrid();
  });
  const size = byId('cell-size');
  size.value = grid.cell;
  size.addEventListener('input', () => { grid.cell = Number(size.value); drawGrid(); });
  choice.listeners.push(drawGrid);
  roving(byId('grids'), moveInGrid);
}

// What the job swept across, what was painted down, and what was swept besides, which would lie in one cell.
function likelyAxes(axes) {
  const may = axes.filter((column) => !DERIVED.has(column.name));
  const across = may.filter((column) => column.countedWithGaps().length <= 24 && column.name !== 'prompt' && column.name !== 'row_id');
  const x = SWEPT.map((name) => across.find((column) => column.name === name)).find(Boolean) ?? across[0] ?? may[0];
  const y = may.find((column) => column.name === 'prompt' && column !== x) ?? may.find((column) => column !== x);
  const cells = [x, y].reduce((all, axis) => all * (axis?.countedWithGaps().length ?? 1), 1);
  const others = SWEPT.map((name) => across.find((column) => column.name === name)).filter((column) => column && column !== x && column !== y);
  return {x: x?.name ?? '', y: y?.name ?? '', z: (COUNT > cells && others[0]?.name) || ''};
}

// Those of images that are shown, then those that only failed samples have
function valuesOn(axis, most, failures) {
  const column = BY_NAME.get(byId(`axis-${axis}`).value);
  if (!column) return {column: null, values: [null], all: 1};
  const there = new Set(choice.shown.map((index) => column.get(index)));
  const values = column.countedWithGaps().map(([given]) => given).filter((given) => there.has(given));
  const asked = ASKED.get(column.name);
  const others = new Set(asked ? failures.map((failure) => asked.get(failure)).filter((given) => !there.has(given)) : []);
  values.push(...others);
  if (others.size && column.kind === 'number') values.sort((a, b) => (a === null) - (b === null) || a - b);
  return {column, values: values.slice(0, most), all: values.length};
}

// What lies in each cell: `images` and `failures`
function sorted(axes, failures) {
  const cells = new Map();
  const put = (kind, given, of) => {
    const place = axes.map((axis) => (axis.column ? axis.values.indexOf(of(axis.column)) : 0));
    if (place.includes(-1)) return;
    const name = place.join(' ');
    if (!cells.has(name)) cells.set(name, {images: [], failures: []});
    cells.get(name)[kind].push(given);
  };
  for (const index of choice.shown) put('images', index, (column) => column.get(index));
  for (const failure of failures) put('failures', failure, (column) => ASKED.get(column.name)?.get(failure));
  return cells;
}

function drawGrid() {
  if (byId('panel-grid').hidden) return;
  const failures = failuresShown();
  const [x, y, z] = [valuesOn('x', MOST_ACROSS, failures), valuesOn('y', MOST_DOWN, failures), valuesOn('z', MOST_GRIDS, failures)];
  const cells = sorted([x, y, z], failures);
  grid.cells = [];
  const made = [];
  let left = MOST_CELLS;
  z.values.forEach((given, layer) => {
    const rows = Math.min(y.values.length, Math.floor(left / Math.max(1, x.values.length)));
    left -= rows * x.values.length;
    if (rows > 0 && (choice.shown.length || failures.length)) made.push(oneGrid(x, y, z, given, layer, rows, cells));
  });
  byId('grids').replaceChildren(...made);
  const notes = [['X', x], ['Y', y], ['Z', z]].filter(([, axis]) => axis.all > axis.values.length).map(([name, axis]) => `${name}: the first ${axis.values.length} of ${number(axis.all)} values`);
  if (left <= 0) notes.push(`the first ${number(MOST_CELLS)} cells`);
  const elsewhere = DATA.summary.errors - (ASKED.size ? FAILURES.count : 0);
  if (elsewhere > 0) notes.push(`${counted(elsewhere, 'failed sample')} in no cell, since the output does not hold what was asked of them; Failures lists them`);
  byId('grid-note').textContent = COUNT === 0 && !made.length ? nothingYet() : !made.length ? 'No image fits. Take a word or a filter away.' : notes.join('; ');
  grid.active = [0, 0];
  markActive();
}

function oneGrid(x, y, z, given, layer, rows, cells) {
  const head = element('tr', {}, element('td', {class: 'corner'}, [y.column?.name, x.column?.name].filter(Boolean).join(' ╲ ')),
    ...x.values.map((across) => element('th', {scope: 'col'}, x.column ? shown(across) : 'all')));
  const body = y.values.slice(0, rows).map((down, row) => {
    const line = [];
    const made = element('tr', {}, element('th', {scope: 'row', title: shown(down)}, element('span', {}, y.column ? shown(down) : 'all')),
      ...x.values.map((_, column) => {
        const cell = cellOf(cells.get([column, row, layer].join(' ')) ?? {images: [], failures: []});
        line.push(cell);
        return element('td', {}, cell);
      }));
    grid.cells.push(line);
    return made;
  });
  const table = element('table', {class: 'sweep'}, element('thead', {}, head), element('tbody', {}, ...body));
  table.style.setProperty('--cell', `${grid.cell}px`);
  return element('section', {class: 'layer'}, z.column ? element('h3', {}, `${z.column.name}: ${shown(given)}`) : null, element('div', {class: 'sweep-scroll'}, table));
}

function cellOf({images, failures}) {
  if (!images.length) return failures.length ? failedCell(failures) : element('button', {class: 'cell empty', 'aria-label': 'No image', tabindex: -1}, '—');
  const others = [images.length > 1 ? `${images.length - 1} more` : null, failures.length ? `${failures.length} failed` : null].filter(Boolean);
  const cell = element('button', {class: 'cell', tabindex: -1, 'aria-label': [described(images[0]), ...others].join(', and '),
    onclick: () => openDetail(images, 0, () => cell.focus())}, thumbnail(images[0], grid.cell));
  if (images.length > 1) cell.append(element('span', {class: 'more'}, `×${number(images.length)}`));
  if (failures.length) cell.append(element('span', {class: 'more failed'}, `✕${number(failures.length)}`));
  return cell;
}

function failedCell(failures) {
  const [first] = failures;
  const message = `${FAILED.get('error_class').get(first)}: ${FAILED.get('error_message').get(first)}`;
  const more = failures.length > 1 ? `, and ${failures.length - 1} more` : '';
  return element('button', {class: 'cell empty failed', tabindex: -1, title: message, 'aria-label': `Failed ${failedKey(first)}${more}: ${message}`,
    onclick: () => showFailure(first)}, `✕ ${FAILED.get('error_class').get(first)}`);
}

function markActive() {
  for (const line of grid.cells) for (const cell of line) cell.tabIndex = -1;
  const [row, column] = grid.active;
  if (grid.cells[row]?.[column]) grid.cells[row][column].tabIndex = 0;
}

function moveInGrid(event) {
  const focused = event.target.closest('.cell');
  const row = grid.cells.findIndex((line) => line.includes(focused));
  if (row < 0) return false;
  const column = grid.cells[row].indexOf(focused);
  const width = grid.cells[row].length;
  const to = {ArrowRight: [row, column + 1], ArrowLeft: [row, column - 1], ArrowDown: [row + 1, column], ArrowUp: [row - 1, column],
    Home: [row, 0], End: [row, width - 1]}[event.key];
  if (!to) return false;
  const cell = grid.cells[to[0]]?.[to[1]];
  if (cell) {
    grid.active = to;
    markActive();
    cell.focus();
    cell.scrollIntoView({block: 'nearest', inline: 'nearest'});
  }
  return true;
}
