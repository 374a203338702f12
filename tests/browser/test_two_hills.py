"""Two hills, as a reader drives it: both losses, the steps of both attacks and the truth are the package's."""

import json
from copy import deepcopy

import pytest
import torch
from bare import bare_page

from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.paper import paper_pgd, paper_surface
from clustr_core.drawing import two_hills
from clustr_core.theory.toys import Toy, cluster_toy

WALL = 0.03
TOY = cluster_toy(side=1, examples=8)
DATA = two_hills.data(TOY)
SEED, WIDTH = DATA["seed"], DATA["view"][1] - DATA["view"][0]
LOSSES = {"scores": cross_entropy, "ce": cross_entropy, "margin": margin_loss}


def exact(toy):
    """A toy in double precision, in which the widget computes too."""
    return Toy(deepcopy(toy.model).double(), toy.images.double(), toy.labels)


def at_the_wall():
    """The toy moved into a corner of [0, 1]^2, where balls and starts are cut."""
    shift = 0.475 - WALL
    toy = cluster_toy(side=1, examples=8)
    toy.model.centroids.sub_(shift)
    return Toy(toy.model, (toy.images - shift).clamp_min(0), toy.labels)


def image_tensor(x, y, side=1):
    return torch.tensor([[x, y]], dtype=torch.float64)[:, :, None, None].expand(-1, -1, side, side).contiguous()


def outputs(kind, toy):
    return paper_surface(toy.model) if kind == "scores" else toy.model


def losses_and_gradients(kind, toy, labels, places):
    points = torch.tensor(places, dtype=torch.float64)[:, :, None, None].requires_grad_()
    loss = LOSSES[kind](outputs(kind, toy)(points), torch.tensor(labels))
    (gradient,) = torch.autograd.grad(loss.sum(), points)
    return torch.cat([loss.detach()[:, None], gradient.flatten(1)], dim=1).tolist()


def loss_and_gradient(kind, toy, label, x, y):
    return losses_and_gradients(kind, toy, [label], [[x, y]])[0]


def paper_attack(toy, image, label, eps, **options):
    return paper_pgd(paper_surface(toy.model), image, torch.tensor([label]), eps=eps, **options)


def correct_attack(toy, image, label, eps, *, loss="margin", **options):
    return pgd(toy.model, image, torch.tensor([label]), eps=eps, step_size=eps / 8, loss=loss, **options)


def numbers(locator, *names):
    found = locator.evaluate("element => ({ ...element.dataset })")
    return [float(found[name]) for name in names]


def set_eps(page, in_255):
    page.get_by_label("eps", exact=True).fill(str(in_255))


def rows(page, name):
    found = page.locator(f"[data-ledger={name}] tr[data-restart]")
    return found.evaluate_all("all => all.map((row) => ({ ...row.dataset }))")


def moved(page, handle, *keys):
    handle.focus()
    for key in keys:
        page.keyboard.press(key)


@pytest.fixture
def page(browser, tmp_path):
    with bare_page(browser, tmp_path, "two-hills", DATA) as page:
        yield page


def test_losses_gradients_and_truth_are_the_packages_at_many_points(page):
    toy, generator = exact(TOY), torch.Generator().manual_seed(0)
    places = (0.4 + 0.2 * torch.rand(160, 2, generator=generator, dtype=torch.float64)).tolist()
    labels = [n % 4 for n in range(len(places))]
    found = page.evaluate(
        """async ([toy, kinds, labels, places]) => {
        const { climbed, largestMargin } = await import("./module.mjs");
        const one = (kind, label, at) => {
          const { loss, gradient, wrong } = climbed(toy, kind, label, at);
          return [loss, ...gradient, Number(wrong), largestMargin(toy, at, label, 0.02).margin];
        };
        return kinds.map((kind) => places.map((at, n) => one(kind, labels[n], at))); }""",
        [DATA, list(LOSSES), labels, places],
    )
    images = torch.tensor(places, dtype=torch.float64)[:, :, None, None]
    wrong = (toy.model(images).argmax(dim=1) != torch.tensor(labels)).tolist()
    margins = Toy(toy.model, images, torch.tensor(labels)).largest_margin(0.02).tolist()
    assert 20 < sum(wrong) < 140
    for kind, each in zip(LOSSES, found, strict=True):
        expected = losses_and_gradients(kind, toy, labels, places)
        for n, (*values, misclassified, margin) in enumerate(each):
            assert values == pytest.approx(expected[n], rel=1e-9, abs=1e-6)
            assert bool(misclassified) == wrong[n]
            assert margin == pytest.approx(margins[n], abs=1e-6)


def test_the_image_follows_mouse_and_keys_and_every_number_follows_the_image(page):
    toy, plot = exact(TOY), page.locator("[data-plot=paper]")
    handle = plot.locator(".handle")
    before = numbers(page.locator("[data-read=paper]"), "x", "y")
    moved(page, handle, "ArrowRight", "ArrowRight", "Shift+ArrowUp", "ArrowLeft", "ArrowDown")
    by_keys = numbers(page.locator("[data-read=paper]"), "x", "y")
    assert by_keys == pytest.approx([before[0] + 0.001, before[1] + 0.004], abs=1e-9)
    box = handle.locator(".halo").first.bounding_box()
    middle = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
    inside = page.locator("[data-plot=paper] image").bounding_box()
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 20, middle[1] - 10)
    page.mouse.move(middle[0] + 40, middle[1] - 25)
    page.mouse.up()
    page.mouse.move(0, 0)
    unit = WIDTH / inside["width"]
    dragged = numbers(page.locator("[data-read=pgd]"), "x", "y")
    # the mark's middle goes to the pointer, which took it up to a pixel away
    assert dragged == pytest.approx([by_keys[0] + 40 * unit, by_keys[1] + 25 * unit], abs=1.5 * unit)
    for name, kind in (("paper", "scores"), ("pgd", "margin")):
        read = page.locator(f"[data-read={name}]")
        expected = loss_and_gradient(kind, toy, 0, *dragged)
        assert numbers(read, "loss", "dx", "dy") == pytest.approx(expected, rel=1e-9, abs=1e-6)
    truth = Toy(toy.model, image_tensor(*dragged), torch.tensor([0])).largest_margin(DATA["eps"]).item()
    assert numbers(page.locator("[data-truth]"), "margin") == pytest.approx([truth], abs=1e-6)
    page.get_by_role("button", name="Put it back").click()
    assert numbers(page.locator("[data-read=paper]"), "x", "y") == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize(("loss", "in_255"), [("margin", 6), ("ce", 8)])
def test_every_step_of_both_attacks_is_the_packages(page, loss, in_255):
    toy, eps = exact(TOY), in_255 / 255
    image = toy.images[:1]
    page.get_by_label("PGD climbs").select_option(loss)
    set_eps(page, in_255)
    page.get_by_role("button", name="Back to the start").click()
    start = [value + eps * (2 * draw - 1) for value, draw in zip(DATA["images"][0], DATA["starts"][0], strict=True)]
    plots = {name: page.locator(f"[data-plot={name}]") for name in ("paper", "pgd")}
    for plot in plots.values():
        assert numbers(plot, "step", "x", "y") == pytest.approx([0, *start], abs=1e-9)
    steps = 0
    page.get_by_role("button", name="Step").focus()
    while page.locator("[data-ledger] tr[data-restart]").count() < 2:
        page.keyboard.press("Enter")
        steps += 1
        if steps > 4 and steps % 4:
            continue  # the package walks each path anew: after a few steps every fourth is enough
        ends = {
            "paper": paper_attack(toy, image, 0, eps, steps=steps, restarts=1, seed=SEED),
            "pgd": correct_attack(toy, image, 0, eps, loss=loss, steps=steps, seed=SEED),
        }
        for name, kind in (("paper", "scores"), ("pgd", loss)):
            expected = ends[name].adversarial.flatten().tolist()
            assert numbers(plots[name], "x", "y") == pytest.approx(expected, abs=1e-6)
            here = loss_and_gradient(kind, toy, 0, *numbers(plots[name], "x", "y"))
            assert numbers(plots[name], "loss", "dx", "dy") == pytest.approx(here, rel=1e-9, abs=1e-6)
            assert plots[name].get_attribute("data-wrong") == str(ends[name].success.item()).lower()
    assert steps > 3


def test_each_row_of_the_ledgers_is_a_restart_of_the_package(browser, tmp_path):
    toy, eps, label = exact(TOY), 7 / 255, 2
    firsts = [two_hills.data(TOY, seed=seed)["starts"][0] for seed in range(10)]
    with bare_page(browser, tmp_path, "two-hills", DATA | {"starts": firsts}) as page:
        page.get_by_label("image of", exact=True).select_option(str(label))
        set_eps(page, 7)
        page.get_by_role("button", name="Run all 10 restarts").click()
        found = {name: rows(page, name) for name in ("paper", "pgd")}
    image = image_tensor(*DATA["images"][label])
    attacks = {"paper": (paper_attack, "scores"), "pgd": (correct_attack, "margin")}
    for name, (attack, kind) in attacks.items():
        for seed, row in enumerate(found[name]):
            result = attack(toy, image, label, eps, steps=20, restarts=1, seed=seed)
            end = result.adversarial.flatten().tolist()
            assert [float(row["x"]), float(row["y"])] == pytest.approx(end, abs=1e-6)
            loss = loss_and_gradient(kind, toy, label, *end)[0]
            assert float(row["loss"]) == pytest.approx(loss, abs=1e-6)
            assert row["wrong"] == str(result.success.item()).lower()
    assert len(found["paper"]) == 10
    # a success ends the correct attack
    assert [row["wrong"] for row in found["pgd"]] == ["false"] * (len(found["pgd"]) - 1) + ["true"]


def verdicts(page):
    found = page.locator("[data-verdict]").evaluate_all("all => all.map((each) => ({ ...each.dataset }))")
    return {each["verdict"]: each for each in found}


def test_the_verdicts_are_those_of_all_ten_restarts(page):
    toy = exact(TOY)
    page.get_by_role("button", name="Run all 10 restarts").click()
    for label, in_255 in ((0, 6.5), (3, 5), (3, 8)):
        page.get_by_label("image of", exact=True).select_option(str(label))
        set_eps(page, in_255)
        image, eps = image_tensor(*DATA["images"][label]), in_255 / 255
        paper = paper_attack(toy, image, label, eps, seed=SEED)
        correct = correct_attack(toy, image, label, eps, steps=20, restarts=10, seed=SEED)
        found = verdicts(page)
        assert {each["over"] for each in found.values()} == {"true"}
        assert found["paper"]["broken"] == str(paper.success.item()).lower()
        assert found["pgd"]["broken"] == str(correct.success.item()).lower()
        truth = Toy(toy.model, image, torch.tensor([label])).largest_margin(eps).item()
        assert numbers(page.locator("[data-truth]"), "margin") == pytest.approx([truth], abs=1e-6)
        assert correct.success.item() == (truth > 0) == (in_255 > 6)


def test_a_lost_success_is_found_and_the_package_loses_it_too(page, monkeypatch):
    page.get_by_label("image of", exact=True).select_option("3")
    page.get_by_role("button", name="Find a lost success").click()
    verdict, found = page.locator("[data-verdict=paper]"), rows(page, "paper")
    lost = [row for row in found if row["lost"] == "true"]
    assert f"The success of restart {lost[0]['restart']}" in verdict.inner_text()
    assert "The closed form says otherwise" in verdict.inner_text()
    kept = [row for row in found if row["kept"] == "true"]
    assert [(row["wrong"], float(row["loss"])) for row in kept] == [("false", max(float(row["loss"]) for row in found))]
    eps = float(page.get_by_label("eps", exact=True).input_value()) / 255
    seed = int(page.get_by_text("seed ").inner_text().removeprefix("seed "))
    draws = page.evaluate("async (seed) => (await import('./module.mjs')).draws(seed, 20)", seed)
    noise = torch.tensor(DATA["starts"] if seed == SEED else draws, dtype=torch.float64).reshape(10, 1, 2, 1, 1)
    toy, image = exact(TOY), image_tensor(*DATA["images"][3])
    success = []
    for restarts in (int(lost[0]["restart"]), 10):
        drawn = iter(noise)
        monkeypatch.setattr(torch, "rand", lambda *_, drawn=drawn, **__: next(drawn))
        success.append(paper_attack(toy, image, 3, eps, restarts=restarts).success.item())
    assert success == [True, False]


def test_in_512_dimensions_a_restart_is_the_packages_and_no_start_lies_far_from_the_image(page):
    toy, eps = exact(cluster_toy(examples=8)), DATA["eps"]
    image = toy.images[:1]
    for seed in (0, 1):
        noise = torch.rand(512, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        common = {"image": DATA["images"][0], "label": 0, "eps": eps, "noise": noise, "steps": 20}
        walks = [
            common | {"kind": "scores", "stepSize": DATA["paper_step_size"], "clipped": False},
            common | {"kind": "margin", "stepSize": eps / 8, "clipped": True},
        ]
        found = page.evaluate(
            """async ([toy, walks]) => {
            const { walk } = await import("./module.mjs");
            return walks.map((each) => walk(toy, each).at(-1)); }""",
            [DATA, walks],
        )
        results = [
            paper_attack(toy, image, 0, eps, steps=20, restarts=1, seed=seed),
            correct_attack(toy, image, 0, eps, steps=20, seed=seed),
        ]
        for end, result in zip(found, results, strict=True):
            assert end["at"] == pytest.approx(result.adversarial.mean(dim=(2, 3)).flatten().tolist(), abs=1e-6)
            assert end["wrong"] == result.success.item()
    page.get_by_label("512 dimensions").check()
    page.get_by_role("button", name="Back to the start").click()
    x, y = DATA["images"][0]
    start = numbers(page.locator("[data-plot=paper]"), "x", "y")
    assert max(abs(start[0] - x), abs(start[1] - y)) < 0.2 * eps


def test_near_the_wall_only_the_papers_start_leaves_the_cube(browser, tmp_path):
    toy, eps = at_the_wall(), 12 / 255
    data = two_hills.data(toy) | {"view": [0.0, 0.18], "eps": eps, "starts": [[0.01, 0.02], [0.6, 0.9]]}
    toy = exact(toy)
    with bare_page(browser, tmp_path, "two-hills", data) as page:
        page.get_by_role("button", name="Back to the start").click()
        x, y = data["images"][0]
        free = [x + eps * (2 * 0.01 - 1), y + eps * (2 * 0.02 - 1)]
        assert min(free) < 0
        assert numbers(page.locator("[data-plot=paper]"), "x", "y") == pytest.approx(free, abs=1e-9)
        clipped = [max(value, 0.0) for value in free]
        assert numbers(page.locator("[data-plot=pgd]"), "x", "y") == pytest.approx(clipped, abs=1e-9)
        truth = Toy(toy.model, image_tensor(x, y), torch.tensor([0])).largest_margin(eps).item()
        assert numbers(page.locator("[data-truth]"), "margin") == pytest.approx([truth], abs=1e-6)
        page.get_by_role("button", name="Step").click()
        assert min(numbers(page.locator("[data-plot=paper]"), "x", "y")) >= 0


def test_an_image_of_another_class_needs_no_attack(page):
    page.locator("[data-plot=pgd] .handle").focus()
    for _ in range(8):
        page.keyboard.press("Shift+ArrowRight")
    assert "misclassified" in page.locator("[data-truth]").inner_text()
    assert "as it stands" in page.locator("[data-verdict=pgd]").inner_text()
    assert rows(page, "pgd") == []
    assert rows(page, "paper")
    page.get_by_role("button", name="Find a lost success").click()
    assert page.locator(".cw").get_by_text("no lost success was found").first.is_visible()
    page.locator("[data-plot=pgd] .handle").focus()
    # the image stays in the picture
    for _ in range(30):
        page.keyboard.press("Shift+ArrowRight")
    assert numbers(page.locator("[data-read=pgd]"), "x") == pytest.approx([DATA["view"][1]], abs=1e-12)


def test_new_starts_are_other_ones_and_a_seed_repeats_its_own(page):
    page.get_by_role("button", name="Run all 10 restarts").click()
    seen = [json.dumps(rows(page, "paper"))]
    for _ in range(2):
        page.get_by_role("button", name="New random starts").click()
        seen.append(json.dumps(rows(page, "paper")))
    assert page.get_by_text("seed 3").is_visible()
    assert len(set(seen)) == 3
    draws = "async (seed) => (await import('./module.mjs')).draws(seed, 20)"
    first, again, other = (page.evaluate(draws, seed) for seed in (3, 3, 2))
    assert first == again != other
    assert all(0 <= draw < 1 for draw in first)
    eps, ends = DATA["eps"], rows(page, "paper")
    image = DATA["images"][0]
    starts = [[image[k] + eps * (2 * first[2 * n + k] - 1) for k in (0, 1)] for n in range(10)]
    stood = [[float(row["x"]), float(row["y"])] for row in ends if row["steps"] == "0"]
    assert stood
    assert all(any(place == pytest.approx(start, abs=1e-9) for start in starts) for place in stood)


WALKED = """(step) => {
  const { dataset } = document.getElementById("host").shadowRoot.querySelector("[data-plot=paper]");
  return dataset.restart === "1" && Number(dataset.step) >= step;
}"""


def test_play_walks_until_it_is_paused_and_a_screen_reader_is_told(page):
    plot, said = page.locator("[data-plot=paper]"), page.locator("[aria-live]")
    page.get_by_role("button", name="Back to the start").click()
    page.get_by_role("button", name="Play").click()
    page.wait_for_function(WALKED, arg=2)
    page.get_by_role("button", name="Pause").click()
    stood = plot.get_attribute("data-step")
    page.wait_for_timeout(400)
    assert plot.get_attribute("data-step") == stood
    page.get_by_role("button", name="Step").click()
    assert f"step {int(stood) + 1}" in said.text_content()
    page.get_by_role("button", name="Run all 10 restarts").click()
    assert "It keeps restart" in said.text_content()
    page.get_by_role("button", name="Play").click()
    page.wait_for_function(WALKED, arg=1)
    page.evaluate("window.cleanup()")
    left = plot.get_attribute("data-step")
    page.wait_for_timeout(400)
    assert plot.get_attribute("data-step") == left


def test_on_a_phone_the_planes_are_stacked_and_a_finger_moves_the_image(browser, tmp_path):
    with bare_page(browser, tmp_path, "two-hills", DATA, width=390) as page:
        left, right = (page.locator(f"[data-plot={name}] image").bounding_box() for name in ("paper", "pgd"))
        assert right["y"] > left["y"] + left["height"]
        assert left["width"] > 250
        heights = page.locator(".cw button, .cw select").evaluate_all("all => all.map((each) => each.offsetHeight)")
        assert min(heights) >= 32
        before = numbers(page.locator("[data-read=paper]"), "x", "y")
        page.locator("[data-plot=paper]").scroll_into_view_if_needed()
        box = page.locator("[data-plot=paper] .halo").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        finger = page.context.new_cdp_session(page)
        for kind, places in (("Start", [(x, y)]), ("Move", [(x + 30, y)]), ("Move", [(x + 50, y - 40)]), ("End", [])):
            touches = [{"x": a, "y": b} for a, b in places]
            finger.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touches})
        unit = WIDTH / left["width"]
        after = numbers(page.locator("[data-read=paper]"), "x", "y")
        assert after == pytest.approx([before[0] + 50 * unit, before[1] + 40 * unit], abs=1.5 * unit)


CONTRASTS = """() => {
  const root = document.getElementById("host").shadowRoot.querySelector(".cw");
  const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((each) => {
    const share = each / 255;
    return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const light = (colour) => { const [r, g, b] = channels(colour); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/rgba\\(.*, 0\\)|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...root.querySelectorAll("*")].filter((element) => !element.closest(".unseen, .on-map, style") &&
    [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((element) => {
    const style = getComputedStyle(element);
    const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [high, low] = [light(ink), light(ground(element))].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    return { text: element.textContent.slice(0, 40), contrast, size: parseFloat(style.fontSize) };
  });
}"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_is_large_and_stands_out(browser, tmp_path, dark):
    with bare_page(browser, tmp_path, "two-hills", DATA, dark=dark) as page:
        page.get_by_role("button", name="Run all 10 restarts").click()
        texts = page.evaluate(CONTRASTS)
        paper = page.locator(".cw").evaluate("element => getComputedStyle(element).backgroundColor")
    assert paper == ("rgb(23, 25, 28)" if dark else "rgb(255, 255, 255)")
    assert len(texts) > 60
    assert [text for text in texts if text["contrast"] < 4.5 or text["size"] < 12] == []


def test_focus_is_seen_on_the_image_and_on_the_controls(page):
    handle = page.locator("[data-plot=paper] .handle")
    still = handle.screenshot()
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert handle.screenshot() != still
    names = page.locator(".cw :is(button, select, input, .handle)").evaluate_all(
        "all => all.map((each) => each.ariaLabel || each.textContent || each.closest('label').textContent)"
    )
    assert len(names) == 13
    assert all(names)


def test_the_static_picture_gives_way_to_the_widget(browser, tmp_path):
    with bare_page(browser, tmp_path, "two-hills", DATA, replaces="figure-static") as page:
        assert not page.locator("#figure-static img").is_visible()
        assert page.locator("#figure-static figcaption").is_visible()


def test_it_can_be_used_as_soon_as_it_is_there_and_not_while_it_is_hidden(page):
    used = page.evaluate(
        """async () => {
        const { default: widget } = await import("./module.mjs");
        const state = await (await fetch("./state.json")).json();
        const model = { get: (name) => state[name] };
        const one = (hidden) => {
          const el = document.createElement("div");
          el.hidden = hidden;
          document.body.append(el);
          widget.render({ model, el });
          return el;
        };
        const [shown, hidden] = [one(false), one(true)];
        const choice = shown.querySelector("select");
        choice.value = "2";
        choice.dispatchEvent(new Event("change"));
        const before = [shown, hidden].map((el) => el.querySelector(".cw").inert);
        hidden.hidden = false;
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        return [...before, hidden.querySelector(".cw").inert, hidden.querySelectorAll("[data-plot=paper] image").length,
          shown.querySelector("[data-read=paper]").dataset.x]; }"""
    )
    assert used[:4] == [False, True, False, 1]
    assert float(used[4]) == DATA["images"][2][0]


WRONG = [
    ({"centroids": [[0.5, None]]}, "centroids: expected rows of 2 numbers"),
    ({"centroids": [[0.5, 0.5]]}, "centroids: expected two or more, got 1"),
    ({"variance": 0}, "variance: expected a number above 0, got 0"),
    ({"images": [[0.5, 0.5]]}, "images: expected one for each of 4 centroids, got 1"),
    ({"starts": []}, "starts: expected one or more, got none"),
    ({"seed": None}, "seed: expected number, got null"),
    ({"view": [0.6, 0.4]}, "view: expected two numbers, the lower first"),
    ({"eps": 8}, "eps: expected at most largest_eps"),
    ({"paper_steps": 2.5}, "paper_steps: expected a whole number from 1 to 500, got 2.5"),
    ({"wide_side": "16"}, "wide_side: expected number, got"),
]


def test_every_wrong_field_is_named(page):
    said = page.evaluate(
        """async (all) => {
        const { default: widget } = await import("./module.mjs");
        return all.map((data) => {
          const el = document.createElement("div");
          document.body.append(el);
          widget.render({ model: { get: (name) => (name === "data" ? data : undefined) }, el });
          return el.querySelector("[role=alert]")?.textContent ?? "drawn";
        }); }""",
        [DATA | changes for changes, _ in WRONG],
    )
    for text, (_, message) in zip(said, WRONG, strict=True):
        assert message in text


@pytest.mark.parametrize("data", [{}, {"centroids": "four"}])
def test_without_good_data_the_page_lives_and_keeps_its_picture(browser, tmp_path, data):
    with bare_page(browser, tmp_path, "two-hills", data, replaces="figure-static") as page:
        assert ("centroids" if data else "no data were given") in page.get_by_role("alert").inner_text()
        assert page.locator("#after").is_visible()
        assert page.locator("#figure-static img").is_visible()
