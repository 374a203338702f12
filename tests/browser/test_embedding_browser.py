"""The browser of embeddings, as a reader uses it: its numbers are the package's, by mouse, keyboard and touch."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from bare import bare_page, luminance

from clustr_core.attacks.ball import pgd_path, random_point
from clustr_core.attacks.losses import cross_entropy
from clustr_core.data import to_float
from clustr_core.drawing import embedding_browser
from clustr_core.measuring.embeddings import nearest_examples
from clustr_core.measuring.pieces import some_test_images
from clustr_core.models.embed import embed_all
from clustr_core.numerics.distances import squared_distances

NAME, EPS, STEPS, STOPS, EXAMPLES = "embedding-browser", 0.1, 5, (0, 2, 5), 24
SLIDER = "input[type=range]"


@pytest.fixture(scope="module")
def found(runs, digits):
    """The data of two small methods, with a second map."""
    indices, _, _ = some_test_images(runs["ce"], digits, EXAMPLES)
    still = np.random.default_rng(0).normal(size=(len(indices), 2))
    places = pd.DataFrame({"index": indices, "x": still[:, 0], "y": still[:, 1]})
    maps = pd.concat([places.assign(method=method) for method in runs])
    return embedding_browser.data(runs, eps=EPS, steps=STEPS, stops=STOPS, examples=EXAMPLES, maps=maps, dataset=digits)


@pytest.fixture(scope="module")
def truth(runs, digits):
    """What the package says of ClusTR's images, clean and at the end of the attack."""
    run = runs["clustr"]
    model = run.model()
    indices, images, labels = some_test_images(run, digits, EXAMPLES)
    clean = to_float(images)
    start = random_point(clean, EPS, "linf", torch.Generator().manual_seed(0))
    *_, attacked = pgd_path(
        lambda x: cross_entropy(model(x), labels), clean, start, eps=EPS, step_size=2.5 * EPS / STEPS, steps=STEPS
    )
    gallery = embed_all(model.encoder, digits.train_images)
    with torch.no_grad():
        embeddings, logits = model.embed(attacked), model(attacked)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    rival = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    centred = gallery.double().numpy() - gallery.double().numpy().mean(axis=0)
    _, values, rows = np.linalg.svd(centred, full_matrices=False)
    return {
        "index": indices.tolist(),
        "attacked": attacked,
        "margin": (own - rival).numpy(),
        "prediction": logits.argmax(dim=1).tolist(),
        "label": labels.tolist(),
        "map": np.abs((embeddings.double().numpy() - gallery.double().numpy().mean(axis=0)) @ rows[:2].T),
        "share": values[:2] ** 2 / (values**2).sum(),
        "near": squared_distances(embeddings, gallery).topk(5, largest=False).indices,
        "near_clean": nearest_examples(model.encoder, images, digits.train_images, count=5),
    }


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory, found):
    with bare_page(browser, tmp_path_factory.mktemp("page"), NAME, found, replaces="figure-static") as page:
        # marks are at once where they would glide
        page.emulate_media(reduced_motion="reduce")
        yield page


@pytest.fixture
def page(opened):
    """The page as it is when it has just been opened."""
    opened.mouse.move(0, 0)
    opened.reload()
    opened.wait_for_function("window.rendered === true")
    return opened


def dots(page) -> dict[int, dict[str, float]]:
    """What the marks say of themselves, by the image's index."""
    sets = page.locator(".dot").evaluate_all("all => all.map((each) => ({ ...each.dataset }))")
    values = [{name: float(json.loads(value)) for name, value in each.items()} for each in sets]
    return {int(each["index"]): each for each in values}


def middle(page, index: int) -> tuple[float, float]:
    box = page.locator(f".dot[data-index='{index}']").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def chosen(page) -> int:
    return int(page.locator(".side").get_attribute("data-index"))


def said(page) -> str:
    return page.locator("[aria-live]").inner_text()


def to_the_end_of_clustr(page) -> None:
    """Choose ClusTR and move the slider to the last stop, by keyboard."""
    page.get_by_label("Method").focus()
    page.keyboard.type("ClusTR")
    page.get_by_label("Attack").focus()
    page.keyboard.press("End")


def alone(page) -> list[int]:
    """Images whose mark no other one covers."""
    places = {index: middle(page, index) for index in dots(page)}
    return [
        a
        for a, p in places.items()
        if all(np.hypot(p[0] - q[0], p[1] - q[1]) > 14 for b, q in places.items() if a != b)
    ]


def test_positions_margins_and_neighbours_are_those_of_the_package(page, truth):
    to_the_end_of_clustr(page)
    shown = dots(page)
    assert sorted(shown) == truth["index"]
    each = [shown[index] for index in truth["index"]]
    assert [d["margin"] for d in each] == pytest.approx(truth["margin"].tolist(), rel=1e-6, abs=1e-6)
    # a principal axis has no sign of its own
    places = np.abs([[d["x"], d["y"]] for d in each])
    np.testing.assert_allclose(places, truth["map"], rtol=0, atol=1e-6)
    assert [d["prediction"] for d in each] == truth["prediction"]
    assert [d["wrong"] for d in each] == [p != y for p, y in zip(truth["prediction"], truth["label"], strict=True)]
    page.locator(".map").first.focus()
    while chosen(page) != truth["index"][0]:
        page.keyboard.press("PageDown")
    for row in (0, 1, 2, 3):
        assert chosen(page) == truth["index"][row]
        near = [
            page.locator(f".near[data-step='{step}'] li").evaluate_all("all => all.map((each) => +each.dataset.index)")
            for step in (0, STEPS)
        ]
        assert near == [truth["near_clean"][row].tolist(), truth["near"][row].tolist()]
        page.keyboard.press("PageDown")
    assert f"{100 * sum(truth['share']):.1f} % of their variance" in page.locator("[data-part=notes]").inner_text()


def test_the_pictures_are_the_images_clean_and_attacked(page, truth, digits):
    to_the_end_of_clustr(page)
    index = chosen(page)
    row = truth["index"].index(index)
    drawn = page.locator(".pair canvas").evaluate_all(
        "all => all.map((each) => [...each.getContext('2d').getImageData(0, 0, 8, 8).data])"
    )
    drawn = [pixels[::4] for pixels in drawn]
    assert drawn[0] == digits.test_images[index].flatten().tolist()
    np.testing.assert_allclose(drawn[1], 255 * truth["attacked"][row].flatten(), atol=255 * EPS / 14 + 0.51)
    assert np.abs(np.subtract(drawn[1], drawn[0])).max() > 0.9 * 255 * EPS


def test_what_is_misclassified_has_a_ring_and_is_found_by_a_button(page, truth):
    to_the_end_of_clustr(page)
    wrong = {i for i, p, y in zip(truth["index"], truth["prediction"], truth["label"], strict=True) if p != y}
    assert 0 < len(wrong) < EXAMPLES
    ringed = page.locator(".dot:has(.wrong-ring)").evaluate_all("all => all.map((each) => +each.dataset.index)")
    assert set(ringed) == wrong
    assert page.locator("[data-part=status]").get_attribute("data-right") == str(EXAMPLES - len(wrong))
    visited = set()
    for _ in wrong:
        page.get_by_text("Next misclassified").click()
        visited.add(chosen(page))
        assert "wrong" in said(page)
    assert visited == wrong


def test_a_pointer_shows_an_image_and_a_click_keeps_it(page):
    first, second = alone(page)[:2]
    page.mouse.move(*middle(page, first))
    assert chosen(page) == first
    page.mouse.click(*middle(page, first))
    assert f"Test image {first}," in said(page)
    page.mouse.move(*middle(page, second))
    assert chosen(page) == first
    page.keyboard.press("Escape")
    page.mouse.move(*middle(page, first))
    page.mouse.move(*middle(page, second))
    assert chosen(page) == second


def test_a_map_that_is_zoomed_in_is_dragged_and_shows_images(page):
    plot = page.locator(".map").first
    plot.focus()
    before = len(page.locator(".dot image").all())
    for _ in range(3):
        page.keyboard.press("+")
    assert float(plot.get_attribute("data-zoom")) == pytest.approx(1.5**3)
    assert (before, page.locator(".dot image").count()) == (0, EXAMPLES)
    box = plot.bounding_box()
    start = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    index = chosen(page)
    place = middle(page, index)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + 20, start[1] - 30, steps=4)
    page.mouse.up()
    # a drag chooses nothing
    assert np.subtract(middle(page, index), place) == pytest.approx([20, -30], abs=4.1)
    page.keyboard.press("0")
    assert plot.get_attribute("data-zoom") == "1"


def test_the_wheel_scrolls_the_page_but_with_ctrl_zooms_where_it_points(page):
    plot = page.locator(".map").first
    bounds = plot.bounding_box()
    centre = bounds["x"] + bounds["width"] / 2, bounds["y"] + bounds["height"] / 2
    index = max(dots(page), key=lambda each: np.hypot(*np.subtract(middle(page, each), centre)))
    place = middle(page, index)
    page.mouse.move(*place)
    page.mouse.wheel(0, -100)
    assert plot.get_attribute("data-zoom") == "1"
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_function("document.querySelector('#host').shadowRoot.querySelector('.map').dataset.zoom > 1.2")
    # the middle of a mark's box is not quite its place
    assert np.subtract(middle(page, index), place) == pytest.approx([0, 0], abs=3)


def test_arrow_keys_choose_in_their_direction(page):
    page.locator(".map").first.focus()
    moves = 0
    for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowLeft", 0, -1), ("ArrowUp", 1, -1), ("ArrowDown", 1, 1)):
        before, place = chosen(page), middle(page, chosen(page))
        page.keyboard.press(key)
        after = chosen(page)
        if after != before:
            moves += 1
            assert sign * (middle(page, after)[axis] - place[axis]) > 0
            assert f"Test image {after}," in said(page)
    assert moves >= 3


def test_the_second_map_stays_and_the_rest_follows(page, found):
    page.get_by_label("Map", exact=True).select_option("still")
    still = dict(zip(found["test"]["index"], found["methods"][0]["still"], strict=True))
    for step in (0, 1):
        assert {index: [d["x"], d["y"]] for index, d in dots(page).items()} == still
        if not step:
            page.locator(SLIDER).press("End")
    expected = dict(zip(found["test"]["index"], found["methods"][0]["margin"][-1], strict=True))
    assert {index: d["margin"] for index, d in dots(page).items()} == expected


def test_play_goes_to_the_end_and_stops(page):
    plot = page.locator(".map").first
    page.get_by_text("Play").click()
    assert plot.get_attribute("data-step") == str(STOPS[1])
    page.get_by_text("Play", exact=True).wait_for()
    assert plot.get_attribute("data-step") == str(STOPS[2])
    page.evaluate("window.cleanup()")


def test_one_class_stands_out_and_keys_stay_in_it(page):
    label = int(page.locator(".dot").first.get_attribute("data-label"))
    page.locator(".classes button").nth(label).click()
    others = page.locator(".dot.aside").evaluate_all("all => all.map((each) => +each.dataset.label)")
    assert label not in others
    assert len(others) == sum(d["label"] != label for d in dots(page).values())
    page.locator(".map").first.focus()
    for _ in range(5):
        page.keyboard.press("PageDown")
        assert dots(page)[chosen(page)]["label"] == label


def test_the_static_picture_gives_way_and_focus_is_seen(page):
    assert not page.locator("#figure-static img").is_visible()
    page.get_by_label("Method").focus()
    page.keyboard.press("Tab")
    ring = page.evaluate("getComputedStyle(document.querySelector('#host').shadowRoot.activeElement).outlineWidth")
    assert ring == "2px"


def test_a_narrow_page_by_touch(browser, tmp_path, found):
    with bare_page(browser, tmp_path, NAME, found, width=390) as page:
        plot, side = page.locator(".map").first.bounding_box(), page.locator(".side").bounding_box()
        assert side["y"] > plot["y"] + plot["height"]
        index = alone(page)[0]
        page.touchscreen.tap(*middle(page, index))
        assert chosen(page) == index
        page.emulate_media(reduced_motion="reduce")
        placed = {}
        for key in ("End", "ArrowLeft", "Home"):
            page.locator(SLIDER).press(key)
            placed[key] = middle(page, index)
        assert placed["End"] != pytest.approx(placed["Home"], abs=10)
        # a glide past the middle stop: in half of its time there, in all of it at the end
        page.emulate_media(reduced_motion="no-preference")
        page.clock.install()
        page.clock.pause_at(page.evaluate("Date.now() + 1000"))
        page.locator(SLIDER).press("End")
        page.clock.run_for(200)
        assert middle(page, index) == pytest.approx(placed["ArrowLeft"], abs=4)
        page.clock.run_for(300)
        assert middle(page, index) == pytest.approx(placed["End"], abs=0.1)
        # two fingers that part
        x, y = plot["x"] + plot["width"] / 2, plot["y"] + plot["height"] / 2
        fingers = page.context.new_cdp_session(page)
        for kind, apart in (("touchStart", 20), ("touchMove", 30), ("touchMove", 50), ("touchEnd", None)):
            touches = [] if apart is None else [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
            fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
        assert float(page.locator(".map").first.get_attribute("data-zoom")) == pytest.approx(2.5, rel=0.05)
        assert chosen(page) == index
        sizes = page.locator(".cw *").evaluate_all(
            "all => all.map((each) => parseFloat(getComputedStyle(each).fontSize))"
        )
        assert min(sizes) >= 12


@pytest.mark.parametrize("dark", [False, True])
def test_ink_is_read_on_paper(browser, tmp_path, found, dark):
    with bare_page(browser, tmp_path, NAME, found, dark=dark) as page:
        style = "(each, name) => getComputedStyle(each)[name]"
        paper = luminance(page.locator(".cw").evaluate(style, "backgroundColor"))
        assert (paper < 0.1) == dark
        for place, name in ((".cw", "color"), (".map text", "fill"), (".note", "color"), (".dot", "stroke")):
            ink = luminance(page.locator(place).first.evaluate(style, name))
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 4.5, place


# where the data are spoilt, with what (None: the entry is taken away), and what is said
SPOILT = (
    (["methods", 1, "margin"], None, "methods.1.margin: expected array, got nothing"),
    (["methods", 0, "x", 1], [1], f"methods.0.x: expected rows of {EXAMPLES} numbers, got [1]"),
    (["methods", 0, "neighbours", 0, 1], [1, 2], "methods.0.neighbours.0: expected rows of 5 numbers, got [1,2]"),
    (["methods", 0, "prediction", 0, 0], 10, "methods.0.prediction: expected whole numbers below 10, got 10"),
    (["methods", 0, "still"], [[0, 1]], f"methods.0.still: expected {EXAMPLES} entries, got 1"),
    (["test", "pixels"], "AAAA", f"test.pixels: expected {64 * EXAMPLES} bytes in base64, got 3"),
    (["train", "pixels"], "%", "train.pixels: expected bytes in base64, got another text"),
    (["classes", 3, "color"], None, "classes.3.color: expected string, got nothing"),
    (["stops"], [0, 5, 2], "stops: expected numbers that rise from 0, got [0,5,2]"),
    (["attack", "eps"], "8/255", 'attack.eps: expected number, got "8/255"'),
    (["methods"], [], "methods: expected at least one, got none"),
)


def test_data_that_are_wrong_are_named_and_the_page_lives(browser, tmp_path, found):
    with bare_page(browser, tmp_path, NAME, {}, replaces="figure-static") as page:
        assert "no data were given" in page.locator("[role=alert]").inner_text()
        assert page.locator("#after").is_visible()
        assert page.locator("#figure-static img").is_visible()
        page.evaluate("(data) => { window.good = data; }", found)
        render = """async ([where, value]) => {
          const widget = (await import("./module.mjs")).default;
          const data = structuredClone(window.good);
          const last = where.pop();
          const parent = where.reduce((inside, name) => inside[name], data);
          if (value === null) delete parent[last];
          else parent[last] = value;
          const el = document.createElement("div");
          widget.render({ model: { get: (name) => (name === "data" ? data : undefined) }, el });
          return [...el.querySelectorAll("[role=alert]")].map((alert) => alert.textContent);
        }"""
        assert page.evaluate(render, [["dataset"], "digits"]) == []
        for where, value, complaint in SPOILT:
            assert page.evaluate(render, [where, value]) == [f"Browser of embeddings: {complaint}"]
