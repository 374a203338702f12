"""The results browser, driven as a reader would: its numbers are the package's, in whatever way they are asked for."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bare import bare_page
from browser_data import without_intervals

from clustr_core.cli import main
from clustr_core.drawing import results_browser
from clustr_core.measuring import study
from clustr_core.measuring.accuracy import (
    best_bound,
    binomial_interval,
    both_protocols,
    certified_accuracy,
    robust_accuracy,
    robust_accuracy_by_loss,
)

PROFILE = """\
shared: {dataset: digits, width: 4, train_examples: 300, learning_rate: 1.0e-2}
methods:
  ce: {epochs: 6}
attacks:
  linf: {norm: linf, eps: [0.02, 0.05, 0.4], steps: 2, examples: 40}
  l2: {norm: l2, eps: [0.2], steps: 2, examples: 40}
  paper: {attack: paper, eps: [0.02, 0.05, 0.4], steps: 2, restarts: 1, examples: 20}
  # a ball in which its first part breaks all
  autoattack: {attack: autoattack, norm: linf, eps: [0.4], examples: 4}
certified_examples: 40
"""
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def studies() -> dict[str, study.Study]:
    """Of two profiles the published rows of some methods: all of them would take as long again."""
    return {name: some_methods(study.read_study(name, published=True)) for name in ("quick", "cpu-cifar10")}


def some_methods(whole: study.Study) -> study.Study:
    recipes = {name: whole.profile.recipes[name] for name in ("ce", "trades", "clustr", "clustr-qtrades", "clustr-lip")}
    return replace(whole, profile=replace(whole.profile, recipes=recipes))


@pytest.fixture(scope="module")
def given(studies: dict[str, study.Study]) -> dict:
    return without_intervals(studies.values())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tables of a tiny model, written by the commands that a reader has."""
    home = tmp_path_factory.mktemp("own")
    (home / "profiles").mkdir()
    (home / "profiles/tiny.yaml").write_text(PROFILE)
    files = {"attack": home / "attacks.csv", "certify": home / "certificates.csv"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUSTR_HOME", str(home))
        for (command, path), method in zip(files.items(), ("ce", "prototypes"), strict=True):
            options = ["--profile", "tiny", "--method", method, "--device", "cpu", "--output", str(path)]
            assert main([command, *options]) == 0
    return files


@pytest.fixture
def opened(browser: Any, tmp_path: Path, given: dict) -> Callable[..., Any]:
    """Opens the page with the published numbers."""

    @contextmanager
    def page(**options: Any) -> Iterator[Any]:
        with bare_page(browser, tmp_path, "results-browser", options.pop("data", given), **options) as found:
            yield found

    return page


def select(page: Any, **chosen: str) -> None:
    """Choose in the lists above the drawing, each by its label."""
    for label, text in chosen.items():
        page.get_by_label(label, exact=True).select_option(text)


def table(page: Any) -> Rows:
    """The rows of the table: what is read, and the numbers behind it."""
    read = "rows => rows.map(row => ({...row.dataset, cells: [...row.cells].map(cell => cell.textContent)}))"
    rows = page.locator(".rows tbody tr").evaluate_all(read)
    numbers = ("at", "share", "low", "high", "kept", "n")
    return [row | {name: float(row[name]) for name in numbers} for row in rows]


def expected(
    frame: pd.DataFrame, share: str, at: str, key: Callable[[Any], str]
) -> dict[tuple[str, float], list[float]]:
    """What the package says: series and radius -> share, interval, images."""
    return {
        (key(row), round(getattr(row, at), 9)): [getattr(row, share), row.low, row.high, row.examples]
        for row in frame.itertuples()
    }


def agree(rows: Rows, said: dict[tuple[str, float], list[float]]) -> None:
    """The rows of the table are these and no others, to 1e-6."""
    found = {
        (row["series"], round(row["at"], 9)): [row[name] for name in ("share", "low", "high", "n")] for row in rows
    }
    assert len(found) == len(rows)
    assert sorted(found) == sorted(said)
    for key, numbers in said.items():
        assert found[key] == pytest.approx(numbers, abs=1e-6), key


def chosen(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["method"].isin(results_browser.CHOSEN)]


def test_robust_accuracy_is_the_package_s(opened: Callable, studies: dict[str, study.Study]) -> None:
    rows = studies["quick"].attacks
    plain = chosen(rows[rows["attack"] != "autoattack"])
    by_method = {"share": "robust_accuracy", "at": "eps"}
    with opened() as page:
        correct = robust_accuracy(plain[plain["attack"] != "paper"])
        for norm in ("linf", "l2"):
            select(page, norm=norm)
            said = expected(correct[correct["norm"] == norm], key=lambda row: f"{row.method}|correct", **by_method)
            agree(table(page), said)
        select(page, shown="paper")
        said = expected(
            robust_accuracy(plain[plain["attack"] == "paper"]), key=lambda row: f"{row.method}|paper", **by_method
        )
        agree(table(page), said)
        assert page.get_by_label("norm").input_value() == "linf"
        select(page, shown="both")
        protocols = both_protocols(plain)
        agree(table(page), expected(protocols, key=lambda row: f"{row.method}|{row.protocol}", **by_method))
        page.get_by_label("count AutoAttack").check()
        protocols = both_protocols(chosen(rows))
        agree(table(page), expected(protocols, key=lambda row: f"{row.method}|{row.protocol}", **by_method))
        select(page, shown="alone", norm="linf", method="clustr-qtrades")
        alone = robust_accuracy_by_loss(rows.query("method == 'clustr-qtrades' and norm == 'linf'"))
        agree(table(page), expected(alone, key=lambda row: f"clustr-qtrades|{row.attack}, {row.loss}", **by_method))


def test_certified_accuracy_and_the_sandwich_are_the_package_s(
    opened: Callable, studies: dict[str, study.Study]
) -> None:
    photographs = studies["cpu-cifar10"]
    radii = [0.0, *photographs.radii]
    with opened() as page:
        select(page, data="CIFAR-10 (JPEG copy)")
        assert {row["cells"][2] for row in table(page)} == {"0 (clean)", "2/255", "4/255", "8/255", "16/255"}
        assert "8/255" in page.locator(".plot svg text").all_text_contents()
        select(page, shown="certified", norm="l2")
        # of cross-entropy there are only certificates of clusters fitted afterwards
        best = chosen(best_bound(photographs.certificates)).query("method != 'ce'")
        found = certified_accuracy(best, radii)
        agree(table(page), expected(found, "certified_accuracy", "at", lambda row: f"{row.method}|{row.bound}"))
        assert {row["cells"][2] for row in table(page)} == {"0 (clean)", "36/255", "72/255", "108/255"}
        select(page, norm="linf")
        scaled = found.assign(at=found["at"] / 3072**0.5)
        agree(table(page), expected(scaled, "certified_accuracy", "at", lambda row: f"{row.method}|{row.bound}"))
        select(page, shown="sandwich", method="clustr-lip")
        page.get_by_label("every point of the curves").check()
        curve = study.sandwich_curve(photographs, "clustr-lip", 55)
        agree(table(page), expected(curve, "accuracy", "at", lambda row: f"clustr-lip|{row.column}"))


def point_of(page: Any, series: str, at: float) -> dict[str, float]:
    """Where in the window a point of a curve is, from the path that is drawn."""
    path = page.locator(f'.plot g.curve[data-series="{series}"] path').first.get_attribute("d")
    pixels = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
    radii = sorted({row["at"] for row in table(page) if row["series"] == series})
    x, y = pixels[radii.index(at)]
    box = page.locator(".plot svg").bounding_box()
    return {"x": box["x"] + x, "y": box["y"] + y}


def test_the_pointer_reads_a_curve_and_fades_the_others(opened: Callable, studies: dict[str, study.Study]) -> None:
    rows = studies["quick"].attacks.query(
        "method == 'clustr' and attack not in ('paper', 'autoattack') and norm == 'linf'"
    )
    said = robust_accuracy(rows).set_index("eps").loc[0.1]
    with opened() as page:
        page.mouse.move(*point_of(page, "clustr|correct", 0.1).values())
        assert page.locator(".tip").inner_text() == (
            f"ClusTR, correct attacks\neps 0.1: {study.with_interval(said.robust_accuracy, said.low, said.high)} %\n"
            f"{round(said.robust_accuracy * said.examples)} of {said.examples:.0f} images"
        )
        opacity = {
            name: page.locator(f'g.curve[data-series="{name}|correct"]').get_attribute("opacity")
            for name in ("clustr", "ce")
        }
        assert opacity == {"clustr": "1", "ce": "0.25"}
        assert page.locator(".rows tr.at").get_attribute("data-series") == "clustr|correct"
        page.mouse.move(2, 2)
        assert page.locator(".tip").is_hidden()


def test_the_keyboard_walks_along_a_curve_and_between_curves(opened: Callable) -> None:
    with opened() as page:
        cursor = page.locator(".plot .cursor")
        page.get_by_label("95 % intervals of every curve").focus()
        for _ in range(4):
            page.keyboard.press("Tab")
            if cursor.evaluate("node => node === node.getRootNode().activeElement"):
                break
        assert cursor.get_attribute("data-series") == "ce|correct"
        walked = [cursor.get_attribute("data-at")]
        for key in ("ArrowRight", "ArrowRight", "End", "Home", "Shift+ArrowRight"):
            page.keyboard.press(key)
            walked.append(cursor.get_attribute("data-at"))
        assert walked == ["0", "0.025", "0.05", "0.3", "0", "0.2"]
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        at = {row["series"]: row["share"] for row in table(page) if row["at"] == 0.025}
        page.keyboard.press("ArrowUp")
        above = cursor.get_attribute("data-series")
        assert at[above] == min(
            share for name, share in at.items() if share >= at["ce|correct"] and name != "ce|correct"
        )
        assert cursor.get_attribute("aria-label") == page.locator(".tip").inner_text().replace("\n", ", ")
        assert float(cursor.get_attribute("data-low")) == pytest.approx(
            binomial_interval(int(cursor.get_attribute("data-kept")), int(cursor.get_attribute("data-n")))[0], abs=1e-9
        )
        page.keyboard.press("Escape")
        assert page.locator(".tip").is_hidden()
        # where the focus is can still be seen
        assert cursor.get_attribute("opacity") == "1"


def test_the_table_is_sorted_and_filtered_by_mouse_and_by_keyboard(opened: Callable) -> None:
    with opened() as page:
        before = [row["share"] for row in table(page)]
        heading = page.get_by_role("button", name="accuracy, %")
        heading.click()
        assert [row["share"] for row in table(page)] == sorted(before)
        assert page.locator('th[aria-sort="ascending"]').inner_text() == "accuracy, % ▲"
        heading.press("Enter")
        assert [row["share"] for row in table(page)] == sorted(before, reverse=True)
        assert page.locator('th[aria-sort="descending"]').count() == 1
        page.get_by_role("button", name="method").press("Space")
        names = [row["cells"][0] for row in table(page)]
        assert names == sorted(names, key=str.lower)
        search = page.get_by_label("filter the table")
        search.click()
        page.keyboard.type("qtrades 0.1")
        assert [row["cells"][:3] for row in table(page)] == [["ClusTR+QTRADES", "correct attacks", "0.1"]]
        assert page.locator(".count").inner_text() == f"1 of {len(before)} rows"
        page.keyboard.press("Control+a")
        page.keyboard.press("Delete")
        assert len(table(page)) == len(before)


def test_methods_are_ticked_by_keyboard_and_by_mouse(opened: Callable) -> None:
    with opened() as page:
        page.get_by_role("button", name="none", exact=True).click()
        assert not table(page)
        assert "Nothing is ticked." in page.locator(".plot svg").text_content()
        page.get_by_role("checkbox", name="TRADES", exact=True).press("Space")
        page.get_by_role("checkbox", name="ClusTR-lip").check()
        assert {row["cells"][0] for row in table(page)} == {"TRADES", "ClusTR-lip"}
        assert "curves: 2" in page.locator('[aria-live="polite"]').inner_text()
        page.get_by_role("button", name="all", exact=True).press("Enter")
        assert page.locator("g.curve").count() == page.locator("fieldset input:checked").count() == 6


def drop(page: Any, name: str, text: str) -> None:
    """Drag a file onto the box and let it go there."""
    carried = page.evaluate_handle(
        "([name, text]) => { const data = new DataTransfer(); data.items.add(new File([text], name)); return data; }",
        [name, text],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.locator(".drop").dispatch_event(event, {"dataTransfer": carried})


def test_a_dropped_file_says_what_the_package_says_of_it(opened: Callable, own: dict[str, Path]) -> None:
    rows = pd.read_csv(own["attack"])
    plain, by_eps = rows[rows["attack"] != "autoattack"], {"share": "robust_accuracy", "at": "eps"}
    assert set(rows["method"]) == {"ce", "ce-clusters"}

    def mine(page: Any) -> Rows:
        return [row for row in table(page) if row["series"].startswith("file")]

    def key(part: str) -> Callable[[Any], str]:
        return lambda row: f"file 1: {row.method}|{part or row.protocol}"

    with opened() as page:
        drop(page, "attacks.csv", own["attack"].read_text())
        page.get_by_role("checkbox", name="cross-entropy (yours)").wait_for()
        correct = robust_accuracy(plain[plain["attack"] != "paper"])
        agree(mine(page), expected(correct[correct["norm"] == "linf"], key=key("correct"), **by_eps))
        assert any(0 < row["share"] < 1 for row in mine(page) if row["at"] > 0)
        # AutoAttack came on fewer images
        select(page, norm="linf")
        page.get_by_label("count AutoAttack").check()
        counted = robust_accuracy(rows[(rows["attack"] != "paper") & (rows["norm"] == "linf")])
        agree(mine(page), expected(counted, key=key("correct"), **by_eps))
        page.get_by_label("count AutoAttack").uncheck()
        select(page, shown="paper")
        agree(mine(page), expected(robust_accuracy(plain[plain["attack"] == "paper"]), key=key("paper"), **by_eps))
        select(page, shown="both")
        agree(mine(page), expected(both_protocols(plain), key=key(""), **by_eps))
        select(page, shown="correct", norm="l2")
        agree(mine(page), expected(correct[correct["norm"] == "l2"], key=key("correct"), **by_eps))
        select(page, shown="alone", norm="linf", method="file 1: ce")
        alone = robust_accuracy_by_loss(rows.query("method == 'ce' and norm == 'linf'"))
        agree(mine(page), expected(alone, key=lambda row: f"file 1: ce|{row.attack}, {row.loss}", **by_eps))
        page.get_by_role("button", name="remove attacks.csv").click()
        select(page, shown="correct")
        assert not mine(page)


def test_a_chosen_table_of_certificates_is_shown_with_the_certified(
    opened: Callable, own: dict[str, Path], studies: dict[str, study.Study]
) -> None:
    with opened() as page:
        page.get_by_label("choose a CSV of your own model").set_input_files(own["certify"])
        page.get_by_role("checkbox", name="prototypes on raw pixels (yours)").wait_for()
        assert page.get_by_label("shown").input_value() == "certified"
        select(page, norm="l2")
        found = certified_accuracy(best_bound(pd.read_csv(own["certify"])), [0.0, *studies["quick"].radii])
        said = expected(found, "certified_accuracy", "at", lambda row: f"file 1: {row.method}|exact")
        agree([row for row in table(page) if row["series"].startswith("file")], said)
        assert any(0 < row[0] < 1 for (_, at), row in said.items() if at > 0)


HEAD = "attack,norm,eps,loss,index,correct,robust\n"


FAULTS = [
    ("", "the file is empty"),
    (HEAD, "the file has no rows"),
    (
        "attack,norm,eps,index,correct\npgd,linf,0.1,0,True\n",
        "column loss, robust: missing; attacks have attack, norm",
    ),
    ("bound,index,radius\nexact,0,0.5\n", "column correct: missing; certificates have bound"),
    (
        HEAD + "pgd,linf,0.1,ce,0,True,True\npgd,linf,0.1,ce,1,True,maybe\n",
        "line 3, column robust: expected True or False, got “maybe”",
    ),
    (HEAD + "pgd,l1,0.1,ce,0,True,True\n", "line 2, column norm: expected linf or l2, got “l1”"),
    (HEAD + "pgd,linf,8/255,ce,0,True,True\n", "line 2, column eps: expected a positive number, got “8/255”"),
    (HEAD + 2 * "pgd,linf,0.1,ce,0,True,True\n", "line 3: expected each image once, got the same as line 2"),
    (HEAD + "pgd,linf,0.1,ce,0,True\n", "line 2: expected 7 values, got 6"),
    ("bound,index,correct,radius\nbest,0,True,0.5\n", "line 2, column bound: expected one of triangle, nearest"),
]


def test_a_file_that_does_not_fit_says_where(opened: Callable, own: dict[str, Path]) -> None:
    with opened() as page:
        before = table(page)
        for n, (text, complaint) in enumerate(FAULTS):
            drop(page, f"mine-{n}.csv", text)
            page.locator(".drop .wrong", has_text=f"mine-{n}.csv: ").wait_for()
            assert complaint in page.locator(".drop .wrong").inner_text()
        assert table(page) == before
        drop(page, "mine.csv", own["attack"].read_text())
        page.get_by_role("button", name="remove mine.csv").wait_for()
        assert page.locator(".drop .wrong").is_hidden()


def test_it_fits_a_telephone_and_a_tap_reads_a_point(opened: Callable) -> None:
    with opened(width=390) as page:
        place = point_of(page, "clustr|correct", 0.1)
        page.touchscreen.tap(place["x"], place["y"])
        assert page.locator(".tip").inner_text().startswith("ClusTR, correct attacks")
        texts = page.locator(".plot svg text").evaluate_all(
            "all => all.map(text => [parseFloat(getComputedStyle(text).fontSize), text.getBoundingClientRect()])"
        )
        assert all(size >= 12 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for size, box in texts)


CONTRAST = """node => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = getComputedStyle(node.closest('.cw')).backgroundColor;
  const [low, high] = [light(paper), light(getComputedStyle(node)[NAME])].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.mark.parametrize("dark", [False, True])
def test_ink_and_curves_stand_out_from_the_paper(opened: Callable, dark: bool) -> None:
    with opened(dark=dark) as page:
        page.get_by_role("button", name="all", exact=True).click()
        paper = page.locator(".cw").evaluate("node => getComputedStyle(node).backgroundColor")
        assert paper == ("rgb(23, 25, 28)" if dark else "rgb(255, 255, 255)")
        lines = page.locator("g.curve > path:first-child")
        assert lines.count() == 6
        stroke = CONTRAST.replace("NAME", "'stroke'")
        assert min(lines.evaluate_all(f"all => all.map({stroke})")) >= 2.95
        for place in (".plot svg text", ".rows td", ".note", "h4", "fieldset label"):
            name = "'fill'" if "svg" in place else "'color'"
            assert page.locator(place).first.evaluate(CONTRAST.replace("NAME", name)) >= 4.5, place


RENDERED = """async states => {
  const { default: widget } = await import("./module.mjs");
  return states.map((state) => {
    const el = document.createElement("div");
    widget.render({ model: { get: (name) => state[name] }, el });
    return el.textContent;
  });
}"""
BROKEN: list[tuple[Callable[[dict], object], str]] = [
    (lambda data: data.clear(), "no data were given"),
    (lambda data: data.update(studies=[]), "studies: expected at least one"),
    (lambda data: data.update(studies="all"), "studies: expected array"),
    (lambda data: data.pop("start"), "start: expected object, got nothing"),
    (lambda data: data["start"].update(shown="all"), "start.shown: expected one of"),
    (lambda data: data["methods"]["ce"].update(dark=1), "methods.ce.dark: expected string, got 1"),
    (lambda data: data["studies"][0].pop("grid"), "studies[0].grid: expected numbers, got nothing"),
    (lambda data: data["studies"][0]["curves"].insert(0, None), "studies[0].curves[0].what: expected string"),
    (lambda data: curve(data).update(method="none"), "studies[0].curves[1].method: expected one of ce, ce-clusters"),
    (lambda data: curve(data).update(kept=[1, "2"]), "studies[0].curves[1].kept: expected numbers"),
    (lambda data: curve(data)["kept"].append(1), "studies[0].curves[1].kept: expected a number for each"),
    (lambda data: curve(data)["kept"].__setitem__(0, 9999), "studies[0].curves[1].kept: expected at most n = "),
]


def curve(data: dict) -> dict:
    return data["studies"][0]["curves"][1]


def test_data_that_do_not_fit_are_said_in_the_box(opened: Callable, given: dict) -> None:
    small = {**given, "studies": [{**given["studies"][0], "curves": given["studies"][0]["curves"][:3]}]}
    states = [copy.deepcopy(small) for _ in BROKEN]
    for state, (change, _) in zip(states, BROKEN, strict=True):
        change(state)
    with opened(data=states[-1], replaces="figure-static") as page:
        assert BROKEN[-1][1] in page.locator(".cw .wrong").inner_text()
        assert page.locator("#after").is_visible()
        assert page.locator("#figure-static img").is_visible()
        found = page.evaluate(RENDERED, [{"data": state} for state in states])
        for text, (_, complaint) in zip(found, BROKEN, strict=True):
            assert f"Results browser: {complaint}" in text
        # what was broken is fine without its fault
        assert "The same in numbers" in page.evaluate(RENDERED, [{"data": small}])[0]


def test_the_static_picture_is_hidden_when_there_is_something_in_its_place(opened: Callable) -> None:
    with opened(replaces="figure-static") as page:
        assert page.locator("#figure-static img").is_hidden()
        assert page.locator("#figure-static figcaption").is_visible()
