const TABS = [...document.querySelectorAll('[role=tab]')];
const WITH_FILTERS = new Set(['images', 'grid']);
const DRAWN = {images: () => drawGallery(true), grid: drawGrid, timeline: drawTimeline};

function show(name) {
  for (const tab of TABS) {
    const is = tab.id === `tab-${name}`;
    tab.setAttribute('aria-selected', is);
    tab.tabIndex = is ? 0 : -1;
    byId(tab.getAttribute('aria-controls')).hidden = !is;
  }
  const filters = WITH_FILTERS.has(name) && COUNT > 0;
  byId('filters').hidden = !filters;
  byId('panels').classList.toggle('with-filters', filters);
  byId('partial').hidden = !WITH_FILTERS.has(name) || !byId('partial').dataset.wanted;
  DRAWN[name]?.();
}

// #sample=12:0 names an image, as `renderfarm inspect` does.
const sampleAsked = () => location.hash.match(/^#sample=(\d+)(?::(\d+))?$/);

function openSample() {
  const [, row, image] = sampleAsked() ?? [];
  if (row === undefined || byId('detail').open) return;
  const name = `${Number(row)}:${Number(image ?? 0)}`;
  const every = Array.from({length: COUNT}, (_, index) => index);
  const index = every.find((each) => key(each) === name);
  if (index === undefined) {
    byId('missing').textContent = `Sample ${name} is not in this report. renderfarm inspect OUT ${name} shows it, or says why there is none.`;
    byId('missing').hidden = false;
    return;
  }
  byId('missing').hidden = true;
  const list = choice.shown.includes(index) ? choice.shown : every;
  openDetail(list, list.indexOf(index), list === choice.shown ? focusTile : null);
}

function buildTabs() {
  const names = TABS.map((tab) => tab.id.slice(4));
  const asked = () => names.find((name) => name === location.hash.slice(1) || (name === 'images' && sampleAsked()));
  for (const tab of TABS) tab.addEventListener('click', () => { location.hash = tab.id.slice(4); });
  document.querySelector('[role=tablist]').addEventListener('keydown', (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    const tab = TABS[(TABS.indexOf(event.target) + step + TABS.length) % TABS.length];
    tab.focus();
    tab.click();
  });
  addEventListener('hashchange', () => {
    if (!asked()) return;
    scrollTo(0, 0);
    show(asked());
    openSample();
  });
  byId('detail').addEventListener('close', () => history.replaceState(null, '', detail.from || location.pathname));
  show(asked() ?? (DATA.summary.images || !DATA.summary.errors ? 'images' : 'failures'));
}

addEventListener('keydown', (event) => {
  const typing = event.target.closest?.('input, select, textarea, dialog');
  if (event.key === '/' && !typing && !byId('filters').hidden) {
    event.preventDefault();
    byId('search').focus();
  } else if (event.key === 'Escape' && event.target === byId('search')) {
    byId('gallery').querySelector('[tabindex="0"]')?.focus();
  }
});

buildHeader();
buildFilters();
buildGallery();
buildGrid();
buildDetail();
buildFailures();
buildTimeline();
buildFacts();
choose();
buildTabs();
openSample();
document.documentElement.dataset.ready = 'yes';
