// Says on the page where each picture and each chapter comes from: the command, the table, the runs; data, seed, versions.
// All of it is read from the sidecars and the executed chapters that `make publish` wrote; nothing is written here by hand.
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import path from 'node:path';

const BOOK = 'quick'; // the profile that the pages show
const read = (file) => JSON.parse(readFileSync(file, 'utf8'));

const text = (value) => ({ type: 'text', value });
const code = (value) => ({ type: 'inlineCode', value });
const link = (url, ...children) => ({ type: 'link', url, children });
const item = (...children) => ({ type: 'listItem', spread: false, children });
const list = (items) => ({ type: 'list', ordered: false, spread: false, children: items.map((each) => item(...each)) });
const joined = (nodes) => nodes.flatMap((node, i) => (i ? [text(', '), node] : [node]));
const folded = (title, children) => ({
  type: 'details',
  class: 'made',
  children: [{ type: 'summary', children: [text(title)] }, ...children],
});

const known = new Map();

/** The chapter that draws each figure, by the label of the cell; the notebooks are read once a book, not once a page. */
function chapters(root) {
  if (!known.has(root)) known.set(root, drawnIn(root));
  return known.get(root);
}

function drawnIn(root) {
  const folder = path.join(root, 'notebooks');
  const names = readdirSync(folder).filter((name) => /^\d\d-.*\.ipynb$/.test(name));
  const drawn = names.flatMap((name) =>
    read(path.join(folder, name)).cells.map((cell) => [cell.metadata.label, name.replace('.ipynb', '')]),
  );
  return new Map(drawn.filter(([label]) => label?.startsWith('fig-')));
}

/** What a fold under a figure says; null where nothing was published. */
function underFigure(root, from, label, chapter) {
  const stem = path.join(root, 'figures', 'published', BOOK, label);
  if (!existsSync(`${stem}.json`)) return null;
  const to = (file) => path.relative(path.dirname(from), file);
  const made = read(`${stem}.json`).made;
  const runs = Object.entries(made.methods ?? {}).map(([profile, methods]) => [
    text(`Methods, profile ${profile}: `),
    ...joined(methods.map((method) => {
      const run = path.join(root, 'results', 'published', profile, 'weights', method, 'run.json');
      return existsSync(run) ? link(to(run), code(method)) : code(method);
    })),
  ]);
  return folded('Made from', [
    list([
      [text('Again: '), code(`make chapter NAME=${chapter}`)],
      [text('Its '), link(to(`${stem}.csv`), text('table')), text(', and '), link(to(`${stem}.json`), text('how that was made'))],
      ...runs,
    ]),
  ]);
}

/** Data, profile, seed, versions and time of a chapter, as its executed twin records them. */
function underChapter(root, from) {
  const recorded = read(from).metadata.clustr;
  if (!recorded?.made) throw new Error(`${from}: expected a chapter as make publish writes it, got one without its record`);
  const { made, profile, tables } = recorded;
  const chapter = path.basename(from, '.ipynb');
  const to = (file) => path.relative(path.dirname(from), path.join(root, file));
  const versions = Object.entries(made.versions).map(([name, version]) => `${name} ${version}`);
  const rows = Object.keys(tables).length;
  const threads = made.threads ? `, ${made.threads} thread${made.threads > 1 ? 's' : ''}` : '';
  return folded('How this page was made', [
    list([
      ...(made.data?.length ? [[text(`Trained methods on: ${made.data.join(', ')}; published rows of other data say which`)]] : []),
      [text('Profile: '), link(to(`profiles/${profile.name}.yaml`), code(profile.name)),
        text(rows ? `; its ${rows} tables of rows lie in results/published/${profile.name}/` : '')],
      ...(made.seeds?.length ? [[text(`Seed of trainings and of the page: ${made.seeds.join(', ')}; others stand in the cells`)]] : []),
      [text(`Software: Python ${made.python}, ${versions.join(', ')}`)],
      [text(`Machine: ${made.processor}, ${made.device}${threads}; this page ran in at most ${made.minutes} min`)],
      [text(`Commit: ${made.commit}`)],
      [text('Again: '), code(`make chapter NAME=${chapter}`), text('; with another parameter: '),
        code(`make chapter NAME=${chapter} ARGS='-p name=value'`)],
      ...launch(root, chapter),
    ]),
  ]);
}

/** Where the chapter can be opened in a browser: from the one setting, `project.github` in myst.yml, or nowhere. */
function launch(root, chapter) {
  const set = readFileSync(path.join(root, 'myst.yml'), 'utf8').match(/^\s+github:\s*["']?(?:https?:\/\/github\.com\/)?([\w.-]+\/[\w.-]+)/m);
  if (!set) return [];
  const repository = set[1].replace(/\.git$/, '');
  const name = repository.split('/')[1];
  return [
    [text('Open it: '),
      link(`https://mybinder.org/v2/gh/${repository}/HEAD?urlpath=lab/tree/notebooks/${chapter}.ipynb`, text('Binder')), text(', '),
      link(`https://colab.research.google.com/github/${repository}/blob/HEAD/notebooks/${chapter}.ipynb`, text('Colab')),
      text('; in Colab run first '), code(`!git clone -q https://github.com/${repository} && pip install -q ./${name}`),
      text(', then '), code(`%cd ${name}/notebooks`)],
  ];
}

const provenance = {
  name: 'provenance',
  stage: 'document',
  plugin: () => (tree, file) => {
    const root = file.cwd;
    const drawn = chapters(root);
    const visit = (node) => {
      if (!node.children) return;
      node.children = node.children.flatMap((child) => {
        visit(child);
        const label = child.type === 'container' && child.children.find((each) => each.url?.startsWith('#fig-'))?.url.slice(1);
        const fold = label && drawn.has(label) && underFigure(root, file.path, label, drawn.get(label));
        return fold ? [child, fold] : [child];
      });
    };
    visit(tree);
    if (/notebooks[\\/]\d\d-[^\\/]*\.ipynb$/.test(file.path)) tree.children.push({ type: 'block', children: [underChapter(root, file.path)] });
  },
};

export default { name: 'Where pictures and chapters come from', transforms: [provenance] };
