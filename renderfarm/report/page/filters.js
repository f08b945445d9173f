const MOST_VALUES = 60; // of a column that one chooses values of
const FEW_VALUES = 8; // shown before `more`
// What people vary comes first; what only machines read has no filter.
const FIRST = ['sampler', 'num_inference_steps', 'guidance_scale', 'true_cfg_scale', 'strength', 'adapters', 'width', 'height'];
const TECHNICAL = new Set(['file_name', 'file_sha256', 'pixel_sha256', 'original_file', 'original_file_sha256', 'original_pixel_sha256', 'format', 'encoder']);
const RANGES = new Set(['row', 'seed', 'bytes', 'prompt_tokens', 'original_bytes']);

const isChosenByValue = (column) => {
  const distinct = column.countedWithGaps().length;
  return distinct > 1 && distinct <= MOST_VALUES && (distinct <= 12 || distinct <= COUNT / 2) && !RANGES.has(column.name);
};
const isRange = (column) => column.kind === 'number' && column.counted().length > 1;

function ordered(columns) {
  const place = (column) => {
    const first = FIRST.indexOf(column.name);
    if (first >= 0) return first;
    return RANGES.has(column.name) ? 1000 : column.name === 'row_id' ? 900 : 100;
  };
  return [...columns].sort((a, b) => place(a) - place(b));
}

function buildFilters() {
  const search = byId('search');
  search.addEventListener('input', () => {
    choice.words = wordsOf(search.value);
    choose();
  });
  byId('clear').addEventListener('click', () => {
    search.value = '';
    choice.words = [];
    choice.facets.clear();
    for (const box of byId('facets').querySelectorAll('input')) {
      if (box.type === 'checkbox') box.checked = false;
      else box.value = '';
    }
    choose();
    search.focus();
  });
  const columns = ordered(COLUMNS.filter((column) => !TECHNICAL.has(column.name)));
  const made = columns.map((column) => (isChosenByValue(column) ? valuesFacet(column) : isRange(column) ? rangeFacet(column) : null));
  byId('facets').append(...made.filter(Boolean));
  for (const facet of [...byId('facets').querySelectorAll('.by-value')].slice(0, 4)) facet.open = facet.dataset.name !== 'row_id';
  choice.listeners.push(sayCount);
}

function valuesFacet(column) {
  const counts = column.countedWithGaps();
  const list = element('ul', {});
  const boxes = counts.map(([given, count]) => {
    const box = element('input', {type: 'checkbox', onchange: () => {
      const wanted = choice.facets.get(column.name) ?? new Set();
      if (box.checked) wanted.add(given);
      else wanted.delete(given);
      if (wanted.size) choice.facets.set(column.name, wanted);
      else choice.facets.delete(column.name);
      choose();
    }});
    const line = element('li', {}, element('label', {title: shown(given)}, box, element('span', {class: 'value'}, shown(given)), element('span', {class: 'muted number'}, number(count))));
    return line;
  });
  list.append(...boxes.slice(0, FEW_VALUES));
  if (boxes.length > FEW_VALUES) {
    const more = element('li', {}, element('button', {class: 'link', onclick: () => more.replaceWith(...boxes.slice(FEW_VALUES))}, `${boxes.length - FEW_VALUES} more`));
    list.append(more);
  }
  return element('details', {class: 'facet by-value', 'data-name': column.name}, element('summary', {}, column.name), list);
}

function rangeFacet(column) {
  const counts = column.counted();
  const ends = [counts[0][0], counts[counts.length - 1][0]];
  const inputs = ends.map((end, side) => element('input', {
    type: 'number', step: 'any', placeholder: shown(end), 'aria-label': `${column.name}: ${side ? 'highest' : 'lowest'}`,
    oninput: () => {
      const wanted = inputs.map((input) => (input.value === '' ? null : Number(input.value)));
      if (wanted.every((given) => given === null)) choice.facets.delete(column.name);
      else choice.facets.set(column.name, wanted);
      choose();
    },
  }));
  return element('details', {class: 'facet'}, element('summary', {}, column.name), element('div', {class: 'range'}, inputs[0], '–', inputs[1]));
}

function sayCount() {
  const filtered = choice.words.length > 0 || choice.facets.size > 0;
  byId('count').textContent = filtered ? `${number(choice.shown.length)} of ${counted(COUNT, 'image')}` : counted(COUNT, 'image');
  byId('clear').hidden = !filtered;
}
