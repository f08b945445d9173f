function buildHeader() {
  const {summary} = DATA;
  byId('name').textContent = summary.name ?? 'renderfarm';
  const state = byId('state');
  state.textContent = summary.state.toLowerCase();
  state.dataset.state = summary.state;
  const written = new Date(summary.written * 1000);
  byId('about').append(`${summary.model} · ${summary.out} · as of `, element('time', {datetime: written.toISOString()}, written.toLocaleString('en-GB', {dateStyle: 'medium', timeStyle: 'short'})));
  const [last] = DATA.runs;
  const figures = [['images', number(summary.images)], ['errors', number(summary.errors)], ['rows', number(summary.rows)],
    ['parts', summary.parts === null ? '—' : summary.parts === summary.parts_done ? number(summary.parts) : `${number(summary.parts_done)} of ${number(summary.parts)}`],
    ['images/s', summary.images_per_second ? number(Number(summary.images_per_second.toPrecision(3))) : '—'],
    ['last run', last?.seconds ? duration(last.seconds) : '—'], ['image files', bytes(summary.bytes)]];
  byId('figures').append(...figures.map(([name, text]) => element('div', {'data-name': name, class: name === 'errors' && summary.errors ? 'bad' : ''}, element('dt', {}, name), element('dd', {}, text))));
  const partial = [];
  const unread = PICTURES.unread_count;
  if (unread) partial.push(`${counted(unread, 'part')} could not be read, and ${unread === 1 ? 'its images are' : 'their images are'} not in this report (${PICTURES.unread.join(', ')}${unread > PICTURES.unread.length ? ', …' : ''}). renderfarm verify OUT says what is wrong.`);
  if (COUNT < summary.images && !unread) partial.push(`${number(COUNT)} of ${number(summary.images)} images are in this report, spread over the output; renderfarm report OUT --max-images N takes more.`);
  const without = WIDTHS.counted().reduce((left, [, count]) => left - count, COUNT);
  if (without) partial.push(`${number(without)} have no thumbnail: their files were not reached in time, or cannot be read. renderfarm report OUT tries again, renderfarm verify OUT says what is damaged.`);
  byId('partial').textContent = partial.join(' ');
  byId('partial').dataset.wanted = partial.length ? 'yes' : '';
}

function buildFacts() {
  const {summary} = DATA;
  const panel = byId('panel-facts');
  panel.append(element('h2', {}, 'Runs'));
  const known = (given, as = number) => (typeof given === 'number' ? as(given) : '—'); // of a run that an error ended, less is
  const runs = DATA.runs.map((run) => [run.run_id, run.logical_date ?? '—', run.key ?? '—', String(run.state).toLowerCase(), known(run.new_images), known(run.new_errors), known(run.seconds, duration),
    known(run.images_per_second, (rate) => number(Number(rate.toPrecision(3)))), known(run.useful_slots, (share) => `${number(Math.round(share * 1000) / 10)} %`), known(run.lost_workers), known(run.copies), run.error ?? '']);
  panel.append(runs.length
    ? tableOf(['run', 'logical date', 'key', 'ended', 'new images', 'new errors', 'time', 'images/s', 'useful slots', 'workers lost', 'copies', ''], runs, {class: 'list', 'aria-label': 'Runs'})
    : element('p', {class: 'nothing'}, 'No run has ended yet.'));
  panel.append(element('h2', {}, 'What was rendered'));
  const facts = [['model', summary.model], ['layout, format', [summary.layout, summary.format].filter(Boolean).join(', ')], ['output', summary.out]];
  const some = summary.counted < summary.images ? ` (of ${number(summary.counted)} images)` : '';
  for (const [name, kinds] of Object.entries(summary.kinds)) facts.push([name + some, kinds.map(([kind, count]) => `${kind}: ${number(count)}`).join(', ')]);
  if (summary.truncated) facts.push([`prompts cut off${some}`, number(summary.truncated)]);
  panel.append(pairs(facts));
  if (summary.profile) {
    panel.append(element('h2', {}, 'Render profile'), element('p', {class: 'muted'}, 'What decides pixels besides the row' + (summary.profiles > 1 ? `; the first of ${summary.profiles}` : '') + '.'),
      pairs(Object.entries(summary.profile)));
  }
  panel.append(element('p', {class: 'muted'}, `Written by renderfarm ${summary.version}. Everything shown here is in this file; it asks nobody for anything.`));
}

const pairs = (facts) => element('table', {class: 'columns'}, element('tbody', {}, ...facts.map(([name, text]) =>
  element('tr', {}, element('th', {scope: 'row'}, name), element('td', {}, shown(text))))));
