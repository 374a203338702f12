"""The certificate explorer as a reader uses it: every radius that it shows is the package's own."""

import contextlib
import io
import json
import math
import re
from contextlib import contextmanager

import pytest
import torch
from bare import bare_page, luminance

from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.names import HARD_BOUNDS, SOFT_BOUNDS
from clustr_core.drawing import widgets
from clustr_core.drawing.certificate_explorer import Preset, data
from clustr_core.models.classifiers import nearest_logits
from clustr_core.models.clusters import Clusters
from clustr_core.theory.examples import Configuration, planar_example, random_configuration
from clustr_core.theory.oracle import exact_nearest_rule_distance
from clustr_core.theory.pictures import planar_flips

NAME = "certificate-explorer"
TOLERANCE = 1e-6
SHORT = (",", ":")


@contextmanager
def explorer(browser, folder, made=None, **options):
    with bare_page(browser, folder, NAME, data() if made is None else made, **options) as page:
        yield page


def plane_of(page) -> tuple[torch.Tensor, Clusters, float]:
    """What the page shows: z, the clusters with their classes counted without holes, and sigma^2 from its Python."""
    z = [float(number) for number in page.locator("[data-prediction]").get_attribute("data-z").split(",")]
    rows = page.locator("[data-centroid]").evaluate_all(
        "all => all.map((each) => [each.dataset.x, each.dataset.y, each.dataset.class].map(Number))"
    )
    variance = float(re.search(r"full\(\(\d+,\), ([^,]+),", page.locator("pre").text_content()).group(1))
    places = torch.tensor([row[:2] for row in rows], dtype=torch.float64)
    labels = torch.tensor([int(row[2]) for row in rows]).unique(return_inverse=True)[1]
    return (
        torch.tensor([z], dtype=torch.float64),
        Clusters(places, labels, torch.full((len(rows),), variance).double()),
        variance,
    )


def radii_of(page) -> dict[str, float]:
    rows = page.locator("tr[data-bound]").evaluate_all(
        "all => all.map((row) => [row.dataset.bound, row.dataset.radius])"
    )
    return {bound: float(radius) for bound, radius in rows if radius}


def stop_of(page, bound: str) -> list[float]:
    """Where the page says that a bound stops."""
    return [float(value) for value in page.locator(f"tr[data-bound={bound}]").get_attribute("data-stop").split(",")]


def agrees(page, *, lipschitz: float = 1.0) -> dict[str, float]:
    """Every certified radius on the page is the package's; returns them all."""
    z, clusters, _ = plane_of(page)
    rule = page.locator("[data-prediction]").get_attribute("data-rule")
    found = radii_of(page)
    for bound in (*HARD_BOUNDS, *(SOFT_BOUNDS if rule == "soft" else ())):
        expected = float(certified_radius(z, clusters, bound=bound, rule=rule, lipschitz=lipschitz))
        assert found[bound] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), bound
    return found


def drag(page, node, dx: float, dy: float) -> None:
    box = node.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx / 2, y + dy / 2)
    page.mouse.move(x + dx, y + dy)
    page.mouse.up()


def random_starts(count: int) -> list[Preset]:
    shapes = [(2, 1), (3, 1), (2, 2), (2, 4), (3, 2), (4, 2)]
    drawn = [
        random_configuration(classes=classes, per_class=k, dim=2, points=1, seed=seed, variance=variance)
        for seed in range(count // len(shapes))
        for (classes, k), variance in zip(shapes, (0.05, 0.2, 0.3, 0.5, 1.0, 4.0), strict=True)
    ]
    return [Preset(f"drawn {n}", "", each, ("exact",)) for n, each in enumerate(drawn)]


def test_radii_and_nearest_rival_points_are_the_packages_on_random_configurations(browser, tmp_path):
    starts = random_starts(12)
    seen = 0
    with explorer(browser, tmp_path, data(starts)) as page:
        for n, start in enumerate(starts):
            page.get_by_label("Start from").select_option(str(n))
            found = agrees(page)
            distance, point = exact_nearest_rule_distance(start.configuration.embeddings, start.configuration.clusters)
            assert found["exact"] == pytest.approx(float(distance), abs=TOLERANCE)
            assert stop_of(page, "exact") == pytest.approx(point[0].tolist(), abs=1e-5)
            for bound in HARD_BOUNDS:
                walked = math.dist(stop_of(page, bound), start.configuration.embeddings[0].tolist())
                assert walked == pytest.approx(found[bound], abs=TOLERANCE)
            page.get_by_label("Rule").select_option("soft")
            soft = agrees(page)
            seen += soft["soft-dual"] > 1.01 * soft["soft-lse"] > 0
            assert all(soft["found"] >= soft[bound] - 1e-9 for bound in (*HARD_BOUNDS, *SOFT_BOUNDS))
    assert seen >= 2, "the best weights hardly ever differ from the shares: the search for them is not tested"


def test_coinciding_centroids_are_skipped_as_the_package_skips_them(browser, tmp_path):
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    clusters = Clusters(places, torch.tensor([0, 0, 1, 1]), torch.full((4,), 0.3).double())
    points = torch.tensor([[0.2, 0.1], [-0.3, -0.4], [0.9, 0.1]], dtype=torch.float64)
    pair = Configuration(points, clusters)
    both = [(n, rule) for n in range(3) for rule in ("nearest", "soft")]
    starts = [Preset(f"point {n}, {rule}", "", pair, ("exact",), point=n, rule=rule) for n, rule in both]
    with explorer(browser, tmp_path, data(starts)) as page:
        for n in range(len(starts)):
            page.get_by_label("Start from").select_option(str(n))
            agrees(page)


def test_the_flip_that_is_found_is_as_short_as_that_of_many_walks(browser, tmp_path):
    example = planar_example()
    plane = Configuration(example.embeddings[::2], example.clusters)
    expected = planar_flips(plane, directions=360, reach=8.0, rule="soft")
    starts = [Preset(f"point {n}", "", plane, ("exact",), rule="soft", point=n) for n in range(len(expected))]
    with explorer(browser, tmp_path, data(starts)) as page:
        for n, flip in enumerate(expected):
            page.get_by_label("Start from").select_option(str(n))
            found = radii_of(page)["found"]
            assert found == pytest.approx(flip, rel=1e-3)


def test_the_counterexamples_say_what_they_teach(browser, tmp_path):
    with explorer(browser, tmp_path) as page:
        for title, bound, broken in (("CE1", "second-nearest", "0.300"), ("CE4", "uncorrected", "0.12")):
            option = page.locator("option", has_text=title)
            page.get_by_label("Start from").select_option(option.get_attribute("value"))
            row = page.locator(f"tr[data-bound={bound}]")
            assert f"broken at {broken}" in row.text_content()
            assert page.locator(f"circle[data-disc={bound}]").count() == 1
            agrees(page)
        page.get_by_label("σ of the votes").fill("0.3")
        assert "broken at 0.420" in page.locator("tr[data-bound=uncorrected]").text_content()
        agrees(page)


def test_points_move_by_mouse_and_keys_and_the_radii_follow(browser, tmp_path):
    with explorer(browser, tmp_path) as page:
        before = agrees(page)
        z = page.locator("[data-point=z]")
        drag(page, z, 40, -30)
        moved = agrees(page)
        assert all(abs(moved[bound] - before[bound]) > 1e-3 for bound in HARD_BOUNDS)
        at = float(z.get_attribute("data-x"))
        z.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Shift+ArrowLeft")
        assert float(z.get_attribute("data-x")) == pytest.approx(at - 0.3, abs=2e-4)
        centroid = page.locator("[data-centroid='3']")
        place = centroid.get_attribute("data-x"), centroid.get_attribute("data-y")
        drag(page, centroid, -25, -40)
        assert centroid.get_attribute("data-class") == "1", "a drag is no click"
        assert (centroid.get_attribute("data-x"), centroid.get_attribute("data-y")) != place
        agrees(page)
        circle = page.locator("circle[data-disc=exact]")
        side = page.locator("clipPath rect").get_attribute("width")
        radius = float(circle.get_attribute("r")) / float(side) * 7.2
        assert radius == pytest.approx(agrees(page)["exact"], rel=1e-9)
        page.get_by_role("button", name="Reset").click()
        assert radii_of(page) == before


def test_a_centroid_changes_class_comes_and_goes(browser, tmp_path):
    with explorer(browser, tmp_path) as page:
        centroid = page.locator("[data-centroid='5']")
        centroid.click()
        assert centroid.get_attribute("data-class") == "3"
        agrees(page)
        centroid.press("c")
        assert centroid.get_attribute("data-class") == "0"
        page.get_by_role("button", name="Next class").click()
        assert centroid.get_attribute("data-class") == "1"
        agrees(page)
        add, remove = (page.get_by_role("button", name=f"{verb} a centroid") for verb in ("Add", "Remove"))
        remove = page.get_by_role("button", name="Remove the centroid")
        add.click()
        add.click()
        assert page.locator("[data-centroid]").count() == 8
        assert add.is_disabled()
        agrees(page)
        page.locator("[data-centroid='0']").press("Delete")
        assert page.locator("[data-centroid]").count() == 7
        assert page.evaluate("document.getElementById('host').shadowRoot.activeElement.dataset.centroid") == "0"
        agrees(page)
        for _ in range(5):
            remove.click()
        assert page.locator("[data-centroid]").count() == 2
        assert remove.is_disabled()


def test_a_single_class_has_no_radius_and_that_is_said(browser, tmp_path):
    plane = planar_example()
    pair = Clusters(plane.clusters.centroids[:2], torch.tensor([0, 1]), plane.clusters.variance[:2])
    made = data([Preset("pair", "", Configuration(plane.embeddings, pair), ("exact",))])
    made["presets"][0]["labels"] = [0, 3]
    with explorer(browser, tmp_path, made) as page:
        centroid = page.locator("[data-centroid='1']")
        centroid.press("c")
        assert radii_of(page) == {}
        assert page.get_by_text("Only one class is left").is_visible()
        assert page.get_by_role("button", name="Copy as Python").is_disabled()
        centroid.press("c")
        agrees(page)


def test_the_discs_and_numbers_shrink_with_the_lipschitz_constant(browser, tmp_path):
    with explorer(browser, tmp_path) as page:
        before = float(page.locator("circle[data-disc=exact]").get_attribute("r"))
        page.get_by_label("Lipschitz constant L").fill("2")
        agrees(page, lipschitz=2.0)
        assert float(page.locator("circle[data-disc=exact]").get_attribute("r")) == pytest.approx(before / 2)


def test_the_regions_have_the_class_that_the_rule_predicts(browser, tmp_path):
    """Each filled path, asked at a grid of places, holds those of its class and no others."""
    ask = """(root) => {
      const svg = root.querySelector('svg[data-rule]'), paths = [...root.querySelectorAll('[data-region]')];
      const box = root.querySelector('clipPath rect'), of = (name) => Number(box.getAttribute(name));
      return Array.from({length: 400}, (_, n) => {
        const [a, b] = [(n % 20 + 0.5) / 20, (Math.floor(n / 20) + 0.5) / 20], point = svg.createSVGPoint();
        [point.x, point.y] = [of('x') + a * of('width'), of('y') + b * of('height')];
        const held = paths.filter((each) => each.isPointInFill(point)).map((each) => Number(each.dataset.region));
        return [7.2 * a - 3.6, 3.6 - 7.2 * b, held];
      });
    }"""
    with explorer(browser, tmp_path) as page:
        _, clusters, _ = plane_of(page)
        answers = page.locator("section").evaluate(ask)
        places = torch.tensor([each[:2] for each in answers], dtype=torch.float64)
        expected = nearest_logits(places, clusters).argmax(dim=1).tolist()
        assert [each[2] for each in answers] == [[label] for label in expected]
        page.get_by_label("Rule").select_option("soft")
        soft = [each[2] for each in page.locator("section").evaluate(ask)]
        other = sum(held != [label] for held, label in zip(soft, expected, strict=True))
        assert 4 < other < 40, "the soft rule's regions are nearly those of the nearest rule, and not the same"


HEARD = "document.getElementById('host').shadowRoot.querySelector('[aria-live]').textContent"


def test_the_copied_python_prints_the_same_radii(browser, tmp_path):
    with explorer(browser, tmp_path) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator("[data-centroid='1']").press("c")
        page.locator("[data-centroid='0']").press("c")
        drag(page, page.locator("[data-point=z]"), 31, -17)
        page.get_by_label("Lipschitz constant L").fill("1.5")
        for rule in ("nearest", "soft"):
            page.get_by_label("Rule").select_option(rule)
            page.get_by_role("button", name="Copy as Python").click()
            page.wait_for_function(f"{HEARD} === 'copied'")
            page.wait_for_timeout(400)  # what the change of the rule had to say comes no more
            assert page.evaluate(HEARD) == "copied"
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(page.evaluate("navigator.clipboard.readText()"), {})
            lines = dict(line.split() for line in printed.getvalue().splitlines())
            shown = {bound: radius for bound, radius in radii_of(page).items() if bound in lines}
            assert list(lines) == [*HARD_BOUNDS, *(SOFT_BOUNDS if rule == "soft" else ())]
            assert {bound: float(radius) for bound, radius in lines.items()} == pytest.approx(shown, abs=TOLERANCE)


def test_a_screen_reader_is_told(browser, tmp_path):
    with explorer(browser, tmp_path) as page:
        page.locator("[data-point=z]").press("ArrowUp")
        page.wait_for_function(f"{HEARD}.includes('exact')")
        assert re.fullmatch(r"z is in class 1, nearest [\d.]+, pairwise [\d.]+, exact [\d.]+", page.evaluate(HEARD))


COLOURS = """(root) => {
  const [own, text, disc] = [root, ...['svg text', '[data-disc=exact]'].map((each) => root.querySelector(each))]
    .map((each) => getComputedStyle(each));
  return [own.color, own.backgroundColor, text.fill, disc.stroke];
}"""


@pytest.mark.parametrize("dark", [False, True])
def test_ink_differs_from_paper(browser, tmp_path, dark):
    with explorer(browser, tmp_path, dark=dark, replaces="figure-static") as page:
        ink, paper, *drawn = page.locator("section").evaluate(COLOURS)
        assert (luminance(paper) < 0.1) == dark
        for colour in (ink, *drawn):
            low, high = sorted((luminance(colour), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) > 7
        assert page.locator("#figure-static img").is_hidden()


def test_a_finger_on_a_narrow_page(browser, tmp_path):
    """Two columns become one, a tap changes a class, and no text is small."""
    with explorer(browser, tmp_path, width=390) as page:
        plot, table = page.locator(".ce-plot").bounding_box(), page.locator("table").bounding_box()
        assert table["y"] >= plot["y"] + plot["height"]
        centroid = page.locator("[data-centroid='4']")
        centroid.tap()
        assert centroid.get_attribute("data-class") == "3"
        agrees(page)
        finger = page.context.new_cdp_session(page)
        box = centroid.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        before = float(centroid.get_attribute("data-x")), float(centroid.get_attribute("data-y"))
        for kind, places in (("touchStart", [(x, y)]), ("touchMove", [(x - 30, y + 50)]), ("touchEnd", [])):
            points = [{"x": across, "y": down} for across, down in places]
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        assert float(centroid.get_attribute("data-x")) < before[0] - 0.5
        assert float(centroid.get_attribute("data-y")) < before[1] - 1
        assert page.evaluate("scrollY") == 0, "the page scrolled under the finger"
        assert centroid.get_attribute("data-class") == "3"
        agrees(page)
        texts = "(root) => [...root.querySelectorAll('*')].filter((each) => each.textContent)"
        sizes = page.locator("section").evaluate(f"{texts}.map((each) => parseFloat(getComputedStyle(each).fontSize))")
        assert min(sizes) >= 12
        page.get_by_role("button", name="Zoom in").click()
        names = page.locator("[data-centroid]").evaluate_all(
            "all => all.map((each) => each.getAttribute('aria-label'))"
        )
        assert all(re.match(r"centroid \d of class \d at ", name) for name in names)


def changed(**fields) -> dict:
    made = data()
    made["presets"][1] |= fields
    return made


COMPLAINTS = [
    ({}, "no data were given"),
    ([], "no data were given"),
    ({"classes": 3}, "classes: expected array, got 3"),
    (data() | {"presets": []}, "presets: expected at least one, got none"),
    (data() | {"bounds": {}}, "bounds.triangle: expected object, got nothing"),
    (changed(centroids=[[0, 1], [2]]), "presets.1.centroids: expected rows of 2 numbers, got [2]"),
    (
        changed(centroids=[[0, 1]] * 9),
        f"presets.1.centroids: expected 2 to 8 points, got {json.dumps([[0, 1]] * 9, separators=SHORT)}",
    ),
    (changed(labels=[0, 1, 7]), "presets.1.labels: expected a class below 4 for each of 3 centroids, got [0,1,7]"),
    (changed(variance=0), "presets.1.variance: expected a positive number, got 0"),
    (changed(rule="both"), 'presets.1.rule: expected nearest or soft, got "both"'),
    (changed(z=[0]), "presets.1.z: expected rows of 2 numbers, got [0]"),
    (changed(lesson=None), "presets.1.lesson: expected string, got null"),
]
RENDER = """async (cases) => {
  const widget = (await import('./module.mjs')).default;
  return cases.map((data) => {
    const el = document.createElement('div');
    document.body.append(el);
    widget.render({ el, model: { get: (name) => ({ data, replaces: 'figure-static' })[name], on() {} } });
    return [...el.querySelectorAll('[role=alert]')].map((each) => each.textContent);
  });
}"""


def test_what_is_wrong_with_the_data_is_said_in_the_box(browser, tmp_path):
    wrong = COMPLAINTS[0][0]
    with explorer(browser, tmp_path, wrong, replaces="figure-static") as page:
        assert page.get_by_role("alert").text_content() == "Certificate explorer: no data were given"
        said = page.evaluate(RENDER, [made for made, _ in COMPLAINTS])
        assert said == [[f"Certificate explorer: {complaint}"] for _, complaint in COMPLAINTS]
        assert page.locator("#after").is_visible()
        assert page.locator("#figure-static img").is_visible()


def test_the_joined_module_is_small():
    assert len(widgets.module(NAME).encode()) <= 60 * 1024
