const FAILURES = DATA.failures;
const FAILED = new Map(table(FAILURES.columns).map((column) => [column.name, column]));
// What was asked of each failed sample, by the names of the images' columns; nothing where the output does not hold its rows
const ASKED = new Map(table(FAILURES.asked).map((column) => [column.name, column]));
const failedKey = (failure) => `${FAILED.get('row').get(failure)}:${FAILED.get('image_index').get(failure)}`;
const failed = {search: null, draw: null};

// The failed samples that the search and the filters choose, as far as it is known what was asked of them.
function failuresShown() {
  const found = [];
  for (let failure = 0; ASKED.size && failure < FAILURES.count; failure += 1) {
    const asked = [...ASKED.values()].map((column) => column.get(failure)).join('\n').toLowerCase();
    const filtered = [...choice.facets].every(([name, wanted]) => ASKED.has(name) && isAmong(ASKED.get(name).get(failure), wanted));
    if (filtered && choice.words.every((word) => asked.includes(word))) found.push(failure);
  }
  return found;
}

// The list of failures, with nothing but that sample
function showFailure(failure) {
  location.hash = 'failures';
  failed.search.value = failedKey(failure);
  failed.draw();
  failed.search.focus();
}

function buildFailures() {
  const panel = byId('panel-failures');
  const {errors, error_classes: classes} = DATA.summary;
  byId('tab-failures').textContent = errors ? `Failures (${number(errors)})` : 'Failures';
  if (!FAILURES.count) {
    panel.append(element('p', {class: 'nothing'}, errors ? 'The tables of errors could not be read; renderfarm errors says more.' : 'Nothing failed: every sample that was rendered has its image.'));
    return;
  }
  const columns = FAILED;
  const counts = Object.entries(classes).length ? Object.entries(classes).sort((a, b) => b[1] - a[1]) : columns.get('error_class').counted();
  const wanted = new Set();
  const list = element('div', {});
  const most = Math.max(...counts.map(([, count]) => count));
  const bars = element('ul', {class: 'bars'}, ...counts.map(([name, count]) => {
    const bar = element('span', {class: 'bar-fill'});
    bar.style.width = `${(100 * count) / most}%`;
    const button = element('button', {class: 'bar-line', 'aria-pressed': 'false', onclick: () => {
      if (!wanted.delete(name)) wanted.add(name);
      button.setAttribute('aria-pressed', wanted.has(name));
      draw();
    }}, element('span', {class: 'bar-name'}, name), element('span', {class: 'bar-track'}, bar), element('span', {class: 'number'}, number(count)));
    return element('li', {}, button);
  }));
  const search = element('input', {type: 'search', placeholder: 'Search in messages and ids; or a sample, 12:0', 'aria-label': 'Search in failures', oninput: () => draw()});

  function draw() {
    const word = search.value.toLowerCase();
    const rows = [];
    let fitting = 0;
    for (let index = 0; index < FAILURES.count; index += 1) {
      const get = (name) => columns.get(name).get(index);
      if (wanted.size && !wanted.has(get('error_class'))) continue;
      if (word && word !== failedKey(index) && !`${get('row_id')}\n${get('error_message')}`.toLowerCase().includes(word)) continue;
      fitting += 1;
      if (rows.length < 500) {
        const then = get('waived') === 'true' ? 'waived' : get('retryable') === 'true' ? 'may succeed' : 'would fail again';
        rows.push([failedKey(index), get('row_id'), get('error_class'), get('error_message'), then]);
      }
    }
    const said = fitting > rows.length ? `The first ${number(rows.length)} of ${number(fitting)}.` : `${counted(fitting, 'sample')}.`;
    list.replaceChildren(element('p', {class: 'muted'}, said + (FAILURES.count < errors ? ` ${number(FAILURES.count)} of ${number(errors)} failures are in this report; renderfarm errors lists them all.` : '')),
      tableOf(['row', 'id', 'class', 'message', 'again'], rows, {class: 'list', 'aria-label': 'Failed samples'}));
  }

  Object.assign(failed, {search, draw});
  panel.append(element('h2', {}, 'By class'), bars, element('div', {class: 'tools'}, element('h2', {}, 'Samples without an image'), element('span', {class: 'right'}, search)), list,
    element('p', {class: 'muted'}, 'renderfarm retry asks for those that may succeed once more; renderfarm waive lets others stay as they are.'));
  draw();
}
