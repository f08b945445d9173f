// Where the time of each part went, by worker. Stages follow one another; a worker has several parts at once, one below the other.
const TIMELINE = DATA.timeline;
const PARTS = new Map(table(TIMELINE.parts).map((column) => [column.name, column]));
const LANE = 11;
const GUTTER = 148;
const MEANING = {
  prepare: 'rows become samples, images are fetched',
  wait: 'for a free slot, behind the parts before it',
  render: 'from the first sample in a slot to the last one’s pixels',
  encode: 'what is left of it when the last pixels are there',
  put: 'the commit and what is derived from it',
};
const chart = {run: null, zoom: 1};

const partAt = (name, index) => PARTS.get(name).get(index);

function buildTimeline() {
  const panel = byId('panel-timeline');
  if (!TIMELINE.count) {
    panel.append(damagedEntries(), element('p', {class: 'nothing'}, TIMELINE.of ? 'No part says how long its stages took: they were committed by an earlier version.' : 'No part is committed yet.'));
    return;
  }
  const names = PARTS.get('run').counted();
  const runs = names.map(([run, count]) => ({run, count, began: Math.min(...indicesOf(run).map((index) => partAt('began', index)))})).sort((a, b) => b.began - a.began);
  const select = element('select', {onchange: () => { chart.run = select.value; drawTimeline(); }},
    ...runs.map(({run, count}) => element('option', {value: run}, `${run} (${counted(count, 'part')})`)));
  chart.run = runs[0].run;
  const zoom = (by) => () => { chart.zoom = Math.min(64, Math.max(1, chart.zoom * by)); drawTimeline(); };
  const legend = element('ul', {class: 'legend'}, ...TIMELINE.stages.map((stage) => element('li', {}, element('span', {class: `swatch ${stage}`}), element('b', {}, stage), ` ${MEANING[stage]}`)));
  panel.append(damagedEntries(),
    element('div', {class: 'tools'}, element('label', {}, 'Run ', select), element('span', {class: 'right'},
      element('button', {class: 'quiet', 'aria-label': 'Zoom out', onclick: zoom(0.5)}, '−'), element('button', {class: 'quiet', 'aria-label': 'Zoom in', onclick: zoom(2)}, '+'))),
    element('div', {id: 'chart', class: 'chart', tabindex: 0, role: 'region', 'aria-label': 'Timeline; the table below says the same'}), legend,
    element('h2', {}, 'Workers'), element('div', {id: 'by-worker'}), element('h2', {}, 'Parts'), element('div', {id: 'by-part'}));
  byId('chart').addEventListener('pointermove', showTip);
  byId('chart').addEventListener('pointerleave', () => { byId('tip').hidden = true; });
  addEventListener('resize', drawTimeline);
}

function damagedEntries() {
  const {unread, unread_count: count} = TIMELINE;
  return count ? element('p', {class: 'note'}, `The index entries of ${counted(count, 'part')} are damaged (${unread.join(', ')}${count > unread.length ? ', …' : ''}), so ${count === 1 ? 'it is' : 'they are'} not shown here. renderfarm run JOB --repair writes them anew.`) : '';
}

function indicesOf(run) {
  const found = [];
  for (let index = 0; index < TIMELINE.count; index += 1) if (partAt('run', index) === run) found.push(index);
  return found;
}

// A part's stages as [name, begin, end] in seconds since the run's first part began
function stagesOf(index, zero) {
  let at = partAt('began', index) - zero;
  return TIMELINE.stages.map((stage) => {
    const begin = at;
    at += partAt(stage, index);
    return [stage, begin, at];
  });
}

function workersOf(run) {
  const indices = indicesOf(run);
  const zero = Math.min(...indices.map((index) => partAt('began', index)));
  const workers = new Map();
  for (const index of indices) {
    const name = partAt('worker', index);
    if (!workers.has(name)) workers.set(name, {name, host: partAt('host', index), parts: [], lanes: []});
    const stages = stagesOf(index, zero);
    const worker = workers.get(name);
    let lane = worker.lanes.findIndex((end) => end <= stages[0][1]);
    if (lane < 0) lane = worker.lanes.length;
    worker.lanes[lane] = stages.at(-1)[2];
    worker.parts.push({index, stages, lane});
  }
  return [...workers.values()].sort((a, b) => a.name.localeCompare(b.name, 'en', {numeric: true}));
}

// The seconds in which at least one of the parts renders, and from the first such second to the last one
function busy(parts) {
  const spans = parts.map(({stages}) => stages.find(([stage]) => stage === 'render').slice(1)).filter(([begin, end]) => end > begin).sort((a, b) => a[0] - b[0]);
  if (!spans.length) return {spans: [], seconds: 0, of: 0};
  const joined = [[...spans[0]]];
  for (const [begin, end] of spans.slice(1)) {
    const last = joined.at(-1);
    if (begin <= last[1]) last[1] = Math.max(last[1], end);
    else joined.push([begin, end]);
  }
  return {spans: joined, seconds: joined.reduce((sum, [begin, end]) => sum + end - begin, 0), of: joined.at(-1)[1] - joined[0][0]};
}

function step(seconds, most) {
  for (const each of [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400]) if (seconds / each <= most) return each;
  return 86400 * Math.ceil(seconds / 86400 / most);
}

function drawTimeline() {
  if (byId('panel-timeline').hidden || !TIMELINE.count) return;
  const workers = workersOf(chart.run);
  const end = Math.max(0.001, ...workers.flatMap(({parts}) => parts.map(({stages}) => stages.at(-1)[2])));
  const width = Math.max(300, byId('chart').clientWidth - GUTTER - 16) * chart.zoom;
  const x = (seconds) => GUTTER + (seconds / end) * width;
  const height = workers.reduce((sum, {lanes}) => sum + lanes.length * LANE + 16, 30);
  const svg = drawn('svg', {width: GUTTER + width + 12, height, role: 'img', 'aria-label': `Timeline of run ${chart.run}`});
  const each = step(end, width / 90);
  for (let at = 0; at <= end; at += each) {
    svg.append(drawn('line', {x1: x(at), x2: x(at), y1: 20, y2: height, class: 'rule'}), drawn('text', {x: x(at), y: 12, class: 'tick'}, at === 0 ? '0' : duration(at)));
  }
  let top = 28;
  for (const worker of workers) {
    const share = busy(worker.parts);
    const percent = share.of ? `${Math.round((100 * share.seconds) / share.of)} % busy` : '';
    svg.append(drawn('text', {x: 0, y: top + 9, class: 'worker'}, worker.name), drawn('text', {x: GUTTER - 12, y: top + 9, class: 'busy'}, percent));
    for (const {index, stages, lane} of worker.parts) {
      const group = drawn('g', {'data-part': index});
      for (const [stage, begin, finish] of stages) {
        if (finish > begin) group.append(drawn('rect', {x: x(begin), y: top + lane * LANE, width: Math.max(0.6, x(finish) - x(begin)), height: LANE - 2, class: stage}));
      }
      svg.append(group);
    }
    top += worker.lanes.length * LANE + 16;
  }
  byId('chart').replaceChildren(svg);
  describe(workers);
}

function describe(workers) {
  const sums = (parts, stage) => parts.reduce((sum, {index}) => sum + partAt(stage, index), 0);
  byId('by-worker').replaceChildren(tableOf(['worker', 'host', 'parts', 'images', 'device busy', ...TIMELINE.stages],
    workers.map(({name, host, parts}) => {
      const share = busy(parts);
      return [name, host, number(parts.length), number(sums(parts, 'images')), share.of ? `${number(Math.round((1000 * share.seconds) / share.of) / 10)} %` : '—', ...TIMELINE.stages.map((stage) => duration(sums(parts, stage)))];
    }), {class: 'list', 'aria-label': 'Workers'}),
  element('p', {class: 'muted'}, `Seconds of all parts together; those of parts that a worker has at the same time add up. Device busy: the share of the time from its first sample to its last in which it had one in a slot.${TIMELINE.count + TIMELINE.unread_count < TIMELINE.of ? ` ${number(TIMELINE.count)} of ${number(TIMELINE.of)} parts are in this report, so gaps mean nothing here.` : ''}`));
  const parts = workers.flatMap((worker) => worker.parts.map((part) => [worker, part])).sort((a, b) => a[1].stages[0][1] - b[1].stages[0][1]);
  byId('by-part').replaceChildren(tableOf(['part', 'worker', 'began', ...TIMELINE.stages, 'images', 'errors'],
    parts.slice(0, 500).map(([{name}, {index, stages}]) => [partAt('part', index), name, duration(stages[0][1]), ...TIMELINE.stages.map((stage) => duration(partAt(stage, index))), number(partAt('images', index)), number(partAt('errors', index))]),
    {class: 'list', 'aria-label': 'Parts'}), element('p', {class: 'muted'}, parts.length > 500 ? `The first 500 of ${number(parts.length)}.` : ''));
}

function showTip(event) {
  const part = event.target.closest?.('g[data-part]');
  const tip = byId('tip');
  tip.hidden = !part;
  if (!part) return;
  const index = Number(part.dataset.part);
  const images = partAt('images', index);
  const errors = partAt('errors', index);
  tip.replaceChildren(element('b', {}, `Part ${partAt('part', index)}`), ` ${counted(images, 'image')}${errors ? `, ${counted(errors, 'error')}` : ''}`,
    ...TIMELINE.stages.map((stage) => element('span', {class: 'tip-line'}, element('span', {class: `swatch ${stage}`}), stage, element('span', {class: 'right'}, duration(partAt(stage, index))))));
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
}
