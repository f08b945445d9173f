// One image, with everything that is known of it; arrows go through the list that it was opened from.
const detail = {list: [], place: 0, back: null, from: ''};
const LONG = new Set(['prompt', 'prompt_2', 'prompt_3', 'negative_prompt', 'negative_prompt_2', 'negative_prompt_3']);

function buildDetail() {
  const dialog = byId('detail');
  byId('close').addEventListener('click', () => dialog.close());
  byId('previous').addEventListener('click', () => showDetail(detail.place - 1));
  byId('next').addEventListener('click', () => showDetail(detail.place + 1));
  dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); }); // beside it
  dialog.addEventListener('close', () => detail.back?.(detail.place));
  dialog.addEventListener('keydown', (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) {
      event.preventDefault();
      showDetail(detail.place + step);
    }
  });
}

// `back`: told the place in the list where whoever looks has ended.
function openDetail(list, place, back) {
  Object.assign(detail, {list: [...list], back, from: sampleAsked() ? '#images' : location.hash});
  byId('detail').showModal();
  showDetail(place);
  byId('close').focus();
}

function showDetail(place) {
  if (place < 0 || place >= detail.list.length) return;
  detail.place = place;
  const index = detail.list[place];
  byId('detail-title').textContent = `Row ${value('row', index)}, image ${value('image_index', index)}`;
  byId('detail-place').textContent = `${number(place + 1)} of ${number(detail.list.length)}`;
  byId('previous').disabled = place === 0;
  byId('next').disabled = place === detail.list.length - 1;
  const picture = byId('detail-picture');
  const side = Math.max(120, Math.min(picture.clientWidth - 40, innerHeight - 240, 640));
  picture.replaceChildren(thumbnail(index, side), link(index));
  byId('detail-text').replaceChildren(...recipe(index));
  byId('detail-text').scrollTop = 0;
  history.replaceState(null, '', `#sample=${key(index)}`); // what the address then says opens this image again
}

function link(index) {
  const file = FILES.get(index);
  const size = `${value('file_width', index) ?? value('width', index)}×${value('file_height', index) ?? value('height', index)}`;
  const text = `${size} ${value('format', index)}, ${bytes(value('bytes', index))}`;
  if (PICTURES.folder === null) return element('p', {class: 'muted file'}, `${text}: ${file}`);
  const href = PICTURES.folder.split('/').concat(file.split('/')).filter(Boolean).map(encodeURIComponent).join('/');
  const base = PICTURES.folder.startsWith('/') ? '/' : './';
  return element('p', {class: 'muted file'}, `${text}: `, element('a', {href: base + href, target: '_blank', rel: 'noopener noreferrer'}, file));
}

function recipe(index) {
  const made = [...LONG].filter((name) => value(name, index)).map((name) =>
    element('div', {class: 'text'}, element('h3', {}, name.replaceAll('_', ' ')), element('p', {}, value(name, index))));
  const command = `${DATA.summary.command} ${key(index)} --render ${value('row', index)}-${value('image_index', index)}.png`;
  made.push(copied('Make it again', command));
  const parameters = PARAMETERS.get(index);
  if (parameters) made.push(copied('Parameters, as A1111 writes them', parameters));
  const rows = COLUMNS.filter((column) => !LONG.has(column.name) && column.get(index) !== null);
  made.push(element('h3', {}, 'All columns'), element('table', {class: 'columns'}, element('tbody', {}, ...rows.map((column) =>
    element('tr', {}, element('th', {scope: 'row'}, column.name), element('td', {}, shown(column.get(index))))))));
  return made;
}

function copied(title, text) {
  const button = element('button', {class: 'quiet', 'aria-label': `Copy: ${title}`, onclick: () => copy(text, button)}, 'Copy');
  return element('div', {class: 'copied'}, element('div', {class: 'copied-title'}, element('h3', {}, title), button), element('pre', {}, text));
}
