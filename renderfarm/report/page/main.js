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

function buildTabs() {
  const names = TABS.map((tab) => tab.id.slice(4));
  const asked = () => names.find((name) => name === location.hash.slice(1));
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
  });
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
document.documentElement.dataset.ready = 'yes';
