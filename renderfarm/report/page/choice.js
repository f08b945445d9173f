// Which images are shown, in which order. Whoever shows them is told when that changes.
const choice = {
  words: [],
  facets: new Map(), // column name -> Set of values, or [lowest, highest] (either may be null)
  sort: 'row',
  descending: false,
  shown: [],
  listeners: [],
};

// Hashes hold any short word; who looks for one pastes at least so many of its digits.
const HASHED = new Set(['file_name', 'file_sha256', 'pixel_sha256', 'profile_sha256', 'original_file', 'original_file_sha256', 'original_pixel_sha256']);
const OF_A_HASH = 8;
const texts = {}; // of each image all its values, in small letters

function searchTexts(hashed) {
  texts[hashed] ??= Array.from({length: COUNT}, (_, index) =>
    COLUMNS.filter((column) => hashed || !HASHED.has(column.name)).map((column) => column.get(index)).filter((given) => given !== null).join('\n').toLowerCase());
  return texts[hashed];
}

// Words, and phrases in quotation marks
const wordsOf = (text) => [...text.toLowerCase().matchAll(/"([^"]+)"?|[^\s"]+/g)].map(([word, phrase]) => phrase ?? word);

function isAmong(given, wanted) {
  if (wanted instanceof Set) return wanted.has(given);
  return given !== null && (wanted[0] === null || given >= wanted[0]) && (wanted[1] === null || given <= wanted[1]);
}

function fits(index, but = null) {
  for (const [name, wanted] of choice.facets) {
    if (name === but) continue;
    if (!isAmong(value(name, index), wanted)) return false;
  }
  return choice.words.length === 0 || choice.words.every((word) => searchTexts(word.length >= OF_A_HASH)[index].includes(word));
}

function choose() {
  const chosen = [];
  for (let index = 0; index < COUNT; index += 1) if (fits(index)) chosen.push(index);
  const column = BY_NAME.get(choice.sort);
  if (column && !(choice.sort === 'row' && !choice.descending)) {
    const compare = column.kind === 'number' ? (a, b) => a - b : new Intl.Collator('en', {numeric: true}).compare;
    const sign = choice.descending ? -1 : 1;
    chosen.sort((a, b) => {
      const [left, right] = [column.get(a), column.get(b)];
      if (left === null || right === null) return (left === null) - (right === null) || a - b; // gaps last
      return sign * compare(left, right) || sign * (a - b);
    });
  }
  choice.shown = chosen;
  for (const listener of choice.listeners) listener();
}
