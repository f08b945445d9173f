// What the page shows. Nothing in here is trusted: it becomes text, never markup.
const DATA = JSON.parse(document.getElementById('data').textContent);

class Column {
  constructor({name, kind, values, of, at}) {
    Object.assign(this, {name, kind, values, of, at});
  }

  get(index) {
    return this.of ? this.of[this.at[index]] : this.values[index];
  }

  // [value, how many rows], gaps left out; numbers ascending, texts as they come
  counted() {
    if (this.counts) return this.counts;
    const counts = new Map();
    const length = (this.at ?? this.values).length;
    for (let index = 0; index < length; index += 1) {
      const value = this.get(index);
      if (value !== null) counts.set(value, (counts.get(value) ?? 0) + 1);
    }
    this.counts = [...counts];
    if (this.kind === 'number') this.counts.sort((a, b) => a[0] - b[0]);
    return this.counts;
  }

  // the same, and last how many rows have none
  countedWithGaps() {
    const gaps = this.counted().reduce((left, [, count]) => left - count, (this.at ?? this.values).length);
    return gaps ? [...this.counts, [null, gaps]] : this.counts;
  }
}

const table = (columns) => columns.map((column) => new Column(column));

const PICTURES = DATA.pictures;
const COUNT = PICTURES.count;
const COLUMNS = table(PICTURES.columns);
const BY_NAME = new Map(COLUMNS.map((column) => [column.name, column]));
const FILES = new Column(PICTURES.files);
const PARAMETERS = new Column(PICTURES.parameters);
const value = (name, index) => BY_NAME.get(name)?.get(index) ?? null;
const key = (index) => `${value('row', index)}:${value('image_index', index)}`;

const grouped = new Intl.NumberFormat('en-US', {maximumFractionDigits: 6});
const number = (given) => grouped.format(given);
const counted = (count, thing) => `${number(count)} ${thing}${count === 1 ? '' : 's'}`;
// of a value that is a name (a seed, a row) rather than a quantity
const shown = (given) => (given === null ? '—' : String(given));

function bytes(given) {
  for (const unit of ['B', 'kB', 'MB', 'GB', 'TB']) {
    if (given < 1000 || unit === 'TB') return `${given < 10 && unit !== 'B' ? given.toFixed(1) : Math.round(given)} ${unit}`;
    given /= 1000;
  }
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return `${minutes} min ${String(Math.round(seconds % 60)).padStart(2, '0')} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`;
}
