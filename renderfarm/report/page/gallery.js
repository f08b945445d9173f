// As many tiles as fit the window, whatever the number of images.
const GAP = 10;
const CAPTION = 40;
const gallery = {tile: 0, side: 0, columns: 1, made: new Map(), active: 0, frame: 0};

function buildGallery() {
  const size = byId('tile-size');
  size.value = gallery.tile = COUNT > 600 ? 136 : COUNT > 60 ? 176 : 224;
  size.addEventListener('input', () => {
    gallery.tile = Number(size.value);
    drawGallery(true);
  });
  const sort = byId('sort');
  for (const column of COLUMNS) if (column.countedWithGaps().length > 1) sort.append(element('option', {value: column.name}, column.name));
  sort.value = 'row';
  sort.addEventListener('change', () => { choice.sort = sort.value; choose(); });
  const direction = byId('direction');
  direction.addEventListener('click', () => {
    choice.descending = !choice.descending;
    direction.setAttribute('aria-pressed', choice.descending);
    choose();
  });
  addEventListener('scroll', () => drawGallery(false), {passive: true});
  addEventListener('resize', () => drawGallery(true));
  choice.listeners.push(() => { gallery.active = 0; paintGallery(true); });
  roving(byId('gallery'), moveInGallery);
}

function moveInGallery(event) {
  const page = Math.max(1, Math.floor(innerHeight / rowHeight()) - 1) * gallery.columns;
  const last = choice.shown.length - 1;
  const {active, columns} = gallery;
  const to = {ArrowRight: active + 1, ArrowLeft: active - 1, ArrowDown: active + columns, ArrowUp: active - columns,
    PageDown: Math.min(last, active + page), PageUp: Math.max(0, active - page), Home: 0, End: last}[event.key];
  if (to === undefined) return false;
  if (to >= 0 && to <= last) focusTile(to);
  return true;
}

function focusTile(place) {
  gallery.active = place;
  const top = byId('gallery').getBoundingClientRect().top + scrollY + Math.floor(place / gallery.columns) * rowHeight();
  const bar = document.querySelector('.bar').offsetHeight + 56; // with the tools, which stay, too
  if (top < scrollY + bar) scrollTo(0, top - bar);
  else if (top + rowHeight() > scrollY + innerHeight) scrollTo(0, top + rowHeight() - innerHeight);
  paintGallery(false);
  gallery.made.get(place)?.focus({preventScroll: true});
}

const rowHeight = () => gallery.side + CAPTION + GAP;

function drawGallery(anew) {
  gallery.anew ||= anew;
  gallery.frame ||= requestAnimationFrame(() => {
    gallery.frame = 0;
    paintGallery(gallery.anew);
    gallery.anew = false;
  });
}

function paintGallery(anew) {
  const box = byId('gallery');
  if (byId('panel-images').hidden) return;
  const width = box.clientWidth;
  const total = choice.shown.length;
  if (anew) {
    gallery.columns = Math.max(1, Math.floor((width + GAP) / (gallery.tile + GAP)));
    gallery.side = Math.floor(Math.min((width + GAP) / gallery.columns - GAP, gallery.tile * 1.6)); // one image need not fill the window
    box.style.height = `${Math.ceil(total / gallery.columns) * rowHeight()}px`;
    for (const tile of gallery.made.values()) tile.remove();
    gallery.made.clear();
    byId('nothing').hidden = total > 0;
    byId('nothing').textContent = COUNT ? 'No image fits. Take a word or a filter away.' : nothingYet();
  }
  const top = -box.getBoundingClientRect().top;
  const from = Math.max(0, Math.floor((top - innerHeight / 2) / rowHeight()) * gallery.columns);
  const to = Math.min(total, Math.ceil((top + innerHeight * 1.5) / rowHeight()) * gallery.columns);
  for (const [place, tile] of gallery.made) {
    if ((place < from || place >= to) && tile !== document.activeElement) {
      tile.remove();
      gallery.made.delete(place);
    }
  }
  for (let place = from; place < to; place += 1) {
    if (!gallery.made.has(place)) {
      const tile = tileOf(place);
      tile.style.transform = `translate(${(place % gallery.columns) * (gallery.side + GAP)}px, ${Math.floor(place / gallery.columns) * rowHeight()}px)`;
      tile.style.width = `${gallery.side}px`;
      gallery.made.set(place, tile);
      box.append(tile);
    }
  }
  for (const [place, tile] of gallery.made) tile.tabIndex = place === gallery.active ? 0 : -1;
}

function tileOf(place) {
  const index = choice.shown[place];
  const frame = element('span', {class: 'frame'}, thumbnail(index, gallery.side));
  frame.style.height = `${gallery.side}px`;
  return element('button', {
    class: 'tile', 'aria-label': described(index), title: value('prompt', index),
    onclick: () => { gallery.active = place; openDetail(choice.shown, place, focusTile); },
  }, frame, element('span', {class: 'caption'}, shown(value('prompt', index)) || ' '), element('span', {class: 'caption muted'}, caption(index)));
}

// Which image it is, and what tells it from its neighbours
const TELLING = [['sampler', (given) => given], ['num_inference_steps', (given) => counted(given, 'step')], ['guidance_scale', (given) => `cfg ${given}`], ['seed', (given) => `seed ${given}`]]
  .filter(([name]) => BY_NAME.has(name) && BY_NAME.get(name).countedWithGaps().length > 1);
const caption = (index) => [key(index), ...TELLING.map(([name, as]) => as(value(name, index)))].join(' · ');

function nothingYet() {
  const {state} = DATA.summary;
  if (DATA.summary.errors) return 'No image: every sample that was rendered has ended as an error. Failures says why.';
  return state === 'SUCCEEDED' ? 'No image.' : 'No image was rendered yet.';
}
