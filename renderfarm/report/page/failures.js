const FAILURES = DATA.failures;

function buildFailures() {
  const panel = byId('panel-failures');
  const {errors, error_classes: classes} = DATA.summary;
  byId('tab-failures').textContent = errors ? `Failures (${number(errors)})` : 'Failures';
  if (!FAILURES.count) {
    panel.append(element('p', {class: 'nothing'}, errors ? 'The tables of errors could not be read; renderfarm errors says more.' : 'Nothing failed: every sample that was rendered has its image.'));
    return;
  }
  const columns = new Map(table(FAILURES.columns).map((column) => [column.name, column]));
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
  const search = element('input', {type: 'search', placeholder: 'Search in messages and ids', 'aria-label': 'Search in failures', oninput: () => draw()});

  function draw() {
    const word = search.value.toLowerCase();
    const rows = [];
    let fitting = 0;
    for (let index = 0; index < FAILURES.count; index += 1) {
      const get = (name) => columns.get(name).get(index);
      if (wanted.size && !wanted.has(get('error_class'))) continue;
      if (word && !`${get('row_id')}\n${get('error_message')}`.toLowerCase().includes(word)) continue;
      fitting += 1;
      if (rows.length < 500) {
        const then = get('waived') === 'true' ? 'waived' : get('retryable') === 'true' ? 'may succeed' : 'would fail again';
        rows.push([`${get('row')}:${get('image_index')}`, get('row_id'), get('error_class'), get('error_message'), then]);
      }
    }
    const said = fitting > rows.length ? `The first ${number(rows.length)} of ${number(fitting)}.` : `${counted(fitting, 'sample')}.`;
    list.replaceChildren(element('p', {class: 'muted'}, said + (FAILURES.count < errors ? ` ${number(FAILURES.count)} of ${number(errors)} failures are in this report; renderfarm errors lists them all.` : '')),
      tableOf(['row', 'id', 'class', 'message', 'again'], rows, {class: 'list', 'aria-label': 'Failed samples'}));
  }

  panel.append(element('h2', {}, 'By class'), bars, element('div', {class: 'tools'}, element('h2', {}, 'Samples without an image'), element('span', {class: 'right'}, search)), list,
    element('p', {class: 'muted'}, 'renderfarm retry asks for those that may succeed once more; renderfarm waive lets others stay as they are.'));
  draw();
}
