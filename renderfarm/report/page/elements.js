const byId = (id) => document.getElementById(id);

// Texts become text nodes; attributes are ours. A property that begins with `on` is a listener.
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, given] of Object.entries(properties)) {
    if (name.startsWith('on')) made.addEventListener(name.slice(2), given);
    else if (name === 'class') made.className = given;
    else if (given === true) made.setAttribute(name, '');
    else if (given !== false && given !== null) made.setAttribute(name, given);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawn(tag, properties = {}, text = null) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, given] of Object.entries(properties)) made.setAttribute(name, given);
  if (text !== null) made.textContent = text;
  return made;
}

function tableOf(head, rows, attributes = {}) {
  const numeric = head.map((title, column) => rows.length > 0 && rows.every((row) => /^[\d,.—–]+( (B|kB|MB|GB|TB|s|%))?$/.test(String(row[column]))));
  const cell = (tag, text, column) => element(tag, {class: numeric[column] ? 'number' : '', scope: tag === 'th' ? 'col' : null}, text instanceof Node ? text : String(text));
  return element('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': attributes['aria-label'] ?? 'Table'},
    element('table', attributes,
      element('thead', {}, element('tr', {}, ...head.map((title, column) => cell('th', title, column)))),
      element('tbody', {}, ...rows.map((row) => element('tr', {}, ...row.map((text, column) => cell('td', text, column)))))));
}

async function copy(text, button) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch { // no permission, or a browser that has none for files: the old way
    const area = element('textarea', {class: 'hidden', 'aria-hidden': 'true'});
    area.value = text;
    button.after(area); // inside the dialog, outside of which nothing can be selected
    area.select();
    done = document.execCommand('copy');
    area.remove();
    button.focus();
  }
  const before = button.textContent;
  button.textContent = done ? 'Copied' : 'Select it by hand';
  setTimeout(() => { button.textContent = before; }, 1500);
}

// One place in the tab order for many buttons; arrows move between them.
function roving(container, move) {
  container.addEventListener('keydown', (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !move(event)) return;
    event.preventDefault();
  });
}
