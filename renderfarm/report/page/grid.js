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
  const [x, y] = likelyAxes(axes);
  byId('axis-x').value = x;
  byId('axis-y').value = y;
  byId('axis-z').value = '';
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

// What the job swept across, and what was painted down.
function likelyAxes(axes) {
  const may = axes.filter((column) => !DERIVED.has(column.name));
  const across = may.filter((column) => column.countedWithGaps().length <= 24 && column.name !== 'prompt' && column.name !== 'row_id');
  const x = SWEPT.map((name) => across.find((column) => column.name === name)).find(Boolean) ?? across[0] ?? may[0];
  const y = may.find((column) => column.name === 'prompt' && column !== x) ?? may.find((column) => column !== x);
  return [x?.name ?? '', y?.name ?? ''];
}

function valuesOn(axis, most) {
  const column = BY_NAME.get(byId(`axis-${axis}`).value);
  if (!column) return {column: null, values: [null], all: 1};
  const there = new Set(choice.shown.map((index) => column.get(index)));
  const values = column.countedWithGaps().map(([given]) => given).filter((given) => there.has(given));
  return {column, values: values.slice(0, most), all: values.length};
}

function drawGrid() {
  if (byId('panel-grid').hidden) return;
  const [x, y, z] = [valuesOn('x', MOST_ACROSS), valuesOn('y', MOST_DOWN), valuesOn('z', MOST_GRIDS)];
  const cells = new Map();
  for (const index of choice.shown) {
    const place = [x, y, z].map((axis) => (axis.column ? axis.values.indexOf(axis.column.get(index)) : 0));
    if (place.includes(-1)) continue;
    const name = place.join(' ');
    if (!cells.has(name)) cells.set(name, []);
    cells.get(name).push(index);
  }
  grid.cells = [];
  const made = [];
  let left = MOST_CELLS;
  z.values.forEach((given, layer) => {
    const rows = Math.min(y.values.length, Math.floor(left / Math.max(1, x.values.length)));
    left -= rows * x.values.length;
    if (rows > 0 && choice.shown.length) made.push(oneGrid(x, y, z, given, layer, rows, cells));
  });
  byId('grids').replaceChildren(...made);
  const cut = [['X', x], ['Y', y], ['Z', z]].filter(([, axis]) => axis.all > axis.values.length).map(([name, axis]) => `${name}: the first ${axis.values.length} of ${number(axis.all)} values`);
  if (left <= 0) cut.push(`the first ${number(MOST_CELLS)} cells`);
  byId('grid-note').textContent = COUNT === 0 ? nothingYet() : choice.shown.length === 0 ? 'No image fits. Take a word or a filter away.' : cut.join('; ');
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
        const cell = cellOf(cells.get([column, row, layer].join(' ')) ?? []);
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

function cellOf(indices) {
  if (!indices.length) return element('button', {class: 'cell empty', 'aria-label': 'No image', tabindex: -1}, '—');
  const cell = element('button', {class: 'cell', tabindex: -1, 'aria-label': described(indices[0]) + (indices.length > 1 ? `, and ${indices.length - 1} more` : ''),
    onclick: () => openDetail(indices, 0, () => cell.focus())}, thumbnail(indices[0], grid.cell));
  if (indices.length > 1) cell.append(element('span', {class: 'more'}, `×${number(indices.length)}`));
  return cell;
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
