// A sheet holds many thumbnails; it is decoded when the first of them is shown.
const SHEETS = [...document.querySelectorAll('script.sheet')];
const SHEET_URLS = [];
const WIDTHS = new Column(PICTURES.width);
const HEIGHTS = new Column(PICTURES.height);
const PER_SHEET = PICTURES.across * PICTURES.across;

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const found = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place += 1) found[place] = text.charCodeAt(place);
  return found;
}

function sheetUrl(sheet) {
  if (!SHEET_URLS[sheet]) {
    SHEET_URLS[sheet] = URL.createObjectURL(new Blob([bytesOf(SHEETS[sheet].textContent)], {type: 'image/webp'}));
    SHEETS[sheet].textContent = ''; // its text has done its work
  }
  return SHEET_URLS[sheet];
}

// An element with the thumbnail, at most `side` CSS pixels wide and high; `larger`: also where it has fewer.
function thumbnail(index, side, larger = true) {
  const width = WIDTHS.get(index);
  const height = HEIGHTS.get(index);
  if (width === null) return element('span', {class: 'no-thumbnail'}, 'no thumbnail');
  const scale = Math.min(side / width, side / height, larger ? Infinity : 1);
  const place = index % PER_SHEET;
  const rest = Math.min(PER_SHEET, COUNT - (index - place));
  const made = element('span', {class: 'thumbnail'});
  const {style} = made;
  style.width = `${width * scale}px`;
  style.height = `${height * scale}px`;
  style.backgroundImage = `url("${sheetUrl(Math.floor(index / PER_SHEET))}")`;
  style.backgroundSize = `${Math.min(PICTURES.across, rest) * PICTURES.side * scale}px auto`;
  style.backgroundPosition = `${-(place % PICTURES.across) * PICTURES.side * scale}px ${-Math.floor(place / PICTURES.across) * PICTURES.side * scale}px`;
  if (scale >= 1.9) style.imageRendering = 'pixelated';
  return made;
}

const described = (index) => `Row ${value('row', index)}, image ${value('image_index', index)}: ${value('prompt', index)}`;
